"""Manifests as somebody hostile would write them: damaged, or of the right types and untrue."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.attack.mutate import damaged_json
from tests.attack.use import KINDS, base, use

__all__ = ["cases", "place", "use"]


def cases(seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """(name, manifest). A name begins with the kind of the shards that the manifest was of: see `place`."""
    draw = random.Random(seed)
    for number in range(count):
        kind = KINDS[number % 2]
        text = (base(kind) / "manifest.json").read_text()
        if number % 3:
            yield f"{kind}-{number}", damaged_json(text, draw)
        else:
            values = json.loads(text)
            _untrue(values, draw)
            yield f"{kind}-untrue {number}", json.dumps(values).encode()


def place(folder: Path, name: str, content: bytes) -> Path:
    """A directory of the manifest, and the sound shards that it was of."""
    directory = folder / "shards"
    shutil.copytree(base(name.partition("-")[0]), directory, symlinks=True)
    (directory / "manifest.json").write_bytes(content)
    return directory


def _untrue(values: dict[str, Any], draw: random.Random) -> None:
    """Change `values` as an attacker would: every type stays right."""
    shard = draw.choice([shard for shards in values["splits"].values() for shard in shards])
    number = draw.choice((0, -1, 1, 2, 10**6, 10**9, 10**12, 2**62, 2**64))
    match draw.randrange(10):
        case 0:
            shard["samples"] = number
        case 1:
            shard["bytes"] = number
        case 2:
            shard["samples"], shard["bytes"] = number, abs(number) * 100 + 1
        case 3:
            shard["sha256"] = draw.choice(("0" * 64, "x" * 64, ""))
        case 4:
            shard["name"] = draw.choice(
                ("manifest.json", "no-such.beton", "../x.beton", ".hidden.beton", "train-00001.beton", "a" * 300 + ".beton")
            )
        case 5:
            values[draw.choice(("height_px", "width_px"))] = draw.choice(
                ([0, 0], [9, 3], [1, 65535], [65536, 65536], [-5, 10**12], [96, 96])
            )
        case 6:
            values["kind"] = {"raw": "jpeg", "jpeg": "raw"}[values["kind"]]
        case 7:
            values["classes"] = draw.choice(([], ["a"], ["x"] * 3, ["\x1b]0;x\x07", "b", "c"], [str(i) for i in range(1000)]))
        case 8:
            values[draw.choice(("mean", "std"))] = draw.choice(([0.0] * 3, [-1.0] * 3, [1e300] * 3, [1e-320] * 3))
        case _:
            values["splits"] = draw.choice(({}, {"train": []}, {"test": values["splits"]["train"]}, {"../x": values["splits"]["train"]}))
