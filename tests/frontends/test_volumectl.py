"""volumectl as people and programs run it, against a running daemon."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness.volumed import Volumed, running_volumed
from volumed import errors
from volumed.cli.exit_codes import EXIT_CODES
from volumed.cli.output import ago, clean, size

pytestmark = pytest.mark.root


@pytest.fixture(autouse=True)
def _nothing_left(volumed: Volumed) -> Iterator[None]:
    yield
    for volume in volumed.api.get("volumes")["volumes"]:
        for snapshot in volumed.api.get("volumes", volume["id"], "snapshots"):
            volumed.api.delete("volumes", volume["id"], "snapshots", snapshot["name"])
        volumed.api.delete("volumes", volume["id"])
    volumed.assert_nothing_left()


def as_json(volumed: Volumed, *words: str) -> Any:
    return json.loads(volumed.ctl("-o", "json", *words).stdout)


def test_create_ls_inspect_rm(volumed: Volumed) -> None:
    assert volumed.ctl("create", "data", "--label", "team=web").stdout == "data\n"
    assert volumed.ctl("create", "disk", "--size", "64m", "--fs", "ext4", "--mode", "0700").stdout == "disk\n"
    table = volumed.ctl("ls").stdout.splitlines()
    assert table[0].split() == ["NAME", "BACKEND", "SIZE", "FS", "STATE", "CREATED", "USED", "BY"]
    assert table[1].split()[:2] == ["data", "local"]
    assert table[2].split()[:6] == ["disk", "sized", "64", "MiB", "ext4", "ready"]
    assert volumed.ctl("ls", "-q", "--label", "team=web").stdout == "data\n"
    assert volumed.ctl("ls", "-q", "--backend", "sized").stdout == "disk\n"
    found = as_json(volumed, "inspect", "disk")
    assert (found["size"], found["ownership"]["mode"]) == (64 << 20, 0o700)
    shown = volumed.ctl("inspect", "disk").stdout
    assert found["id"] in shown
    assert "not mounted" in shown
    assert volumed.ctl("rm", "-y", "data", "disk").stdout == "data\ndisk\n"
    assert volumed.ctl("ls").stdout == ""


def test_a_raw_block_volume(volumed: Volumed) -> None:
    volumed.ctl("create", "raw", "--size", "16m", "--block")
    assert as_json(volumed, "inspect", "raw")["mode"] == "block"
    answer = volumed.plugin("Mount", Name="raw", ID="x")
    assert "raw block volume and has no tree to mount" in answer.error


def test_snapshots_clones_and_growth(volumed: Volumed) -> None:
    volumed.ctl("create", "disk", "--size", "300m", "--fs", "xfs")
    assert volumed.ctl("snapshot", "create", "disk", "first").stdout == "first\n"
    assert volumed.ctl("snapshot", "ls", "disk").stdout.splitlines()[1].startswith("first  300 MiB")
    assert volumed.ctl("clone", "disk@first", "copy").stdout == "copy\n"
    assert volumed.ctl("expand", "disk", "400m").stdout == "disk has 400 MiB\n"
    assert "would put disk back" in volumed.ctl("snapshot", "restore", "-n", "disk", "first").stdout
    assert "disk is as it was in first" in volumed.ctl("snapshot", "restore", "-y", "disk", "first").stdout
    # The snapshot's file system was smaller than the volume is now.
    path = volumed.plugin("Mount", Name="disk", ID="x").body["Mountpoint"]
    assert os.statvfs(path).f_blocks * os.statvfs(path).f_frsize > 320 << 20
    assert volumed.plugin("Unmount", Name="disk", ID="x").error == ""
    assert "would remove snapshot first" in volumed.ctl("snapshot", "rm", "-n", "disk", "first").stdout
    volumed.ctl("snapshot", "rm", "-y", "disk", "first")
    assert volumed.ctl("snapshot", "ls", "disk").stderr == "disk has no snapshots\n"


def test_nothing_is_destroyed_unless_it_is_said(volumed: Volumed) -> None:
    volumed.ctl("create", "data")
    volumed.ctl("create", "disk", "--size", "64m")
    volumed.ctl("snapshot", "create", "disk", "first")
    assert volumed.ctl("rm", "-n", "data").stdout.startswith("would remove data (backend local")
    # Nobody at the terminal to say yes.
    for words in (("rm", "data"), ("snapshot", "rm", "disk", "first"), ("snapshot", "restore", "disk", "first")):
        told = volumed.ctl(*words, check=False)
        assert told.returncode == 130
        assert "nothing was done" in told.stderr
    assert volumed.ctl("ls", "-q").stdout == "data\ndisk\n"
    assert len(as_json(volumed, "snapshot", "ls", "disk")) == 1


def test_one_wrong_name_among_many_destroys_nothing(volumed: Volumed) -> None:
    volumed.ctl("create", "data")
    assert volumed.ctl("rm", "-y", "data", "nosuch", check=False).returncode == 3
    assert volumed.ctl("ls", "-q").stdout == "data\n"


def test_df(volumed: Volumed) -> None:
    volumed.ctl("create", "disk", "--size", "64m")
    path = Path(volumed.plugin("Mount", Name="disk", ID="x").body["Mountpoint"])
    (path / "file").write_bytes(b"x" * (20 << 20))
    (row,) = as_json(volumed, "df", "disk")
    assert row["used"] > 20 << 20
    assert "%" in volumed.ctl("df").stdout.splitlines()[1]
    volumed.plugin("Unmount", Name="disk", ID="x")


def test_who_what_ps(volumed: Volumed) -> None:
    volumed.ctl("create", "data")
    assert volumed.ctl("who", "data").stderr == "nobody uses data\n"
    assert volumed.ctl("ps").stderr == "no volume is in use\n"
    assert volumed.ctl("what", "web-1", check=False).returncode == 3
    volumed.plugin("Mount", Name="data", ID="0123456789abcdef")
    row = volumed.ctl("who", "data").stdout.splitlines()[1].split()
    assert row[:4] == ["data", "docker", "?", "0123456789ab"]  # known by its mount id until the engine names it
    volumed.plugin("Unmount", Name="data", ID="0123456789abcdef")
    assert "(released)" in volumed.ctl("who", "--history", "data").stdout


def test_backends_and_drivers(volumed: Volumed) -> None:
    names = [row.split()[0] for row in volumed.ctl("backend", "ls").stdout.splitlines()[1:]]
    assert names == ["local", "sized"]
    assert "prjquota" in volumed.ctl("backend", "inspect", "local").stdout
    drivers = {driver["name"]: driver for driver in as_json(volumed, "driver", "ls")}
    assert set(drivers) >= {"directory", "image", "btrfs", "lvm"}
    assert all(driver["description"].endswith(".") and not driver["error"] for driver in drivers.values())
    for name in drivers:
        assert "in volumed.toml" in volumed.ctl("driver", "show", name).stdout
    told = volumed.ctl("driver", "show", "imgae", check=False)
    assert told.returncode == 3


def test_doctor_finds_and_destroys_by_name_alone(volumed: Volumed) -> None:
    assert volumed.ctl("doctor").stdout == "ledger, machine and storage agree\n"
    orphan = volumed.folder / "volumes" / ("v" + "0" * 32)
    (orphan / "data").mkdir(parents=True)
    (orphan / "data" / "file").write_text("somebody's")
    told = volumed.ctl("doctor", check=False)
    assert told.returncode == 17
    assert f"volumectl doctor --destroy orphan:local:{orphan.name}" in told.stdout
    assert volumed.ctl("doctor", "--fix", check=False).returncode == 17
    assert orphan.exists()
    assert volumed.ctl("doctor", "--destroy", "orphan:local:other", check=False).returncode == 3
    assert orphan.exists()
    assert "done: delete it" in volumed.ctl("doctor", "--destroy", f"orphan:local:{orphan.name}").stdout
    assert not orphan.exists()


def test_events_and_version(volumed: Volumed) -> None:
    volumed.ctl("create", "data")
    assert "data: created on backend local" in volumed.ctl("events").stdout
    lines = volumed.ctl("-o", "json", "events").stdout.splitlines()
    assert json.loads(lines[-1])["kind"] == "volume.created"
    assert as_json(volumed, "version")["version"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(volumed: Volumed, shell: str) -> None:
    assert "_VOLUMECTL_COMPLETE" in volumed.ctl("completion", shell).stdout


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (("create", "data", "--size", "ten"), 2, "'ten' is not a size"),
        (("create", "data", "--mode", "999"), 2, "is not octal"),
        (("create", "data", "--label", "x"), 2, "is not KEY=VALUE"),
        (("create", "data", "--backend", "locl"), 2, "did you mean 'local'"),
        (("create", "data", "--backend", "local", "--size", "1g"), 7, "prjquota"),
        (("create", "../x"), 2, "is no volume name"),
        (("inspect", "nosuch"), 3, "there is no such volume"),
        (("expand", "nosuch", "1g"), 3, "there is no such volume"),
        (("snapshot", "create", "nosuch"), 3, "there is no such volume"),
        (("nonsense",), 2, "No such command"),
        ((), 2, "Usage"),
    ],
)
def test_errors_are_for_people(volumed: Volumed, words: tuple[str, ...], status: int, told: str) -> None:
    answer = volumed.ctl(*words, check=False)
    assert answer.returncode == status
    assert told in answer.stderr
    assert "Traceback" not in answer.stderr


def test_no_daemon(tmp_path: Path) -> None:
    told = subprocess.run(
        [sys.executable, "-m", "volumed.cli.main", "--socket", tmp_path / "none.sock", "ls"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 16
    assert "no daemon answers" in told.stderr
    assert "systemctl start volumed" in told.stderr


def test_every_error_has_its_exit_status() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.VolumedError)]
    assert {kind.code for kind in kinds} <= EXIT_CODES.keys()


def test_nothing_that_moves_a_terminal_is_printed() -> None:
    assert clean("a\x1b[31mb\rc\n") == "a\ufffd[31mb\ufffdc\n"


def test_shown_values() -> None:
    assert (size(None), size(1 << 30)) == ("-", "1 GiB")
    assert ago(None) == "-"
    assert ago("2020-01-01T00:00:00Z").endswith("days ago")


def test_takeover_says_who_has_it_and_needs_proof(volumed: Volumed) -> None:
    volumed.ctl("create", "data")
    shown = volumed.ctl("takeover", "data", "--dry-run").stdout
    assert "the storage cannot tell" in shown
    assert "nothing: nobody else has it" in shown
    assert as_json(volumed, "takeover", "data")["done"] is True
    refused = volumed.ctl("takeover", "data", "--force-with-operator-word", check=False)
    assert refused.returncode == 130
    assert "without power" in refused.stderr
    assert volumed.ctl("takeover", "data", "--from", "node-1", check=False).returncode == EXIT_CODES["invalid_request"]


def test_classes_and_the_room_of_backends(tmp_path: Path) -> None:
    table = '[classes.fast]\nbackends = ["sized", "local"]\nsize = "32m"\nfs = "ext4"\nrequires = ["clone"]\n'
    with running_volumed(tmp_path / "volumed", backends=table) as volumed:
        made = as_json(volumed, "create", "data", "--class", "fast")
        assert (made["backend"], made["size"], made["class_name"]) == ("sized", 32 << 20, "fast")
        assert volumed.ctl("class", "ls").stdout.splitlines()[1].split() == ["fast", "sized,", "local", "1"]
        shown = volumed.ctl("class", "show", "fast").stdout
        assert "sized (image): " in shown
        assert "local (directory): " in shown
        assert "driver directory has no clone" in shown or "no size can be enforced" in shown
        wrong = volumed.ctl("class", "show", "fats", check=False)
        assert (wrong.returncode, "did you mean 'fast'" in wrong.stderr) == (EXIT_CODES["not_found"], True)
        heads = volumed.ctl("backend", "ls").stdout.splitlines()[0].split()
        assert heads == ["NAME", "DRIVER", "DEFAULT", "VOLUMES", "SIZE", "AVAILABLE", "HEALTH", "SINCE", "CAN"]
        (local, _) = as_json(volumed, "backend", "ls")
        assert 0 < local["capacity"]["available"] <= local["capacity"]["total"]
        assert local["since"]
        volumed.ctl("rm", "-y", "data")


def test_import_and_rebuild(volumed: Volumed) -> None:
    (volumed.folder / "volumes").mkdir(exist_ok=True)
    (volumed.folder / "volumes" / "photos").mkdir()
    (volumed.folder / "volumes" / "photos" / "file").write_text("old")
    image = volumed.folder / "images" / "disk.raw"
    image.write_bytes(bytes(1 << 20))
    assert as_json(volumed, "import", "--list", "local") == ["photos"]
    assert volumed.ctl("import", "local", "photos", "--name", "pictures").stdout == "pictures\n"
    raw = volumed.ctl("import", "sized", "disk.raw", "--name", "disk")
    assert "it is a raw device" in raw.stderr
    assert as_json(volumed, "inspect", "disk")["mode"] == "block"
    assert volumed.ctl("import", "local", check=False).returncode == 2
    volumed.ctl("create", "ext", "--size", "32m")
    ids = {volume["name"]: volume["id"] for volume in volumed.api.get("volumes")["volumes"]}
    volumed.stop()
    (volumed.state / "ledger.db").rename(volumed.state / "lost.db")
    for path in volumed.state.glob("ledger.db-*"):
        path.unlink()
    volumed.start()
    shown = volumed.ctl("import", "--rebuild", "--dry-run").stdout
    assert "3 would be recreated" in shown
    assert volumed.api.get("volumes")["volumes"] == []
    assert "3 recreated" in volumed.ctl("import", "--rebuild", "--yes").stdout
    assert {volume["name"]: volume["id"] for volume in volumed.api.get("volumes")["volumes"]} == ids
    assert as_json(volumed, "inspect", "disk")["mode"] == "block"
    assert volumed.plugin("Mount", Name="ext", ID="x").error == ""
    assert volumed.plugin("Unmount", Name="ext", ID="x").error == ""
