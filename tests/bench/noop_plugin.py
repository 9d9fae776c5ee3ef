"""A volume plugin that does nothing and keeps nothing: what the protocol itself costs, in the server that we use.

usage: noop_plugin.py SOCKET
"""

from __future__ import annotations

import json
import sys
from typing import Any

import uvicorn

NAMES: set[str] = set()


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    body = b""
    while (message := await receive()).get("more_body"):
        body += message["body"]
    body += message.get("body", b"")
    asked = json.loads(body) if body else {}
    name = asked.get("Name", "")
    match scope["path"]:
        case "/Plugin.Activate":
            answer: dict[str, Any] = {"Implements": ["VolumeDriver"]}
        case "/VolumeDriver.Capabilities":
            answer = {"Capabilities": {"Scope": "local"}}
        case "/VolumeDriver.Create":
            NAMES.add(name)
            answer = {"Err": ""}
        case "/VolumeDriver.Remove":
            NAMES.discard(name)
            answer = {"Err": ""}
        case "/VolumeDriver.Get":
            answer = {"Volume": {"Name": name}, "Err": ""} if name in NAMES else {"Err": "no such volume"}
        case "/VolumeDriver.List":
            answer = {"Volumes": [{"Name": name} for name in NAMES], "Err": ""}
        case _:
            answer = {"Mountpoint": "/tmp", "Err": ""}
    status = 500 if answer.get("Err") else 200
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": json.dumps(answer).encode()})


if __name__ == "__main__":
    uvicorn.run(
        app,
        uds=sys.argv[1],
        http="httptools",
        loop="asyncio",
        lifespan="off",
        access_log=False,
        log_level="error",
        timeout_keep_alive=600,
    )
