"""What every command is given."""

from __future__ import annotations

from typing import NamedTuple

import click

from volumed.cli.client import Client
from volumed.cli.output import Output


class Session(NamedTuple):
    client: Client
    output: Output


pass_session = click.make_pass_decorator(Session)


def confirm(question: str, *, yes: bool) -> None:
    """Raises Abort unless it is confirmed; without a terminal nobody can be asked, so `--yes` must have said it."""
    if not yes:
        click.confirm(question, abort=True, err=True)
