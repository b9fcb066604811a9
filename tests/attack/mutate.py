"""Damage for files of JSON and of bytes, drawn from a generator, so that every case can be made again."""

from __future__ import annotations

import copy
import json
import random
import tempfile
from pathlib import Path
from typing import Any

_VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        -1,
        0,
        1,
        7,
        100,
        10**6,
        10**12,
        2**63,
        -(2**63),
        10**40,
        10**400,
        0.5,
        -0.0,
        1e-300,
        1e308,
        float("nan"),
        float("inf"),
    ),
    *("", "x", "\0", "..", "../../elsewhere", "/etc/passwd", "a\x1b[2Jb", "\ud800", "x" * 100_000, "jpeg", "1"),
    *([], [1], [None] * 50, ["a"] * 10_000, {}, {"": {}}, {"a": 1}, [[[[[[]]]]]]),
)


_held: list[tempfile.TemporaryDirectory[str]] = []


def folder() -> Path:
    """A new folder, which goes with the process."""
    _held.append(tempfile.TemporaryDirectory(prefix="simclr-attack-"))
    return Path(_held[-1].name)


def damaged_json(text: str, draw: random.Random) -> bytes:
    """The JSON `text` with one to three values replaced, removed or added at any depth; now and then with its bytes damaged."""
    kind = draw.random()
    if kind < 0.1:
        return damaged(text.encode(), draw)
    if kind < 0.13:
        return b"[" * 100_000
    if kind < 0.14:
        return draw.choice(
            (
                b"",
                b"[]",
                b"null",
                b"{}",
                b'{"schema": 1}',
                text.encode() * 2,
                text.encode().replace(b": 1", b": 1" + b"0" * 5000),
                text.encode() + b" " * (1 << 20),
            )
        )
    if kind < 0.15:
        return text.encode().replace(b"{", b'{"schema": 1, "schema": [],', 1)  # the same name twice
    value = copy.deepcopy(json.loads(text))
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        value = _changed(value, draw)
    return json.dumps(value).encode("utf-8", "surrogatepass")


def _changed(value: Any, draw: random.Random) -> Any:
    """`value` with one place changed."""
    places = list(_places(value))
    if not places:
        return draw.choice(_VALUES)
    inside, key = draw.choice(places)
    match draw.randrange(5):
        case 0:
            del inside[key]
        case 1 if isinstance(inside, dict):
            inside[draw.choice(("", "unknown", "schema", str(key) * 2))] = draw.choice(_VALUES)
        case 2 if isinstance(inside[key], int | float) and not isinstance(inside[key], bool):
            inside[key] = draw.choice((-inside[key], inside[key] + 1, inside[key] * 1000, float(inside[key]) / 3, str(inside[key])))
        case _:
            inside[key] = copy.deepcopy(draw.choice(_VALUES))
    return value


def _places(value: Any) -> Any:
    """(container, key) of every value inside `value`."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield value, key
        yield from _places(inner)


def damaged(data: bytes, draw: random.Random) -> bytes:
    """`data` with bits flipped, bytes set, cut, repeated or moved, or its end lost."""
    found = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 5, 20))):
        # Headers are at the beginning, and damage there does most.
        at = draw.randrange(min(len(found), draw.choice((16, 256, 4096, len(found) or 1))) or 1) if found else 0
        match draw.randrange(7):
            case 0 if found:
                found[at] ^= 1 << draw.randrange(8)
            case 1:
                found[at : at + 8] = draw.choice((b"\0" * 8, b"\xff" * 8, (2**63 - 1).to_bytes(8, "little"), draw.randbytes(8)))
            case 2:
                del found[at : at + draw.randrange(1, 64)]
            case 3:
                found[at:at] = draw.randbytes(draw.randrange(1, 64))
            case 4:
                found[at:at] = found[at : at + draw.randrange(1, 512)]
            case 5 if draw.random() < 0.3:
                del found[draw.randrange(len(found) + 1) :]
            case _:
                found[at : at + 4] = draw.choice((b"\0\0\0\0", b"\xff\xff\xff\x7f", b"\x80\0\0\0", b"\1\0\0\0"))
    return bytes(found)
