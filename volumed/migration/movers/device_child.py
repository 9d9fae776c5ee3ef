"""The process that copies a device for the daemon: told by lines of JSON on its input, it answers by lines.

It is not the daemon, because a write to storage that does not answer cannot be given up: who waits in it cannot even be
killed. It ends when its input does.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from volumed.errors import VolumedError
from volumed.migration.movers.block import BlockMover
from volumed.migration.movers.mover import Control, Stopped

_TELL = 0.1  # seconds between two lines of progress
_WITHOUT_CONTROL = frozenset({"watch", "pending"})


class Child:
    def __init__(self, source: str, target: str, workdir: str, *, filled: bool) -> None:
        self._mover = BlockMover(Path(source), Path(target), Path(workdir), filled=filled)
        self._orders: queue.SimpleQueue[tuple[dict[str, Any], Control]] = queue.SimpleQueue()
        self._control = Control()
        self._before = self._told = 0  # bytes
        self._saying = threading.Lock()

    def serve(self) -> None:
        for job in (self._listen, self._tell):
            threading.Thread(target=job, daemon=True).start()
        while True:
            order, control = self._orders.get()
            self._done(self._answer(order, control))

    def _answer(self, order: dict[str, Any], control: Control) -> dict[str, Any]:
        words = () if order["do"] in _WITHOUT_CONTROL else (control,)
        try:
            done = getattr(self._mover, order["do"])(*words, **order["with"])
        except Stopped:
            return {"stopped": True}
        except VolumedError as error:
            return {"error": error.code, "text": error.text, "subject": error.subject, "hint": error.hint}
        return {"done": None if done is None else done._asdict()}

    def _listen(self) -> None:
        """What must act while an order is carried out; the rest waits for its turn."""
        for line in sys.stdin:
            order = json.loads(line)
            if order["do"] == "stop":
                self._control.stop()
            elif order["do"] == "rate":
                self._control.rate = order["rate"]
            else:
                self._before += self._control.bytes
                self._control = Control(rate=self._control.rate)
                self._orders.put((order, self._control))
        os.killpg(0, signal.SIGKILL)

    def _tell(self) -> None:
        resting = threading.Event()
        while not resting.wait(_TELL):
            self._progress()

    def _progress(self) -> None:
        with self._saying:
            done = self._before + self._control.bytes
            if done != self._told:
                self._told = done
                _say({"bytes": done, "files": 0})

    def _done(self, answer: dict[str, Any]) -> None:
        self._progress()
        with self._saying:
            _say(answer)


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    settings = json.loads(sys.stdin.readline())
    Child(settings["source"], settings["target"], settings["workdir"], filled=settings["filled"]).serve()
