"""snapshot create, ls, rm, restore."""

from __future__ import annotations

import click

from volumed.cli.client import joined
from volumed.cli.output import ago, size
from volumed.cli.session import Session, confirm, pass_session


@click.group()
def snapshot() -> None:
    """Points in time of a volume."""


@snapshot.command("create")
@click.argument("volume")
@click.argument("name", default="")
@pass_session
def create(session: Session, volume: str, name: str) -> None:
    """Take a snapshot; without a name it is named after the time."""
    with session.output.waiting(f"taking a snapshot of {volume}"):
        made = session.client.post("volumes", volume, "snapshots", body={"name": name})
    if session.output.as_json:
        session.output.json(made)
    else:
        session.output.line(made["name"])


@snapshot.command("ls")
@click.argument("volume")
@pass_session
def ls(session: Session, volume: str) -> None:
    """List a volume's snapshots."""
    found = sorted(session.client.get("volumes", volume, "snapshots"), key=lambda each: str(each["created"]))
    if not session.output.as_json:
        for each in found:
            each |= {"shown": size(each["size"]), "when": ago(each["created"])}
    columns = {"NAME": "name", "SIZE": "shown", "STATE": "state", "CREATED": "when"}
    session.output.table(found, columns, empty=f"{volume} has no snapshots")


@snapshot.command("rm")
@click.argument("volume")
@click.argument("name")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.option("-n", "--dry-run", is_flag=True, help="Say what would be destroyed, and destroy nothing.")
@pass_session
def rm(session: Session, volume: str, name: str, yes: bool, dry_run: bool) -> None:
    """Remove a snapshot."""
    known = [each["name"] for each in session.client.get("volumes", volume, "snapshots")]
    if dry_run and name in known:
        session.output.line(f"would remove snapshot {name} of {volume}")
        return
    if name in known:
        confirm(f"Remove snapshot {name} of {volume}?", yes=yes)
    with session.output.waiting(f"removing snapshot {name}"):
        joined(lambda: session.client.delete("volumes", volume, "snapshots", name))
    if not session.output.as_json:
        session.output.line(name)


@snapshot.command("restore")
@click.argument("volume")
@click.argument("name")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.option("-n", "--dry-run", is_flag=True, help="Check that it can be done, and do nothing.")
@pass_session
def restore(session: Session, volume: str, name: str, yes: bool, dry_run: bool) -> None:
    """Put a volume back to a snapshot. What was written since is lost."""
    session.client.post("volumes", volume, "snapshots", name, "restore", dry_run=True)
    if dry_run:
        session.output.line(f"would put {volume} back to snapshot {name}; what was written since would be lost")
        return
    confirm(f"Put {volume} back to snapshot {name} and lose what was written since?", yes=yes)
    with session.output.waiting(f"restoring {volume}"):
        restored = joined(lambda: session.client.post("volumes", volume, "snapshots", name, "restore"))
    if session.output.as_json:
        session.output.json(restored)
    else:
        session.output.line(f"{volume} is as it was in {name}")
