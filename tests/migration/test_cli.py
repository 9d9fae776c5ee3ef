"""Moves as they are typed."""

from __future__ import annotations

import json
import os

import pytest

from tests.migration.conftest import Mover

pytestmark = pytest.mark.root


def test_planned_moved_shown_and_undone(mover: Mover) -> None:
    ctl = mover.volumed.ctl
    mover.create("data", "sized", size="64m")
    (mover.mount("data") / "file").write_bytes(os.urandom(1 << 20))
    mover.unmount("data")
    plan = ctl("migrate", "data", "--to", "images", "--dry-run").stdout
    assert "path     block" in plan
    assert "losses   none" in plan
    assert ctl("migration", "ls", "-a").stdout == ""  # nothing was begun
    assert mover.volume("data")["backend"] == "sized"
    done = ctl("migrate", "data", "--to", "images").stdout
    assert done.startswith("data is on images: ")
    assert "verified as blake3 " in done
    assert "kept for an undo" in done
    shown = ctl("migration", "show", "data").stdout
    assert "images by block" in shown
    assert "kept" in shown
    assert " kept " in ctl("migration", "ls").stdout
    assert 'volumed_migrations{phase="kept"} 1.0' in mover.volumed.metrics()
    assert ctl("migration", "rollback", "data").stdout == "data is where it was, on sized\n"
    assert mover.volume("data")["backend"] == "sized"
    mover.assert_clean()


def test_refusals_say_what_to_do(mover: Mover) -> None:
    ctl = mover.volumed.ctl
    mover.create("data", "sized", size="64m")
    refused = ctl("migrate", "data", "--to", "local", check=False)
    assert refused.returncode == 18
    assert "its size of 64 MiB is not enforced any more" in refused.stderr
    assert "--accept-loss size" in refused.stderr
    assert ctl("migrate", "data", "--to", "sized", check=False).returncode == 7
    assert "did you mean 'images'" in ctl("migrate", "data", "--to", "image", check=False).stderr
    assert ctl("migrate", "data", "--to", "images", "--path", "sideways", check=False).returncode != 0
    assert ctl("migrate", "--to", "images", check=False).returncode == 2
    assert ctl("migration", "abort", "data", check=False).returncode == 3
    assert mover.volumed.api.get("migrations") == []
    mover.assert_clean()


def test_a_backend_is_emptied_by_one_command(mover: Mover) -> None:
    for number in range(3):
        mover.create(f"data-{number}", "sized", size="16m")
    mover.mount("data-1")
    told = mover.volumed.ctl(
        *("-o", "json", "migrate", "--all-from", "sized", "--to", "images", "--parallel", "2"),
        *("--keep-source", "0s", "--detach"),
        check=False,
    )
    assert told.returncode == 2  # the summary is what it is for
    mover.unmount("data-1")
    told = mover.volumed.ctl(
        *("-o", "json", "migrate", "--all-from", "sized", "--to", "images", "--parallel", "2", "--keep-source", "0s")
    )
    assert {each["volume"]: each["phase"] for each in json.loads(told.stdout)}.keys() == {"data-0", "data-1", "data-2"}
    assert {volume["backend"] for volume in mover.volumed.api.get("volumes")["volumes"]} == {"images"}
    assert json.loads(mover.volumed.ctl("-o", "json", "migrate", "--all-from", "sized", "--to", "images").stdout) == []
