"""A subvolume per volume on a CephFS, with its quota; snapshots and clones by the manager; mounted by kernel or FUSE.

GROUP/<volume id>                        a subvolume; its metadata tells that it is finished, and the mark
GROUP/<volume id>, snapshot <id>         a snapshot; its handle is <volume id>@<snapshot id>
GROUP/<volume id>, snapshot of-<id>      what the volume <id> is being copied from
GROUP/<any name>                         a subvolume that was imported: it cannot be renamed, its metadata tells its id
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from volumed.driver import (
    Capability,
    Capacity,
    CreatedVolume,
    Facts,
    FilesystemDriver,
    Found,
    FoundSnapshot,
    Host,
    Options,
    Probe,
    SupportsCapacity,
    SupportsClone,
    SupportsExpand,
    SupportsImport,
    SupportsSnapshots,
    VolumeSpec,
)
from volumed.errors import (
    AlreadyExists,
    BackendError,
    BackendUnavailable,
    CommandFailed,
    ConfigError,
    InvalidRequest,
    NotFound,
    OperationPending,
)
from volumed.model import Handle, SnapshotId, VolumeId
from volumed.testing import crash
from volumed_drivers.ceph import CephOptions, Cluster
from volumed_drivers.cephfs_volumes import CLONE_TIMEOUT, NO_ANSWER, Note, State, Subvolume, Subvolumes
from volumed_drivers.fuse import FuseClient, check_options, client_name, write_private

_VOLUME_ID = re.compile(r"v[0-9a-f]{32}")
_SNAPSHOT_ID = re.compile(r"s[0-9a-f]{32}")
_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
_SUBVOLUME = re.compile(_NAME)
MOUNT_TIMEOUT, FINISH_TIMEOUT = 60.0, 30.0
_EXACT = (sys.executable, "-I", "-S", Path(__file__).with_name("cephfs_exact.py"))


class CephFsOptions(CephOptions):
    filesystem: str = Field(pattern=_NAME, description="Name of the CephFS")
    group: str = Field(default="volumed", pattern=_NAME, description="Subvolume group of the volumes; made if missing")
    mount_with: str = Field(
        default="auto",
        pattern="^(auto|kernel|fuse)$",
        description="What mounts: `kernel`, `fuse` (ceph-fuse); `auto`: the kernel where it can",
    )


class CephFsDriver(
    FilesystemDriver, SupportsExpand, SupportsSnapshots, SupportsClone, SupportsCapacity, SupportsImport
):
    BackendOptions = CephFsOptions
    capabilities: ClassVar[frozenset[Capability]] = frozenset(
        {Capability.SIZE, Capability.SNAPSHOT_LIVE, Capability.CLONE_LIVE, Capability.MULTI_NODE}
    )
    remote: ClassVar[bool] = True
    cannot_hold: ClassVar[frozenset[str]] = frozenset({"sparse", "flags"})  # a hole counts against the quota

    def __init__(self, backend: str, options: Options, host: Host) -> None:
        super().__init__(backend, options, host)
        assert isinstance(options, CephFsOptions)
        self._options = options
        self._subject = f"backend {backend}"
        self._cluster = Cluster(host, options, backend=backend)
        self._volumes = Subvolumes(
            self._cluster, filesystem=options.filesystem, group=options.group, subject=self._subject
        )
        self._pool = ""  # of the data
        self._kernel: bool | None = None

    def probe(self) -> Probe:
        found = {each["name"]: each for each in self._cluster.command("fs ls")}
        if self._options.filesystem not in found:
            raise BackendUnavailable(
                f"there is no CephFS {self._options.filesystem}",
                subject=self._subject,
                hint=f"there are: {', '.join(found)}" if found else "make it with `ceph fs volume create`",
            )
        self._pool = found[self._options.filesystem]["data_pools"][0]
        self._kernel, reason = self._choose_client()
        self._volumes.make_group()
        facts = {
            "filesystem": self._options.filesystem,
            "group": self._options.group,
            "user": self._options.user,
            "mount-with": "kernel" if self._kernel else "fuse",
        }
        return Probe(lacking={}, facts=facts | ({"not kernel": reason} if reason else {}))

    def _choose_client(self) -> tuple[bool, str]:
        """Whether it is the kernel, and why not. Raises ConfigError when what was asked for cannot be."""
        if self._options.mount_with == "fuse":
            return False, ""
        reason = self._no_kernel()
        if reason and self._options.mount_with == "kernel":
            raise ConfigError(reason, subject=self._subject, hint="set mount-with to fuse, or see to it")
        return not reason, reason

    def _no_kernel(self) -> str:
        """Why the kernel cannot mount here; empty when it can."""
        try:
            self.host.run(["modprobe", "--quiet", "ceph"], timeout=20.0, check=False)
            if "ceph" not in Path("/proc/filesystems").read_text().split():
                return "this kernel has no module ceph"
            self.host.run(["mount.ceph", "--help"], timeout=10.0, check=False)
        except CommandFailed as error:
            return error.text
        return ""

    # Volumes
    def create(self, spec: VolumeSpec) -> CreatedVolume:
        if self._volumes.look(spec.id) is None:
            self._volumes.create(spec.id, spec.size)
            crash.point("cephfs.create.made")
        return self._finish(spec.id, Note(spec.size, spec.mark))

    def _finish(self, name: str, note: Note) -> CreatedVolume:
        """Give a complete subvolume the size and the mark it shall have."""
        wanted, size = note.size, self._complete(name).size
        if wanted is not None and (size is None or size < wanted):
            self._volumes.resize(name, wanted)
            size = wanted
        self._volumes.note(name, note)
        return CreatedVolume(Handle(name), size)

    def _complete(self, name: str) -> Subvolume:
        """Raises NotFound, OperationPending for one that is being filled."""
        found = self._volumes.look(_checked(name, self._subject))
        if found is None:
            raise NotFound(
                f"subvolume {self._options.group}/{name} is gone",
                subject=self._subject,
                hint="put it back from a backup",
            )
        if found.state is not State.COMPLETE:
            raise OperationPending(f"subvolume {name} is {found.state}", subject=self._subject, hint="try again later")
        return found

    def delete(self, handle: Handle) -> None:
        name = _checked(handle, self._subject)
        self._leave_place(name)
        for helper in self.host.helpers(f"cephfs-{name}-"):
            if not helper.running:
                self.host.stop_helper(helper.name)
        found = self._volumes.look(name)
        if found is None:
            return
        if found.state is State.COMPLETE and not self._volume_id(name):
            raise NotFound(f"subvolume {self._options.group}/{name} is not ours", subject=self._subject)
        if found.state is State.PENDING:
            self._volumes.cancel_clone(name)
        self._volumes.remove(name)
        crash.point("cephfs.delete.removed")
        self._forget_copies_for(name)

    def _forget_copies_for(self, target: str) -> None:
        """What a copy for this volume, never finished, left on its source."""
        for name in self._names():
            if f"of-{target}" in self._volumes.snapshots(name):
                self._volumes.remove_snapshot(name, f"of-{target}")

    def inspect(self, handle: Handle) -> Facts:
        found = self._complete(handle)
        return Facts(size=found.size, used=found.used)

    def _names(self) -> list[str]:
        """Of ours."""
        return [name for name in self._volumes.names() if self._volume_id(name)]

    def _volume_id(self, name: str) -> str:
        """Whose it is; empty: nobody's, or of one that was imported and is being put back to a snapshot: the manager
        tells nothing of it until it is filled. Its handle is its name all the same."""
        if _VOLUME_ID.fullmatch(name):
            return name
        if self._told(name) is None:
            return ""
        note = self._volumes.read_note(name) or self._note_kept(name)
        return note.volume_id if note else ""

    def _told(self, name: str) -> Subvolume | None:
        """A complete one. None as well for what the manager fails to tell of: somebody made it by hand."""
        try:
            found = self._volumes.look(name)
        except NO_ANSWER:
            raise
        except BackendError:
            return None
        return found if found is not None and found.state is State.COMPLETE else None

    def _note_kept(self, name: str) -> Note | None:
        """With a snapshot, of one that was filled from it and is not finished."""
        for snapshot in filter(_SNAPSHOT_ID.fullmatch, self._volumes.snapshots(name)):
            if note := self._volumes.read_snapshot_note(name, snapshot):
                return note
        return None

    def list(self) -> Iterable[Found]:
        for name in self._volumes.names():
            if volume_id := self._volume_id(name):
                note = self._volumes.read_note(name)
                mark = {} if note is None else note.mark
                yield Found(Handle(name), VolumeId(volume_id), mark, whole=note is not None)

    def find(self, volume_id: VolumeId) -> Handle | None:
        if self._volumes.look(_checked(volume_id, self._subject)) is not None:
            return Handle(volume_id)
        imported = (name for name in self._volumes.names() if self._volume_id(name) == volume_id)
        return next(map(Handle, imported), None)

    def expand(self, handle: Handle, size: int) -> int:
        there = self._complete(handle).size
        if there is not None and there >= size:
            return there
        self._volumes.resize(handle, size)
        return size

    def capacity(self) -> Capacity:
        return Capacity(*self._cluster.call("rbd_images.capacity", pool=self._pool))

    # Snapshots and clones
    def snapshot(self, handle: Handle, snapshot_id: SnapshotId) -> Handle:
        self._volumes.take_snapshot(_checked(handle, self._subject), snapshot_id)
        return Handle(f"{handle}@{snapshot_id}")

    def delete_snapshot(self, snapshot: Handle) -> None:
        self._volumes.remove_snapshot(*_parts(snapshot))

    def list_snapshots(self) -> Iterable[FoundSnapshot]:
        for name in self._names():
            for snapshot in self._volumes.snapshots(name):
                if _SNAPSHOT_ID.fullmatch(snapshot):
                    yield FoundSnapshot(Handle(f"{name}@{snapshot}"), SnapshotId(snapshot))

    def restore(self, handle: Handle, snapshot: Handle) -> None:
        """The subvolume goes, its snapshots stay, and it is filled from one of them: the wanted state is there all the
        time. What it was for is kept with the snapshot meanwhile."""
        name, snapshot_name = _parts(snapshot)
        found = self._volumes.look(name)
        note = kept = None
        if found is not None and found.state is State.COMPLETE:
            # What was filled again has no note yet, as a removal takes it along: that is gone on with.
            note, kept = self._volumes.read_note(name), self._volumes.read_snapshot_note(name, snapshot_name)
            if note is None and kept is None:
                raise BackendError(
                    f"nothing tells what subvolume {name} is for, so it is left as it is", subject=self._subject
                )
        if found is not None and note is not None:
            if kept is None:
                self._volumes.note_snapshot(name, snapshot_name, note._replace(size=found.size))
                crash.point("cephfs.restore.noted")
            self._volumes.remove(name, keep_snapshots=True)
            crash.point("cephfs.restore.removed")
            found = None
        if found is None or found.state not in (State.PENDING, State.COMPLETE):
            self._volumes.clone(name, snapshot_name, name)
            crash.point("cephfs.restore.begun")
        self._volumes.wait_for_clone(name)
        crash.point("cephfs.restore.filled")
        self._make_exact(name, snapshot_name, name)
        note_kept = self._volumes.read_snapshot_note(name, snapshot_name)
        self._finish(name, note_kept or Note())
        crash.point("cephfs.restore.finished")
        self._volumes.forget_snapshot_note(name, snapshot_name)

    def create_from_snapshot(self, snapshot: Handle, spec: VolumeSpec) -> CreatedVolume:
        return self._copy(*_parts(snapshot), spec)

    def clone(self, source: Handle, spec: VolumeSpec) -> CreatedVolume:
        snapshot = f"of-{spec.id}"
        if self._volumes.look(spec.id) is None:
            self._complete(source)
            self._volumes.take_snapshot(source, snapshot)
            crash.point("cephfs.clone.snapshot")
        made = self._copy(source, snapshot, spec)
        self._volumes.remove_snapshot(source, snapshot)
        return made

    def _copy(self, source: str, snapshot: str, spec: VolumeSpec) -> CreatedVolume:
        found = self._volumes.look(spec.id)
        if found is not None and found.state is State.FAILED:
            self._volumes.remove(spec.id)
            found = None
        if found is None:
            self._volumes.clone(source, snapshot, spec.id)
            crash.point("cephfs.copy.begun")
        if found is None or found.state is not State.COMPLETE:
            self._volumes.wait_for_clone(spec.id)
            crash.point("cephfs.copy.filled")
        note = Note(spec.size, spec.mark)
        if self._volumes.read_note(spec.id) != note:
            self._make_exact(source, snapshot, spec.id)
        return self._finish(spec.id, note)

    def _make_exact(self, source: str, snapshot: str, name: str) -> None:
        """The manager copies no ACL or other attribute, no device, socket or FIFO, hard links as files of their own,
        and times without their nanoseconds (measured)."""
        found = self._complete(name)
        group = Path(found.path).parents[1]
        self._leave_place(name)  # a daemon that was killed left it
        place = self._place(name)
        try:
            self._mount(Handle(name), found._replace(path=str(group)), place)
            crash.point("cephfs.exact.mounted")
            trees = (place / source / ".snap" / snapshot, place / Path(found.path).relative_to(group))
            self.host.run([*_EXACT, *trees], timeout=CLONE_TIMEOUT)
        except CommandFailed as error:
            raise BackendError(
                f"what was copied from {source} is not equal to it: {error.stderr.strip()}", subject=self._subject
            ) from None
        finally:
            self._leave_place(name)

    def _place(self, name: str) -> Path:
        """Where a copy is made equal to its original."""
        return self.host.private_folder(f"cephfs-{name}-copied")

    def _leave_place(self, name: str) -> None:
        """Not there is success."""
        place = self._place(name)
        if self.host.is_mountpoint(place):
            self.unmount(Handle(name), place)
        place.rmdir()

    # Import
    def importable(self) -> Iterable[str]:
        for name in self._volumes.names():
            if _SUBVOLUME.fullmatch(name) and not self._volume_id(name):
                found = self._told(name)
                if found is not None and not found.old:
                    yield name

    def adopt(self, reference: str, spec: VolumeSpec) -> CreatedVolume:
        """Who has it mounted is not to be seen; several nodes may."""
        name = _checked(reference, self._subject)
        subject = f"subvolume {self._options.group}/{name}"
        if self._complete(name).old:
            raise InvalidRequest(
                "is of an old format, which cannot be put back to a snapshot",
                subject=subject,
                hint="import a clone of it (`ceph fs subvolume snapshot clone`), or remove its snapshots: Ceph then "
                "gives it the new format, unless it is older than both",
            )
        known = self._volume_id(name)
        if known not in ("", spec.id):
            raise AlreadyExists(f"is volume {known} already", subject=subject)
        made = self._finish(name, Note(spec.size, spec.mark, spec.id))
        crash.point("cephfs.adopt.noted")
        return made

    # Mounting
    def mount(self, handle: Handle, target: Path, *, options: Sequence[str], readonly: bool) -> None:
        check_options(options, subject=self._subject)
        found = self._complete(handle)
        self._mount(handle, found, target, options, readonly=readonly)

    def _mount(
        self, handle: Handle, found: Subvolume, target: Path, options: Sequence[str] = (), *, readonly: bool = False
    ) -> None:
        """The folder at `found.path`, by a client of its own."""
        if self._kernel is None:
            self._kernel, _ = self._choose_client()
        if self._kernel:
            self._mount_by_kernel(handle, found, target, options, readonly=readonly)
        else:
            self._mount_by_fuse(handle, found, target, options, readonly=readonly)

    def _mount_by_kernel(
        self, handle: Handle, found: Subvolume, target: Path, options: Sequence[str], *, readonly: bool
    ) -> None:
        """mount.ceph(8) gives the key to the kernel's keyring; as an option it would stay readable."""
        folder = self.host.private_folder(client_name("cephfs", handle, target))
        write_private(folder / "key", self._cluster.key())
        words = [f"name={self._options.user}", f"secretfile={folder / 'key'}", f"fs={self._options.filesystem}"]
        try:
            self.host.mount_network(
                f"{','.join(found.monitors)}:{found.path}",
                target,
                fstype="ceph",
                options=[*words, "recover_session=clean", *options],
                readonly=readonly,
                timeout=MOUNT_TIMEOUT,
            )
        finally:
            (folder / "key").unlink()
            folder.rmdir()

    def _mount_by_fuse(
        self, handle: Handle, found: Subvolume, target: Path, options: Sequence[str], *, readonly: bool
    ) -> None:
        client = self._client(handle, target)
        if client.running():
            client.finish(timeout=FINISH_TIMEOUT)  # of the mount before; it may still write
        folder = self.host.private_folder(client_name("cephfs", handle, target))
        keyring = folder / "keyring"
        write_private(keyring, f"[client.{self._options.user}]\n\tkey = {self._cluster.key()}\n")
        words = [f"fsname=ceph:{found.path}", *options, *(["ro"] if readonly else [])]
        try:
            argv = [*self._argv(keyring, found.path), "-o", ",".join(words), target]
            client.start(argv, timeout=MOUNT_TIMEOUT)
        finally:
            keyring.unlink()  # ceph-fuse has read it before it mounts
            folder.rmdir()

    def _argv(self, keyring: Path, path: str) -> Iterable[str | Path]:
        options = self._options
        yield from ("ceph-fuse", "-f", "--id", options.user, "-k", keyring, "-r", path)
        yield f"--client_fs={options.filesystem}"
        yield from ("-c", options.conf if options.conf.exists() else "/dev/null")
        if options.monitors:
            yield from ("-m", options.monitors)
        yield f"--client_mount_timeout={options.timeout}"
        yield from ("--log_file=", "--admin_socket=", "--pid_file=")
        yield from ("--client_acl_type=posix_acl", "--fuse_default_permissions=false")
        # It remounts its mount once right after the start, to see whether it could trim the kernel's names so, and each
        # time it does. Where that fails it would abort, with all that it has not written yet: and it fails when the
        # mount was taken away meanwhile (ceph_fuse.cc, RemountTest). Without, the MDS complains of its cache at worst.
        yield from ("--client_die_on_failed_dentry_invalidate=false", "--client_die_on_failed_remount=false")

    def _client(self, handle: Handle, target: Path) -> FuseClient:
        return FuseClient(self.host, client_name("cephfs", handle, target), target, subject=self._subject)

    def unmount(self, handle: Handle, target: Path) -> None:
        """ceph-fuse still holds what was written a moment ago: it is waited for, and never killed."""
        self.host.unmount_network(target)
        if self.host.helper(client_name("cephfs", handle, target)) is not None:
            self._client(handle, target).finish(timeout=FINISH_TIMEOUT)

    def owns_mount(self, handle: Handle, target: Path) -> bool:
        entry = next((entry for entry in reversed(self.host.mounts()) if entry.target == target), None)
        return entry is not None and f":/volumes/{self._options.group}/{handle}/" in entry.source


def _checked(name: str, subject: str) -> str:
    if not _SUBVOLUME.fullmatch(name):
        raise NotFound(f"{name[:60]!r} is no volume of this driver", subject=subject)
    return name


def _parts(snapshot: Handle) -> tuple[str, str]:
    """Volume and snapshot."""
    name, _, snapshot_id = snapshot.partition("@")
    return name, snapshot_id
