"""What may be called what. Names are for people: storage never sees one, and no name ever becomes a path."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

from volumed.errors import InvalidRequest

# Docker's own rule for volume names, bounded as its plugin protocol and file names are.
MAX_NAME = 255
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*", re.ASCII)
MAX_CLAIM = 128  # bytes (CSI specification, "Size Limits")
_BANNED = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # by CreateVolumeRequest.name
MAX_LABELS = 64
MAX_LABEL = 4096


def check_name(name: str, *, what: str = "volume") -> None:
    """Raises InvalidRequest, saying which rule the name breaks."""
    if len(name) > MAX_NAME:
        raise InvalidRequest(f"a {what} name has at most {MAX_NAME} characters, this one has {len(name)}")
    if _NAME.fullmatch(name) is None:
        raise InvalidRequest(
            f"{name!r} is no {what} name",
            hint="use letters of ASCII, digits, `_`, `.` and `-`, and begin with a letter or digit",
        )


def name_for_claim(text: str) -> str:
    """A name of ours for what an orchestrator calls a volume or snapshot: the same, where that is one; else made from
    it. Raises InvalidRequest for what CSI does not allow as a name."""
    if not text:
        raise InvalidRequest("no name is given")
    if len(text.encode("utf-8", "surrogatepass")) > MAX_CLAIM or _BANNED.search(text):
        raise InvalidRequest(f"a name has at most {MAX_CLAIM} bytes and no control characters")
    return text if _NAME.fullmatch(text) else f"csi-{hashlib.sha256(text.encode()).hexdigest()[:40]}"


def check_labels(labels: dict[str, str]) -> None:
    if len(labels) > MAX_LABELS:
        raise InvalidRequest(f"a volume has at most {MAX_LABELS} labels, these are {len(labels)}")
    for key, value in labels.items():
        if not key or len(key) > MAX_LABEL or len(value) > MAX_LABEL:
            raise InvalidRequest(
                f"label {key[:40]!r}: a key is not empty, and neither it nor its value over {MAX_LABEL}"
            )


_DEVICE_TAG = re.compile(r"(PART)?(UUID|LABEL)=", re.IGNORECASE)


def check_words(words: Sequence[str], *, what: str) -> None:
    """Options for mkfs or mount that may say how, never where: a path, or a tag that blkid would turn into one, could
    name another device, and `mkfs.ext4 /dev/sda DEVICE` formats the first. Raises InvalidRequest."""
    for number, word in enumerate(words):
        value = word.startswith("-") or (number > 0 and words[number - 1].startswith("-")) or what == "mount-options"
        if "/" in word or "\0" in word or _DEVICE_TAG.search(word) or not value:
            raise InvalidRequest(
                f"option {what!r}: {word[:60]!r} cannot be used, as it could name a device or a file",
                hint="give options and their values alone",
            )
