"""Which LUN is whose: a file for each that is taken.

A LUN has no room for a mark beside its user's data. So the claim lies on a file system, one file named by the LUN and
made exclusively: of two that want it at once, on one node or on several that share the folder, one gets it.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from volumed.errors import BackendUnavailable, HostError, IntegrityError
from volumed.model import Handle, VolumeId


class Claim(NamedTuple):
    iqn: str
    lun: int
    volume_id: str
    size: int = 0  # bytes; 0: not looked at yet
    taken: bool = False  # False: claimed to be looked at; what lies there may be anybody's, so it is never wiped
    wiped: int | None = None  # bytes, once it is to go
    mark: Mapping[str, str] = {}

    @property
    def handle(self) -> Handle:
        return Handle(f"{self.lun}@{self.iqn}")


def place(handle: Handle) -> tuple[str, int]:
    """Target and LUN of a handle."""
    lun, _, iqn = handle.partition("@")
    return iqn, int(lun)


class Claims:
    def __init__(self, folder: Path, subject: str) -> None:
        self._folder, self._subject = folder, subject

    def prepare(self) -> None:
        """Raises BackendUnavailable."""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise BackendUnavailable(
                f"the folder of claims {self._folder} cannot be made: {error.strerror}", subject=self._subject
            ) from None

    def _path(self, iqn: str, lun: int) -> Path:
        return self._folder / f"{iqn.replace(':', '_')}-lun-{lun}.json"

    def all(self) -> Iterator[Claim]:
        for path in sorted(self._folder.glob("*.json")):
            claim = self._read(path)
            if claim is not None:
                yield claim

    def get(self, handle: Handle) -> Claim | None:
        return self._read(self._path(*place(handle)))

    def of(self, volume_id: VolumeId) -> Claim | None:
        return next((claim for claim in self.all() if claim.volume_id == volume_id), None)

    def _read(self, path: Path) -> Claim | None:
        try:
            return Claim(**json.loads(path.read_text()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            raise IntegrityError(
                "is no claim of a LUN", subject=str(path), hint="look at it, and move it away"
            ) from None
        except OSError as error:
            raise HostError(f"cannot be read: {error.strerror}", subject=str(path)) from None

    def take(self, claim: Claim) -> bool:
        """Whether nobody had it."""
        path = self._path(claim.iqn, claim.lun)
        made = self._written(claim, path)
        try:
            os.link(made, path)
        except FileExistsError:
            return False
        finally:
            made.unlink()
        self._sync()
        return True

    def put(self, claim: Claim) -> None:
        path = self._path(claim.iqn, claim.lun)
        self._written(claim, path).replace(path)
        self._sync()

    def _written(self, claim: Claim, path: Path) -> Path:
        made = path.with_suffix(f".{os.getpid()}.{claim.volume_id}.new")
        with made.open("w") as file:
            json.dump(claim._asdict(), file)
            file.flush()
            os.fsync(file.fileno())
        return made

    def drop(self, claim: Claim) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._path(claim.iqn, claim.lun).unlink()
        self._sync()

    def _sync(self) -> None:
        descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
