"""The bindings of the distribution are taken one by one, and their absence is explained."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from volumed.errors import ConfigError
from volumed_drivers import ceph


def test_what_is_absent_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ceph, "_FOLDERS", (str(tmp_path),))
    monkeypatch.setitem(sys.modules, "rados", None)
    with pytest.raises(ConfigError, match="module rados cannot be used.*install python3-rados"):
        ceph.load("rbd")


def test_one_that_is_broken_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "rados.py").write_text("raise ImportError('librados.so.2: cannot open shared object file')")
    monkeypatch.setattr(ceph, "_FOLDERS", (str(tmp_path),))
    with pytest.raises(ConfigError, match=r"librados\.so\.2: cannot open"):
        ceph.load("rados")
    assert "rados" not in sys.modules


def test_nothing_beside_them_can_be_imported(tmp_path: Path) -> None:
    """Of the distribution's folder, which holds other versions of what volumed brings."""
    (tmp_path / "rados.py").write_text("")
    (tmp_path / "rbd.py").write_text("import rados")
    (tmp_path / "beside.py").write_text("")
    script = f"""
import sys
from volumed_drivers import ceph
ceph._FOLDERS = ({str(tmp_path)!r},)
assert ceph.load("rbd") is sys.modules["rbd"]
try:
    import beside
except ModuleNotFoundError:
    print("not there")
"""
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert told.stdout == "not there\n"


def test_they_are_not_loaded_before_they_are_used() -> None:
    script = "import sys, volumed_drivers.ceph; print(sorted({'rados', 'rbd', 'cephfs'} & set(sys.modules)))"
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert told.stdout == "[]\n"
