"""A new volume with another's data on other storage: made, filled by a mover, proven, and only then there at all."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec

from volumed.core.core import Core
from volumed.core.planning import CreateVolume
from volumed.errors import IntegrityError
from volumed.migration import losses
from volumed.migration.inspection import Inspection
from volumed.migration.movers.block import BlockMover
from volumed.migration.movers.mover import Control, Mover
from volumed.migration.movers.tree import TreeMover
from volumed.migration.planner import Wish
from volumed.model import MovePath, Volume, VolumeMode
from volumed.testing import crash

_PREFIX = "copy-"


class Copies:
    def __init__(self, core: Core) -> None:
        self._core = core
        self._workdirs = core.settings.state_dir / "migrations"

    def make(self, reference: str, name: str, wish: Wish) -> Volume:
        """Nobody may use the original meanwhile: its data would be of no one moment. Raises InUse, and as a move does,
        PreconditionFailed with what would be lost. A crash leaves nothing of it."""
        source = self._core.volumes.get(reference)
        path = MovePath.BLOCK if source.mode is VolumeMode.BLOCK else MovePath.TREE
        plan = Inspection(self._core).plan(source, msgspec.structs.replace(wish, path=str(path)))
        lost = [loss for loss in plan.losses if loss.kind != "snapshots"]  # the original keeps them
        losses.check(lost, wish.accept, subject=f"volume {source.name}")
        request = CreateVolume(
            name=name,
            backend=wish.backend,
            size=plan.target.size,
            mode=source.mode,
            filesystem=plan.target.filesystem or "",
            mount_options=plan.target.mount_options,
            options=plan.target.options,
            labels=source.labels,
            encryption=source.encryption,
        )
        return self._core.volumes.create(request, fill=lambda made: self._fill(source, made, path))

    def _fill(self, source: Volume, made: Volume, path: MovePath) -> None:
        core = self._core
        backend = core.backends.get(source.backend)
        with (
            core.locks.hold(source.id, subject=f"volume {source.name}"),
            core.mounts.unmounted(source, backend),
            self._present(source) as original,
            self._present(made) as copy,
            self._workdir() as workdir,
            contextlib.closing(_mover(path, original, copy, workdir)) as mover,
        ):
            mover.round(Control(), last=True)
            crash.point("migrate.filled")
            differences = mover.verify(Control()).differences
        if differences:
            raise IntegrityError(
                f"the copy is not what was read: {'; '.join(differences[:10])}",
                subject=f"volume {made.name}",
                hint=f"look at backend {made.backend}",
            )

    @contextlib.contextmanager
    def _present(self, volume: Volume) -> Iterator[Path]:
        """At the volume's own path; not there any more afterwards."""
        driver, presence = self._core.backends.get(volume.backend).driver, self._core.mounts.presence
        try:
            yield presence.establish(volume, driver)
        finally:
            presence.remove(volume, driver)

    @contextlib.contextmanager
    def _workdir(self) -> Iterator[Path]:
        self._workdirs.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=self._workdirs) as folder:
            yield Path(folder)

    def forget(self) -> None:
        """What a crash left of copies; the volumes themselves are the journal's to undo."""
        for folder in self._workdirs.glob(f"{_PREFIX}*"):
            shutil.rmtree(folder, ignore_errors=True)


def _mover(path: MovePath, source: Path, target: Path, workdir: Path) -> Mover:
    return (BlockMover if path is MovePath.BLOCK else TreeMover)(source, target, workdir)
