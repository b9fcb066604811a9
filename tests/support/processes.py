"""Processes, as the kernel lists them."""

from __future__ import annotations

from pathlib import Path


def children(pid: int) -> list[int]:
    """Processes below `pid`, all the way down."""
    try:
        own = [int(word) for path in Path(f"/proc/{pid}/task").glob("*/children") for word in path.read_text().split()]
    except OSError:
        return []
    return [found for child in own for found in (child, *children(child))]


def alive(pid: int) -> bool:
    """Whether `pid` runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
