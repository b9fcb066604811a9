"""manifest.json: the content of a directory of shards. All parts of the program read it, so it needs neither FFCV nor torch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from simclr import fields, files
from simclr.errors import UserError

SCHEMA = 1
_INSTEAD = "prepare the data again"
LISTS = ("skipped.csv", "duplicates.csv", "names-train.txt", "names-test.txt")
"""Files beside the manifest that training does not read: for people, and for lists of labels by name."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One .beton file."""

    name: str
    bytes: int
    sha256: str
    samples: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """A prepared dataset."""

    splits: dict[str, tuple[Shard, ...]]
    """train, and test where there is one."""
    classes: tuple[str, ...]
    """Sorted names, the label is the index; empty = unlabelled."""
    kind: str
    """raw: pixels of one size, whole; jpeg: photographs."""
    height_px: tuple[int, int]
    """Smallest and largest."""
    width_px: tuple[int, int]
    mean: tuple[float, float, float]
    """Per channel, of pixels in [0, 1]: some 4,000 evenly spaced ones of every training image."""
    std: tuple[float, float, float]
    source: str
    identity: str = ""
    """A cheap hash of the source's content: a changed archive or folder has another."""
    options: dict[str, int]
    """Options of `simclr prepare`: the same source and options give the same bytes."""
    skipped: int
    """Images that could not be read; skipped.csv names them."""
    duplicates: int = 0
    """Images whose file is a copy of an earlier one, so that they are each other's negatives; duplicates.csv lists them."""
    versions: dict[str, str]

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The shards of every split."""
        return tuple(shard for shards in self.splits.values() for shard in shards)

    def part(self, groups: int = 1, group: int = 0) -> tuple[Shard, ...]:
        """The training shards of `group` of `groups` (−1: none), and all shards of other splits."""
        others = [shard for split, shards in self.splits.items() if split != "train" for shard in shards]
        return (*(self.splits.get("train", ())[group::groups] if group >= 0 else ()), *others)

    def examples(self, split: str, groups: int = 1) -> int:
        """Images in `split`. With more than one shard group, those of the smallest group times the number of groups: all that an epoch
        can use.

        Raises UserError for an unknown split, naming the known ones, or if there are fewer shards than groups.
        """
        if split not in self.splits:
            raise UserError(f"the shards have no split {split!r}, only {', '.join(self.splits)}")
        if groups > len(self.splits[split]):
            raise UserError(f"{len(self.splits[split])} shards of {split} make no {groups} groups; prepare with a smaller --shard-mib")
        return groups * min(sum(shard.samples for shard in self.splits[split][group::groups]) for group in range(groups))

    def to_json(self) -> str:
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: object = "the manifest") -> Self:
        """The manifest in `text`. Raises UserError, naming `where`, for another schema or a text that is no manifest."""
        values = files.json_in(text, where, _INSTEAD)
        if (schema := values.pop("schema", None)) != SCHEMA:
            raise UserError(f"{where} has shard schema {schema}, this version reads {SCHEMA}; {_INSTEAD}")
        fields.require(values, {"splits": dict[str, list[dict[str, Any]]]}, where, _INSTEAD)
        shards = {split: tuple(fields.build(Shard, s, where, _INSTEAD) for s in rows) for split, rows in values.pop("splits").items()}
        return fields.build(cls, values, where, _INSTEAD, splits=shards)


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write manifest.json, atomically and last: a directory with a manifest is whole."""
    files.write_text(directory / "manifest.json", manifest.to_json())


def write_names(directory: Path, split: str, names: Iterable[str]) -> None:
    """Write names-SPLIT.txt: the name in the source of each image, one a line, in the order of sample ids."""
    with (directory / f"names-{split}.txt").open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        file.writelines(name.replace("\n", "\\n") + "\n" for name in names)


def read_names(directory: Path, split: str, examples: int) -> list[str] | None:
    """The names of the `examples` images of a split; None if there are none: the source gave pixels, or an earlier version prepared the
    shards.

    Raises UserError if the file has another number of names."""
    path = directory / f"names-{split}.txt"
    if not path.is_file():
        return None
    names = files.read_text(path, _INSTEAD).split("\n")[:-1]
    if len(names) != examples:
        raise UserError(f"{path} has {len(names):,} names, the split {examples:,} images; prepare the data again")
    return names


def read_manifest(directory: Path, look: bool = True, groups: int = 1, group: int = 0) -> Manifest:
    """The manifest of `directory`, after a `look` at the size of each shard (of the training shards, those of `group` only).

    Raises UserError for a missing directory or manifest, another schema, a shard that is missing or has another size.
    """
    if not directory.is_dir():
        raise UserError(f"no directory {directory}; `simclr prepare --source … --out {directory}` makes it")
    path = directory / "manifest.json"
    if not path.is_file():
        raise UserError(f"{directory} has no manifest.json, so it is no (complete) dataset; `simclr prepare --source … --out …` makes one")
    manifest = Manifest.from_json(files.read_text(path, _INSTEAD), path)
    for shard in manifest.part(groups, group) if look else ():
        file = directory / shard.name
        if not file.is_file():
            raise UserError(f"shard {shard.name} of {directory} is missing; prepare the data again")
        size = file.stat().st_size
        if size != shard.bytes:
            raise UserError(f"shard {shard.name} of {directory} has {size:,} bytes, the manifest says {shard.bytes:,}; prepare it again")
    return manifest
