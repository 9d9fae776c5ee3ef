"""A FUSE client: a process that serves one mount, outlives the daemon, and is found again after a restart."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from zlib import crc32

from volumed import context
from volumed.driver import Host
from volumed.errors import DeadlineExceeded, MountFailed
from volumed.model import Handle

# Those that no file system takes for itself.
MOUNT_OPTIONS = frozenset({"noatime", "nodiratime", "relatime", "nosuid", "nodev", "noexec", "sync", "dirsync"})
# Seconds between two looks at a client that comes or goes, which takes some 30 ms; after long waits seldom.
_POLL, _POLL_SELDOM = 0.001, 0.05


def client_name(kind: str, handle: Handle, target: Path) -> str:
    """Of the helper that serves this volume at this place."""
    return f"{kind}-{handle}-{crc32(os.fsencode(target)):08x}"


def write_private(path: Path, text: str) -> None:
    """For root alone from its first byte on."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)


def check_options(options: Sequence[str], *, subject: str) -> None:
    """Raises MountFailed for an option that could be the client's own: another server, another key."""
    unknown = set(options) - MOUNT_OPTIONS
    if unknown:
        raise MountFailed(
            f"a volume here cannot take the option {min(unknown)!r}",
            errno=errno.EINVAL,
            subject=subject,
            hint=f"it takes {', '.join(sorted(MOUNT_OPTIONS))}",
        )


def _pause(begun: float) -> None:
    waited = time.monotonic() - begun
    time.sleep(min(max(_POLL, waited / 20), _POLL_SELDOM))


class FuseClient:
    """`name` is the helper's, `place` where it mounts. `subject` is for errors."""

    def __init__(self, host: Host, name: str, place: Path, *, subject: str) -> None:
        self._host = host
        self._name = name
        self._place = place
        self._subject = subject

    def running(self) -> bool:
        helper = self._host.helper(self._name)
        return helper is not None and helper.running

    def start(self, argv: Sequence[str | Path], *, env: Mapping[str, str] | None = None, timeout: float) -> None:
        """Returns when it is in the mount table; one that is on its way there is waited for. Raises MountFailed with
        what it said, DeadlineExceeded; after either nothing of it is left."""
        begun = time.monotonic()
        ends = begun + context.remaining(timeout)
        self._host.start_helper(self._name, argv, env=env)
        while not self._host.is_mountpoint(self._place):
            if not self.running():
                raise self.failure()
            if time.monotonic() > ends:
                self.end(timeout=2.0)
                raise DeadlineExceeded(
                    f"{argv[0]} got no answer from its server in time", subject=self._subject, hint="is it up?"
                )
            _pause(begun)

    def failure(self) -> MountFailed:
        """What the client said, for whoever has seen that it does not serve. Nothing of it is left."""
        said = self._host.helper_log(self._name, limit=1000).replace("\n", "; ")
        self.end(timeout=2.0)
        text = f"its FUSE client failed: {said or 'it said nothing'}"
        return MountFailed(text, errno=errno.ENOTCONN, subject=self._subject)

    def finish(self, *, timeout: float) -> None:
        """After its last mount is gone: wait until it has written all it holds and ends by itself. One that does not
        is left to its work, never killed. Raises DeadlineExceeded."""
        begun = time.monotonic()
        ends = begun + context.remaining(timeout)
        while self.running():
            if time.monotonic() > ends:
                helper = self._host.helper(self._name)
                raise DeadlineExceeded(
                    f"its FUSE client (pid {helper.pid if helper else '?'}) has not written everything yet",
                    subject=self._subject,
                    hint="it goes on by itself as soon as its server answers",
                )
            _pause(begun)
        self._host.stop_helper(self._name)

    def end(self, *, timeout: float) -> None:
        """Whatever it holds; the mount first, or the helper's end would leave a dead one."""
        self._host.unmount_network(self._place, timeout=timeout, force=True)
        self._host.stop_helper(self._name, timeout=timeout)
