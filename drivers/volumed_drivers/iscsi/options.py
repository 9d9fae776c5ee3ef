"""What a backend's table and `-o` may say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import AfterValidator, Field, model_validator

from volumed.driver import Options, Secret

PORT = 3260
_PORTAL = re.compile(r"(?P<host>[A-Za-z0-9.-]+|\[[0-9a-fA-F:.]+\])(:(?P<port>\d{1,5}))?")
_RANGE = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?")
_MOST = 16383  # of a LUN's number that is told in a flat address (SAM-5, 4.7.7.3)
# RFC 3720, 3.2.6.3: so it is safe as the name of a folder, too.
IQN = r"^(iqn\.\d{4}-\d{2}\.[a-z0-9.-]+(:[a-z0-9.:-]+)?|eui\.[0-9A-F]{16}|naa\.[0-9A-F]{16,32})$"


class Portal(NamedTuple):
    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def portals(text: str) -> list[Portal]:
    found = [_PORTAL.fullmatch(word.strip()) for word in text.split(",")]
    if not all(found):
        raise ValueError("write portals as 10.0.0.5 or 10.0.0.5:3260, several with commas")
    return [Portal(match["host"], int(match["port"] or PORT)) for match in found if match]


def luns(text: str) -> list[int]:
    """`0-7,9`."""
    found: list[int] = []
    for word in filter(None, text.split(",")):
        match = _RANGE.fullmatch(word.strip())
        if match is None or int(match[2] or match[1]) > _MOST:
            raise ValueError("write LUNs as 0-7,9")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return found


def _checked_portals(text: str) -> str:
    portals(text)
    return text


def _checked_luns(text: str) -> str:
    luns(text)
    return text


class IscsiVolumeOptions(Options):
    iqn: str | None = Field(default=None, pattern=IQN, description="Target of the LUN; default: the backend's")
    lun: int | None = Field(default=None, ge=0, le=_MOST, description="This LUN and no other")


class IscsiOptions(Options):
    portal: Annotated[str, AfterValidator(_checked_portals)] = Field(
        description="Address of the target, with :PORT unless it is 3260; several with commas"
    )
    iqn: str = Field(pattern=IQN, description="The target's name")
    luns: Annotated[str, AfterValidator(_checked_luns)] = Field(
        default="", description="LUNs that volumes may be given: 0-7,9; none: only those that a volume names"
    )
    user: str = Field(default="", pattern=r"^[^\s=]*$", description="CHAP: our name")
    password: Secret | None = Field(default=None, description="CHAP: where our secret lies")
    target_user: str = Field(default="", pattern=r"^[^\s=]*$", description="Mutual CHAP: the target's name")
    target_password: Secret | None = Field(default=None, description="Mutual CHAP: where the target's secret lies")
    multipath: bool = Field(default=False, description="Log in at every portal; multipathd makes one device of them")
    claims: Path = Field(
        default=Path("/var/lib/volumed/iscsi"),
        description="Folder that says which LUN is whose; shared by all nodes that share the target",
    )

    @model_validator(mode="after")
    def _both_or_none(self) -> IscsiOptions:
        if bool(self.user) != (self.password is not None):
            raise ValueError("user and password go together")
        if bool(self.target_user) != (self.target_password is not None):
            raise ValueError("target-user and target-password go together")
        if self.target_user and not self.user:
            raise ValueError("mutual CHAP needs user and password as well")
        return self
