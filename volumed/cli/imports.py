"""import."""

from __future__ import annotations

from collections import Counter
from typing import Any

import click

from volumed.cli.client import joined
from volumed.cli.session import Session, confirm, pass_session
from volumed.cli.volumes import read_pairs


@click.command("import")
@click.argument("backend", default="")
@click.argument("reference", default="")
@click.option("--name", default="", help="Of the volume that it becomes.")
@click.option("--block", is_flag=True, help="A raw device, whatever lies on it.")
@click.option("--label", "labels", multiple=True, callback=read_pairs, metavar="KEY=VALUE")
@click.option("--list", "listing", is_flag=True, help="Say what the backend could import.")
@click.option("--rebuild", is_flag=True, help="The ledger was lost: find our volumes by the marks on their storage.")
@click.option("--dry-run", is_flag=True, help="With --rebuild: only say what would be done.")
@click.option("-y", "--yes", is_flag=True, help="Ask nothing.")
@pass_session
def import_(
    session: Session,
    *,
    backend: str,
    reference: str,
    name: str,
    block: bool,
    labels: dict[str, str],
    listing: bool,
    rebuild: bool,
    dry_run: bool,
    yes: bool,
) -> None:
    """Make what is on a backend's storage already a volume, with its data: a folder, an image, a subvolume, ...

    \b
    volumectl import --list BACKEND
    volumectl import BACKEND REFERENCE --name NAME
    volumectl import --rebuild
    """
    if rebuild:
        _rebuild(session, dry_run=dry_run, yes=yes)
    elif not backend:
        raise click.UsageError("say which BACKEND it lies on")
    elif listing:
        found = session.client.get("backends", backend, "importable")
        rows = [{"reference": each} for each in found]
        session.output.table(
            found if session.output.as_json else rows, {"REFERENCE": "reference"}, empty="there is nothing to import"
        )
    elif not reference or not name:
        raise click.UsageError("say what to import and how the volume is called: BACKEND REFERENCE --name NAME")
    else:
        _adopt(session, {"backend": backend, "reference": reference, "name": name, "block": block, "labels": labels})


def _adopt(session: Session, body: dict[str, Any]) -> None:
    with session.output.waiting(f"importing {body['reference']}"):
        made = joined(lambda: session.client.post("imports", body=body))
    if session.output.as_json:
        session.output.json(made)
        return
    session.output.line(made["name"])
    if made["mode"] == "block" and not body["block"]:
        click.echo("no file system that volumed knows was found on it: it is a raw device", err=True)


def _rebuild(session: Session, *, dry_run: bool, yes: bool) -> None:
    """Looked at first, then done: what would be made is told before anybody says yes."""
    with session.output.waiting("looking through the storage of every backend"):
        found = session.client.post("rebuild", body={"dry_run": True})
    todo = sum(line["outcome"] == "recreated" for line in found)
    if not dry_run and todo:
        if not session.output.as_json:
            _show(session, found, would=True)
        confirm(f"Put {todo} volumes into the ledger?", yes=yes)
        found = session.client.post("rebuild", body={"dry_run": False})
    if session.output.as_json:
        session.output.json(found)
    else:
        _show(session, found, would=dry_run)


def _show(session: Session, found: list[dict[str, Any]], *, would: bool) -> None:
    words = {"recreated": "would be recreated"} if would else {}
    rows = [line | {"shown": words.get(line["outcome"], line["outcome"])} for line in found]
    columns = {"BACKEND": "backend", "OUTCOME": "shown", "VOLUME": "name", "ID": "id", "": "text"}
    session.output.table(rows, columns, empty="no backend holds anything of ours")
    counts = Counter(row["shown"] for row in rows)
    session.output.line(", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())))
