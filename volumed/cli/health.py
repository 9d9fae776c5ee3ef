"""events, doctor, version, completion."""

from __future__ import annotations

from typing import Any

import click
from click.shell_completion import get_completion_class

from volumed import __version__
from volumed.cli.client import ApiError
from volumed.cli.exit_codes import EXIT_CODES
from volumed.cli.session import Session, pass_session


@click.command()
@click.option("-f", "--follow", is_flag=True, help="Go on as they happen.")
@click.option("-n", "--limit", type=click.IntRange(0, 1000), default=100, show_default=True, help="Of the past.")
@pass_session
def events(session: Session, follow: bool, limit: int) -> None:
    """What happened, oldest first."""
    for event in session.client.lines("events", follow=follow, limit=limit):
        if session.output.as_json:
            click.echo(_compact(event))
        else:
            session.output.line(f"{event['at'][:19]}Z  {event['kind']:20}  {event['subject']}: {event['text']}")


def _compact(event: dict[str, Any]) -> str:
    """One line each, as they may go on for ever."""
    import json  # noqa: PLC0415 (for this command alone)

    return json.dumps(event)


@click.command()
@click.option("--fix", is_flag=True, help="Do what can be done without deleting data.")
@click.option("--destroy", multiple=True, metavar="FINDING", help="Fix this finding, which deletes data.")
@pass_session
def doctor(session: Session, fix: bool, destroy: tuple[str, ...]) -> int:
    """Compare ledger, machine and storage, and say what is wrong with what would be done about it.

    Ends with status 17 while something is not fixed.
    """
    with session.output.waiting("looking"):
        if fix or destroy:
            only = [] if fix else ["-"]  # no finding has this id: nothing but what --destroy names
            found = session.client.post("doctor", body={"fix": only, "destroy": list(destroy)})
        else:
            found = session.client.get("doctor")
    unknown = set(destroy) - {finding["id"] for finding in found}
    if session.output.as_json:
        session.output.json(found)
    else:
        _show(session, found)
    if unknown:
        raise ApiError("not_found", f"there is no finding {', '.join(sorted(unknown))}", hint="see `volumectl doctor`")
    return EXIT_CODES["findings"] if any(not finding["fixed"] for finding in found) else 0


def _show(session: Session, found: list[dict[str, Any]]) -> None:
    if not found:
        session.output.line("ledger, machine and storage agree")
    for finding in found:
        session.output.line(f"{finding['subject']}: {finding['text']}")
        if finding["fixed"]:
            session.output.line(f"    done: {finding['action']}")
        elif finding["error"]:
            session.output.line(f"    failed: {finding['error']}")
        elif finding["destroys"]:
            session.output.line(f"    to {finding['action']}: volumectl doctor --destroy {finding['id']}")
        else:
            session.output.line(f"    to do: {finding['action']}")


@click.command()
@pass_session
def version(session: Session) -> None:
    """Of volumectl and of the daemon."""
    told = session.client.get("version")
    session.output.fields(
        told | {"client": __version__},
        {
            "volumectl": __version__,
            "volumed": told["version"],
            "node": told["node"],
            "python": told["python"],
            "kernel": told["kernel"],
        },
    )


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """The completion script: eval "$(volumectl completion bash)"."""
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(context.find_root().command, {}, "volumectl", "_VOLUMECTL_COMPLETE").source())
