"""volumectl: the admin API for people, and with `-o json` for programs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from volumed.cli.backends import backend, driver, placement_class
from volumed.cli.bindings import ps, what, who
from volumed.cli.client import DEFAULT_SOCKET, ApiError, Client
from volumed.cli.copies import backup, restore
from volumed.cli.encryption import encryption
from volumed.cli.exit_codes import EXIT_CODES
from volumed.cli.health import completion, doctor, events, version
from volumed.cli.imports import import_
from volumed.cli.migration import migrate, migration
from volumed.cli.output import Output, clean
from volumed.cli.session import Session
from volumed.cli.snapshots import snapshot
from volumed.cli.takeover import takeover
from volumed.cli.verification import verify
from volumed.cli.volumes import clone, create, df, expand, inspect, ls, rm


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--socket",
    type=click.Path(path_type=Path),
    default=lambda: Path(os.environ.get("VOLUMED_SOCKET", DEFAULT_SOCKET)),
    show_default=f"$VOLUMED_SOCKET, or {DEFAULT_SOCKET}",
    help="The daemon's admin socket.",
)
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", help="What is printed.")
@click.pass_context
def cli(context: click.Context, socket: Path, output: str) -> None:
    """Manage volumed's volumes, and see which container uses which."""
    context.obj = Session(client=Client(socket), output=Output(as_json=output == "json"))


for command in (
    *(create, import_, clone, ls, inspect, df, expand, rm),
    *(snapshot, migrate, migration, verify, backup, restore, who, what, ps, takeover),
    *(encryption, backend, placement_class, driver, events, doctor, version, completion),
):
    cli.add_command(command)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        result = cli.main(args=list(argv) if argv is not None else None, prog_name="volumectl", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except ApiError as error:
        subject = f"{error.subject}: " if error.subject else ""
        click.echo(clean(f"volumectl: {subject}{error.message}"), err=True)
        if error.hint:
            click.echo(clean(f"  {error.hint}"), err=True)
        return EXIT_CODES.get(error.code, 1)
    except click.exceptions.Abort:
        click.echo("volumectl: nothing was done", err=True)
        return 130
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except BrokenPipeError:  # `volumectl ls | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
