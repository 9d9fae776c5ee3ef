"""A file system whose server can be made to hang, for what must not wait for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.stalled import Server, stalled_tree


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    made = tmp_path / "tree"
    made.mkdir()
    return made


@pytest.fixture
def server(tree: Path) -> Iterator[Server]:
    with stalled_tree(tree) as running:
        yield running
