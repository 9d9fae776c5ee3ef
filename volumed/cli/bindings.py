"""who, what, ps: which container uses which volume."""

from __future__ import annotations

from typing import Any

import click

from volumed.cli.output import ago
from volumed.cli.session import Session, pass_session

COLUMNS = {
    "VOLUME": "volume",
    "ENGINE": "engine",
    "USED BY": "container",
    "ID": "short_id",
    "IMAGE": "image",
    "AT": "target",
    "ACCESS": "access",
    "SINCE": "when",
    "NODE": "node",
}


def consumers_of(binding: dict[str, Any]) -> list[str]:
    """For a line: the names of its containers, or what else is known of the hold."""
    if binding["staging"]:
        return []
    names = [_name(consumer) for consumer in binding["consumers"]]
    return names or [f"{binding['engine']}:{binding['mount_id'][:12]}"]


def _name(consumer: dict[str, Any]) -> str:
    """A container's name alone; of all others what they are, too."""
    name = consumer["name"] or consumer["id"][:12] or "?"
    return name if consumer["kind"] == "container" else f"{consumer['kind']} {name}"


def rows(bindings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per container, pod, ...; a hold whose container nobody has named yet has one too."""
    nobody = {"id": "", "name": "?", "image": "", "target": "", "readonly": False, "kind": "container"}
    nobody_yet = nobody | {"name": "(staged, and used by nobody yet)"}
    used = {binding["volume_id"] for binding in bindings if not binding.get("staging")}
    return [
        {
            **binding,
            "volume": f"{binding['volume']} ({binding['claim']})" if binding.get("claim") else binding["volume"],
            "container": _name(consumer),
            "short_id": consumer["id"][:12] or binding["mount_id"][:12],
            "image": consumer["image"],
            "target": consumer["target"],
            "access": "ro" if consumer["readonly"] else "rw",
            "when": ago(binding["since"]),
            "ended": f"{ago(binding['until'])} ({binding['reason']})" if "until" in binding else "",
        }
        for binding in bindings
        if not binding.get("staging") or binding["volume_id"] not in used
        for consumer in binding["consumers"] or [nobody_yet if binding.get("staging") else nobody]
    ]


def _show(session: Session, bindings: list[dict[str, Any]], columns: dict[str, str], *, empty: str) -> None:
    session.output.table(bindings if session.output.as_json else rows(bindings), columns, empty=empty)


@click.command()
@click.argument("volume")
@click.option("--history", is_flag=True, help="Those who used it before, too.")
@pass_session
def who(session: Session, volume: str, history: bool) -> None:
    """Which containers use a volume."""
    found = session.client.get("volumes", volume, "bindings")
    columns = COLUMNS
    if history:
        found += session.client.get("volumes", volume, "history")
        columns = COLUMNS | {"ENDED": "ended"}
    _show(session, found, columns, empty=f"nobody uses {volume}")


@click.command()
@click.argument("container")
@pass_session
def what(session: Session, container: str) -> None:
    """Which volumes a container uses: by its name, its id or the beginning of it."""
    _show(session, session.client.get("consumers", container), COLUMNS, empty=f"{container} uses no volume")


@click.command()
@pass_session
def ps(session: Session) -> None:
    """Every use of every volume."""
    found = sorted(session.client.get("bindings"), key=lambda binding: (binding["volume"], binding["since"]))
    _show(session, found, COLUMNS, empty="no volume is in use")
