"""One dockerd and one volumed for the tests that do not kill them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.docker import PLUGINS, Docker, running_docker
from tests.harness.volumed import Volumed, running_volumed


def plugin_socket(name: str) -> Path:
    """A plugin's name must be nobody else's on the machine."""
    return PLUGINS / f"volumed-{name}-{os.getpid()}.sock"


@pytest.fixture(scope="module")
def docker() -> Iterator[Docker]:
    with running_docker() as running:
        yield running


@pytest.fixture(scope="module")
def volumed(
    docker: Docker, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Volumed]:
    socket = plugin_socket(request.module.__name__.rpartition("_")[2])
    with running_volumed(
        tmp_path_factory.mktemp("volumed"), plugin_socket=socket, docker_socket=docker.socket
    ) as running:
        yield running
        docker.remove_containers()  # or they would hold its mounts


@pytest.fixture
def plugin(volumed: Volumed) -> str:
    """The driver's name in `docker volume create -d`."""
    return volumed.plugin_socket.stem
