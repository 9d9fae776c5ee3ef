"""create, clone, ls, inspect, df, expand, rm."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from volumed.cli.bindings import consumers_of
from volumed.cli.client import ApiError, joined
from volumed.cli.output import ago, size
from volumed.cli.session import Session, confirm, pass_session

PAGE = 5000
# The label with the PersistentVolumeClaim that a volume was made for, as namespace/name.
CLAIM = "kubernetes.pvc"


def _octal(_: click.Context, param: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    try:
        mode = int(value, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o7777:
        raise click.BadParameter(f"{value!r} is not octal; write it as 0750", param=param)
    return mode


def read_pairs(_: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for value in values:
        key, equals, rest = value.partition("=")
        if not equals or not key:
            raise click.BadParameter(f"{value!r} is not KEY=VALUE", param=param)
        pairs[key] = rest
    return pairs


@click.command()
@click.argument("name")
@click.option("--backend", default="", help="Default: the first that can do what is asked.")
@click.option("--class", "class_name", default="", help="To choose a backend from; see `volumectl class ls`.")
@click.option("--encrypt", "encryption", default="", metavar="KEY", help="The name of a key in volumed.toml.")
@click.option("--size", metavar="SIZE", help="As 20g or 512MiB; enforced.")
@click.option("--fs", default="", help="File system on a block device: ext4, xfs, btrfs.")
@click.option("--block", is_flag=True, help="A raw device, no file system.")
@click.option("--mkfs-options", default="", help="Words for mkfs.")
@click.option("--mount-options", default="", help="Words for mount, with commas.")
@click.option("--uid", type=click.IntRange(0, 2**32 - 2), help="Owner of the root.")
@click.option("--gid", type=click.IntRange(0, 2**32 - 2), help="Group of the root.")
@click.option("--mode", metavar="OCTAL", callback=_octal, help="Permissions of the root, as 0750.")
@click.option("--from", "source", default="", help="VOLUME to clone, or VOLUME@SNAPSHOT.")
@click.option("--label", "labels", multiple=True, callback=read_pairs, metavar="KEY=VALUE")
@click.option(
    "--opt", "options", multiple=True, callback=read_pairs, metavar="KEY=VALUE", help="The driver's own option."
)
@pass_session
def create(
    session: Session,
    *,
    name: str,
    backend: str,
    class_name: str,
    encryption: str,
    size: str | None,
    fs: str,
    block: bool,
    mkfs_options: str,
    mount_options: str,
    uid: int | None,
    gid: int | None,
    mode: int | None,
    source: str,
    labels: dict[str, str],
    options: dict[str, str],
) -> None:
    """Create a volume; one that is there and is what was asked for is success."""
    body = {
        "name": name,
        "backend": backend,
        "class_name": class_name,
        "encryption": encryption,
        "size": size,
        "mode": "block" if block else "filesystem",
        "filesystem": fs,
        "mkfs_options": mkfs_options.split(),
        "mount_options": [word for word in mount_options.split(",") if word],
        "ownership": {"uid": uid, "gid": gid, "mode": mode},
        "source": source,
        "labels": labels,
        "options": options,
    }
    _create(session, body)


def _create(session: Session, body: dict[str, Any]) -> None:
    with session.output.waiting(f"creating {body['name']}"):
        made = joined(lambda: session.client.post("volumes", body=body))
    if session.output.as_json:
        session.output.json(made)
    else:
        session.output.line(made["name"])


@click.command()
@click.argument("source", metavar="VOLUME[@SNAPSHOT]")
@click.argument("name")
@click.option("--size", metavar="SIZE", help="Larger than the original.")
@click.option("--to", "backend", default="", metavar="BACKEND", help="On other storage, verified.")
@click.option("--accept-loss", default="", metavar="WORDS", help="With --to: what may be lost, as acls,hardlinks.")
@pass_session
def clone(session: Session, /, *, source: str, name: str, size: str | None, backend: str, accept_loss: str) -> None:
    """Make a new volume with the data of another, or of a snapshot.

    With --to on another backend, read back and proven; of a volume in use only where its backend can take a snapshot
    of one, so that the copy is of one moment.
    """
    if not backend:
        _create(session, {"name": name, "source": source, "size": size})
        return
    words = [word for word in accept_loss.split(",") if word]
    body = {"name": name, "backend": backend, "size": size, "accept_loss": words}
    with session.output.waiting(f"copying {source} to {backend}"):
        made = joined(lambda: session.client.post("volumes", source, "copy", body=body))
    if session.output.as_json:
        session.output.json(made)
    else:
        session.output.line(made["name"])


def all_volumes(session: Session) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    after = ""
    while True:
        page = session.client.get("volumes", after=after, limit=PAGE)
        found += page["volumes"]
        if page["next"] is None:
            return sorted(found, key=lambda volume: str(volume["name"]))
        after = page["next"]


@click.command()
@click.option("--backend", help="Only of this backend.")
@click.option("--label", "labels", multiple=True, metavar="KEY[=VALUE]", help="Only with this label.")
@click.option("-q", "--quiet", is_flag=True, help="Names only.")
@pass_session
def ls(session: Session, backend: str | None, labels: tuple[str, ...], quiet: bool) -> None:
    """List volumes."""
    found = [volume for volume in all_volumes(session) if _chosen(volume, backend, labels)]
    if quiet:
        for volume in found:
            session.output.line(volume["name"])
        return
    if session.output.as_json:
        session.output.json(found)
        return
    used: dict[str, list[str]] = {}
    for binding in session.client.get("bindings"):
        used.setdefault(binding["volume_id"], []).extend(consumers_of(binding))
    rows = [
        volume
        | {"shown": size(volume["size"]), "fs": volume["filesystem"] or "", "when": ago(volume["created"])}
        | {"users": ", ".join(used.get(volume["id"], [])), "claim": volume["labels"].get(CLAIM, "")}
        for volume in found
    ]
    columns = {"NAME": "name", "BACKEND": "backend", "SIZE": "shown", "FS": "fs", "STATE": "state"}
    if any(row["claim"] for row in rows):
        columns["CLAIM"] = "claim"
    session.output.table(rows, columns | {"CREATED": "when", "USED BY": "users"}, empty="there are no volumes")


def _chosen(volume: dict[str, Any], backend: str | None, labels: tuple[str, ...]) -> bool:
    if backend is not None and volume["backend"] != backend:
        return False
    for label in labels:
        key, equals, value = label.partition("=")
        if key not in volume["labels"] or (equals and volume["labels"][key] != value):
            return False
    return True


@click.command()
@click.argument("volume")
@pass_session
def inspect(session: Session, volume: str) -> None:
    """Everything that is known of one volume."""
    found = session.client.get("volumes", volume)
    usage = found["usage"] or {}
    session.output.fields(
        found,
        {
            "name": found["name"],
            "id": found["id"],
            "backend": found["backend"],
            "state": found["state"],
            "created": f"{found['created']} ({ago(found['created'])})",
            "size": size(found["size"]),
            "used": size(usage.get("used")),
            "fs": found["filesystem"] or ("raw block" if found["mode"] == "block" else "folder of the backend"),
            "mount options": ",".join(found["mount_options"]),
            "from": found["source"],
            "mounted at": found["path"] or "not mounted",
            "labels": [f"{key}={value}" for key, value in found["labels"].items()],
            "options": [f"{key}={value}" for key, value in found["options"].items()],
            "snapshots": [f"{snap['name']} ({ago(snap['created'])})" for snap in found["snapshots"]],
            "used by": [who for binding in found["bindings"] for who in consumers_of(binding)],
        },
    )


@click.command()
@click.argument("volumes", nargs=-1)
@pass_session
def df(session: Session, volumes: tuple[str, ...]) -> None:
    """How full volumes are; all of them, or those named."""
    asked = [session.client.get("volumes", name) for name in volumes] if volumes else all_volumes(session)
    rows = [_usage(session, volume) for volume in session.output.each(asked, "looking")]
    columns = {"NAME": "name", "BACKEND": "backend", "SIZE": "total_shown", "USED": "used_shown", "USE%": "percent"}
    session.output.table(
        [{key: row[key] for key in ("name", "backend", "total", "used", "error")} for row in rows]
        if session.output.as_json
        else rows,
        columns | {"": "error"},
        empty="there are no volumes",
    )


def _usage(session: Session, volume: dict[str, Any]) -> dict[str, Any]:
    """One backend that is away must not hide the others."""
    used = total = None
    error = ""
    try:
        found = session.client.get("volumes", volume["name"], "usage")
        used, total = found["used"], found["total"]
    except ApiError as refused:
        error = refused.message
    percent = f"{100 * used / total:.0f}%" if used is not None and total else "-"
    shown = {"total_shown": size(total), "used_shown": size(used), "percent": percent}
    return {
        "name": volume["name"],
        "backend": volume["backend"],
        "total": total,
        "used": used,
        "error": error,
        **shown,
    }


@click.command()
@click.argument("volume")
@click.argument("to", metavar="SIZE")
@pass_session
def expand(session: Session, volume: str, to: str) -> None:
    """Grow a volume, in use or not."""
    with session.output.waiting(f"growing {volume}"):
        grown = joined(lambda: session.client.post("volumes", volume, "expand", body={"size": to}))
    if session.output.as_json:
        session.output.json(grown)
    else:
        session.output.line(f"{grown['name']} has {size(grown['size'])}")


@click.command()
@click.argument("volumes", nargs=-1, required=True)
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.option("-n", "--dry-run", is_flag=True, help="Say what would be destroyed, and destroy nothing.")
@pass_session
def rm(session: Session, volumes: tuple[str, ...], yes: bool, dry_run: bool) -> None:
    """Remove volumes with their data. One that is in use is refused, and it is said by whom."""
    planned = [session.client.delete("volumes", volume, dry_run=True) for volume in volumes]
    lines = [_doomed(removal) for removal in planned]
    if dry_run:
        if session.output.as_json:
            session.output.json(planned)
        else:
            for line in lines:
                session.output.line(f"would remove {line}")
        return
    confirm("Remove " + "; ".join(lines) + "?", yes=yes)
    for removal in planned:
        # By its id: the name may belong to another volume by now.
        volume_id, name = removal["volume"]["id"], removal["volume"]["name"]
        with session.output.waiting(f"removing {name}"):
            joined(partial(session.client.delete, "volumes", volume_id))
        if not session.output.as_json:
            session.output.line(name)
    if session.output.as_json:
        session.output.json(planned)


def _doomed(removal: dict[str, Any]) -> str:
    volume, used = removal["volume"], removal["used"]
    holding = f", {size(used)} of data" if used is not None else ""
    return f"{volume['name']} (backend {volume['backend']}{holding})"
