"""The process that copies a tree for the daemon: told by lines of JSON on its input, answering by lines on its output.

It is not the daemon, because what it looks at may hang in the kernel, and because it uses every core. It ends, with
its workers, when its input does.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from volumed.migration.tree import posix
from volumed.migration.tree.entries import Tree
from volumed.migration.tree.manifest import Manifest
from volumed.migration.tree.pool import Pool, Stopped
from volumed.migration.tree.reading import walk
from volumed.migration.tree.rounds import Rounds, count
from volumed.migration.tree.tracking import Tracker, Untrackable, is_local, mapped_files
from volumed.migration.tree.worker import Failure

_TELL = 0.1  # seconds between two lines of progress
_AHEAD = 0.25  # seconds that a throttled copy may run ahead


class Child:
    def __init__(
        self, source: str, target: str, workdir: str, *, losses: frozenset[str], filled: bool, workers: int
    ) -> None:
        self._source_path, self._target_path = source, target
        self._source = _tree(source, losses)
        self._target = _tree(target, losses)._replace(filled=filled)
        self._pool = Pool(self._source, self._target, workers=workers)
        self._manifest = Manifest(Path(workdir) / "tree.db")
        self._rounds = Rounds(self._source, self._target, self._manifest, self._pool, self._tick)
        self._tracker: Tracker | None = None
        self._orders: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._rate = 0
        self._ticked = self._told = time.monotonic()

    def serve(self) -> None:
        threading.Thread(target=self._listen, daemon=True).start()
        _say({"ready": True})
        while True:
            order = self._orders.get()
            try:
                answer = getattr(self, f"_do_{order['do']}")(**order.get("with", {}))
                self._progress()
                _say({"done": answer})
            except Failure as failure:
                self._rounds_cut_short()
                _say({"failed": failure.text, "path": failure.path, "errno": failure.number})
            except Stopped:
                self._rounds_cut_short()
                self._progress()
                _say({"stopped": True})
            except OSError as error:
                _say(_failed(error))
            self._pool.shared.stop(stopped=False)

    def _listen(self) -> None:
        """What must act while a round runs; the rest waits for its turn."""
        for line in sys.stdin:
            order = json.loads(line)
            if order["do"] == "stop":
                self._pool.shared.stop(stopped=True)
            elif order["do"] == "rate":
                self._rate = order["rate"]
            else:
                self._orders.put(order)
        os.killpg(0, signal.SIGKILL)

    def _rounds_cut_short(self) -> None:
        """What was copied stays and counts; a target that cannot even be synced has told why already."""
        with contextlib.suppress(OSError):
            self._rounds.commit()

    # What it is told
    def _do_watch(self) -> bool:
        """Whether changes are tracked from now on. Everything is taken as changed once more."""
        if self._tracker is not None:
            self._tracker.close()
            self._tracker = None
        try:
            self._tracker = Tracker(self._source_path, ours=self._target_path)
        except Untrackable:
            return False
        return True

    def _do_estimate(self) -> dict[str, int]:
        return count(self._source, self._ticked_idly)._asdict()

    def _do_copy(self, last: bool) -> dict[str, int]:
        self._pool.tell_each(("priority", not last))
        posix.lower_priority(low=not last)
        changed = self._tracker.take() if self._tracker is not None else None
        try:
            outcome = self._rounds.copy([*(changed or ()), *self._mapped()], walk=changed is None)
            if last and outcome.unsettled:
                outcome = self._rounds.copy(self._mapped(), walk=True)
        except BaseException:
            if self._tracker is not None:
                self._tracker.lose()  # what was on the list is not done
            raise
        if last and outcome.unsettled:
            raise Failure("", 0, "it changes while nobody should write to it")
        return outcome._asdict()

    def _mapped(self) -> list[str]:
        return list(mapped_files(os.path.realpath(self._source_path)))

    def _do_compare(self) -> dict[str, Any]:
        begun = self._pool.shared.done()
        different = self._rounds.compare()
        files, size = self._manifest.totals()
        return {
            "different": different,
            "digest": self._manifest.digest() if not different else "",
            "files": files,
            "bytes": size,
            "read": self._pool.shared.done() - begun,
        }

    def _do_read(self) -> dict[str, Any]:
        """All of the source, from its storage, into a manifest that knew nothing."""
        posix.sync_filesystem(self._source.root)  # what is not on storage yet is read from memory
        jobs = (("read", job) for job in walk(self._source.root))
        for found in self._pool.run(jobs, self._ticked_idly):
            self._rounds.looked += len(found)
            self._manifest.put_new(found)
        self._manifest.commit()
        files, size = self._manifest.totals()
        return {"digest": self._manifest.digest(), "files": files, "bytes": size}

    def _do_pending(self) -> int | None:
        return None if self._tracker is None else self._tracker.pending()

    def _do_changed(self) -> bool | None:
        return None if self._tracker is None else self._tracker.paths() != []

    def _ticked_idly(self) -> None:
        self._pool.shared.gate(0)(0)
        self._tick(self._rounds)

    def _tick(self, _: Rounds) -> None:
        now = time.monotonic()
        shared, rate = self._pool.shared, self._rate
        if rate <= 0:
            shared.allow(None)
        else:
            due = shared.allowed + int(rate * (now - self._ticked))
            shared.allow(min(due, shared.done() + int(rate * _AHEAD)))  # time without a copy is no credit
        self._ticked = now
        if now - self._told >= _TELL:
            self._progress()

    def _progress(self) -> None:
        self._told = time.monotonic()
        _say({"bytes": self._pool.shared.done(), "files": self._rounds.looked + self._rounds.compared})


def _tree(path: str, losses: frozenset[str]) -> Tree:
    root = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    found = posix.get_flags(root)
    return Tree(root, project=found[1] if found else 0, losses=losses, remote=not is_local(path))


def _failed(error: OSError) -> dict[str, Any]:
    return {"failed": error.strerror or str(error), "path": "", "errno": error.errno or 0}


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    settings = json.loads(sys.stdin.readline())
    try:
        child = Child(
            settings["source"],
            settings["target"],
            settings["workdir"],
            losses=frozenset(settings["losses"]),
            filled=settings["filled"],
            workers=settings["workers"],
        )
    except OSError as error:
        _say(_failed(error))  # whatever it is told
        sys.stdin.read()
    else:
        child.serve()
