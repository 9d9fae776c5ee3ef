"""The containers that use a volume, held still for the end of its move and let go after it.

Who holds no file of it is frozen for that moment, and sees the new place when it goes on. Who holds one must be
stopped and started: a file that is open stays where it is, and would be written to at the old place.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from volumed.core.core import Core
from volumed.errors import InUse, MountFailed, NotSupported, VolumedError
from volumed.host import swap
from volumed.migration.move import StopWriters
from volumed.migration.movers.mover import Writers
from volumed.migration.writers.engines import ContainerEngine, DockerEngine, PodmanEngine
from volumed.model import Binding, Engine, Volume

RUNNING = frozenset({"running", "restarting"})


class Held(msgspec.Struct, frozen=True):
    """A container as it was before it was held."""

    engine: Engine
    id: str
    name: str
    status: str
    started: str
    obstacle: str
    targets: tuple[str, ...]  # where it sees the volume


class ContainerWriters(Writers):
    def __init__(
        self, engines: Iterable[ContainerEngine], path: Path, bindings: Sequence[Binding], *, freeze: bool
    ) -> None:
        """`path`: where the volume is mounted on this node. `bindings`: of others than ourselves. `freeze`: whoever
        holds no file is frozen and not stopped."""
        self._engines = {engine.engine: engine for engine in engines}
        self._path = path
        self._bindings = bindings
        self._freeze = freeze

    def plan(self) -> bytes:
        """In the order of their start. Raises InUse for a hold whose container is not known."""
        targets: dict[tuple[Engine, str], set[str]] = {}
        for binding in self._bindings:
            if not binding.consumers:
                raise InUse(
                    "is used by a container that cannot be told",
                    holders=[f"{binding.engine} mount id {binding.mount_id[:12]}"],
                    hint="it is known when the engine answers; or stop it yourself",
                )
            for consumer in binding.consumers:
                targets.setdefault((binding.engine, consumer.id), set()).add(consumer.target)
        held = []
        for (engine, identifier), places in targets.items():
            found = self._engine(engine).look(identifier)
            if found is not None and found.status not in RUNNING | {"paused"}:
                raise InUse(
                    f"is {found.status} and holds the volume: it is about to start, or to end, or files are copied",
                    subject=f"container {found.name}",
                )
            if found is not None:
                held.append(
                    Held(
                        engine=engine,
                        id=identifier,
                        name=found.name,
                        status=found.status,
                        started=found.started,
                        obstacle=found.obstacle,
                        targets=tuple(sorted(places)),
                    )
                )
        return msgspec.json.encode(sorted(held, key=lambda each: each.started))

    def describe(self, plan: bytes) -> Sequence[str]:
        held = "frozen for a moment, or stopped and started again" if self._freeze else "stopped and started again"
        return [
            f"{each.engine} container {each.name} is {'kept paused' if each.status == 'paused' else held}"
            for each in _decoded(plan)
        ]

    def hold(self, plan: bytes) -> None:
        """Last started, first stopped."""
        for each in reversed(_decoded(plan)):
            engine = self._engine(each.engine)
            found = engine.look(each.id)
            if found is None or found.status not in RUNNING | {"paused"}:
                continue
            if found.status != "paused":
                if self._freeze and found.status == "running" and self._frozen_idle(engine, each):
                    continue
                self._stop(engine, each)
            elif not self._freeze:
                raise InUse(
                    "is paused with the volume's file system mounted, which its device cannot be copied under",
                    subject=f"container {each.name}",
                    hint="stop it, or let it go on, and try again",
                )
            elif not self._idle(each, found.pid):
                raise InUse(
                    "is paused with a file open on the volume",
                    subject=f"container {each.name}",
                    hint="stop it, or let it go on, and try again",
                )

    def _frozen_idle(self, engine: ContainerEngine, held: Held) -> bool:
        """Frozen, and found to hold nothing. What is seen before it is frozen may be otherwise a moment later, but one
        that is busy now is not worth freezing."""
        found = engine.look(held.id)
        if found is None or not self._idle(held, found.pid):
            return False
        engine.pause(held.id)
        if self._idle(held, found.pid):
            return True
        engine.resume(held.id)
        return False

    def _idle(self, held: Held, pid: int) -> bool:
        """Whether each of its mounts of the volume can be swapped."""
        own = swap.mount_in(os.getpid(), str(self._path))
        for target in held.targets:
            entry = swap.mount_in(pid, target)
            # A folder of the volume alone, or an older mount: only the engine knows how to make it again.
            if own is None or entry is None or (entry.device, entry.root) != (own.device, own.root):
                return False
            if swap.users(pid, entry):
                return False
        return not swap.has_namespaces_within(pid)

    def _stop(self, engine: ContainerEngine, held: Held) -> None:
        if held.obstacle:
            raise InUse(
                f"holds files of the volume and is not stopped by us: {held.obstacle}",
                subject=f"container {held.name}",
                hint="stop it yourself, or let the move wait until nobody uses the volume",
            )
        engine.stop(held.id)

    def release(self, plan: bytes, *, moved: bool) -> Sequence[str]:
        stranded = []
        for each in _decoded(plan):
            try:
                self._release(each, moved=moved)
            except VolumedError as error:
                stranded.append(f"container {each.name} could not be brought back as it was: {error}")
        return stranded

    def _release(self, held: Held, *, moved: bool) -> None:
        engine = self._engine(held.engine)
        found = engine.look(held.id)
        if found is None:
            return  # removed meanwhile, by whoever may
        if moved and found.status in {"paused", "running"}:
            self._show_new_place(engine, held, pid=found.pid, paused=found.status == "paused")
            found = engine.look(held.id) or found
        if held.status == "paused":
            return
        if found.status == "paused":
            engine.resume(held.id)
        elif found.status not in RUNNING:
            engine.start(held.id)

    def _show_new_place(self, engine: ContainerEngine, held: Held, *, pid: int, paused: bool) -> None:
        """A frozen one that cannot be shown it dies before it runs again: it would write to the old place."""
        try:
            for target in held.targets:
                own, entry = swap.mount_in(os.getpid(), str(self._path)), swap.mount_in(pid, target)
                if own is None:
                    raise MountFailed("nothing is mounted there", subject=str(self._path))
                if entry is None or (entry.device, entry.root) != (own.device, own.root):
                    swap.swap(pid, target, self._path)
        except VolumedError:
            if not paused:
                raise
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # acts in the instant in which it is let go
            engine.resume(held.id)
            engine.stop(held.id)  # to wait until it has ended, and not to be restarted before we do

    def _engine(self, engine: Engine) -> ContainerEngine:
        try:
            return self._engines[engine]
        except KeyError:
            raise NotSupported(f"containers of {engine} cannot be stopped from here") from None


def stopping_writers(core: Core) -> StopWriters:
    """As the engine of migrations asks: None when somebody uses the volume whom we cannot hold still, so that it has to
    wait until they are gone."""
    settings = core.settings.engines
    engines: list[ContainerEngine] = []
    if settings.docker.enabled:
        engines.append(DockerEngine(settings.docker.socket))
    if settings.podman.enabled:
        engines.append(PodmanEngine(core.host, settings.podman.command, arguments=settings.podman.arguments))
    known = {engine.engine for engine in engines}

    def make(volume: Volume, bindings: list[Binding], *, freeze: bool) -> Writers | None:
        if any(binding.engine not in known or binding.node != core.node or binding.staging for binding in bindings):
            return None
        return ContainerWriters(engines, core.mounts.presence.path(volume.id), bindings, freeze=freeze)

    return make


def _decoded(plan: bytes) -> list[Held]:
    return msgspec.json.decode(plan, type=list[Held]) if plan else []
