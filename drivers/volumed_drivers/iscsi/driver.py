"""A LUN per volume, of an iSCSI target that exists: volumed gives them out, and makes none.

A LUN that holds anything is never given out. A volume that is deleted is overwritten with zeros before its LUN may be
another one's.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import ClassVar

from volumed import context
from volumed.driver import (
    BlockDriver,
    Capability,
    CreatedVolume,
    Facts,
    Found,
    Host,
    Options,
    Probe,
    SupportsExpand,
    SupportsImport,
    VolumeSpec,
)
from volumed.errors import (
    AlreadyExists,
    BackendUnavailable,
    CapacityExhausted,
    CommandFailed,
    HostError,
    InvalidRequest,
    NotFound,
    OperationPending,
    OutOfRange,
    VolumedError,
)
from volumed.model import Handle, VolumeId
from volumed.testing import crash
from volumed.units import MIB, format_size
from volumed_drivers.iscsi.claims import Claim, Claims, place
from volumed_drivers.iscsi.options import IscsiOptions, IscsiVolumeOptions, Portal, luns, portals
from volumed_drivers.iscsi.sessions import Credentials, LunPath, Sessions

DEVICE_TIMEOUT = 60.0
_STEP = 256 * MIB  # wiped at a time, and written down
_SPARE = 10.0  # seconds of a request that are left for what comes after a step
_LOOKED_AT = MIB  # at each end of a LUN


class IscsiDriver(BlockDriver, SupportsExpand, SupportsImport):
    BackendOptions = IscsiOptions
    VolumeOptions = IscsiVolumeOptions
    capabilities: ClassVar[frozenset[Capability]] = frozenset({Capability.SIZE})

    def __init__(self, backend: str, options: Options, host: Host) -> None:
        super().__init__(backend, options, host)
        assert isinstance(options, IscsiOptions)
        self._options = options
        self._subject = f"backend {backend}"
        self._portals = portals(options.portal)
        chap = Credentials(options.user, options.password, options.target_user, options.target_password)
        self._sessions = Sessions(host, self._portals, chap, self._subject)
        self._claims = Claims(options.claims / backend, self._subject)

    def probe(self) -> Probe:
        self._sessions.check()
        self._claims.prepare()
        answering = [str(portal) for portal in self._portals if _answers(portal)]
        if not answering:
            raise BackendUnavailable(f"no portal of {self._options.iqn} answers", subject=self._subject)
        free = len(self._unclaimed())
        return Probe(
            lacking={},
            facts={"target": self._options.iqn, "portals that answer": ", ".join(answering), "LUNs to give": str(free)},
        )

    # Volumes
    def create(self, spec: VolumeSpec) -> CreatedVolume:
        if spec.size is None:
            raise OutOfRange("a LUN is found by its size", subject=self._subject)
        there = self._finished(spec.id)
        if there is not None:
            return there
        assert isinstance(spec.options, IscsiVolumeOptions)
        if spec.options.lun is not None:
            return self._take(spec, spec.options.iqn or self._options.iqn, spec.options.lun)
        if spec.options.iqn is not None:
            raise InvalidRequest("iqn alone does not say which LUN", subject=self._subject, hint="set lun, too")
        return self._take_one(spec)

    def _finished(self, volume_id: VolumeId) -> CreatedVolume | None:
        """What an earlier call made; what it did not finish is forgotten."""
        there = self._claims.of(volume_id)
        if there is None:
            return None
        if there.taken:
            return CreatedVolume(there.handle, there.size)
        self._unmap(there)
        self._claims.drop(there)
        return None

    def _take_one(self, spec: VolumeSpec) -> CreatedVolume:
        """The first free LUN, in their order, that is large enough and holds nothing."""
        passed: list[str] = []
        for lun in self._unclaimed():
            try:
                return self._take(spec, self._options.iqn, lun)
            except (InvalidRequest, NotFound, AlreadyExists) as error:
                passed.append(f"LUN {lun}: {error.text}")
        raise CapacityExhausted(
            f"no LUN is free for {format_size(spec.size or 0)}" + (f" ({'; '.join(passed[:5])})" if passed else ""),
            subject=self._subject,
            hint="make one on the target, and list it in `luns`",
        )

    def _unclaimed(self) -> list[int]:
        taken = {claim.lun for claim in self._claims.all() if claim.iqn == self._options.iqn}
        return [lun for lun in luns(self._options.luns) if lun not in taken]

    def _take(self, spec: VolumeSpec, iqn: str, lun: int, *, adopted: bool = False) -> CreatedVolume:
        claim = Claim(iqn, lun, spec.id, mark=dict(spec.mark))
        if not self._claims.take(claim):
            holder = self._claims.get(claim.handle)
            raise AlreadyExists(
                f"LUN {lun} of {iqn} is volume {holder.volume_id if holder else '?'} already", subject=self._subject
            )
        crash.point("iscsi.create.claimed")
        try:
            device = self._map(claim)
            try:
                size = _size(device)
                if spec.size is not None and size < spec.size:
                    raise OutOfRange(f"LUN {lun} has {format_size(size)} only", subject=self._subject)
                if adopted:
                    self._check_unheld(device)
                else:
                    self._check_empty(device, lun)
            finally:
                self._unmap(claim)
        except VolumedError:
            self._claims.drop(claim)
            raise
        crash.point("iscsi.create.checked")
        self._claims.put(claim._replace(size=size, taken=True))
        return CreatedVolume(claim.handle, size)

    def _check_empty(self, device: Path, lun: int) -> None:
        """Raises InvalidRequest for a LUN that anybody ever wrote to, at its ends or as file systems and others do."""
        found = self.host.run(["wipefs", "--no-act", "--noheadings", "--output", "TYPE", device], timeout=30.0).stdout
        kinds = ", ".join(dict.fromkeys(found.split()))
        if not kinds and not _is_zero(device):
            kinds = "data"
        if kinds:
            raise InvalidRequest(
                f"LUN {lun} holds something: {kinds}",
                subject=self._subject,
                hint="`volumectl import` keeps what it holds; to lose it, wipe it: blkdiscard --zeroout",
            )

    def delete(self, handle: Handle) -> None:
        """Raises OperationPending while it is being overwritten: the next call goes on where this one ended."""
        claim = self._claims.get(handle)
        if claim is None:
            return
        if not claim.taken:
            self._unmap(claim)
            self._claims.drop(claim)
            return
        device = self._map(claim)
        self._check_unheld(device)
        self._wipe(claim, device)
        crash.point("iscsi.delete.wiped")
        self._unmap(claim)
        self._claims.drop(claim)

    def _wipe(self, claim: Claim, device: Path) -> None:
        size = _size(device)
        for start in range(claim.wiped or 0, size, _STEP):
            self._claims.put(claim._replace(wiped=start))
            crash.point("iscsi.delete.step")
            if context.remaining(3600.0) < _SPARE:
                raise OperationPending(
                    f"LUN {claim.lun} is being overwritten: {100 * start // size} %", subject=self._subject
                )
            length = min(_STEP, size - start)
            self.host.run(
                ["blkdiscard", "--force", "--zeroout", "--offset", str(start), "--length", str(length), device],
                timeout=600.0,
            )

    def inspect(self, handle: Handle) -> Facts:
        return Facts(size=self._claim(handle).size, used=None)

    def _claim(self, handle: Handle) -> Claim:
        claim = self._claims.get(handle)
        if claim is None:
            raise NotFound("nobody has claimed this LUN", subject=f"LUN {handle} of {self._subject}")
        return claim

    def list(self) -> Iterable[Found]:
        for claim in self._claims.all():
            whole = claim.taken and claim.wiped is None
            yield Found(claim.handle, VolumeId(claim.volume_id), claim.mark, whole)

    # Devices
    def map(self, handle: Handle) -> Path:
        return self._map(self._claim(handle))

    def _map(self, claim: Claim) -> Path:
        iqn, lun = claim.iqn, claim.lun
        with self._sessions.lock(iqn):
            self._sessions.check()
            self._sessions.open(iqn, every=self._options.multipath)
            self._sessions.show(iqn, lun)
        path = self.host.wait_for_device(
            *({"ID_PATH": f"ip-{portal}-iscsi-{iqn}-lun-{lun}"} for portal in self._portals), timeout=DEVICE_TIMEOUT
        )
        if self._options.multipath:
            self._wait_for_multipath(path)
        return _over(self._sessions.paths(iqn, lun)) or path

    def _wait_for_multipath(self, path: Path) -> None:
        """For the device that multipathd makes of the paths: by the identity that udev and it read from the LUN."""
        told = self.host.run(["udevadm", "info", "--query=property", f"--name={path}"]).stdout
        serial = next((line.partition("=")[2] for line in told.splitlines() if line.startswith("ID_SERIAL=")), "")
        try:
            self.host.run(["multipath", "-a", path])  # where it only takes what it was told of (find_multipaths)
            self.host.run(["multipathd", "add", "path", path.name], check=False)
        except CommandFailed as error:
            raise HostError(
                f"multipath does not take it: {error.text}", subject=f"device {path}", hint="does multipathd run?"
            ) from None
        self.host.wait_for_device({"DM_UUID": f"mpath-{serial}"}, timeout=DEVICE_TIMEOUT)

    def _check_unheld(self, device: Path) -> None:
        """Raises InUse. What udev's rules run on a device that has just come or changed is waited for."""
        self.host.run(["udevadm", "settle", "--timeout=30"], timeout=40.0, check=False)
        self.host.check_unheld(device)

    def unmap(self, handle: Handle) -> None:
        iqn, lun = place(handle)
        self._unmap(Claim(iqn, lun, ""))

    def _unmap(self, claim: Claim) -> None:
        with self._sessions.lock(claim.iqn):
            paths = self._sessions.paths(claim.iqn, claim.lun)
            device = _over(paths)
            if device is not None:
                self._check_unheld(device)
                if device not in [path.device for path in paths]:
                    self.host.run(["multipath", "-f", device.name])
                self._sessions.hide(paths)
            self._sessions.close(claim.iqn)

    def mapped(self, handle: Handle) -> Path | None:
        return _over(self._sessions.paths(*place(handle)))

    def mappings(self) -> Mapping[VolumeId, Path]:
        claims = list(self._claims.all())
        paths = {iqn: self._sessions.paths(iqn) for iqn in {claim.iqn for claim in claims}}
        found = {
            claim.volume_id: _over([path for path in paths[claim.iqn] if path.lun == claim.lun]) for claim in claims
        }
        return {VolumeId(volume_id): device for volume_id, device in found.items() if device is not None}

    # Changes
    def expand(self, handle: Handle, size: int) -> int:
        """The target makes LUNs larger, and its admin; here the new size is looked at."""
        claim = self._claim(handle)
        there = self._sessions.paths(claim.iqn, claim.lun)
        device = self._map(claim)
        try:
            paths = self._sessions.paths(claim.iqn, claim.lun)
            self._sessions.rescan(paths)
            if device not in [path.device for path in paths]:
                self.host.run(["multipathd", "resize", "map", device.name])
            found = _size(device)
        finally:
            if not there:
                self._unmap(claim)
        if found < size:
            raise OutOfRange(
                f"LUN {claim.lun} has {format_size(found)} only",
                subject=self._subject,
                hint="make it larger on the target, then try again",
            )
        self._claims.put(claim._replace(size=found))
        return found

    # Import
    def importable(self) -> Iterable[str]:
        for lun in self._unclaimed():
            yield Claim(self._options.iqn, lun, "").handle

    def adopt(self, reference: str, spec: VolumeSpec) -> CreatedVolume:
        lun, _, iqn = reference.partition("@")
        if not lun.isdecimal():
            raise InvalidRequest(f"{reference[:80]!r} is no LUN", subject=self._subject, hint="write it as 3@iqn...")
        there = self._finished(spec.id)
        if there is not None:
            return there
        return self._take(spec, iqn or self._options.iqn, int(lun), adopted=True)


def _over(paths: list[LunPath]) -> Path | None:
    """The multipath device over them, or the path itself."""
    for path in paths:
        for name in sorted(each.name for each in Path("/sys/block", path.device.name, "holders").glob("dm-*")):
            if _read(Path("/sys/block", name, "dm/uuid")).startswith("mpath-"):
                return Path("/dev/mapper") / _read(Path("/sys/block", name, "dm/name"))
    return paths[0].device if paths else None


def _read(path: Path) -> str:
    return path.read_text().strip()


def _size(device: Path) -> int:
    with device.open("rb") as opened:
        return opened.seek(0, os.SEEK_END)


def _is_zero(device: Path) -> bool:
    with device.open("rb") as opened:
        start = opened.read(_LOOKED_AT)
        opened.seek(max(0, _size(device) - _LOOKED_AT))
        return not any(start) and not any(opened.read(_LOOKED_AT))


def _answers(portal: Portal) -> bool:
    try:
        socket.create_connection((portal.host.strip("[]"), portal.port), timeout=3).close()
    except OSError:
        return False
    return True
