"""Shards as somebody hostile would write them: each a mutation of a sound one, under a manifest that fits it."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tests.attack.use import KINDS, base, use, with_digests

__all__ = ["cases", "place", "use"]
_HEADER = np.dtype(
    [("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4"), ("num_samples", "<u8"), ("alloc_table_ptr", "<u8")], align=True
)
_NUMBERS = (0, 1, 2, 255, 4096, 65535, 1 << 21, (1 << 31) - 1, 1 << 32, 10**12, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


def cases(seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """`count` names and .beton files, each in place of the first training shard. A name begins with the kind of the others: see `place`."""
    chance = random.Random(f"shards {seed}")
    for number in range(count):
        kind = KINDS[number % 2]
        what, content = _mutated(bytearray((base(kind) / _first(base(kind))).read_bytes()), chance)
        yield f"{kind}-{number:04}-{what}", content


def place(folder: Path, name: str, content: bytes) -> Path:
    """A directory of the altered shard among the sound ones, and a manifest with its size and its sha256."""
    directory = folder / "shards"
    shutil.copytree(base(name.partition("-")[0]), directory, symlinks=True)
    (directory / _first(directory)).write_bytes(content)
    path = directory / "manifest.json"
    path.write_bytes(with_digests(path.read_bytes(), directory))
    return directory


def _first(directory: Path) -> str:
    return str(json.loads((directory / "manifest.json").read_bytes())["splits"]["train"][0]["name"])


def _mutated(content: bytearray, chance: random.Random) -> tuple[str, bytes]:
    """A mutation's name, and the file."""
    header = np.frombuffer(bytes(content[: _HEADER.itemsize]), _HEADER)[0]
    samples, table = int(header["num_samples"]), int(header["alloc_table_ptr"])
    rows = _HEADER.itemsize + int(header["num_fields"]) * 1041
    ways = ["header", "field", "descriptor", "rows", "number", "table", "entry", "image", "marker", "anywhere", "cut", "grown", "moved"]
    how = chance.choice(ways)
    places = {
        "header": (0, _HEADER.itemsize),
        "descriptor": (_HEADER.itemsize, _HEADER.itemsize + 64),
        "rows": (rows, rows + 32 * samples),
        "table": (table, len(content)),
        "image": (rows + 32 * samples, table),
        "anywhere": (0, len(content)),
    }
    if how in places:
        for _ in range(chance.choice((1, 2, 8, 64))):
            content[chance.randrange(*places[how])] ^= 1 << chance.randrange(8)
    elif how == "field":
        name = chance.choice(_HEADER.names or ())
        at, size = _HEADER.fields[name][1], _HEADER.fields[name][0].itemsize  # type: ignore[index]
        content[at : at + size] = (chance.choice(_NUMBERS) % (1 << 8 * size)).to_bytes(size, "little")
    elif how == "number":  # any aligned number of a sample's row: mode, sides, pointer, label
        at = rows + chance.randrange(32 * samples) // 2 * 2
        size = chance.choice((2, 4, 8))
        content[at : at + size] = (chance.choice(_NUMBERS) % (1 << 8 * size)).to_bytes(size, "little")
    elif how == "entry":  # sample id, pointer, size
        at = table + 8 * chance.randrange(3 * samples)
        content[at : at + 8] = chance.choice((*_NUMBERS, len(content), len(content) - 1, table)).to_bytes(8, "little")
    elif how == "marker":  # a JPEG's own segments: sizes, tables, scans
        at = _a_jpeg(content, chance)
        for _ in range(chance.choice((1, 4))):
            content[at + chance.randrange(700)] = chance.choice((0, 1, 0x7F, 0xC2, 0xD9, 0xDA, 0xFF))
    elif how == "cut":
        del content[chance.choice((0, 1, 23, 24, rows, table, table + 1, len(content) - 1, chance.randrange(len(content)))) :]
    elif how == "grown":
        content += bytes(chance.choice((1, 24, 4096, 1 << 20)))
    else:  # two samples in one place: row and table agree, the sizes do not
        entry = table + 24 * chance.randrange(1, samples)
        content[entry + 8 : entry + 16] = content[table + 8 : table + 16]
        pointer = content[entry - 16 : entry - 8]
        at = content.find(pointer, rows, rows + 32 * samples)
        if at >= 0:
            content[at : at + 8] = content[table + 8 : table + 16]
    return how, bytes(content)


def _a_jpeg(content: bytearray, chance: random.Random) -> int:
    """Where one of the JPEGs begins, or any place where there is none."""
    begins = [at for at in range(len(content) - 3) if content[at] == 0xFF and content[at + 1] == 0xD8 and content[at + 2] == 0xFF]
    return chance.choice(begins) if begins else chance.randrange(len(content) - 800)
