"""Our csi.proto is the specification's, number for number, and what Python imports is made from it."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor

from volumed.frontends.csi.proto import csi_pb2 as csi

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).with_name("csi-interface.tsv")
PROTO = Path("volumed/frontends/csi/proto")
_SCALARS = {
    FieldDescriptor.TYPE_STRING: "string",
    FieldDescriptor.TYPE_BOOL: "bool",
    FieldDescriptor.TYPE_INT32: "int32",
    FieldDescriptor.TYPE_INT64: "int64",
}


class Row(NamedTuple):
    kind: str
    within: str
    name: str
    number: str
    type: str
    label: str
    secret: bool


def specified() -> set[Row]:
    with TABLE.open(newline="") as file:
        return {
            Row(
                row["kind"],
                row["in"],
                row["name"] or "",
                row["number"] or "",
                row["type"] or "",
                row["label"] or "",
                "secret" in (row["notes"] or "").split(),
            )
            for row in csv.DictReader(file, delimiter="\t")
        }


def ours() -> Iterator[Row]:
    for service in csi.DESCRIPTOR.services_by_name.values():
        for method in service.methods:
            stream = "stream " if method.server_streaming else ""
            signature = f"{method.input_type.full_name} -> {stream}{method.output_type.full_name}"
            yield Row("rpc", service.full_name, method.name, "", signature, "", False)
    for message in csi.DESCRIPTOR.message_types_by_name.values():
        yield from _message(message)
    for enum in csi.DESCRIPTOR.enum_types_by_name.values():
        yield from _enum(enum)


def _message(message: Descriptor) -> Iterator[Row]:
    if message.GetOptions().map_entry:
        return
    yield Row("message", message.full_name, "", "", "", "", False)
    for field in message.fields:
        secret = bool(field.GetOptions().Extensions[csi.csi_secret])  # type: ignore[index]
        yield Row("field", message.full_name, field.name, str(field.number), _type(field), _label(field), secret)
    for nested in message.nested_types:
        yield from _message(nested)
    for enum in message.enum_types:
        yield from _enum(enum)


def _enum(enum: EnumDescriptor) -> Iterator[Row]:
    for value in enum.values:
        yield Row("enum", enum.full_name, value.name, str(value.number), "", "", False)


def _type(field: FieldDescriptor) -> str:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key, value = field.message_type.fields
        return f"map<{_type(key)},{_type(value)}>"
    described = field.message_type or field.enum_type
    return described.full_name if described is not None else _SCALARS[field.type]


def _label(field: FieldDescriptor) -> str:
    if field.containing_oneof is not None:
        return f"oneof {field.containing_oneof.name}"
    is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
    return "repeated" if field.is_repeated and not is_map else ""


def test_every_message_field_number_and_type_is_the_specifications() -> None:
    assert set(ours()) == specified()


def test_what_python_imports_is_made_from_the_proto_files(tmp_path: Path) -> None:
    subprocess.run([ROOT / "scripts" / "make-stubs", sys.executable, tmp_path], check=True)
    made = {path.name: path.read_text() for path in (tmp_path / PROTO).iterdir()}
    kept = {path.name: path.read_text() for path in (ROOT / PROTO).glob("*_pb2.py*")}
    assert made == kept
