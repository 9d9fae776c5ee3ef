"""What a finished copy wrote down in its workdir, whichever mover made it."""

from __future__ import annotations

from pathlib import Path

from volumed.migration.movers import block, tree
from volumed.model import MovePath


def digest(workdir: Path, path: MovePath) -> str:
    """Empty where what was written down is gone."""
    if path is MovePath.BLOCK:
        return block.digest(workdir) if (workdir / "chunks").exists() else ""
    return tree.digest(workdir) if (workdir / "tree.db").exists() else ""


def differences(
    before: Path, after: Path, path: MovePath, *, losses: frozenset[str] = frozenset(), beginning: bool = False
) -> list[str]:
    """What the second of two workdirs knows otherwise than the first, for people. `losses`: of a tree, what does not
    count; `beginning`: of a device, only as far as the first reached."""
    if path is MovePath.BLOCK:
        return block.differences(before, after, beginning=beginning)
    return tree.differences(before, after, losses=losses)
