"""A real PostgreSQL in a container, and clients outside of it who write down what was acknowledged to them.

The image holds links alone: the server is the machine's own, whose /usr is mounted read-only.
"""

from __future__ import annotations

import contextlib
import io
import subprocess
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from tests.conftest import sh, wait_until
from tests.harness.docker import Docker

IMAGE, USER = "postgres", 70
PROGRAMS = max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
_LINKS = {"bin": "usr/bin", "lib": "usr/lib", "lib64": "usr/lib64"}
_FOLDERS = {"usr": (0, 0o755), "etc": (0, 0o755), "tmp": (0, 0o1777), "sockets": (0, 0o755), "data": (USER, 0o700)}
_DURABLE = ("-c", "fsync=on", "-c", "full_page_writes=on", "-c", "synchronous_commit=on")
_SMALL = ("-c", "shared_buffers=16MB", "-c", "max_wal_size=32MB", "-c", "min_wal_size=4MB", "-c", "listen_addresses=")


def import_image(docker: Docker, archive: Path) -> None:
    with tarfile.open(archive, "w") as tar:
        for name, (owner, mode) in _FOLDERS.items():
            entry = tarfile.TarInfo(name)
            entry.type, entry.uid, entry.gid, entry.mode = tarfile.DIRTYPE, owner, owner, mode
            tar.addfile(entry)
        for name, place in _LINKS.items():
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, place
            tar.addfile(entry)
        passwd = f"root:x:0:0::/:/bin/sh\npostgres:x:{USER}:{USER}::/data:/bin/sh\n".encode()
        entry = tarfile.TarInfo("etc/passwd")
        entry.size = len(passwd)
        tar.addfile(entry, io.BytesIO(passwd))
    docker("import", str(archive), IMAGE)


class Postgres:
    """On one volume of Docker's. Its socket is in a folder of the machine, so that its clients outlive its restarts."""

    def __init__(self, docker: Docker, volume: str, sockets: Path) -> None:
        self._docker, self._sockets = docker, sockets
        self._mounts = ("-v", "/usr:/usr:ro", "-v", f"{volume}:/data", "-v", f"{sockets}:/sockets")
        sockets.mkdir(mode=0o700, exist_ok=True)
        sockets.chmod(0o777)

    def _once(self, *words: str) -> str:
        user = ("-u", f"{USER}:{USER}")
        return self._docker("run", "--rm", *user, *self._mounts, IMAGE, f"{PROGRAMS}/{words[0]}", *words[1:])

    def make(self) -> None:
        """A cluster with checksums, whose log is in pieces of 1 MiB."""
        self._once(
            *("initdb", "-D", "/data/cluster", "-A", "trust", "-U", "postgres", "--data-checksums"),
            *("--wal-segsize", "1", "--locale", "C", "--encoding", "UTF8"),
        )

    def start(self) -> None:
        self._docker(
            *("run", "-d", "--name", "postgres", "-u", f"{USER}:{USER}", "--stop-signal", "SIGINT", *self._mounts),
            *(IMAGE, f"{PROGRAMS}/postgres", "-D", "/data/cluster", "-k", "/sockets", *_DURABLE, *_SMALL),
        )
        wait_until(self.answers, timeout=60)

    def answers(self) -> bool:
        return subprocess.run(self.client("pg_isready", "-q"), check=False, capture_output=True).returncode == 0

    def client(self, program: str, *words: str) -> list[str]:
        return [str(PROGRAMS / program), "-h", str(self._sockets), "-U", "postgres", *words]

    def ask(self, query: str) -> list[str]:
        return sh(*self.client("psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "-d", "postgres", "-c", query)).split()

    def check_pages(self) -> None:
        """Of a server that was stopped: each page has the checksum that it was written with."""
        assert "Bad checksums:  0" in self._once("pg_checksums", "--check", "-D", "/data/cluster")

    def check_relations(self) -> None:
        """Each table's rows can be read and are where its indexes say, and the other way round."""
        sh(*self.client("pg_amcheck", "-d", "postgres", "--install-missing", "--heapallindexed", "--parent-check"))


class Witness:
    """A client that inserts one number after the other, each a transaction, and writes down what was acknowledged. It
    connects anew when it is cut off, and never takes one for stored that it was not told of."""

    def __init__(self, postgres: Postgres) -> None:
        self._postgres = postgres
        self.acknowledged: list[int] = []
        self.longest = 0.0  # seconds between two acknowledgements
        self._ends = threading.Event()
        self._last = time.monotonic()
        postgres.ask("CREATE TABLE witness (number integer PRIMARY KEY)")
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        number = 0
        while not self._ends.is_set():
            words = self._postgres.client("psql", "-XAt", "-d", "postgres")
            child = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            assert child.stdin is not None
            assert child.stdout is not None
            try:
                with contextlib.suppress(BrokenPipeError), child.stdin, child.stdout:
                    number = self._insert(child.stdin, child.stdout, number)
            finally:
                child.wait()
                time.sleep(0.02)

    def _insert(self, questions: IO[bytes], answers: IO[bytes], number: int) -> int:
        """Until it is cut off; the number of which it is not known whether it is there."""
        while not self._ends.is_set():
            number += 1
            questions.write(b"INSERT INTO witness VALUES (%d);\n" % number)
            questions.flush()
            if answers.readline() != b"INSERT 0 1\n":
                break
            now = time.monotonic()
            self.longest, self._last = max(self.longest, now - self._last), now
            self.acknowledged.append(number)
        return number

    def wait_for_more(self, count: int = 50) -> None:
        aim = len(self.acknowledged) + count
        wait_until(lambda: len(self.acknowledged) >= aim, timeout=90)

    def pause(self) -> float:
        """The longest since it was last asked."""
        found, self.longest = self.longest, 0.0
        return found

    def end(self) -> None:
        self._ends.set()
        self._thread.join()


@contextlib.contextmanager
def load(postgres: Postgres, log: Path) -> Iterator[Witness]:
    """pgbench, begun again whenever it is cut off, and a witness."""
    sh(*postgres.client("pgbench", "-i", "-q", "-s", "1", "postgres"))
    ends = threading.Event()

    def bench() -> None:
        words = postgres.client("pgbench", "-n", "-c", "2", "-R", "100", "-T", "600", "postgres")
        while not ends.wait(0.05):
            with log.open("ab") as output, subprocess.Popen(words, stdout=output, stderr=output) as child:
                while child.poll() is None and not ends.wait(0.05):
                    pass
                child.terminate()

    thread, witness = threading.Thread(target=bench), Witness(postgres)
    thread.start()
    try:
        yield witness
    finally:
        ends.set()
        witness.end()
        thread.join()
