"""What movers have in common whose work is done by a child process."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path

from volumed.migration.movers.mover import Control, Estimate, Mover
from volumed.migration.session import Session


class ChildMover(Mover):
    def __init__(self, source: Path, target: Path, workdir: Path) -> None:
        super().__init__(source, target, workdir)
        self._session: Session | None = None

    @abstractmethod
    def _begun(self) -> Session:
        """A child that knows both places."""

    def _child(self) -> Session:
        """From the first order on until `close`."""
        if self._session is None:
            self._session = self._begun()
        return self._session

    def estimate(self, control: Control) -> Estimate:
        return Estimate(**self._child().order("estimate", control))

    def watch(self) -> None:
        self._child().order("watch", Control())

    def close(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None
