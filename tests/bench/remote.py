"""CephFS, Gluster and S3 volumes on real servers, and NFS in the emulated machine, as this one may lack its client."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.bench.beside import Ask, Steps, beside, report, with_volumed
from tests.conftest import sh
from tests.harness.ceph import FILESYSTEM, Ceph, S3User, ceph_cluster
from tests.harness.gluster import running_gluster
from tests.harness.volumed import Volumed, running_volumed
from tests.vm.machine import SOURCES, machine

COUNT = 8


def remote() -> None:
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as name:
        folder = Path(name)
        with ceph_cluster() as cluster:
            _cephfs(cluster, folder)
            _s3(cluster, folder)
        _gluster(folder)
    _nfs()


def _asking(volumed: Volumed) -> Ask:
    def ask(endpoint: str, **fields: Any) -> None:
        answer = volumed.plugin(endpoint, timeout=120, **fields)
        assert not answer.error, answer

    return ask


def _table(**fields: str) -> str:
    return "[backends.remote]\n" + "".join(f"{key.replace('_', '-')} = {value}\n" for key, value in fields.items())


def _ended(pid: int) -> None:
    while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():
        time.sleep(0.001)


def _cephfs(cluster: Ceph, folder: Path) -> None:
    cluster.start_filesystem()
    key = cluster.make_files_user()
    keyring = folder / "keyring"
    keyring.write_text(f"[client.files]\n\tkey = {key.read_text()}\n")
    ceph = ("ceph", "-c", cluster.conf, "--id", "files", "-k", keyring, "fs")
    sh(*ceph, "subvolumegroup", "create", FILESYSTEM, "bare")

    def bare(number: int) -> Steps:
        target, name = folder / f"cephfs{number}", f"bare{number}"
        pid = folder / f"cephfs{number}.pid"

        def forth() -> None:
            sh(*ceph, "subvolume", "create", FILESYSTEM, name, "--group_name", "bare", "--size", str(64 << 20))
            path = sh(*ceph, "subvolume", "getpath", FILESYSTEM, name, "--group_name", "bare").strip()
            target.mkdir()
            words = ("-c", cluster.conf, "--id", "files", "-k", keyring, "-r", path, "--pid-file", pid)
            sh("ceph-fuse", *words, "--log_file=", "--admin_socket=", target)

        def back() -> None:
            sh("umount", target)
            _ended(int(pid.read_text()))
            sh(*ceph, "subvolume", "rm", FILESYSTEM, name, "--group_name", "bare")

        return forth, back

    table = _table(driver='"cephfs"', filesystem=f'"{FILESYSTEM}"', conf=f'"{cluster.conf}"', user='"files"')
    with running_volumed(folder / "cephfs", quiet=True, backends=table + f'key = "file:{key}"\n') as volumed:
        ours = _asking(volumed)
        beside(
            "a CephFS subvolume with a quota, by ceph-fuse",
            "ceph fs subvolume, ceph-fuse",
            lambda number: with_volumed(ours, number, backend="remote", size="64M"),
            bare,
            count=COUNT,
        )


def _s3(cluster: Ceph, folder: Path) -> None:
    endpoint, user = cluster.start_gateway(), cluster.make_s3_user("bench")
    for name, text in (("access", user.access_key), ("secret", user.secret_key)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o600)
    keys = {name: f'"file:{folder / name}"' for name in ("access", "secret")}
    table = _table(
        driver='"s3"', endpoint=f'"{endpoint}"', access_key=keys["access"], secret_key=keys["secret"], prefix='"v-"'
    )
    with running_volumed(folder / "s3", quiet=True, backends=table) as volumed:
        ours = _asking(volumed)
        beside(
            "an S3 bucket of RADOS Gateway, by s3fs",
            "boto3, s3fs",
            lambda number: with_volumed(ours, number, backend="remote"),
            lambda number: _s3_by_hand(endpoint, user, folder, number),
            count=COUNT,
        )


def _s3_by_hand(endpoint: str, user: S3User, folder: Path, number: int) -> Steps:
    import boto3  # noqa: PLC0415

    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id=user.access_key,
        aws_secret_access_key=user.secret_key,
    )
    bucket, target, keys = f"bare{number}", folder / f"s3-{number}", folder / "passwd-s3fs"
    running: list[subprocess.Popen[bytes]] = []

    def forth() -> None:
        client.create_bucket(Bucket=bucket)
        target.mkdir()
        keys.write_text(f"{user.access_key}:{user.secret_key}")
        keys.chmod(0o600)
        words = f"passwd_file={keys},url={endpoint},use_path_request_style"
        running.append(subprocess.Popen(["s3fs", bucket, target, "-f", "-o", words], stdout=subprocess.DEVNULL))
        while not os.path.ismount(target):
            time.sleep(0.001)

    def back() -> None:
        sh("umount", target)
        running.pop().wait(60)
        client.delete_bucket(Bucket=bucket)

    return forth, back


def _gluster(folder: Path) -> None:
    """The same on a client that is there already, which is how volumed has it."""
    with running_gluster(folder / "g") as gluster:
        gluster.make_volume("files")
        client = folder / "client"
        client.mkdir()
        sh("mount", "-t", "glusterfs", f"{gluster.address}:/files", client)

        def bare(number: int) -> Steps:
            tree, target = client / f"bare{number}", folder / f"gluster{number}"

            def forth() -> None:
                sh("mkdir", tree)
                target.mkdir()
                sh("mount", "--bind", tree, target)

            def back() -> None:
                sh("umount", target)
                sh("rm", "-rf", tree)

            return forth, back

        table = _table(driver='"gluster"', servers=f'["{gluster.address}"]', volume='"files"')
        try:
            with running_volumed(folder / "gluster", quiet=True, backends=table) as volumed:
                ours = _asking(volumed)
                beside(
                    "a folder of a Gluster volume",
                    "mkdir, mount --bind, on a client that is mounted",
                    lambda number: with_volumed(ours, number, backend="remote"),
                    bare,
                    count=COUNT,
                )
        finally:
            sh("umount", "-l", client, *(folder / "gluster/run/backends/remote").iterdir())


_SETTINGS = """
[backends.remote]
driver = "nfs"
server = "127.0.0.1"
export = "/plain"
"""
_IN_THE_MACHINE = f"""
import json
from pathlib import Path
from tests.bench.beside import WARM, timed, with_volumed
from tests.conftest import sh
from volumed.unix_http import UnixConnection

connection = UnixConnection(Path("/run/docker/plugins/volumed.sock"), timeout=120)

def ask(endpoint, **fields):
    connection.request("POST", "/VolumeDriver." + endpoint, body=json.dumps(fields))
    answer = json.loads(connection.getresponse().read())
    assert not answer.get("Err"), answer

def bare(number):
    tree, target = Path("/all", str(number)), Path("/mnt", str(number))
    def forth():
        sh("mkdir", tree)
        target.mkdir()
        sh("mount", "-t", "nfs", "-o", "nfsvers=4.2,sec=sys", f"127.0.0.1:/plain/{{number}}", target)
    def back():
        sh("umount", target)
        sh("rm", "-rf", tree)
    return forth, back

Path("/all").mkdir()
sh("mount", "-t", "nfs", "-o", "nfsvers=4.2,sec=sys", "127.0.0.1:/plain", "/all")
rounds = [
    (timed(with_volumed(ask, number, backend="remote")), timed(bare(number))) for number in range({COUNT} + WARM)
]
print(json.dumps(list(zip(*rounds[WARM:]))))
"""


def _nfs() -> None:
    with machine() as guest:
        guest.install()
        guest.put("/etc/volumed/volumed.toml", _SETTINGS.encode())
        start = "from tests.vm.guest.nfs_server import NfsServer as N; s = N(); s.export('plain'); s.start()"
        guest.run("python3", "-c", start, timeout=300, **SOURCES)
        guest.sh("systemctl start volumed.service", timeout=300)
        told = guest.run("python3", "-c", _IN_THE_MACHINE, timeout=600, **SOURCES)
        assert told.status == 0, told.text
        ours, bare = json.loads(told.text.splitlines()[-1])
        report(
            "a folder of an NFS export, in an emulated machine (ten times slower)",
            "mkdir, mount -t nfs",
            ours,
            bare,
        )
