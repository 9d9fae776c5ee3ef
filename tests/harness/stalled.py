"""A file system whose server can be stopped, continued and killed, by the kernel's FUSE protocol: an empty folder, and
below it the empty `folder`, which only a look at its name finds.

with stalled_tree(target) as server:      # mounted
    server.stop()                         # from now on nobody gets an answer
    server.kill()                         # every call fails with ENOTCONN
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

LOOKUP, GETATTR, SETATTR, STATFS, INIT, OPENDIR, READDIR, RELEASEDIR = 1, 3, 4, 17, 26, 27, 28, 29
_WITHOUT_ANSWER = (2, 36, 42)  # FORGET, INTERRUPT, BATCH_FORGET
_MAJOR, _MINOR = 7, 31


def serve(target: str) -> None:
    """Until it is unmounted. Its root keeps the owner and mode it is given."""
    device = os.open("/dev/fuse", os.O_RDWR)
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"fd={device},rootmode=40755,user_id=0,group_id=0,allow_other"
    if libc.mount(b"stalled", target.encode(), b"fuse.stalled", 0, options.encode()):
        raise OSError(ctypes.get_errno(), "mount(2)")
    root = {"mode": 0o40755, "uid": 0, "gid": 0}
    swallowing, swallowed = False, list[bytes]()

    def swallow(*_: object) -> None:
        nonlocal swallowing
        swallowing = True
        print("swallowing", flush=True)

    def disgorge(*_: object) -> None:
        nonlocal swallowing
        swallowing = False
        while swallowed:
            with contextlib.suppress(FileNotFoundError):  # nobody waits for it any more
                os.write(device, swallowed.pop(0))

    signal.signal(signal.SIGUSR1, swallow)
    signal.signal(signal.SIGUSR2, disgorge)
    while True:
        try:
            request = os.read(device, 1 << 17)
        except OSError as error:
            if error.errno == errno.ENODEV:  # unmounted
                return
            raise
        _, code, unique = struct.unpack_from("<IIQ", request)
        if code in _WITHOUT_ANSWER:
            continue
        number, answer = _answer(code, request[40:], root)
        whole = struct.pack("<IiQ", 16 + len(answer), -number, unique) + answer
        if swallowing:
            swallowed.append(whole)
        else:
            os.write(device, whole)
        if code == INIT:
            print("mounted", flush=True)


def _answer(code: int, body: bytes, root: dict[str, int]) -> tuple[int, bytes]:
    if code == INIT:
        return 0, struct.pack("<IIIIHHIIHHI28x", _MAJOR, _MINOR, 4096, 0, 1, 1, 4096, 1, 0, 0, 0)
    if code in (GETATTR, SETATTR):
        if code == SETATTR:
            valid, mode, uid, gid = struct.unpack_from("<I64xI4xII", body)
            root |= {
                key: value for bit, key, value in ((1, "mode", mode), (2, "uid", uid), (4, "gid", gid)) if valid & bit
            }
        attributes = struct.pack(
            "<QQQQQQIIIIIIIIII", 1, 0, 0, 0, 0, 0, 0, 0, 0, root["mode"], 2, root["uid"], root["gid"], 0, 4096, 0
        )
        return 0, struct.pack("<QII", 0, 0, 0) + attributes
    if code == LOOKUP and body == b"folder\0":
        attributes = struct.pack("<QQQQQQIIIIIIIIII", 2, 0, 0, 0, 0, 0, 0, 0, 0, 0o40755, 2, 0, 0, 0, 4096, 0)
        return 0, struct.pack("<QQQQII", 2, 0, 0, 0, 0, 0) + attributes
    if code == STATFS:
        return 0, struct.pack("<QQQQQIII28x", 1000, 600, 500, 100, 90, 4096, 255, 4096)
    if code == OPENDIR:
        return 0, struct.pack("<QII", 1, 0, 0)
    if code in (READDIR, RELEASEDIR):
        return 0, b""
    return errno.ENOENT if code == LOOKUP else errno.ENOSYS, b""


class Server:
    def __init__(self, target: Path) -> None:
        self.child = subprocess.Popen([sys.executable, __file__, target], stdout=subprocess.PIPE)
        self._expect(b"mounted\n")

    def _expect(self, line: bytes) -> None:
        assert self.child.stdout is not None
        assert self.child.stdout.readline() == line

    def stop(self) -> None:
        self.child.send_signal(signal.SIGSTOP)

    def swallow(self) -> None:
        self.child.send_signal(signal.SIGUSR1)
        self._expect(b"swallowing\n")

    def go_on(self) -> None:
        self.child.send_signal(signal.SIGCONT)
        self.child.send_signal(signal.SIGUSR2)

    def kill(self) -> None:
        self.child.kill()
        self.child.wait(10)


@contextlib.contextmanager
def stalled_tree(target: Path) -> Iterator[Server]:
    server = Server(target)
    try:
        yield server
    finally:
        server.kill()
        assert server.child.stdout is not None
        server.child.stdout.close()
        libc = ctypes.CDLL(None, use_errno=True)
        while libc.umount2(os.fsencode(target), 0) == 0:
            pass


if __name__ == "__main__":
    serve(sys.argv[1])
