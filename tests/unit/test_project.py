"""The project's own promises: style, types, layers, what is installed, and that nothing of a machine is in it."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from volumed import errors
from volumed.frontends.statuses import STATUSES

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


@pytest.mark.parametrize("name", ["install-packages", "find-python", "make-environment"])
def test_scripts_are_sound_shell(name: str) -> None:
    run("sh", "-n", ROOT / "scripts" / name)
