"""A machine with a kernel of its own: QEMU without KVM, resumed from a frozen template in less than a second.

The image is built once (`image/build`), booted once and frozen; each test resumes its own copy. Guest memory is a file
that all copies map privately; disks are overlays.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import tarfile
import tempfile
import threading
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.vm.volatile import VolatileDisk

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "vm"
IMAGE_FILES = ("image/build", "image/agent.py")
MEMORY = 1024  # MiB
# What runs in the guest finds ours.
SOURCES = {"PYTHONPATH": "/root/volumed:/root/volumed/drivers", "PYTHONDONTWRITEBYTECODE": "1"}
APPEND = (
    "console=ttyS0 quiet loglevel=4 panic=-1 mitigations=off nokaslr audit=0 apparmor=0 no_timer_check tsc=reliable "
    "random.trust_cpu=1 cryptomgr.notests systemd.firstboot=off rcupdate.rcu_expedited=1 nowatchdog "
    "systemd.default_timeout_start_sec=300"
)


class Output(NamedTuple):
    status: int
    text: str


class MachineError(Exception):
    pass


class _Channel:
    """JSON lines over a unix socket; answers find their question by its id."""

    def __init__(self, path: Path) -> None:
        ends = time.monotonic() + 20
        self._socket = socket.socket(socket.AF_UNIX)
        while True:
            try:
                self._socket.connect(os.fspath(path))
                break
            except OSError:
                if time.monotonic() > ends:
                    raise
                time.sleep(0.005)
        self._ids = itertools.count(1)
        self._answers: dict[int, dict[str, Any]] = {}
        self._events: list[dict[str, Any]] = []
        self._arrived = threading.Condition()
        self._closed = False
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with contextlib.suppress(OSError), self._socket.makefile("rb") as lines:
            for line in lines:
                with contextlib.suppress(ValueError):
                    answer = json.loads(line)
                    with self._arrived:
                        if "id" in answer:
                            self._answers[answer["id"]] = answer
                        else:
                            self._events.append(answer)
                        self._arrived.notify_all()
        with self._arrived:
            self._closed = True
            self._arrived.notify_all()

    def ask(self, question: dict[str, Any], *, timeout: float) -> dict[str, Any]:
        number = next(self._ids)
        self._socket.sendall(json.dumps({**question, "id": number}).encode() + b"\n")
        with self._arrived:
            if not self._arrived.wait_for(lambda: number in self._answers or self._closed, timeout):
                raise TimeoutError(f"no answer to {question}"[:200])
            if number not in self._answers:
                raise MachineError("the machine is gone")
            return self._answers.pop(number)

    def wait_for_event(self, name: str, *, timeout: float, **data: Any) -> None:
        def come() -> bool:
            told = [event for event in self._events if event.get("event") == name]
            return self._closed or any(data.items() <= event.get("data", {}).items() for event in told)

        with self._arrived:
            if not self._arrived.wait_for(come, timeout):
                raise TimeoutError(f"no event {name} {data}")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


class Machine:
    def __init__(self, folder: Path, *, image: Path) -> None:
        self.folder = folder
        self._image = image
        self._disks: list[str] = []
        self.volatile: dict[str, VolatileDisk] = {}  # those of them that have a write cache, by their serial number
        self._plugged: dict[str, str] = {}  # devices by their disk's serial number
        self._plugs = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._agent: _Channel | None = None
        self._monitor: _Channel | None = None

    # Life
    def _start(self, *, memory: Path, private: bool, incoming: bool) -> None:
        folder = self.folder
        for name in ("agent.sock", "monitor.sock"):
            (folder / name).unlink(missing_ok=True)
        share = "off" if private else "on"
        argv = [
            *("qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", str(MEMORY)),
            *(
                "-M",
                "pc,memory-backend=ram,hpet=off",
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
                "-no-reboot",
            ),
            *("-object", f"memory-backend-file,id=ram,size={MEMORY}M,mem-path={memory},share={share}"),
            *("-kernel", str(self._image / "vmlinuz"), "-initrd", str(self._image / "initrd.gz"), "-append", APPEND),
            *("-chardev", f"file,id=console,path={folder}/console.log,append=on", "-serial", "chardev:console"),
            *("-chardev", f"socket,id=agent,path={folder}/agent.sock,server=on,wait=off"),
            *("-chardev", f"socket,id=monitor,path={folder}/monitor.sock,server=on,wait=off"),
            *("-mon", "chardev=monitor,mode=control"),
            # What the guest's disk has said to have survives the end of the process: a power cut loses RAM alone.
            *("-blockdev", f"driver=qcow2,node-name=root,file.driver=file,file.filename={folder}/root.qcow2"),
            *("-device", "virtio-blk-pci,drive=root,addr=4", "-device", "virtio-serial-pci,addr=5"),
            *("-device", "virtserialport,chardev=agent,name=volumed.agent", "-device", "virtio-rng-pci,addr=6"),
            *(("-incoming", "defer") if incoming else ()),
        ]
        with (folder / "qemu.log").open("ab") as log:
            self._process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._monitor = _Channel(folder / "monitor.sock")
        self.monitor("qmp_capabilities")

    def _wait_for_agent(self, timeout: float) -> None:
        self._agent = _Channel(self.folder / "agent.sock")
        ends = time.monotonic() + timeout
        while True:
            assert self._process is not None
            if self._process.poll() is not None:
                raise MachineError((self.folder / "qemu.log").read_text()[-1500:])
            try:
                self._agent.ask({"operation": "ping"}, timeout=1.0)
                break
            except TimeoutError:
                if time.monotonic() > ends:
                    raise MachineError(f"it does not boot: {self.console()[-1500:]}") from None
        self._agent.ask({"operation": "set_time", "now": time.time()}, timeout=10)

    def boot(self) -> None:
        """From its disk as it is; the disks that were plugged are there again."""
        _overlay(self._image / "root.img", self.folder / "root.qcow2", "raw")
        self._start(memory=self.folder / "ram", private=False, incoming=False)
        for serial in self._disks:
            self._plug(serial)
        self._wait_for_agent(300)

    def freeze(self, template: Path) -> None:
        self.sh("sync; echo 3 > /proc/sys/vm/drop_caches")
        self.monitor("stop")
        self._ignore_shared()
        self.monitor("migrate", uri=f"exec:cat > {template}/state")
        while (status := self.monitor("query-migrate")["status"]) != "completed":
            if status == "failed":
                raise MachineError("it cannot be frozen")
            time.sleep(0.02)
        self.monitor("quit")
        assert self._process is not None
        self._process.wait(20)
        shutil.move(self.folder / "root.qcow2", template / "root.qcow2")
        subprocess.run(["cp", "--sparse=always", self.folder / "ram", template / "ram"], check=True)

    def resume(self, template: Path) -> None:
        _overlay(template / "root.qcow2", self.folder / "root.qcow2", "qcow2")
        self._start(memory=template / "ram", private=True, incoming=True)
        self._ignore_shared()
        self.monitor("migrate-incoming", uri=f"exec:cat {template}/state")
        ends = time.monotonic() + 60
        while self.monitor("query-migrate").get("status") != "completed":
            if time.monotonic() > ends:
                raise MachineError("it does not resume")
            time.sleep(0.01)
        if self.monitor("query-status")["status"] != "running":
            self.monitor("cont")
        self._wait_for_agent(30)

    def _ignore_shared(self) -> None:
        self.monitor("migrate-set-capabilities", capabilities=[{"capability": "x-ignore-shared", "state": True}])

    def cut_power(self) -> None:
        """What was in the guest's memory is lost, what its disks had taken is kept; but see `plug`."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait(30)
        for channel in (self._agent, self._monitor):
            if channel is not None:
                channel.close()

    def power_off(self) -> None:
        """As `systemctl poweroff` does, to its end."""
        self.run("systemctl", "poweroff", "--no-block")
        assert self._process is not None
        self._process.wait(120)
        self.cut_power()

    def console(self) -> str:
        path = self.folder / "console.log"
        return path.read_text(errors="replace") if path.exists() else ""

    # Inside
    def run(self, *argv: str, timeout: float = 120.0, **environment: str) -> Output:
        assert self._agent is not None
        answer = self._agent.ask(
            {"operation": "run", "argv": argv, "timeout": timeout, "env": environment}, timeout=timeout + 20
        )
        if "error" in answer:
            raise MachineError(answer["error"])
        return Output(answer["status"], answer["output"])

    def sh(self, script: str, *, timeout: float = 120.0, check: bool = True) -> str:
        """Its output, standard error included; a failure fails the test."""
        told = self.run("bash", "-euo", "pipefail", "-c", script, timeout=timeout)
        assert not check or told.status == 0, f"in the guest: {script}: {told.text[-3000:]}"
        return told.text

    def put(self, path: str, data: bytes) -> None:
        assert self._agent is not None
        for offset in range(0, max(1, len(data)), 1 << 20):
            part = base64.b64encode(data[offset : offset + (1 << 20)]).decode()
            answer = self._agent.ask({"operation": "put", "path": path, "data": part, "append": offset > 0}, timeout=60)
            if "error" in answer:
                raise MachineError(answer["error"])

    def put_sources(self) -> None:
        """This tree as it is now, in /root/volumed."""
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as tar:
            for name in ("volumed", "drivers", "tests", "systemd", "pyproject.toml"):
                tar.add(ROOT / name, name, filter=lambda entry: None if "__pycache__" in entry.name else entry)
        self.put("/root/volumed.tar.gz", packed.getvalue())
        self.sh("mkdir -p /root/volumed && tar -xzf /root/volumed.tar.gz -C /root/volumed")

    def install(self) -> None:
        """What `make install` would leave, of these sources."""
        self.put_sources()
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        points = "".join(f"{name} = {value}\n" for name, value in project["entry-points"]["volumed.drivers"].items())
        self.put("/opt/site/volumed-0.dist-info/METADATA", b"Metadata-Version: 2.1\nName: volumed\nVersion: 0\n")
        self.put("/opt/site/volumed-0.dist-info/entry_points.txt", f"[volumed.drivers]\n{points}".encode())
        self.put("/opt/site/volumed.pth", b"/root/volumed\n/root/volumed/drivers\n")
        for name, module in (("volumed", "volumed.daemon"), ("volumectl", "volumed.cli.main")):
            script = f"#!/usr/bin/python3 -B\nimport sys\nfrom {module} import main\nsys.exit(main())\n"
            self.put(f"/opt/volumed/bin/{name}", script.encode())
        self.sh(
            """
            echo 'import site; site.addsitedir("/opt/site")' > /usr/lib/python3/dist-packages/site-opt.pth
            chmod 755 /opt/volumed/bin/*; ln -s /opt/volumed/bin/* /usr/local/bin/
            cd /root/volumed/systemd
            cp *.service *.socket /etc/systemd/system/
            cp volumed.sysusers /usr/lib/sysusers.d/volumed.conf; cp volumed.tmpfiles /usr/lib/tmpfiles.d/volumed.conf
            mkdir -p /etc/volumed; cp volumed.toml /etc/volumed/volumed.toml
            systemd-sysusers volumed.conf; systemd-tmpfiles --create volumed.conf; systemctl daemon-reload
            """
        )
        self.put("/root/plugin.py", (ROOT / "tests/vm/guest/plugin.py").read_bytes())
        self.sh("sync")  # for a test that cuts the power

    def run_suite(self, name: str, *words: str, timeout: float, **environment: str) -> None:
        """tests/vm/guest/NAME under pytest, in the sources that `put_sources` brought; what fails in it fails the
        test. `words`: more for pytest."""
        top = "/root/volumed"
        told = self.run(
            *("python3", "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--confcutdir={top}"),
            *("-c", f"{top}/pyproject.toml", f"--rootdir={top}", *words, f"{top}/tests/vm/guest/{name}"),
            timeout=timeout,
            **SOURCES,
            **environment,
        )
        print(told.text)
        assert told.status == 0
        assert " passed" in told.text

    def plugin(self, endpoint: str, **fields: Any) -> dict[str, Any]:
        """A request as dockerd sends it."""
        told = self.run("python3", "/root/plugin.py", endpoint, json.dumps(fields))
        assert told.status == 0, told.text
        answer: dict[str, Any] = json.loads(told.text)
        return answer

    # Network
    def connect(self) -> None:
        """A network card. The host connects for it, so that the guest reaches what the host reaches, but for the
        host's 127.0.0.1; nobody reaches the guest."""
        self.monitor("netdev_add", type="user", id="net", net="10.9.0.0/24")
        self.monitor("device_add", driver="virtio-net-pci", id="card", netdev="net", romfile="")
        self.sh(
            """
            modprobe virtio_net
            for i in $(seq 100); do ls /sys/class/net | grep -qv lo && break; sleep 0.1; done
            udevadm settle; card=$(ls /sys/class/net | grep -v lo)  # it has got its name by then
            ip link set "$card" up; ip address add 10.9.0.15/24 dev "$card"; ip route add default via 10.9.0.2
            """
        )

    # Disks
    def plug(self, serial: str, *, size: int, volatile: bool = False) -> str:
        """A new disk; its path in the guest. `volatile`: a power cut takes what was not flushed."""
        file = self.folder / f"{serial}.raw"
        with file.open("wb") as disk:
            disk.truncate(size)
        self._disks.append(serial)
        if volatile:
            self.volatile[serial] = VolatileDisk(file, file.with_suffix(".sock"))
        self._plug(serial)
        path = f"/dev/disk/by-id/virtio-{serial}"
        self.sh(f"for i in $(seq 100); do [ -b {path} ] && exit 0; sleep 0.1; done; exit 1")
        return path

    def _plug(self, serial: str) -> None:
        if serial in self.volatile:
            server = {"type": "unix", "path": str(self.folder / f"{serial}.sock")}
            self.monitor("blockdev-add", driver="nbd", **{"node-name": serial, "server": server})
        else:
            file = {"driver": "file", "filename": str(self.folder / f"{serial}.raw"), "discard": "unmap"}
            self.monitor("blockdev-add", driver="raw", **{"node-name": serial, "discard": "unmap", "file": file})
        slot = f"{16 + self._disks.index(serial):#x}"  # after the root disk: at a boot that is the first to be found
        device = {"driver": "virtio-blk-pci", "id": f"d-{serial}", "drive": serial, "serial": serial}
        self.monitor("device_add", bus="pci.0", addr=slot, **device)

    def plug_file(self, serial: str, file: Path, *, model: str = "virtio-blk-pci") -> None:
        """A disk that somebody else keeps the file of. `model`: nvme, too."""
        backing = {"driver": "file", "filename": str(file), "discard": "unmap"}
        self.monitor("blockdev-add", driver="raw", **{"node-name": serial, "discard": "unmap", "file": backing})
        self._plugs += 1
        self._plugged[serial] = f"d{self._plugs}-{serial}"
        self.monitor("device_add", driver=model, id=self._plugged[serial], drive=serial, serial=serial)

    def unplug(self, serial: str) -> None:
        """As a hand that pulls it: the guest is not asked whether it is done."""
        device = self._plugged.pop(serial)
        self.monitor("device_del", id=device)
        assert self._monitor is not None
        self._monitor.wait_for_event("DEVICE_DELETED", device=device, timeout=60)
        self.monitor("blockdev-del", **{"node-name": serial})

    def resize(self, serial: str, size: int) -> None:
        self.monitor("block_resize", **{"node-name": serial, "size": size})

    def network(self) -> str:
        """A network card; the address that stands for the host's loopback there."""
        self.monitor("netdev_add", type="user", id="net", net="10.0.2.0/24", host="10.0.2.2")
        self.monitor("device_add", driver="virtio-net-pci", id="card", netdev="net")
        self.sh(
            """
            card() { ls /sys/class/net | grep -v lo | head -1; }
            for i in $(seq 200); do [ -n "$(card)" ] && break; sleep 0.1; done
            udevadm settle; card=$(card)
            ip link set "$card" up; ip address add 10.0.2.15/24 dev "$card"
            """
        )
        return "10.0.2.2"

    def monitor(self, command: str, **arguments: Any) -> Any:
        assert self._monitor is not None
        answer = self._monitor.ask({"execute": command, "arguments": arguments}, timeout=60)
        if "error" in answer:
            raise MachineError(f"{command}: {answer['error']['desc']}")
        return answer["return"]


def _overlay(base: Path, target: Path, kind: str) -> None:
    if not target.exists():
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", kind, target], check=True)


@contextlib.contextmanager
def machine() -> Iterator[Machine]:
    """A running one, resumed from the template."""
    template, image = prepare()
    with tempfile.TemporaryDirectory(prefix="machine-") as folder:
        made = Machine(Path(folder), image=image)
        try:
            made.resume(template)
            yield made
        finally:
            made.cut_power()
            for disk in made.volatile.values():
                disk.close()


def prepare() -> tuple[Path, Path]:
    """Template and image; built when they are not there or something they are made from has changed."""
    uv = ROOT / ".cache" / "uv" / "bin" / "uv"
    requirements = subprocess.run(
        [uv, "export", "--frozen", "--no-dev", "--all-extras", "--no-emit-project", "--no-hashes", "--quiet"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    requirements += subprocess.run(
        [uv, "export", "--frozen", "--only-dev", "--no-emit-project", "--no-hashes", "--quiet"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    digest = hashlib.sha256(requirements.encode())
    for name in IMAGE_FILES:
        digest.update((Path(__file__).parent / name).read_bytes())
    image = CACHE / digest.hexdigest()[:16]
    if not (image / "template" / "state").exists():
        _forget_old_images()
        shutil.rmtree(image, ignore_errors=True)
        image.mkdir(parents=True)
        (image / "requirements.txt").write_text(requirements)
        subprocess.run([ROOT / "tests/vm/image/build", image, image / "requirements.txt"], check=True)
        _make_template(image)
    return image / "template", image


def _forget_old_images() -> None:
    """All but the latest, which another branch may be using."""
    if CACHE.is_dir():
        for old in sorted(CACHE.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)[1:]:
            shutil.rmtree(old, ignore_errors=True)


def _make_template(image: Path) -> None:
    making = image / "template.new"
    making.mkdir()
    with tempfile.TemporaryDirectory(prefix="machine-") as folder:
        first = Machine(Path(folder), image=image)
        try:
            first.boot()
            first.sh("systemctl is-system-running --wait || true; udevadm settle", timeout=300)
            first.freeze(making)
        finally:
            first.cut_power()
    making.rename(image / "template")
