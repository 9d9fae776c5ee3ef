from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.harness.volumed import Volumed, running_volumed


@pytest.fixture(scope="module")
def volumed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Volumed]:
    with running_volumed(tmp_path_factory.mktemp("v")) as running:
        yield running
