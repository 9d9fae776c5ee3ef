"""backup create, ls, show, verify, stop, rm; and restore."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import click

from volumed.cli import verification
from volumed.cli.following import FAILED, followed, time_shown, who
from volumed.cli.output import ago, size
from volumed.cli.session import Session, confirm, pass_session


class _Backups(click.Group):
    """`backup VOLUME --to BACKEND` is `backup create VOLUME --to BACKEND`."""

    def resolve_command(
        self, context: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.commands:
            args = ["create", *args]
        return super().resolve_command(context, args)


@click.group(cls=_Backups)
def backup() -> None:
    """Backups of volumes on other storage: `backup VOLUME --to BACKEND`, and what is there."""


@backup.command("create")
@click.argument("source", metavar="VOLUME[@SNAPSHOT]")
@click.option("--to", "backend", required=True, metavar="BACKEND", help="Where to.")
@click.option("--full", is_flag=True, help="Copy all, whatever earlier backups there hold.")
@click.option("--bandwidth", metavar="SIZE", help="A second, as 200m; default: as fast as it goes.")
@click.option("--accept-loss", default="", metavar="WORDS", help="What may be lost, as acls,hardlinks.")
@click.option("--detach", is_flag=True, help="Begin it and return.")
@pass_session
def create(
    session: Session,
    /,
    *,
    source: str,
    backend: str,
    full: bool,
    bandwidth: str | None,
    accept_loss: str,
    detach: bool,
) -> int:
    """Back a volume up, in use or not, as it is at one moment.

    Of a volume in use from a snapshot, where its backend takes one of such. After the first one only what changed is
    copied, and each is whole by itself. It is read back and proven before it counts.
    """
    body = {
        "backend": backend,
        "full": full,
        "bandwidth": bandwidth,
        "accept_loss": [word for word in accept_loss.split(",") if word],
        "by": who(),
    }
    with session.output.waiting(f"looking through {source}"):
        begun = session.client.post("volumes", source, "backup", body=body)
    return _detached(session, begun) if detach else _follow(session, begun["id"])


@backup.command("ls")
@click.argument("volume", default="")
@click.option("-a", "--all", "every", is_flag=True, help="Clones, restores and what failed as well.")
@pass_session
def ls(session: Session, volume: str, every: bool) -> None:
    """List backups, of all volumes or of one."""
    found = [
        each
        for each in session.client.get("copies")
        if (every or (each["kind"] == "backup" and each["state"] != "failed"))
        and volume in ("", each["volume"], each["volume_id"])
    ]
    if not session.output.as_json:
        for each in found:
            each |= {
                "holds": size(each["bytes"]) if each["state"] == "ready" else "-",
                "wrote": size(each["copied"]),
                "how": "incremental" if each["base"] else "full",
                "when": ago(each["created"]),
            }
    columns = {"ID": "id", "VOLUME": "volume", "ON": "backend", "STATE": "state", "DATA": "holds", "COPIED": "wrote"}
    kinds = {"KIND": "kind"} if every else {}
    session.output.table(found, columns | kinds | {"": "how", "MADE": "when"}, empty="there are no backups")


@backup.command("show")
@click.argument("reference", metavar="BACKUP|VOLUME")
@pass_session
def show(session: Session, reference: str) -> None:
    """Show a backup, or of a volume the latest."""
    found = session.client.get("copies", reference)
    session.output.fields(
        found,
        {
            "id": found["id"],
            "kind": found["kind"],
            "volume": found["volume"] + (f"@{found['snapshot']}" if found["snapshot"] else ""),
            "on": f"{found['backend']} by {found['path']}",
            "state": found["state"],
            "of": found["of"] or "",
            "as of": found["point"],
            "data": f"{size(found['bytes'])}" + (f" in {found['files']} files" if found["files"] else ""),
            "copied": size(found["copied"]) + (f", the rest is as in {found['base']}" if found["base"] else ""),
            "size": size(found["size"]) if found["size"] else "",
            "digest": found["digest"],
            "without": ", ".join(found["accepted"]),
            "begun": f"{found['created'][:19]}Z ({ago(found['created'])})",
            "ended": f"{found['ended'][:19]}Z" if found["ended"] else "",
            "by": found["by"],
            "error": found["error"],
        },
    )


@backup.command("verify")
@click.argument("reference", metavar="BACKUP|VOLUME")
@pass_session
def verify(session: Session, reference: str) -> int:
    """Read all of a backup from its storage, and compare it with what was written down when it was made."""
    return verification.follow(session, reference, session.client.lines("copies", reference, "verify"))


@backup.command("stop")
@click.argument("reference", metavar="ID")
@pass_session
def stop(session: Session, reference: str) -> None:
    """End a backup, clone or restore that runs. Nothing is left of it."""
    _told(session, session.client.post("copies", reference, "stop"))


@backup.command("rm")
@click.argument("references", metavar="ID...", nargs=-1, required=True)
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.option("-n", "--dry-run", is_flag=True, help="Say what would be destroyed, and destroy nothing.")
@pass_session
def rm(session: Session, references: tuple[str, ...], yes: bool, dry_run: bool) -> None:
    """Remove backups with their data, by their ids. Others that were made after them stay whole."""
    found = [session.client.get("copies", reference) for reference in references]
    for reference, each in zip(references, found, strict=True):
        if not each["id"].startswith(reference):
            raise click.UsageError(f"{reference} is a volume: name its backups by their ids, see `backup ls`")
    lines = [f"{each['id']} ({each['volume']} on {each['backend']}, {ago(each['created'])})" for each in found]
    if dry_run:
        for line in lines:
            session.output.line(f"would remove {line}")
        return
    confirm("Remove " + "; ".join(lines) + "?", yes=yes)
    for each in found:
        with session.output.waiting(f"removing {each['id']}"):
            _told(session, session.client.delete("copies", each["id"]))


@click.command()
@click.argument("reference", metavar="BACKUP|VOLUME")
@click.argument("name", default="")
@click.option("--to", "backend", default="", metavar="BACKEND", help="Default: where its volume is.")
@click.option("--size", metavar="SIZE", help="Of the new volume.")
@click.option("--accept-loss", default="", metavar="WORDS", help="What may be lost, as acls,hardlinks.")
@click.option("--in-place", is_flag=True, help="Put it back into its volume, and lose what that has now.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.option("--detach", is_flag=True, help="Begin it and return.")
@pass_session
def restore(
    session: Session,
    /,
    *,
    reference: str,
    name: str,
    backend: str,
    size: str | None,
    accept_loss: str,
    in_place: bool,
    yes: bool,
    detach: bool,
) -> int:
    """Make volume NAME of a backup, or of a volume's latest; NAME is its volume's own when that is gone.

    What is read must have the digest that the backup was proven by, and what is written is read back. With --in-place
    the volume, which nobody may use, has the backup's data from one instant on, or on any failure stays as it was.
    """
    body: dict[str, Any] = {"name": name, "backend": backend, "in_place": in_place, "by": who()}
    if size:
        body["size"] = size
    if accept_loss:
        body["accept_loss"] = [word for word in accept_loss.split(",") if word]
    if in_place:
        held = session.client.get("copies", reference)
        confirm(f"Put {held['volume']} back to {held['created'][:19]}Z and lose what it has now?", yes=yes)
    begun = session.client.post("copies", reference, "restore", body=body)
    return _detached(session, begun) if detach else _follow(session, begun["id"])


def _told(session: Session, copy: dict[str, Any]) -> None:
    if session.output.as_json:
        session.output.json(copy)
    else:
        session.output.line(copy["id"])


def _detached(session: Session, begun: dict[str, Any]) -> int:
    _told(session, begun)
    return 0


def _follow(session: Session, reference: str) -> int:
    last = followed(session, "copies", reference, lambda copy: copy["state"] != "copying")
    if session.output.as_json:
        session.output.json(last)
    else:
        session.output.line(_sentence(last))
    return 0 if last["state"] == "ready" else FAILED


def _sentence(copy: dict[str, Any]) -> str:
    if copy["state"] != "ready":
        return f"{copy['kind']} of {copy['volume']}: {copy['error'] or copy['state']}"
    begun, ended = (datetime.fromisoformat(copy[key]) for key in ("created", "ended"))
    took = f"{size(copy['copied'])} copied in {time_shown((ended - begun).total_seconds())}"
    proof = f"verified as blake3 {copy['digest'][:16]}"
    if copy["kind"] == "backup":
        how = " since the last one" if copy["base"] else ""
        return f"{copy['id']}: {copy['volume']} is on {copy['backend']}, {size(copy['bytes'])}, {took}{how}, {proof}"
    name = copy["name"] or copy["volume"]
    return f"{name} is on {copy['backend']} as {copy['volume']} was ({copy['point']}): {took}, {proof}"
