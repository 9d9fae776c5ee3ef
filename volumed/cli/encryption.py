"""encryption rotate."""

from __future__ import annotations

from functools import partial

import click

from volumed.cli.client import joined
from volumed.cli.session import Session, pass_session


@click.group()
def encryption() -> None:
    """Volumes that are encrypted at rest."""


@encryption.command()
@click.argument("volumes", nargs=-1, required=True)
@pass_session
def rotate(session: Session, volumes: tuple[str, ...]) -> None:
    """Let the newest key alone open each volume, in use or not: add it, see that it fits, take the old ones away.

    Before: give the new key as `key` of [keys.NAME] in volumed.toml, the one until now in `old`, and restart volumed.
    """
    told = []
    for volume in session.output.each(volumes, "changing keys"):
        told.append(joined(partial(session.client.post, "volumes", volume, "rotate-key")))
        if not session.output.as_json:
            session.output.line(told[-1]["name"])
    if session.output.as_json:
        session.output.json(told)
