"""Killing volumed at a named step, starting it again, and comparing what ledger, machine and storage say."""

from __future__ import annotations

import ast
import http.client
from collections.abc import Callable, Iterable
from pathlib import Path

import grpc

from tests.harness.volumed import ApiError, Volumed

ROOT = Path(__file__).parents[2]
# Steps that only an orchestrator's calls pass.
CSI_AREAS = ("stage", "publish", "unpublish", "group-snapshot", "modify")


def crash_points() -> list[str]:
    """Every `crash.point("name")` of the sources: a new one is tested without a word here."""
    found: set[str] = set()
    for folder in ("volumed", "drivers"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "crash.point":
                    found.add(ast.literal_eval(node.args[0]))
    return sorted(found)


def live_through(volumed: Volumed, steps: Iterable[Callable[[], None]], point: str) -> int:
    """A whole life, killed once at the point; how often it was killed. Each step may be made again after a crash."""
    volumed.start(env={"VOLUMED_CRASH_AT": point})
    killed = 0
    for step in steps:
        try:
            step()
        except (OSError, http.client.HTTPException, ApiError, grpc.RpcError) as error:
            if isinstance(error, ApiError) and error.code != "unreachable":
                raise
            if isinstance(error, grpc.RpcError) and error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            assert volumed.wait_end() == -9, volumed.log()[-3000:]
            killed += 1
            # The same point may be passed on the way back: then it dies there again, before it serves anybody.
            volumed.start(env={"VOLUMED_CRASH_AT": point}, wait=False)
            try:
                volumed.wait_ready()
            except AssertionError:
                volumed.start()
            else:
                volumed.kill()
                volumed.start()
            assert_agree(volumed)
            step()
    return killed


def assert_agree(volumed: Volumed) -> None:
    """Ledger, mount table, loop devices and storage, right after the start."""
    assert volumed.api.get("doctor") == []
    known = {volume["id"] for volume in volumed.api.get("volumes")["volumes"]}
    bound = {binding["volume_id"] for binding in volumed.bindings()}
    assert set(volumed.mounted()) == bound
    devices = [path.stem for path in volumed.loops() if path.suffix == ".img" and path.stem.startswith("v")]
    assert set(devices) <= bound
    assert {path.name for path in (volumed.state / "mounts").iterdir()} <= known
    stored = {name.removeprefix(".new-").removeprefix(".trash-").partition(".")[0] for name in volumed.stored()}
    assert stored - {"stranger"} <= known  # what was not imported yet
