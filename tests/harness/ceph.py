"""A real Ceph on loopback: monitor, manager, one OSD in memory, and what else is asked for.

cephx is on, and every client has a user of its own with the least it needs. All of it ends with the test session, by
pid, and with the session's process should that be killed. A daemon can be stopped (it hangs), killed and started again.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import signal
import socket
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.conftest import sh, wait_until
from tests.harness.processes import Process

POOL = "rbd"
FILESYSTEM = "files"
READY = 60.0

_CONF = """
[global]
fsid = {fsid}
mon_host = {mon_host}
public_addr = {address}
cluster_addr = {address}
ms_bind_ipv6 = false
auth_cluster_required = cephx
auth_service_required = cephx
auth_client_required = cephx
auth_allow_insecure_global_id_reclaim = false
keyring = {folder}/$name.keyring
log_file = {folder}/$name.log
admin_socket = {folder}/$name.asok
run_dir = {folder}
mon_data = {folder}/mon
mgr_data = {folder}/mgr
mds_data = {folder}/mds
osd_data = {folder}/osd
rgw_data = {folder}/rgw
osd_objectstore = memstore
memstore_device_bytes = {size}
memstore_page_set = false
# Its objects are written to a file when it ends in peace, and read again when it starts.
osd_fast_shutdown = false
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 8
osd_pool_default_pgp_num = 8
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
# It is marked down by tests, often, and must not take that for a reason to end itself.
osd_max_markdown_count = 1000
osd_class_load_list = *
osd_class_default_list = *
mon_allow_pool_size_one = true
mon_allow_pool_delete = true
mon_warn_on_pool_no_redundancy = false
# The disk of the machine that runs the tests is not the cluster's.
mon_data_avail_warn = 1
mon_data_avail_crit = 0
# A cluster of one waits for nobody.
paxos_propose_interval = 0.05
mon_tick_interval = 1
mgr_tick_period = 1
mgr_stats_period = 1
[mon]
# OSD and clients are told the truth about one that was stopped within a test's patience.
mon_osd_min_down_reporters = 1
[client.rgw.a]
rgw_frontends = beast endpoint={address}:{gateway} tcp_nodelay=1
rgw_dns_name = localhost
rgw_rados_pool_pg_num_min = 8
rgw_bucket_quota_ttl = 1
rgw_user_quota_bucket_sync_interval = 1
rgw_gc_obj_min_wait = 2
rgw_gc_processor_period = 3
rgw_gc_processor_max_time = 3
"""

# Every key is known to the monitor from the start: no command is needed for it later.
_CAPS = {
    "mon.": {"mon": "allow *"},
    "client.admin": {"mon": "allow *", "osd": "allow *", "mds": "allow *", "mgr": "allow *"},
    "mgr.x": {"mon": "allow profile mgr", "osd": "allow *", "mds": "allow *"},
    "osd.0": {"mon": "allow profile osd", "mgr": "allow profile osd", "osd": "allow *"},
    "mds.a": {"mon": "allow profile mds", "osd": "allow rwx", "mds": "allow *", "mgr": "allow profile mds"},
    "client.rgw.a": {"mon": "allow rw", "mgr": "allow rw", "osd": "allow rwx"},
}
_ARGV = {
    "mon.a": ("ceph-mon", "-i", "a"),
    "mgr.x": ("ceph-mgr", "-i", "x"),
    "osd.0": ("ceph-osd", "-i", "0"),
    "mds.a": ("ceph-mds", "-i", "a"),
    "client.rgw.a": ("radosgw", "-n", "client.rgw.a"),
}


class S3User(NamedTuple):
    name: str
    access_key: str
    secret_key: str


class Ceph:
    """A cluster. Daemons go by their names: mon.a, mgr.x, osd.0, mds.a, client.rgw.a (the S3 gateway)."""

    def __init__(self, folder: Path, *, address: str = "127.0.0.1", size: int = 4 << 30) -> None:
        self.folder, self.address = folder, address
        self.conf = folder / "ceph.conf"
        self.fsid = str(uuid.uuid4())
        self._processes: dict[str, Process] = {}
        port, old_port, self._gateway_port = _free_ports(address, 3)
        self.monitors = f"[v2:{address}:{port},v1:{address}:{old_port}]"
        self.conf.write_text(
            _CONF.format(
                fsid=self.fsid,
                mon_host=self.monitors,
                address=address,
                folder=folder,
                size=size,
                gateway=self._gateway_port,
            )
        )

    # Life
    def start(self) -> None:
        """Returns when the pool `rbd` can be written."""
        for name in ("mon", "mgr", "mds", "osd", "rgw"):
            (self.folder / name).mkdir()
        keyring = self._make_keys()
        sh("monmaptool", "--create", "--fsid", self.fsid, "--addv", "a", self.monitors, self.folder / "monmap")
        sh(
            *("ceph-mon", "-c", self.conf, "--mkfs", "-i", "a"),
            *("--monmap", self.folder / "monmap", "--keyring", keyring),
        )
        self.run("mon.a")
        osd = str(uuid.uuid4())
        self.ceph("osd", "new", osd)
        sh("ceph-osd", "-c", self.conf, "-i", "0", "--mkfs", "--osd-uuid", osd)
        self.run("mgr.x")
        self.run("osd.0")
        self.make_pool(POOL)
        wait_until(self.clean, timeout=READY)

    def _make_keys(self) -> Path:
        everybody = self.folder / "all.keyring"
        text = ""
        for name, caps in _CAPS.items():
            key = sh("ceph-authtool", "--gen-print-key").strip()
            entry = f"[{name}]\n\tkey = {key}\n"
            (self.folder / f"{name}.keyring").write_text(entry)
            text += entry + "".join(f'\tcaps {service} = "{cap}"\n' for service, cap in caps.items())
        shutil.copy(self.folder / "mon..keyring", self.folder / "mon.a.keyring")
        everybody.write_text(text)
        return everybody

    def run(self, name: str) -> None:
        """Start a daemon, or start it again."""
        argv = ("setpriv", "--pdeathsig", "KILL", *_ARGV[name], "-f", "-c", self.conf)
        self._processes[name] = Process(argv, log=self.folder / f"{name}.out")

    def start_filesystem(self) -> str:
        """A CephFS, there already or not; its name."""
        if "mds.a" in self._processes:
            return FILESYSTEM
        for pool in ("files-metadata", "files-data"):
            self.ceph("osd", "pool", "create", pool, "8")
        self.ceph("fs", "new", FILESYSTEM, "files-metadata", "files-data")
        # What a killed client holds, others get when the MDS drops it: the least that it takes, for 60 s and 300 s.
        self.ceph("fs", "set", FILESYSTEM, "session_timeout", "30")
        self.ceph("fs", "set", FILESYSTEM, "session_autoclose", "60")
        # Nor is it kept because the OSD lay still a while ago, in another test.
        self.ceph("config", "set", "mds", "defer_client_eviction_on_laggy_osds", "false")
        self.run("mds.a")
        wait_until(lambda: "up:active" in self.ceph("mds", "stat"), timeout=READY)
        return FILESYSTEM

    def start_gateway(self) -> str:
        """An S3 gateway, there already or not; its endpoint."""
        if "client.rgw.a" not in self._processes:
            self.run("client.rgw.a")
        wait_until(self._gateway_answers, timeout=READY)
        return f"http://{self.address}:{self._gateway_port}"

    def _gateway_answers(self) -> bool:
        with contextlib.suppress(OSError):
            socket.create_connection((self.address, self._gateway_port), timeout=1).close()
            return True
        return False

    def end(self) -> None:
        for name in reversed(self._processes):  # whoever needs another goes first
            process = self._processes[name]
            if process.running():
                process.end(signal.SIGKILL)

    # Faults
    def hang(self, name: str) -> None:
        """It holds its connections, and answers nothing."""
        self._processes[name].send(signal.SIGSTOP)

    def resume(self, name: str) -> None:
        self._processes[name].send(signal.SIGCONT)

    def recover(self) -> None:
        """After the OSD lay still for longer than its leases on its placement groups. As it is the only one it may find
        no way back by itself: from the next question on they are laggy and answer nothing, for 800 s and more (Ceph
        16). Marked down it takes part anew."""
        before = self._up_since()
        self.ceph("osd", "down", "0")
        wait_until(lambda: self._up_since() > before and self.clean(), timeout=READY)

    def _up_since(self) -> int:
        """The epoch of the cluster's map."""
        (found,) = self.told("osd", "dump")["osds"]
        return int(found["up_from"])

    def kill(self, name: str) -> None:
        """As a crash does. An OSD in memory forgets everything: end that one instead, if its data shall come back."""
        self._processes[name].end(signal.SIGKILL)

    def stop(self, name: str) -> None:
        self._processes[name].end(signal.SIGTERM)

    def pid(self, name: str) -> int:
        return self._processes[name].pid

    # Administration
    def ceph(self, *words: str) -> str:
        return sh("ceph", "-c", self.conf, "--connect-timeout", "30", *words)

    def told(self, *words: str) -> Any:
        """Of a command that can answer in JSON."""
        return json.loads(self.ceph(*words, "--format", "json"))

    def rbd(self, *words: str | Path) -> str:
        return sh("timeout", "60", "rbd", "-c", self.conf, *words)

    def make_pool(self, name: str, *, application: str = "rbd") -> None:
        self.ceph("osd", "pool", "create", name, "8")
        self.ceph("osd", "pool", "application", "enable", name, application)

    def make_user(self, name: str, **caps: str) -> Path:
        """`make_user("volumed", mon="profile rbd")`: the file with its key, and nothing else in it."""
        words = [word for service, cap in caps.items() for word in (service, cap)]
        self.ceph("auth", "get-or-create", f"client.{name}", *words)
        key = self.folder / f"{name}.key"
        key.write_text(self.ceph("auth", "print-key", f"client.{name}"))
        key.chmod(0o600)
        return key

    def make_rbd_user(self, name: str = "volumed", *, pool: str = POOL) -> Path:
        """As the README says."""
        return self.make_user(
            name,
            mon='profile rbd, allow command "mgr dump"',
            osd=f"profile rbd pool={pool}",
            mgr=f"profile rbd pool={pool}",
        )

    def make_files_user(self, name: str = "files", *, path: str = "/volumes") -> Path:
        """As the README says, for the groups below `path`."""
        return self.make_user(
            name,
            mon="allow r",
            mgr="allow module volumes rw",
            mds=f"allow rw fsname={FILESYSTEM} path={path}",
            osd=f"allow rw tag cephfs data={FILESYSTEM}",
        )

    def allow_quotas(self, user: S3User) -> None:
        sh("radosgw-admin", "-c", self.conf, "caps", "add", "--uid", user.name, "--caps", "buckets=*")

    def make_s3_user(self, name: str) -> S3User:
        user = S3User(name, secrets.token_hex(10), secrets.token_hex(20))
        sh(
            *("radosgw-admin", "-c", self.conf, "user", "create", "--uid", name, "--display-name", name),
            *("--access-key", user.access_key, "--secret-key", user.secret_key),
        )
        return user

    def clean(self) -> bool:
        """Whether every placement group can be read and written."""
        states = self.told("status")["pgmap"]
        found = states.get("pgs_by_state", [])
        return states["num_pgs"] > 0 and [state["state_name"] for state in found] == ["active+clean"]


def _free_ports(address: str, count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        ports = []
        for _ in range(count):
            opened = stack.enter_context(socket.socket())
            opened.bind((address, 0))
            ports.append(opened.getsockname()[1])
        return ports


@contextlib.contextmanager
def ceph_cluster(*, address: str = "127.0.0.1", size: int = 4 << 30) -> Iterator[Ceph]:
    """A running one. In a folder of a short name: its sockets' paths must fit into 108 bytes."""
    with tempfile.TemporaryDirectory(prefix="ceph-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        cluster = Ceph(Path(folder), address=address, size=size)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.end()


@contextlib.contextmanager
def address_for_guests() -> Iterator[str]:
    """One of this machine's that is neither 127.0.0.1, which a guest has for itself, nor anybody's: of TEST-NET-2
    (RFC 5737), on the loopback device."""
    taken = {each["local"] for link in json.loads(sh("ip", "-json", "address")) for each in link["addr_info"]}
    free = [f"198.51.100.{number}" for number in range(1, 255) if f"198.51.100.{number}" not in taken]
    address = secrets.choice(free)
    sh("ip", "address", "add", f"{address}/32", "dev", "lo")
    try:
        yield address
    finally:
        sh("ip", "address", "del", f"{address}/32", "dev", "lo")
