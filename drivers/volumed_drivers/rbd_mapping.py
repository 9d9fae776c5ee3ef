"""How an RBD image becomes a block device on this machine: by the kernel, by rbd-nbd, or by qemu-storage-daemon.

All three have a client of their own for each image, and so can be told apart and cut off one by one. The processes of
the latter two outlive the daemon (`Host.start_helper`) and are found again by their names.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path

from volumed.driver import Host
from volumed.errors import BackendUnavailable, DeadlineExceeded, HostError, VolumedError
from volumed_drivers import rbd_kernel
from volumed_drivers.ceph import Ask, Cluster
from volumed_drivers.qmp import Monitor, monitor

START_TIMEOUT = 30.0
STOP_TIMEOUT = 20.0
_QEMU_MODULES = ("lib/*-linux-gnu/qemu/block-rbd.so", "lib64/qemu-kvm/block-rbd.so", "lib64/qemu/block-rbd.so")
SYS_BLOCK = Path("/sys/block")


class Mapper(ABC):
    """`image`: its name, unlike any other's in the world."""

    name: str

    def __init__(self, host: Host, cluster: Cluster, *, pool: str, namespace: str) -> None:
        self.host, self.cluster = host, cluster
        self.pool, self.namespace = pool, namespace

    @abstractmethod
    def lacking(self) -> str:
        """Why it cannot be used on this machine; empty when it can."""

    @abstractmethod
    def map(self, image: str, ask: Ask) -> Path:
        """`ask`: the session in which the right to map it is held."""

    @abstractmethod
    def unmap(self, image: str) -> None:
        """Raises InUse. Not mapped is success."""

    @abstractmethod
    def find(self, image: str) -> Path | None: ...

    @abstractmethod
    def all(self) -> Mapping[str, Path]: ...

    @abstractmethod
    def grow(self, image: str, size: int) -> None:
        """The image has grown; its device shall show it."""

    def file_for(self, folder: Path) -> Path:
        """A configuration that names the cluster, and no key."""
        if not self.cluster.options.monitors:
            return self.cluster.options.conf
        conf = folder / "ceph.conf"
        conf.write_text(f"[global]\nmon_host = {self.cluster.options.monitors}\n")
        return conf


class KernelMapper(Mapper):
    name = "krbd"

    def lacking(self) -> str:
        if not rbd_kernel.BUS.exists():
            self.host.run(["modprobe", "rbd"], check=False)
        return "" if rbd_kernel.BUS.exists() else "this kernel has no module rbd"

    def map(self, image: str, ask: Ask) -> Path:
        ask("rbd_kernel.add", where=(self.pool, self.namespace), image=image)
        device = self.find(image)
        if device is None:
            raise HostError("is not there though the kernel has mapped it", subject=f"image {self.pool}/{image}")
        return device

    def unmap(self, image: str) -> None:
        found = self._look().get(image)
        if found is not None:
            self.host.check_unheld(found.device)
            self.cluster.call("rbd_kernel.remove", number=found.number, device=str(found.device))

    def find(self, image: str) -> Path | None:
        found = self._look().get(image)
        return found.device if found else None

    def all(self) -> Mapping[str, Path]:
        return {image: found.device for image, found in self._look().items()}

    def grow(self, image: str, size: int) -> None:
        found = self._look().get(image)
        if found is not None:
            self.cluster.call("rbd_kernel.refresh", number=found.number)
            self.host.wait_for_device_size(found.device, size, timeout=START_TIMEOUT)

    def _look(self) -> dict[str, rbd_kernel.Mapped]:
        return rbd_kernel.find(pool=self.pool, namespace=self.namespace)


class _HelperMapper(Mapper):
    """One whose device lives as long as a process of ours."""

    def helper(self, image: str) -> str:
        return f"rbd-{self.name}-{image}"

    def running(self, image: str) -> bool:
        found = self.host.helper(self.helper(image))
        return found is not None and found.running

    def all(self) -> Mapping[str, Path]:
        prefix = self.helper("")
        images = [found.name.removeprefix(prefix) for found in self.host.helpers(prefix)]
        return {image: device for image in images if (device := self.find(image)) is not None}

    def place(self, image: str) -> Path:
        """Of a short name: the path of a socket must fit into 108 bytes."""
        return self.host.private_folder(f"{self.name}-{image}")

    def failed(self, image: str, error: VolumedError) -> VolumedError:
        said = self.host.helper_log(self.helper(image)) or error.text
        return BackendUnavailable(
            f"{self.name} could not map it: {said}",
            subject=f"image {self.pool}/{image}",
            hint="look at the cluster with `ceph status`",
        )

    @contextlib.contextmanager
    def key_file(self, folder: Path) -> Iterator[Path]:
        """There only while the process starts."""
        path = folder / "key"
        path.touch(mode=0o600)
        try:
            path.write_text(self.cluster.key())
            yield path
        finally:
            path.unlink(missing_ok=True)


class NbdMapper(_HelperMapper):
    name = "nbd"

    def lacking(self) -> str:
        if shutil.which("rbd-nbd") is None:
            return "rbd-nbd is not installed"
        if not Path("/sys/module/nbd").exists():
            self.host.run(["modprobe", "nbd", "nbds_max=64"], check=False)
        return "" if Path("/sys/module/nbd").exists() else "this kernel has no module nbd"

    def map(self, image: str, ask: Ask) -> Path:
        self.unmap(image)  # what a process that died has left
        folder = self.place(image)
        spec = "/".join(part for part in (self.pool, self.namespace, image) if part)
        options = self.cluster.options
        with self.key_file(folder) as key:
            self.host.start_helper(
                self.helper(image),
                [
                    *("rbd-nbd", "map", spec, "-f", "--conf", self.file_for(folder), "--id", options.user),
                    *("--keyfile", key, "--log-file", "/dev/null"),
                ],
            )
            ends = time.monotonic() + START_TIMEOUT
            while (device := self.find(image)) is None:
                if not self.running(image) or time.monotonic() > ends:
                    error = self.failed(image, DeadlineExceeded("did not get ready in time"))
                    self.unmap(image)
                    raise error
                time.sleep(0.01)
        return device

    def unmap(self, image: str) -> None:
        device, helper = self.find(image), self.host.helper(self.helper(image))
        if device is not None and helper is not None:
            self.host.check_unheld(device, server=helper.pid)
            self.host.run(["rbd-nbd", "unmap", device], timeout=STOP_TIMEOUT, check=False)
        self.host.stop_helper(self.helper(image), timeout=STOP_TIMEOUT)
        shutil.rmtree(self.place(image), ignore_errors=True)

    def find(self, image: str) -> Path | None:
        """The kernel tells which thread serves a device."""
        found = self.host.helper(self.helper(image))
        if found is None or not found.running:
            return None
        for entry in SYS_BLOCK.glob("nbd*"):
            with contextlib.suppress(OSError):
                pid = (entry / "pid").read_text().strip()
                if Path(f"/proc/{found.pid}/task/{pid}").exists() and (entry / "size").read_text().strip() != "0":
                    return Path("/dev", entry.name)
        return None

    def grow(self, image: str, size: int) -> None:
        device = self.find(image)  # rbd-nbd watches the image, and tells the kernel
        if device is not None:
            self.host.wait_for_device_size(device, size, timeout=START_TIMEOUT)


class QemuMapper(_HelperMapper):
    """A FUSE file that is the image, in a loop device."""

    name = "qsd"

    def lacking(self) -> str:
        if shutil.which("qemu-storage-daemon") is None:
            return "qemu-storage-daemon is not installed"
        if not Path("/dev/fuse").exists():
            return "this kernel has no FUSE"
        if not any(any(Path("/usr").glob(pattern)) for pattern in _QEMU_MODULES):
            return "QEMU's module for RBD is not installed (qemu-block-extra)"
        return ""

    def map(self, image: str, ask: Ask) -> Path:
        self._clear(image)  # what a process that died has left
        folder, export = self.place(image), self._export(image)
        export.touch(mode=0o600)
        with self.key_file(folder) as key:
            try:
                self.host.start_helper(self.helper(image), self._command(image, folder, key))
                with self._monitor(image):
                    pass
                return self.host.attach_loop(export, direct_io=True)
            except BaseException as error:
                failed = self.failed(image, error) if isinstance(error, VolumedError) else error
                with contextlib.suppress(VolumedError):
                    self._clear(image)
                raise failed from None

    def _command(self, image: str, folder: Path, key: Path) -> list[str | Path]:
        options = self.cluster.options
        node = f"driver=rbd,node-name=image,pool={self.pool},image={image},user={options.user},key-secret=key"
        node += f",conf={self.file_for(folder)},cache.direct=on,discard=unmap"
        if self.namespace:
            node += f",namespace={self.namespace}"
        export = f"type=fuse,id=export,node-name=image,mountpoint={self._export(image)},writable=on,growable=off"
        return [
            "qemu-storage-daemon",
            *("--chardev", f"socket,id=monitor,path={self._socket(image)},server=on,wait=off"),
            *("--monitor", "chardev=monitor"),
            *("--object", f"secret,id=key,format=base64,file={key}"),
            *("--blockdev", node, "--export", export),
        ]

    def _monitor(self, image: str) -> contextlib.AbstractContextManager[Monitor]:
        return monitor(self._socket(image), timeout=START_TIMEOUT, running=lambda: self.running(image))

    def _socket(self, image: str) -> Path:
        return self.place(image) / "m"

    def _export(self, image: str) -> Path:
        return self.place(image) / "image"

    def unmap(self, image: str) -> None:
        self._clear(image)

    def _clear(self, image: str) -> None:
        export = self._export(image)
        device = _loop_over(export)
        if device is not None:
            self.host.detach_loop(device)
        self.host.stop_helper(self.helper(image), timeout=STOP_TIMEOUT)
        if any(entry.target == export for entry in self.host.mounts()):  # of a process that was killed
            self.host.unmount_network(export, force=True)
        shutil.rmtree(export.parent, ignore_errors=True)

    def find(self, image: str) -> Path | None:
        return _loop_over(self._export(image)) if self.running(image) else None

    def grow(self, image: str, size: int) -> None:
        device = self.find(image)
        if device is None:
            return
        with self._monitor(image) as asked:
            asked.ask("block_resize", node_name="image", size=size)
        # The kernel remembers a FUSE file's size for a second.
        ends = time.monotonic() + START_TIMEOUT
        while self._export(image).stat().st_size < size and time.monotonic() < ends:
            time.sleep(0.02)
        self.host.refresh_loop(device)


def _loop_over(file: Path) -> Path | None:
    """By what the kernel shows: asking the device could wait for the process behind the file."""
    for entry in os.scandir(SYS_BLOCK):
        if entry.name.startswith("loop"):
            with contextlib.suppress(OSError):
                if Path(entry.path, "loop", "backing_file").read_text().strip() == str(file):
                    return Path("/dev", entry.name)
    return None


MAPPERS: Mapping[str, type[Mapper]] = {cls.name: cls for cls in (KernelMapper, NbdMapper, QemuMapper)}
