"""Manifests as somebody hostile would write them: each a mutation of a sound one."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.attack.use import KINDS, base, use

__all__ = ["cases", "place", "use"]
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 10**12, 10**18, 2**63, -(2**63), 10**40, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "x", "0", "\u0000", "\ud800", "../../etc/passwd", "/etc/passwd", "a/b", ".", "..", "manifest.json", "a" * 5000, "\x1b[2J"),
    *(
        [],
        {},
        [[]],
        [None] * 3,
        [1, 2, 3],
        [0.5, 0.5, 0.5],
        ["a", 1],
        {"a": {"b": 1}},
        [[1, 2], [3]],
        {"": ""},
        [65535, 65535],
        [1, 1 << 20],
    ),
)


def cases(seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """`count` names and manifests. A name begins with the kind of the shards that the manifest was of: see `place`."""
    chance = random.Random(f"manifests {seed}")
    for number in range(count):
        kind = KINDS[number % 2]
        what, text = _mutated((base(kind) / "manifest.json").read_bytes(), chance)
        yield f"{kind}-{number:04}-{what}", text


def place(folder: Path, name: str, content: bytes) -> Path:
    """A directory of the manifest, and the sound shards that it was of."""
    directory = folder / "shards"
    shutil.copytree(base(name.partition("-")[0]), directory, symlinks=True)
    (directory / "manifest.json").write_bytes(content)
    return directory


def _mutated(text: bytes, chance: random.Random) -> tuple[str, bytes]:
    """A mutation's name, and the manifest."""
    how = chance.choices(
        ["value", "gone", "several", "pairs", "deep", "twice", "bytes", "cut", "grown", "whole"], [10, 4, 3, 5, 2, 2, 2, 1, 1, 1]
    )[0]
    values = json.loads(text)
    if how in ("value", "several"):
        for _ in range(1 if how == "value" else 4):
            _put(values, chance.choice(_paths(values)), copy.deepcopy(chance.choice(_VALUES)))
    elif how == "gone":
        holder, key = _holder(values, chance.choice(_paths(values)))
        del holder[key]
    elif how == "pairs":  # what an attacker would write: of the right types, and untrue
        _untrue(values, chance)
    elif how == "deep":
        deep: Any = 1
        for _ in range(chance.choice((40, 200, 900))):
            deep = {"a": deep} if chance.random() < 0.5 else [deep]
        _put(values, chance.choice(_paths(values)), deep)
    elif how == "twice":
        key = chance.choice(sorted(values))
        doubled = f"{json.dumps(key)}: {json.dumps(chance.choice(_VALUES))}"
        at = chance.choice((1, text.rindex(b"}")))
        return how, text[:at] + (doubled + "," if at == 1 else ", " + doubled).encode(errors="surrogatepass") + text[at:]
    elif how == "bytes":
        broken = bytearray(text)
        for _ in range(chance.choice((1, 3, 20))):
            broken[chance.randrange(len(broken))] = chance.randrange(256)
        return how, bytes(broken)
    elif how == "cut":
        return how, text[: chance.randrange(len(text))]
    elif how == "grown":
        return how, text + chance.choice((b"\0" * 4096, b"{}", text, b" " * (1 << 20)))
    else:
        return how, chance.choice(
            (b"", b"[]", b"null", b"1", b"[" * 99_999, b'{"a":' * 99_999, b"\xff\xfe", b'"x"', b"{}", b'{"schema": 1}')
        )
    return how, json.dumps(values, indent=1).encode(errors="surrogatepass")


def _untrue(values: dict[str, Any], chance: random.Random) -> None:
    """Change `values` so that every type stays right."""
    shard = chance.choice([shard for shards in values["splits"].values() for shard in shards])
    number = chance.choice((0, -1, 1, 2, 10**6, 10**9, 10**12, 2**62, 2**64))
    match chance.randrange(10):
        case 0:
            shard["samples"] = number
        case 1:
            shard["bytes"] = number
        case 2:
            shard["samples"], shard["bytes"] = number, abs(number) * 100 + 1
        case 3:
            shard["sha256"] = chance.choice(("0" * 64, "x" * 64, ""))
        case 4:
            shard["name"] = chance.choice(
                ("manifest.json", "no-such.beton", "../x.beton", ".hidden.beton", "train-00001.beton", "a" * 300 + ".beton")
            )
        case 5:
            values[chance.choice(("height_px", "width_px"))] = chance.choice(
                ([0, 0], [9, 3], [1, 65535], [65536, 65536], [-5, 10**12], [96, 96])
            )
        case 6:
            values["kind"] = {"raw": "jpeg", "jpeg": "raw"}[values["kind"]]
        case 7:
            values["classes"] = chance.choice(([], ["a"], ["x"] * 3, ["\x1b]0;x\x07", "b", "c"], [str(i) for i in range(1000)]))
        case 8:
            values[chance.choice(("mean", "std"))] = chance.choice(([0.0] * 3, [-1.0] * 3, [1e300] * 3, [1e-320] * 3))
        case _:
            values["splits"] = chance.choice(({}, {"train": []}, {"test": values["splits"]["train"]}, {"../x": values["splits"]["train"]}))


def _paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value inside `value`."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, item in inner for path in ((*at, key), *_paths(item, (*at, key)))]


def _holder(values: Any, path: tuple[Any, ...]) -> tuple[Any, Any]:
    for key in path[:-1]:
        values = values[key]
    return values, path[-1]


def _put(values: Any, path: tuple[Any, ...], value: Any) -> None:
    """Set the value at `path`, if an earlier change has left the way to it."""
    try:
        holder, key = _holder(values, path)
        holder[key] = value
    except (TypeError, KeyError, IndexError):
        pass
