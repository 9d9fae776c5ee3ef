"""`docker volume create -d volumed` and all that follows, with a real dockerd and real file systems."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import wait_until
from tests.harness.docker import Docker
from tests.harness.volumed import Volumed
from volumed.host.filesystems import CAP_SYS_RESOURCE, has_capability

pytestmark = [pytest.mark.root, pytest.mark.engine]


@pytest.fixture(autouse=True)
def _nothing_left(docker: Docker, volumed: Volumed) -> Iterator[None]:
    """Whatever a test did, once its containers and volumes are removed there is nothing left of it."""
    yield
    docker.remove_containers()
    wait_until(lambda: volumed.bindings() == [])
    wait_until(lambda: volumed.mounted() == {} and volumed.loops() == [])
    for volume in docker("volume", "ls", "-q").split():
        docker("volume", "rm", volume)
    volumed.assert_nothing_left()


def create(docker: Docker, plugin: str, name: str, *options: str) -> None:
    docker("volume", "create", "-d", plugin, *(word for option in options for word in ("-o", option)), name)


def run(docker: Docker, volume: str, script: str, *, check: bool = True) -> str:
    return docker("run", "--rm", "-v", f"{volume}:/data", "busybox", "sh", "-c", script, check=check)


def start(docker: Docker, name: str, volume: str, *options: str) -> str:
    return docker(
        *("run", "-d", "--name", name, "-v", f"{volume}:/data", *options),
        *("busybox", "sh", "-c", "trap exit TERM; while :; do sleep 0.1; done"),
    )


@pytest.mark.parametrize("options", [(), ("size=64m",), ("size=300m", "fs=xfs"), ("size=256m", "fs=btrfs")])
def test_data_outlives_its_container(docker: Docker, plugin: str, options: tuple[str, ...]) -> None:
    create(docker, plugin, "data", *options)
    run(docker, "data", "echo kept > /data/file")
    assert run(docker, "data", "cat /data/file") == "kept"


def test_inspect_shows_what_the_ledger_knows(docker: Docker, plugin: str) -> None:
    create(docker, plugin, "data", "size=64m", "label.team=web")
    start(docker, "web-1", "data")
    status = docker.inspect("data")["Status"]
    assert status["backend"] == "sized"
    assert status["size"] == "64 MiB"
    assert status["state"] == "ready"
    assert status["labels"] == {"team": "web"}
    assert docker.inspect("data")["Mountpoint"].endswith(f"/mounts/{status['id']}")
    wait_until(lambda: "docker container web-1" in docker.inspect("data")["Status"]["used by"][0])


def test_a_volume_is_as_large_as_was_asked_for(docker: Docker, plugin: str) -> None:
    create(docker, plugin, "data", "size=32m")
    said = run(docker, "data", "dd if=/dev/zero of=/data/file bs=1M count=64", check=False)
    assert "No space left on device" in said


def test_a_container_and_its_bindings(docker: Docker, plugin: str, volumed: Volumed) -> None:
    create(docker, plugin, "data")
    identifier = start(docker, "web-1", "data")
    wait_until(lambda: volumed.bindings()[0]["consumers"])
    binding = volumed.bindings()[0]
    assert binding["volume"] == "data"
    assert binding["engine"] == "docker"
    assert binding["node"] == "node-1"
    consumer = binding["consumers"][0]
    pid = int(docker("inspect", "-f", "{{.State.Pid}}", "web-1"))
    assert consumer == {
        "id": identifier,
        "name": "web-1",
        "image": "busybox",
        "pid": pid,
        "target": "/data",
        "readonly": False,
        "kind": "container",
        "details": {},
    }
    assert "web-1" in volumed.ctl("who", "data").stdout
    assert "data" in volumed.ctl("what", "web-1").stdout
    assert "data" in volumed.ctl("what", identifier[:12]).stdout
    assert "web-1" in volumed.ctl("ps").stdout
    docker("rm", "-f", "web-1")
    assert volumed.bindings() == []
    history = json.loads(volumed.ctl("-o", "json", "who", "--history", "data").stdout)
    assert history[0]["reason"] == "released"
    assert history[0]["consumers"][0]["name"] == "web-1"


def test_read_only_is_seen(docker: Docker, plugin: str, volumed: Volumed) -> None:
    create(docker, plugin, "data")
    docker("run", "-d", "--name", "reader", "-v", "data:/in:ro", "busybox", "sleep", "60")
    wait_until(lambda: volumed.bindings()[0]["consumers"])
    assert volumed.bindings()[0]["consumers"][0]["readonly"] is True
    assert volumed.bindings()[0]["consumers"][0]["target"] == "/in"


def test_remove_while_in_use_is_refused_and_says_by_whom(docker: Docker, plugin: str, volumed: Volumed) -> None:
    create(docker, plugin, "data")
    start(docker, "web-1", "data")
    wait_until(lambda: volumed.bindings()[0]["consumers"])
    refused = volumed.ctl("rm", "--yes", "data", check=False)
    assert refused.returncode == 5
    assert "docker container web-1 (pid " in refused.stderr
    answer = volumed.plugin("Remove", Name="data")
    assert "web-1" in answer.error
    assert len(volumed.mounted()) == 1


def test_a_restart_keeps_the_mount_and_one_binding(docker: Docker, plugin: str, volumed: Volumed) -> None:
    create(docker, plugin, "data", "size=64m")
    start(docker, "web-1", "data")
    docker("exec", "web-1", "sh", "-c", "echo kept > /data/file")
    for _ in range(3):
        docker("restart", "-t", "0", "web-1")
        assert docker("exec", "web-1", "cat", "/data/file") == "kept"
        assert [binding["count"] for binding in volumed.bindings()] == [1]


@pytest.mark.parametrize("options", [(), ("size=64m",), ("size=300m", "fs=xfs"), ("size=256m", "fs=btrfs")])
def test_two_containers_share_and_the_last_one_unmounts(
    docker: Docker, plugin: str, volumed: Volumed, options: tuple[str, ...]
) -> None:
    create(docker, plugin, "data", *options)
    start(docker, "one", "data")
    start(docker, "two", "data")
    assert len(volumed.bindings()) == 2
    docker("exec", "one", "sh", "-c", "echo hello > /data/file")
    assert docker("exec", "two", "cat", "/data/file") == "hello"
    docker("rm", "-f", "one")
    assert docker("exec", "two", "cat", "/data/file") == "hello"
    assert len(volumed.mounted()) == 1
    docker("rm", "-f", "two")
    assert volumed.mounted() == {}


def test_one_volume_twice_in_a_container(docker: Docker, plugin: str, volumed: Volumed) -> None:
    create(docker, plugin, "data")
    start(docker, "twice", "data", "-v", "data:/again:ro")
    wait_until(lambda: all(binding["consumers"] for binding in volumed.bindings()))
    targets = {consumer["target"] for binding in volumed.bindings() for consumer in binding["consumers"]}
    assert targets == {"/data", "/again"}


def test_docker_cp_leaves_a_running_containers_mount(
    docker: Docker, plugin: str, volumed: Volumed, tmp_path: Path
) -> None:
    create(docker, plugin, "data", "size=64m")
    start(docker, "web-1", "data")
    (tmp_path / "file").write_text("copied")
    docker("cp", str(tmp_path / "file"), "web-1:/data/file")
    assert docker("exec", "web-1", "cat", "/data/file") == "copied"
    docker("cp", "web-1:/data/file", str(tmp_path / "back"))
    assert (tmp_path / "back").read_text() == "copied"
    assert [binding["count"] for binding in volumed.bindings()] == [1]
    assert len(volumed.mounted()) == 1


def test_a_new_volume_is_filled_from_the_image(docker: Docker, plugin: str) -> None:
    """Docker fills only an empty one: ext4's lost+found would prevent it."""
    create(docker, plugin, "data", "size=64m")
    assert docker("run", "--rm", "-v", "data:/filled", "busybox", "cat", "/filled/file") == "from the image"
    assert run(docker, "data", "cat /data/file") == "from the image"


def test_run_creates_what_is_not_there(docker: Docker, plugin: str) -> None:
    docker("run", "--rm", "--volume-driver", plugin, "-v", "made:/data", "busybox", "touch", "/data/file")
    assert docker.inspect("made")["Driver"] == plugin


def test_owner_and_mode_of_the_root(docker: Docker, plugin: str) -> None:
    for name, options in {"tree": (), "device": ("size=64m",)}.items():
        create(docker, plugin, name, "uid=1000", "gid=1001", "mode=2750", *options)
        assert run(docker, name, "stat -c '%u %g %a' /data") == "1000 1001 2750"


def test_mount_and_mkfs_options_arrive(docker: Docker, plugin: str) -> None:
    create(docker, plugin, "data", "size=64m", "mount-options=noatime,nodev", "mkfs-options=-L my-label -N 4096")
    seen = run(docker, "data", "grep ' /data ' /proc/mounts; df -i /data")
    assert "noatime" in seen
    assert "nodev" in seen
    assert "4096" in seen


def test_clone_and_snapshot(docker: Docker, plugin: str, volumed: Volumed) -> None:
    create(docker, plugin, "data", "size=64m")
    run(docker, "data", "echo then > /data/file")
    volumed.ctl("snapshot", "create", "data", "before")
    run(docker, "data", "echo now > /data/file")
    create(docker, plugin, "copy", "from=data")
    create(docker, plugin, "older", "from=data@before")
    assert [run(docker, name, "cat /data/file") for name in ("copy", "older")] == ["now", "then"]
    # Both at once: their file systems have identities of their own.
    for name in ("data", "copy", "older"):
        start(docker, f"c-{name}", name)
    docker("rm", "-f", "c-data", "c-copy", "c-older")
    assert docker.inspect("data")["Status"]["snapshots"] == ["before"]
    volumed.ctl("snapshot", "restore", "--yes", "data", "before")
    assert run(docker, "data", "cat /data/file") == "then"
    volumed.ctl("snapshot", "rm", "--yes", "data", "before")


def test_growing_under_a_running_container(docker: Docker, plugin: str, volumed: Volumed) -> None:
    kinds = {"xfs": "300m", "btrfs": "256m"} | ({"ext4": "64m"} if may_grow_ext4() else {})
    for kind, size in kinds.items():
        create(docker, plugin, kind, f"size={size}", f"fs={kind}")
        start(docker, f"c-{kind}", kind)
        docker("exec", f"c-{kind}", "sh", "-c", "echo kept > /data/file")
        volumed.ctl("expand", kind, "1g")
        blocks = docker("exec", f"c-{kind}", "df", "-k", "/data").splitlines()[-1].split()
        assert int(next(word for word in blocks if word.isdecimal())) > 850_000
        assert docker("exec", f"c-{kind}", "cat", "/data/file") == "kept"


def may_grow_ext4() -> bool:
    """With CAP_SYS_RESOURCE, which not every machine gives its root (tests/vm has it in any case)."""
    return has_capability(CAP_SYS_RESOURCE)


@pytest.mark.skipif(may_grow_ext4(), reason="the capability is there")
def test_a_growth_that_cannot_be_had_changes_nothing(docker: Docker, plugin: str, volumed: Volumed) -> None:
    create(docker, plugin, "data", "size=64m")
    refused = volumed.ctl("expand", "data", "128m", check=False)
    assert refused.returncode == 7
    assert "CAP_SYS_RESOURCE" in refused.stderr
    assert docker.inspect("data")["Status"]["size"] == "64 MiB"
    assert volumed.api.get("doctor") == []


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("sise=1g",), "did you mean 'size'?"),
        (("size=ten",), "'ten' is not a size"),
        (("size=0",), "a size of zero"),
        (("size=-1",), "is not a size"),
        (("size=1e30",), "is not a size"),
        (("size=9999999999g",), "larger than any storage"),
        (("fs=ext5", "size=1g"), "choose ext4, xfs, btrfs"),
        (("backend=locl",), "did you mean 'local'?"),
        (("backend=local", "size=1g"), "prjquota"),
        (("size=1m",), "too small for ext4"),
        (("mode=999",), "is not octal"),
        (("uid=root",), "is no number"),
        (("from=nothing",), "there is no such volume"),
        (("mount-options=bogus", "size=64m"), "bogus"),
        (("mkfs-options=--bogus", "size=64m"), "mkfs.ext4 refused"),
        (("mkfs-options=/dev/null", "size=64m"), "could name a device"),
        (("mkfs-options=-d /etc", "size=64m"), "could name a device"),
        (("mount-options=journal_path=/dev/null", "size=64m"), "could name a device"),
        (("preallocate=perhaps", "size=64m"), "preallocate"),
    ],
)
def test_options_that_cannot_be(docker: Docker, plugin: str, options: tuple[str, ...], told: str) -> None:
    words = [word for option in options for word in ("-o", option)]
    said = docker("volume", "create", "-d", plugin, *words, "wrong", check=False)
    assert told in said
    assert docker("volume", "ls", "-q") == ""


def test_what_is_refused_later_leaves_no_mount(docker: Docker, plugin: str, volumed: Volumed) -> None:
    """The storage of a volume vanishes: the mount fails with the reason, and nothing is held."""
    create(docker, plugin, "data")
    volume_id = docker.inspect("data")["Status"]["id"]
    (volumed.folder / "volumes" / volume_id).rename(volumed.folder / "aside")
    said = run(docker, "data", "true", check=False)
    assert "is gone" in said
    assert volumed.bindings() == []
    assert docker.inspect("data")["Name"] == "data"  # Get does not err: Docker must not put another in its place
    (volumed.folder / "aside").rename(volumed.folder / "volumes" / volume_id)


def test_a_foreign_mount_is_never_handed_out(docker: Docker, plugin: str, volumed: Volumed, tmp_path: Path) -> None:
    create(docker, plugin, "data")
    volume_id = docker.inspect("data")["Status"]["id"]
    target = volumed.state / "mounts" / volume_id
    target.mkdir()
    from volumed.host import mounts  # noqa: PLC0415

    mounts.bind(tmp_path, target, readonly=False, options=())
    try:
        said = run(docker, "data", "true", check=False)
        assert "something else is mounted" in said
        findings = volumed.api.get("doctor")
        assert [finding["kind"] for finding in findings] == ["foreign-mount"]
    finally:
        mounts.unmount(target)
        target.rmdir()


def test_a_mount_that_vanished_comes_back_and_is_told(docker: Docker, plugin: str, volumed: Volumed) -> None:
    from volumed.host import mounts  # noqa: PLC0415

    create(docker, plugin, "data")
    start(docker, "web-1", "data")
    (volume_id,) = volumed.mounted()
    mounts.unmount(volumed.state / "mounts" / volume_id)
    wait_until(lambda: volume_id in volumed.mounted())
    assert volumed.wait_for_event("mount.repaired")["subject"] == "data"
