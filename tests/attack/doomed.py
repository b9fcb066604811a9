"""A kind whose cases die, hang, take memory and raise, to see that the driver sees it."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from pathlib import Path


def cases(seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """(what happens, nothing)."""
    for name in ("used", "sentence", "traceback", "signal", "hang", "memory", "used again")[:count]:
        yield name, b""


def place(folder: Path, name: str, content: bytes) -> Path:
    """A path of the case's name."""
    return folder / name


def use(path: Path) -> None:
    """End as the path is named."""
    from simclr.errors import UserError

    match path.name:
        case "sentence":
            raise UserError("what was found, what was expected, what to do")
        case "traceback":
            raise KeyError("step")
        case "signal":
            ctypes.string_at(0)
        case "hang":
            time.sleep(600)
        case "memory":
            assert len(bytearray(b"x") * (5 << 29))
