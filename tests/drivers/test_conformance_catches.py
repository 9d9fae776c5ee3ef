"""The suite that all drivers pass is itself worth something: each of these wrong drivers fails it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# What is wrong, how (the body of a subclass of MemoryDriver), and the test that must notice.
WRONG = {
    "create forgets": ("def create(self, spec): return CreatedVolume(Handle('memory:' + spec.id), None)", "is_found"),
    "create empties what is there": (
        "def create(self, spec):\n"
        "        self.delete(Handle('memory:' + spec.id))\n"
        "        return super().create(spec)",
        "create_again_keeps",
    ),
    "delete does nothing": ("def delete(self, handle): pass", "delete_leaves_nothing"),
    "delete is not repeatable": (
        "def delete(self, handle):\n        self._volume(handle)\n        super().delete(handle)",
        "delete_leaves_nothing",
    ),
    "delete keeps the tree": (
        "def delete(self, handle): self.storage.volumes.pop(handle, None)",
        "new_volume_is_empty",
    ),
    "one tree for all": (
        "def _tree(self, name, source): return super()._tree('all' if name[0] == 'v' else name, source)",
        "do_not_see_one_another",
    ),
    "memory alone": (
        "def __init__(self, *given):\n        super().__init__(*given[:3])",
        "nothing_is_kept_in_memory",
    ),
    "inspect of nothing": ("def inspect(self, handle): return Facts(None, None)", "what_is_not_there"),
    "find invents": ("def find(self, volume_id): return Handle('memory:' + volume_id)", "what_is_not_there"),
    "list shows snapshots": (
        "def list(self):\n        return [*super().list(), *(Found(h, 'v') for h in self.storage.snapshots)]",
        "snapshots_are_no_volumes",
    ),
    "expand shrinks": (
        "def expand(self, handle, size):\n        self._volume(handle).size = size\n        return size",
        "expand_grows",
    ),
    "the snapshot follows": (
        "def snapshot(self, handle, snapshot_id):\n"
        "        name = Handle('memory:' + snapshot_id)\n"
        "        self.storage.snapshots[name] = self._volume(handle)\n"
        "        return name",
        "point_in_time",
    ),
    "restore eats the snapshot": (
        "def restore(self, handle, snapshot):\n"
        "        super().restore(handle, snapshot)\n"
        "        self.storage.snapshots.pop(snapshot)",
        "restore_puts_back",
    ),
    "restore does nothing": ("def restore(self, handle, snapshot): pass", "restore_puts_back"),
    "the clone is the source": (
        "def clone(self, source, spec):\n"
        "        handle = Handle('memory:' + spec.id)\n"
        "        self.storage.volumes[handle] = self._volume(source)\n"
        "        return CreatedVolume(handle, None)",
        "clone_stands_alone",
    ),
    "mount of nothing": (
        "def mount(self, handle, target, *, options, readonly): self.host.bind(self.storage.folder, target)",
        "mount_of_what_is_gone",
    ),
    "unmount does nothing": ("def unmount(self, handle, target): pass", "mounts_come_and_go"),
    "probe lies": ("def probe(self): return Probe({Capability.BLOCK: 'for no reason at all'}, {})", "probe_says_only"),
    "more room than there is": ("def capacity(self): return Capacity(total=1, available=2)", "capacity_is"),
    "a crash in create is forgotten": (
        "def create(self, spec):\n"
        "        (self.storage.folder / spec.id).mkdir()\n"
        "        crash.point('wrong.create')\n"
        "        return super().create(spec)",
        "crash_in_create",
    ),
    "a crash in restore loses all": (
        "def restore(self, handle, snapshot):\n"
        "        held = self.storage.volumes.pop(handle, None) or self.storage.snapshots[snapshot]\n"
        "        crash.point('wrong.restore')\n"
        "        self.storage.volumes[handle] = held\n"
        "        super().restore(handle, snapshot)",
        "crash_in_restore",
    ),
}

FILE = """\
from pathlib import Path
from tests.drivers.test_memory import MemoryConformance, MemoryDriver
from volumed.driver import *
from volumed.model import Handle
from volumed.testing import crash

{classes}
"""

CLASS = """\
class Wrong{number}(MemoryDriver):
    {body}

class TestWrong{number}(MemoryConformance):
    driver_class = Wrong{number}
"""


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """All of them in one run: `TestWrong3::test_...` of each that failed."""
    classes = "\n".join(CLASS.format(number=number, body=body) for number, (body, _) in enumerate(WRONG.values()))
    file = tmp_path_factory.mktemp("wrong") / "test_wrong.py"
    file.write_text(FILE.format(classes=classes))
    told = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml", file],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 1, told.stdout + told.stderr
    return {
        line.split("::", 1)[1].split(" ")[0]
        for line in told.stdout.splitlines()
        if line.startswith(("FAILED", "ERROR"))
    }


@pytest.mark.parametrize("what", WRONG)
def test_it_notices(failed: set[str], what: str) -> None:
    number = list(WRONG).index(what)
    mine = {name for name in failed if name.startswith(f"TestWrong{number}::")}
    assert any(WRONG[what][1] in name for name in mine), mine
