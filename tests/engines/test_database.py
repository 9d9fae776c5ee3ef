"""PostgreSQL in a container, under load, is moved from storage to storage: nothing that it acknowledged is lost."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import filesystems, wait_until
from tests.engines.conftest import plugin_socket
from tests.engines.test_docker_ceph import backend_table
from tests.harness.ceph import Ceph
from tests.harness.docker import Docker
from tests.harness.postgres import Postgres, import_image, load
from tests.harness.volumed import Volumed, running_volumed

pytestmark = [pytest.mark.root, pytest.mark.engine, pytest.mark.slow]

# One command each. What a size means differs: folders enforce none.
MOVES = {
    "sized": ("--size", "400m"),
    "ceph": (),
    "tree": (),
    "local": ("--accept-loss", "size"),
}


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="v-", dir="/tmp"))  # sockets' paths are short
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture(scope="module")
def volumed(docker: Docker, ceph: Ceph, folder: Path) -> Iterator[Volumed]:
    with filesystems(folder) as make:
        tree = make("btrfs", size=2 << 30)
        with running_volumed(
            folder / "v",
            plugin_socket=plugin_socket("database"),
            docker_socket=docker.socket,
            backends=f'{backend_table(ceph)}[backends.tree]\ndriver = "btrfs"\npath = "{tree}/volumes"\n',
        ) as running:
            yield running
            docker.remove_containers()
            wait_until(lambda: running.bindings() == [], timeout=60)
            for volume in docker("volume", "ls", "-q").split():
                docker("volume", "rm", volume)
            # The kept sources go with it.
            wait_until(lambda: not any(each["phase"] == "kept" for each in running.api.get("migrations")), timeout=60)
            wait_until(lambda: running.mounted() == {}, timeout=60)


@pytest.fixture
def postgres(docker: Docker, plugin: str, folder: Path) -> Postgres:
    import_image(docker, folder / "postgres.tar")
    docker("volume", "create", "-d", plugin, "-o", "backend=local", "pgdata")
    made = Postgres(docker, "pgdata", folder / "sockets")
    made.make()
    made.start()
    return made


def test_a_database_goes_round_all_storage_under_load(
    docker: Docker, volumed: Volumed, postgres: Postgres, folder: Path
) -> None:
    with load(postgres, folder / "pgbench.log") as witness:
        witness.wait_for_more()
        for backend, words in MOVES.items():
            witness.pause()
            print(f"$ volumectl migrate pgdata --to {backend} {' '.join(words)}")
            print(volumed.ctl("migrate", "pgdata", "--to", backend, *words).stdout.strip())
            assert docker.inspect("pgdata")["Status"]["backend"] == backend
            witness.wait_for_more()
            print(f"its clients waited {witness.pause():.2f} s")
        print("$ volumectl migration rollback pgdata --carry")
        print(volumed.ctl("migration", "rollback", "pgdata", "--carry").stdout.strip())
        assert docker.inspect("pgdata")["Status"]["backend"] == "tree"
        witness.wait_for_more()
        print(f"its clients waited {witness.pause():.2f} s")
    there = set(map(int, postgres.ask("SELECT number FROM witness")))
    assert set(witness.acknowledged) - there == set()
    assert postgres.ask(
        "SELECT (SELECT sum(abalance) FROM pgbench_accounts) = (SELECT sum(delta) FROM pgbench_history)"
    ) == ["t"]
    assert "ERROR" not in docker("logs", "postgres")
    postgres.check_relations()
    docker("stop", "postgres")
    postgres.check_pages()
    print(f"{len(witness.acknowledged)} acknowledged, and all are there")
