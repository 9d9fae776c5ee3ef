"""`make install` and `make uninstall`, into a folder as a packager would. A real systemd starts it in tests/vm."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import sh

pytestmark = pytest.mark.root

ROOT = Path(__file__).parents[2]
PREFIX = "/opt/elsewhere"


def make(target: str, destination: Path) -> None:
    sh("make", "-s", "-C", ROOT, target, f"DESTDIR={destination}", f"PREFIX={PREFIX}")


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def test_installed_and_taken_away(tmp_path: Path) -> None:
    make("install", tmp_path)
    units = tmp_path / "etc" / "systemd" / "system"
    assert f"ExecStart={PREFIX}/bin/volumed\n" in (units / "volumed.service").read_text()
    for unit in units.iterdir():
        assert "/opt/volumed/" not in unit.read_text()
    config = tmp_path / "etc" / "volumed" / "volumed.toml"
    assert config.stat().st_mode & 0o777 == 0o600
    binaries = tmp_path / PREFIX.lstrip("/") / "bin"
    assert "the settings are good" in sh(binaries / "volumed", "--check", "--config", config)
    assert "Usage: volumectl" in sh(binaries / "volumectl", "--help")
    assert (tmp_path / "usr/local/bin/volumectl").readlink() == Path(PREFIX, "bin/volumectl")
    config.write_text(config.read_text() + "# the operator's\n")
    make("install", tmp_path)  # an upgrade leaves the settings alone
    assert config.read_text().endswith("# the operator's\n")
    make("uninstall", tmp_path)
    assert files(tmp_path) == {"etc/volumed/volumed.toml"}
