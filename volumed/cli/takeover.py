"""takeover."""

from __future__ import annotations

import click

from volumed.cli.client import joined
from volumed.cli.session import Session, confirm, pass_session


@click.command()
@click.argument("volume")
@click.option("--from", "node", default="", metavar="NODE", help="Take it from this node; default: from all others.")
@click.option(
    "--force-with-operator-word",
    "operator_word",
    is_flag=True,
    help="You have made sure that the old machine has no power. If it has, both write, and destroy the data.",
)
@click.option("--dry-run", is_flag=True, help="Say who holds it and what would be done.")
@click.option("-y", "--yes", is_flag=True, help="Ask nothing.")
@pass_session
def takeover(session: Session, *, volume: str, node: str, operator_word: bool, dry_run: bool, yes: bool) -> None:
    """Take a volume from a node that is gone.

    The storage must have cut the old node off, or say that nobody holds the volume; that the node does not answer is
    no proof.
    """
    if operator_word and not dry_run:
        confirm(f"Is every other machine that had {volume} without power?", yes=yes)
    body = {"node": node, "operator_word": operator_word, "dry_run": dry_run}
    with session.output.waiting(f"taking over {volume}"):
        told = joined(lambda: session.client.post("volumes", volume, "takeover", body=body))
    holders = told["holders"]
    held = ["the storage cannot tell"] if holders is None else [_holder(each) for each in holders] or ["nobody"]
    session.output.fields(
        told,
        {
            "volume": told["volume"]["name"],
            "held, by its storage": held,
            "used elsewhere, by the ledger": told["uses"] or ["by nobody"],
            "proof": told["proof"],
            **({} if told["done"] else {"would be done": told["action"]}),
        },
    )


def _holder(holder: dict[str, str]) -> str:
    node = f" (node {holder['node']})" if holder["node"] else ""
    return f"{holder['text']}{node}{', this one' if holder['ours'] else ''}"
