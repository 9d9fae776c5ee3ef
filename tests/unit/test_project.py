"""The project's own promises: style, types, layers, what is installed, and that nothing of a machine is in it."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import msgspec
import pytest

from volumed import errors
from volumed.cli.main import cli
from volumed.config import Settings
from volumed.frontends.statuses import STATUSES
from volumed.frontends.volume_options import OPTIONS

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def run(*words: str | Path) -> str:
    told = subprocess.run([str(word) for word in words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stdout[-5000:] + told.stderr[-2000:]
    return told.stdout


def test_style() -> None:
    run(BIN / "ruff", "check", ".")
    run(BIN / "ruff", "format", "--check", ".")


def test_types() -> None:
    run(BIN / "mypy")


def test_layers() -> None:
    run(BIN / "lint-imports", "--no-cache")


def test_every_error_has_a_status() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.VolumedError)]
    assert {kind.code for kind in kinds} == STATUSES.keys()


def test_the_lock_names_the_public_index_only() -> None:
    text = (ROOT / "uv.lock").read_text()
    hosts = set(re.findall(r"https?://([^/\"]+)", text))
    assert hosts == {"pypi.org", "files.pythonhosted.org"}


def test_the_wheel_holds_both_packages_and_no_tests(tmp_path: Path) -> None:
    uv = ROOT / ".cache" / "uv" / "bin" / "uv"
    run(uv, "build", "--wheel", "--quiet", "--out-dir", tmp_path, ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {"volumed", "volumed_drivers"} <= tops
    assert all(top in ("volumed", "volumed_drivers") or top.endswith(".dist-info") for top in tops)
    assert "volumed/py.typed" in names


def test_a_start_loads_no_more_than_it_needs() -> None:
    """What containers wait for must not import what only an operator's request needs."""
    said = run(
        sys.executable,
        "-c",
        "import sys, volumed.daemon; print([m for m in ('fastapi', 'rich', 'boto3') if m in sys.modules])",
    )
    assert said.strip() == "[]"
    said = run(
        sys.executable,
        "-c",
        "import sys, volumed.cli.main; print([m for m in ('rich', 'fastapi', 'pydantic') if m in sys.modules])",
    )
    assert said.strip() == "[]"


README = (ROOT / "README.md").read_text()


def settings_keys(kind: type[msgspec.Struct]) -> Iterator[str]:
    for field in msgspec.structs.fields(kind):
        if field.encode_name in ("source", "lines"):  # found, not written
            continue
        yield field.encode_name
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            yield from settings_keys(field.type)


@pytest.mark.parametrize("key", sorted(set(settings_keys(Settings))))
def test_the_readme_knows_every_setting(key: str) -> None:
    assert re.search(rf"`{key}`|\[[a-z.]*{key}[\]. ]|^{key} =", README, re.MULTILINE)


@pytest.mark.parametrize("option", sorted(OPTIONS))
def test_the_readme_knows_every_option(option: str) -> None:
    assert re.search(rf"^\|.*`{re.escape(option)}`.*\|", README, re.MULTILINE)


@pytest.mark.parametrize("command", sorted(cli.commands))
def test_the_readme_knows_every_command(command: str) -> None:
    assert re.search(rf"volumectl (-o json )?{command}\b", README)


@pytest.mark.parametrize("driver", sorted(found.name for found in entry_points(group="volumed.drivers")))
def test_the_readme_knows_every_driver(driver: str) -> None:
    assert re.search(rf"^\| `{driver}` \|", README, re.MULTILINE)


@pytest.mark.parametrize("name", ["install-packages", "find-python", "make-environment"])
def test_scripts_are_sound_shell(name: str) -> None:
    run("sh", "-n", ROOT / "scripts" / name)
