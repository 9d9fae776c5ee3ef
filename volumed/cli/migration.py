"""migrate, and migration ls, show, follow, pause, resume, throttle, abort, rollback, finish."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from volumed.cli.client import ApiError
from volumed.cli.following import BEAT, FAILED, followed, time_shown, who
from volumed.cli.output import ago, size
from volumed.cli.session import Session, confirm, pass_session
from volumed.cli.volumes import all_volumes

if TYPE_CHECKING:
    pass

ENDED_WELL = ("kept", "done")
ENDED = (*ENDED_WELL, "failed", "aborted", "rolled-back")


@click.command()
@click.argument("volume", default="")
@click.option("--to", "backend", required=True, metavar="BACKEND", help="Where to.")
@click.option("-n", "--dry-run", is_flag=True, help="Show the plan and what would be lost, and do nothing.")
@click.option("--detach", is_flag=True, help="Begin it and return.")
@click.option("--path", default="", help="native, live, block or tree; default: the best that can be taken.")
@click.option("--size", metavar="SIZE", help="Of the volume at its new place; default: as it is.")
@click.option("--fs", default="", help="File system at its new place; default: as it is.")
@click.option("--bandwidth", metavar="SIZE", help="A second, as 200m; default: as fast as it goes.")
@click.option("--max-pause", metavar="TIME", help="For which its users may have to wait, as 5s.")
@click.option("--wait", is_flag=True, help="Until nobody uses it; no container is stopped.")
@click.option("--keep-source", metavar="TIME", default="24h", show_default=True, help="For an undo.")
@click.option("--accept-loss", default="", metavar="WORDS", help="What may be lost, as acls,hardlinks.")
@click.option("--all-from", metavar="BACKEND", help="All volumes of a backend, instead of one.")
@click.option("--parallel", type=click.IntRange(1, 64), default=2, show_default=True, help="With --all-from.")
@pass_session
def migrate(session: Session, /, *, volume: str, all_from: str | None, parallel: int, **wanted: Any) -> int:
    """Move a volume to another backend; its name and id stay. It is verified before it counts, and can be undone."""
    dry_run, detach = wanted.pop("dry_run"), wanted.pop("detach")
    body = _body(**wanted)
    if bool(volume) == bool(all_from):
        raise click.UsageError("name one VOLUME, or all of a backend with --all-from")
    if all_from and detach:
        raise click.UsageError("--all-from waits for the moves it begins; leave --detach out")
    if all_from:
        return _evacuate(session, all_from, body, parallel=parallel, dry_run=dry_run)
    if dry_run:
        _show_plan(session, volume, session.client.post("volumes", volume, "migration-plan", body=body))
        return 0
    with session.output.waiting(f"looking through {volume}"):
        begun = session.client.post("volumes", volume, "migrate", body=body)
    if detach:
        if session.output.as_json:
            session.output.json(begun)
        else:
            session.output.line(begun["id"])
        return 0
    return _follow(session, begun["id"])


def _body(
    *,
    backend: str,
    path: str,
    size: str | None,
    fs: str,
    bandwidth: str | None,
    max_pause: str | None,
    wait: bool,
    keep_source: str,
    accept_loss: str,
) -> dict[str, Any]:
    return {
        "backend": backend,
        "path": path,
        "size": size,
        "filesystem": fs,
        "bandwidth": bandwidth,
        "max_pause": max_pause,
        "wait": wait,
        "keep_source": keep_source,
        "accept_loss": [word for word in accept_loss.split(",") if word],
        "by": who(),
    }


def _show_plan(session: Session, volume: str, plan: dict[str, Any]) -> None:
    target = plan["target"]
    kind = f", {target['filesystem']}" if target["filesystem"] else ""
    none = "none: it is moved under its users" if plan["touched"] else "none: nobody uses it"
    pause = f"about {time_shown(plan['pause'])}" if plan["pause"] else none
    session.output.fields(
        plan,
        {
            "volume": volume,
            "to": f"{target['backend']} ({size(target['size'])}{kind})",
            "path": [
                plan["path"] + (f": {plan['way']}" if plan["way"] else ""),
                *(f"not {path}: {why}" for path, why in plan["rejected"].items()),
            ],
            "phases": " > ".join(plan["phases"]),
            "data": size(plan["bytes"]) + (f" in {plan['files']} files" if plan["files"] else ""),
            "time": f"about {time_shown(plan['seconds'])}",
            "pause": pause,
            "used by": plan["touched"] or "nobody",
            "losses": [loss["text"] for loss in plan["losses"]] or "none",
        },
    )


# Watching
def _follow(session: Session, reference: str) -> int:
    return _report(
        session, followed(session, "migrations", reference, lambda move: move["phase"] in ENDED or move["paused"])
    )


def _report(session: Session, migration: dict[str, Any]) -> int:
    if session.output.as_json:
        session.output.json(migration)
    else:
        session.output.line(_sentence(migration))
    return 0 if migration["phase"] in ENDED_WELL else FAILED


def _sentence(migration: dict[str, Any]) -> str:
    volume, target = migration["volume"], migration["target"]["backend"]
    match migration["phase"]:
        case "kept" | "done":
            kept = "; the source is kept for an undo" if migration["phase"] == "kept" else ""
            pause = (
                f", nobody could write for {time_shown(migration['pause'])}" if migration["pause"] is not None else ""
            )
            copied = f"{size(migration['copied'])} copied"
            if migration["path"] == "native":
                copied = (
                    f"brought by the storage, {copied} besides" if migration["copied"] else "brought by the storage"
                )
            took = f"{copied} in {time_shown(_duration(migration))}"
            proof = f"verified as blake3 {migration['digest'][:16]}"
            return f"{volume} is on {target}: {took}, {proof}{pause}{kept}"
        case "aborted" | "rolled-back":
            return f"{volume} is where it was, on {migration['source']['backend']}"
        case "failed":
            return f"{volume} stays on {migration['source']['backend']}: {migration['error']}"
    return f"{volume}: {migration['phase']}{', paused' if migration['paused'] else ''}"


def _duration(migration: dict[str, Any]) -> float:
    from datetime import datetime  # noqa: PLC0415

    times = [datetime.fromisoformat(each["entered"]) for each in migration["phases"]]
    return (times[-1] - times[0]).total_seconds()


# All of a backend
def _evacuate(session: Session, source: str, body: dict[str, Any], *, parallel: int, dry_run: bool) -> int:
    """As many at once as asked for. Called again after an interruption it goes on with what is left."""
    waiting = [volume["name"] for volume in all_volumes(session) if volume["backend"] == source]
    if dry_run:
        for name in waiting:
            _show_plan(session, name, session.client.post("volumes", name, "migration-plan", body=body))
        return 0
    running: list[str] = []
    ended: list[dict[str, Any]] = []
    while waiting or running:
        while waiting and len(running) < parallel:
            name = waiting.pop(0)
            try:
                running.append(session.client.post("volumes", name, "migrate", body=body)["id"])
            except ApiError as error:
                ended.append({"volume": name, "phase": "refused", "error": f"{error.message} {error.hint}".strip()})
        time.sleep(BEAT)
        states = [session.client.get("migrations", reference) for reference in running]
        ended += [state for state in states if state["phase"] in ENDED]
        running = [state["id"] for state in states if state["phase"] not in ENDED]
    session.output.table(
        ended, {"VOLUME": "volume", "OUTCOME": "phase", "ERROR": "error"}, empty=f"{source} holds no volumes"
    )
    return 0 if all(each["phase"] in ENDED_WELL for each in ended) else FAILED


# The group
@click.group()
def migration() -> None:
    """Moves of volumes: watched, steered, undone."""


@migration.command("ls")
@click.option("-a", "--all", "every", is_flag=True, help="Those that ended as well.")
@pass_session
def ls(session: Session, every: bool) -> None:
    """List the moves that run, or are kept for an undo."""
    found = [each for each in session.client.get("migrations") if every or each["phase"] not in ENDED[1:]]
    if not session.output.as_json:
        for each in found:
            running = each["progress"] or {}
            each |= {
                "from": each["source"]["backend"],
                "to": each["target"]["backend"],
                "state": each["phase"] + (", paused" if each["paused"] else ""),
                "rate": f"{size(int(running['rate']))}/s" if running.get("rate") else "-",
                "left": time_shown(running.get("left")),
                "when": ago(each["created"]),
            }
    columns = {"ID": "id", "VOLUME": "volume", "FROM": "from", "TO": "to", "PHASE": "state", "RATE": "rate"}
    session.output.table(found, columns | {"LEFT": "left", "BEGUN": "when", "BY": "by"}, empty="nothing is moved")


@migration.command("show")
@click.argument("reference", metavar="ID|VOLUME")
@pass_session
def show(session: Session, reference: str) -> None:
    """Show a move, or of a volume the latest."""
    found = session.client.get("migrations", reference)
    running = found["progress"] or {}
    session.output.fields(
        found,
        {
            "id": found["id"],
            "volume": found["volume"],
            "from": found["source"]["backend"],
            "to": f"{found['target']['backend']} by {found['path']}",
            "phase": found["phase"] + (", paused" if found["paused"] else ""),
            "now": running.get("step", ""),
            "copied": f"{size(found['copied'])} of {size(found['expected'])}",
            "left": time_shown(running["left"]) if running.get("left") else "",
            "digest": found["digest"],
            "pause": time_shown(found["pause"]) if found["pause"] is not None else "",
            "error": found["error"],
            "by": found["by"],
            "kept until": f"{found['kept_until'][:19]}Z" if found["phase"] == "kept" else "",
            "history": [f"{each['entered'][:19]}Z {each['phase']}" for each in found["phases"]],
        },
    )


@migration.command("follow")
@click.argument("reference", metavar="ID|VOLUME")
@pass_session
def follow(session: Session, reference: str) -> int:
    """Watch a move until it ends."""
    return _follow(session, session.client.get("migrations", reference)["id"])


def _steer(session: Session, reference: str, *words: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    changed: dict[str, Any] = session.client.post("migrations", reference, *words, body=body)
    if session.output.as_json:
        session.output.json(changed)
    else:
        session.output.line(changed["id"])
    return changed


@migration.command("pause")
@click.argument("reference", metavar="ID|VOLUME")
@pass_session
def pause(session: Session, reference: str) -> None:
    """Stop a move for now; what was copied stays."""
    _steer(session, reference, "pause")


@migration.command("resume")
@click.argument("reference", metavar="ID|VOLUME")
@pass_session
def resume(session: Session, reference: str) -> None:
    """Let a paused move go on."""
    _steer(session, reference, "resume")


@migration.command("throttle")
@click.argument("reference", metavar="ID|VOLUME")
@click.argument("bandwidth")
@pass_session
def throttle(session: Session, reference: str, bandwidth: str) -> None:
    """Give a move another BANDWIDTH, as 200m, or `none`."""
    _steer(session, reference, "throttle", body={"bandwidth": None if bandwidth == "none" else bandwidth})


@migration.command("abort")
@click.argument("reference", metavar="ID|VOLUME")
@pass_session
def abort(session: Session, reference: str) -> int:
    """End a move before it counts. The source was never touched."""
    aborted = session.client.post("migrations", reference, "abort")
    outcome = _follow(session, aborted["id"])
    return outcome if session.client.get("migrations", aborted["id"])["phase"] != "aborted" else 0


@migration.command("rollback")
@click.argument("reference", metavar="ID|VOLUME")
@click.option("--carry", is_flag=True, help="Carry back what was written since.")
@click.option("--discard", is_flag=True, help="Lose what was written since.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@pass_session
def rollback(session: Session, reference: str, carry: bool, discard: bool, yes: bool) -> int:
    """Undo a move while its source is kept."""
    if discard:
        confirm(f"Lose what was written to {reference} since it was moved?", yes=yes)
    begun = session.client.post("migrations", reference, "rollback", body={"carry": carry, "discard": discard})
    outcome = _follow(session, begun["id"])
    return outcome if session.client.get("migrations", begun["id"])["phase"] != "rolled-back" else 0


@migration.command("finish")
@click.argument("reference", metavar="ID|VOLUME")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@pass_session
def finish(session: Session, reference: str, yes: bool) -> None:
    """Give the undo up: the source goes now."""
    confirm(f"Delete the old place of {reference}?", yes=yes)
    _steer(session, reference, "finish")
