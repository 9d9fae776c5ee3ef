"""backend ls, inspect; class ls, show; driver ls, show."""

from __future__ import annotations

from typing import Any

import click

from volumed.cli.output import ago, size
from volumed.cli.session import Session, pass_session


@click.group()
def backend() -> None:
    """The configured backends."""


@backend.command("ls")
@pass_session
def backend_ls(session: Session) -> None:
    """List the backends."""
    found = session.client.get("backends")
    rows = [
        each
        | {
            "health": "ok" if each["ok"] else each["error"],
            "size": size((each["capacity"] or {}).get("total")),
            "free": size((each["capacity"] or {}).get("available")),
            "since_shown": ago(each["since"]),
            "default_shown": "yes" if each["default"] else "",
            "can": ", ".join(each["capabilities"]),
        }
        for each in found
    ]
    columns = {"NAME": "name", "DRIVER": "driver", "DEFAULT": "default_shown", "VOLUMES": "volumes"}
    columns |= {"SIZE": "size", "AVAILABLE": "free", "HEALTH": "health", "SINCE": "since_shown", "CAN": "can"}
    session.output.table(found if session.output.as_json else rows, columns, empty="there are no backends")


@backend.command("inspect")
@click.argument("name")
@pass_session
def backend_inspect(session: Session, name: str) -> None:
    """What a backend can do, and why it cannot do the rest."""
    found = session.client.get("backends", name)
    capacity = found["capacity"]
    session.output.fields(
        found,
        {
            "name": found["name"],
            "driver": found["driver"],
            "health": "ok" if found["ok"] else found["error"],
            "since": ago(found["since"]),
            "volumes": found["volumes"],
            "room": f"{size(capacity['available'])} of {size(capacity['total'])}" if capacity else "",
            "can": ", ".join(found["capabilities"]),
            "cannot": [f"{capability}: {reason}" for capability, reason in found["lacking"].items()],
            "turned off": ", ".join(found["disabled"]),
            "reached from": [f"{key}={value}" for key, value in found["topology"].items()],
            **found["facts"],
        },
    )


@click.group("class")
def placement_class() -> None:
    """Classes: backends that serve one purpose."""


@placement_class.command("ls")
@pass_session
def class_ls(session: Session) -> None:
    """List the classes."""
    found = session.client.get("classes")
    rows = [each | {"of": ", ".join(member["name"] for member in each["backends"])} for each in found]
    columns = {"NAME": "name", "BACKENDS": "of", "VOLUMES": "volumes"}
    session.output.table(found if session.output.as_json else rows, columns, empty="there are no classes")


@placement_class.command("show")
@click.argument("name")
@pass_session
def class_show(session: Session, name: str) -> None:
    """What a volume of a class is, and which backends could hold one now."""
    found = session.client.get("classes", name)
    session.output.fields(
        found,
        {
            "name": found["name"],
            "volumes": found["volumes"],
            "backends": [_member(each) for each in found["backends"]],
            "requires": ", ".join(found["requires"]),
            "reached from": [f"{key}={value}" for key, value in found["topology"].items()],
            "size": size(found["size"]) if found["size"] else "",
            "fs": found["filesystem"],
            "mkfs-options": " ".join(found["mkfs_options"]),
            "mount-options": ",".join(found["mount_options"]),
            "encrypt": found["encryption"],
            "options": [f"{key}={value}" for key, value in found["options"].items()],
        },
    )


def _member(member: dict[str, Any]) -> str:
    capacity = member["capacity"]
    room = f"{size(capacity['available'])} of {size(capacity['total'])} free" if capacity else "tells no room"
    return f"{member['name']} ({member['driver']}): {member['refusal'] or room}"


@click.group()
def driver() -> None:
    """The installed drivers."""


@driver.command("ls")
@pass_session
def driver_ls(session: Session) -> None:
    """List the drivers."""
    found = session.client.get("drivers")
    rows = [each | {"shown": each["error"] or each["description"]} for each in found]
    columns = {"NAME": "name", "FROM": "distribution", "": "shown"}
    session.output.table(found if session.output.as_json else rows, columns, empty="there are no drivers")


@driver.command("show")
@click.argument("name")
@pass_session
def driver_show(session: Session, name: str) -> None:
    """A driver's options and abilities."""
    found = session.client.get("drivers", name)
    session.output.fields(
        found,
        {
            "name": found["name"],
            "from": found["distribution"],
            "": found["description"],
            "can": ", ".join(found["capabilities"]),
            "in volumed.toml": [_option(option) for option in found["backend_options"]],
            "per volume": [_option(option) for option in found["volume_options"]],
        },
    )


def _option(option: dict[str, Any]) -> str:
    note = "required" if option["required"] else f"default {option['default']}" if option["default"] else ""
    return f"{option['key']} ({option['type']}{', ' + note if note else ''}): {option['description']}"
