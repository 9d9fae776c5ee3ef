"""What people and orchestrators write to say what a volume shall be, read into a request for one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from volumed.core.options import nearest
from volumed.core.planning import CreateVolume
from volumed.errors import InvalidRequest
from volumed.model import Ownership
from volumed.units import parse_size

# Every option that is not a driver's own, with what it does: for the error, the README and its test.
OPTIONS: Mapping[str, str] = {
    "backend": "Backend to use; default: the first of default-backends that can do what is asked",
    "class": "Class to choose a backend from, with what a volume is there: volumectl class ls",
    "encrypt": "The name of the key, of volumed.toml, to encrypt the volume with",
    "size": "Size that is enforced, as 20g or 512MiB",
    "fs": "File system on a block device: ext4, xfs, btrfs",
    "mkfs-options": "Words for mkfs, separated by spaces",
    "mount-options": "Words for mount, separated by commas",
    "uid": "Owner of the volume's root, a number",
    "gid": "Group of the volume's root, a number",
    "mode": "Permissions of the volume's root, octal, as 0750",
    "from": "Volume to clone, or VOLUME@SNAPSHOT to restore into the new volume",
    "label.KEY": "A label of the volume",
}
_LABEL = "label."
_LARGEST_ID = 2**32 - 2


def read_create(name: str, options: Mapping[str, str], *, driver_options: Iterable[str]) -> CreateVolume:
    """Raises InvalidRequest naming the option, and for an unknown one the nearest right one."""
    own, labels = {}, {}
    ours: dict[str, str] = {}
    drivers = frozenset(driver_options)
    for key, value in options.items():
        if key.startswith(_LABEL) and key != _LABEL:
            labels[key.removeprefix(_LABEL)] = value
        elif key in OPTIONS:
            ours[key] = value
        elif key in drivers:
            own[key] = value
        else:
            known = (OPTIONS.keys() - {"label.KEY"}) | drivers
            raise InvalidRequest(f"there is no option {key[:60]!r}", hint=nearest(key[:60], known))
    return CreateVolume(
        name=name,
        backend=ours.get("backend", ""),
        class_name=ours.get("class", ""),
        encryption=ours.get("encrypt", ""),
        size=parse_size(ours["size"]) if "size" in ours else None,
        filesystem=ours.get("fs", ""),
        mkfs_options=tuple(ours.get("mkfs-options", "").split()),
        mount_options=tuple(word for word in ours.get("mount-options", "").split(",") if word),
        ownership=Ownership(
            uid=_number(ours, "uid", base=10), gid=_number(ours, "gid", base=10), mode=_number(ours, "mode", base=8)
        ),
        source=ours.get("from", ""),
        labels=labels,
        options=own,
    )


def _number(options: Mapping[str, str], key: str, *, base: int) -> int | None:
    if key not in options:
        return None
    largest = 0o7777 if base == 8 else _LARGEST_ID
    text = options[key]
    if not (text.isascii() and text.isdecimal()) or len(text) > 12:
        raise InvalidRequest(f"option {key!r}: {text[:40]!r} is no number", hint=_example(base))
    try:
        number = int(text, base)
    except ValueError:
        raise InvalidRequest(f"option {key!r}: {text[:40]!r} is not octal", hint=_example(base)) from None
    if number > largest:
        raise InvalidRequest(f"option {key!r}: {text[:40]} is too large", hint=_example(base))
    return number


def _example(base: int) -> str:
    return "write it as 0750" if base == 8 else "write it as 1000"
