"""verify."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import click

from volumed.cli.client import ApiError
from volumed.cli.exit_codes import EXIT_CODES
from volumed.cli.output import size
from volumed.cli.session import Session, pass_session


@click.command()
@click.argument("volume")
@pass_session
def verify(session: Session, volume: str) -> int:
    """Read a volume from its storage, and compare it with what is kept of it.

    Kept are the digest that its last move was proven by; while that move can be undone, what was written down of each
    file or extent, and the source itself. A volume that was used since may rightly differ: that is said, and is no
    error. One that is in use is not read. Of a volume that was never moved the digest is shown, and that all of it
    can be read.
    """
    return follow(session, volume, session.client.lines("volumes", volume, "verify"))


def follow(session: Session, what: str, lines: Iterable[dict[str, Any]]) -> int:
    with session.output.counting(f"verifying {what}") as show:
        found = None
        for line in lines:
            if line["error"]:
                told = line["error"]
                raise ApiError(told["code"], told["message"], subject=told["subject"], hint=told["hint"])
            if line["reading"]:
                show(line["reading"]["step"], line["reading"]["bytes"])
            found = line["verification"]
    if found is None:
        raise ApiError("unreachable", "the daemon ended before it was done", hint="try again")
    _report(session, found)
    different = any(each["outcome"] == "different" for each in found["comparisons"])
    return EXIT_CODES["integrity_error"] if different else 0


def _report(session: Session, found: dict[str, Any]) -> None:
    if session.output.as_json:
        session.output.json(found)
        return
    files = f" in {found['files']} files" if found["files"] else ""
    session.output.line(
        f"{found['volume']}: {size(found['bytes'])}{files} read by {found['path']} in {found['seconds']:.1f} s, "
        f"blake3 {found['digest'][:16]}"
    )
    for each in found["comparisons"]:
        reason = f" ({each['text']})" if each["text"] else ""
        session.output.line(f"{_WORDS[each['outcome']]} {each['against']}{reason}")
        for line in each["differences"]:
            session.output.line(f"  {line}")
    if not found["comparisons"]:
        session.output.line("nothing is kept to compare it with; all of it can be read")


_WORDS = {
    "equal": "equal to",
    "different": "DIFFERENT from",
    "changed": "not compared with",
    "unknown": "not comparable with",
}
