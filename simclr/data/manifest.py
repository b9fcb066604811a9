"""manifest.json: the content of a directory of shards. All parts of the program read it, so it needs neither FFCV nor torch."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from simclr import fields, files, keyed
from simclr.data.s3.uri import Corrupt
from simclr.errors import UserError

SCHEMA = 2
"""Of a dataset with more images in a split than an epoch's order sorts (`keyed.SORTED_UP_TO`): their order is `keyed.entries`. Smaller ones
are written as schema 1, in which every order is sorted: it is the same order, and versions that know schema 1 alone read them too."""
_MOST_BYTES = 1 << 50
_LEAST_BYTES = 24  # of an image: its row in the file's table
_INSTEAD = "prepare the data again"
LISTS = ("skipped.csv", "duplicates.csv", "conflicts.csv", "names-train.txt", "names-test.txt")
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

    schema: int = 0
    """1 or 2, see `SCHEMA`; 0 = as the size of the splits wants it."""
    splits: dict[str, tuple[Shard, ...]]
    """train, and test where there is one."""
    classes: tuple[str, ...]
    """Sorted names, the label is the index; empty = unlabelled."""
    kind: Literal["raw", "jpeg"]
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
    times: str = ""
    """A hash of the files' modification times; "" = not known."""
    content: str = ""
    """A hash of the content of every file, in order; "" = not known."""
    understood: dict[str, Any] = field(default_factory=dict)
    """How splits and classes were found in the source; {} = not known."""
    options: dict[str, Any]
    """Options of `simclr prepare`: the same source and options give the same bytes."""
    captions: bool = False
    """Whether every image has a caption in the shards."""
    skipped: int
    """Images that could not be read; skipped.csv names them."""
    duplicates: int = 0
    """Images whose file is a copy of an earlier one, so that they are each other's negatives; duplicates.csv lists them."""
    conflicts: int = 0
    """Copies whose first one has another class; conflicts.csv lists them."""
    pixels: dict[str, Any] = field(default_factory=dict)
    """How pictures became 8-bit RGB, where they were not: `ranges` (kind of pixels → black, white), `stated` (by the user, not by a
    sample), and the number of images that are `rescaled`, `clipped` (more than 1 % of the pixels outside) and `grey` (one channel)."""
    videos: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Split → id of the first frame of each video, ascending from 0: a video's frames follow each other, in their order, up to the next
    one's first. {} = the images are no frames of videos."""
    versions: dict[str, str]

    def __post_init__(self) -> None:
        if self.schema == 0:
            large = any(sum(shard.samples for shard in shards) > keyed.SORTED_UP_TO for shards in self.splits.values())
            object.__setattr__(self, "schema", SCHEMA if large else 1)

    @property
    def order(self) -> keyed.Rule:
        """How the images of an epoch are put in order. Data that was prepared before schema 2 keeps its order at every size."""
        return "sort" if self.schema == 1 else "by size"

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The shards of every split."""
        return tuple(shard for shards in self.splits.values() for shard in shards)

    @property
    def shards_sha256(self) -> str:
        """sha256 of what is in the shards, in order, and of the classes: wherever and whenever the same images were prepared alike."""
        shards = {split: [[shard.samples, shard.sha256] for shard in shards] for split, shards in sorted(self.splits.items())}
        return hashlib.sha256(json.dumps([shards, self.classes]).encode()).hexdigest()

    def part(self, groups: int = 1, group: int = 0) -> tuple[Shard, ...]:
        """The training shards of `group` of `groups`, and all shards of other splits."""
        others = [shard for split, shards in self.splits.items() if split != "train" for shard in shards]
        return (*self.splits.get("train", ())[group::groups], *others)

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
        values = asdict(self)
        if not self.captions:  # as in manifests of before
            del values["captions"]
        if not self.videos:  # which manifests of before have not
            del values["videos"]
        return json.dumps(values, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: object = "the manifest") -> Self:
        """The manifest in `text`. Raises UserError, naming `where`, for another schema or a text that is no manifest."""
        values = files.json_in(text, where, _INSTEAD)
        if (schema := values.get("schema")) not in range(1, SCHEMA + 1):
            raise UserError(f"{where} has shard schema {fields.short(schema)}, this version reads 1 to {SCHEMA}; {_INSTEAD}")
        fields.require(values, {"splits": dict[str, list[dict[str, Any]]]}, where, _INSTEAD)
        shards = {split: tuple(fields.build(Shard, s, where, _INSTEAD) for s in rows) for split, rows in values.pop("splits").items()}
        fields.require({"videos": {}, **values}, {"videos": dict[str, list[int]]}, where, _INSTEAD)
        videos = {split: tuple(firsts) for split, firsts in values.pop("videos", {}).items()}
        found = fields.build(cls, values, where, _INSTEAD, splits=shards, videos=videos)
        for trouble in _troubles(found):
            raise UserError(f"{where} is damaged: {trouble}; {_INSTEAD}")
        return found


def _troubles(manifest: Manifest) -> Iterator[str]:
    """What cannot be true of any shards. The manifest may come from somebody else, and all that follows relies on it: names of files,
    sizes that are mapped, numbers that tables are made of."""
    names = [shard.name for shard in manifest.shards]
    for split in manifest.splits:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", split):
            yield f"it names a split {fields.short(split)}"
    for shard in manifest.shards:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.beton", shard.name):
            yield f"it names a shard {fields.short(shard.name)}, which is no file name of a shard"
        if not re.fullmatch(r"[0-9a-f]{64}", shard.sha256):
            yield f"sha256 of {shard.name} is {fields.short(shard.sha256)}"
        if not 0 < shard.bytes < _MOST_BYTES or not 0 < _LEAST_BYTES * shard.samples <= shard.bytes:
            yield f"{shard.name} is said to hold {fields.short(shard.samples)} images in {fields.short(shard.bytes)} bytes"
    if not names or len(set(names)) < len(names):
        yield "it names no shard, or one of them twice"
    for what, (least, most) in (("height", manifest.height_px), ("width", manifest.width_px)):
        if not 0 < least <= most < 1 << 16 or (manifest.kind == "raw" and least < most):
            yield f"the smallest and the largest {what} are {fields.short(least)} and {fields.short(most)} px"
    if not all(0 <= moment <= 1 for moment in (*manifest.mean, *manifest.std)):
        yield f"mean and standard deviation of pixels between 0 and 1 are {fields.short(manifest.mean)} and {fields.short(manifest.std)}"
    if min(manifest.skipped, manifest.duplicates, manifest.conflicts) < 0:
        yield "a number of images is negative"
    for split, firsts in manifest.videos.items():
        ends = [*firsts[1:], sum(shard.samples for shard in manifest.splits.get(split, ()))]
        if firsts[:1] != (0,) or any(first >= end for first, end in zip(firsts, ends, strict=True)):
            yield f"videos of {split} begin at {fields.short(list(firsts))}, which are no ascending ids from 0 in that split"
    if not _table_fits(manifest.understood):
        yield f"understood is {fields.short(manifest.understood)}"


def _table_fits(understood: dict[str, Any]) -> bool:
    """Whether the splits that were `understood` are a table, as the report shows it."""
    hints = {"notes": list[str], "left_out": dict[str, int], "splits": dict[str, dict[str, Any]], "counted": bool}
    hints["videos"] = dict[str, dict[str, int]]
    if not all(fields.fits(understood[name], hint) for name, hint in hints.items() if name in understood):
        return False
    row = {"images": int, "labelled": int, "classes": dict[str, int], "examples": list[tuple[str, str | None]]}
    return all(
        name in split and fields.fits(split[name], hint) for split in understood.get("splits", {}).values() for name, hint in row.items()
    )


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write manifest.json, atomically and last: a directory with a manifest is whole."""
    files.write_text(directory / "manifest.json", manifest.to_json())


def digest_of(text: bytes) -> str:
    """sha256 of a manifest's text but for the modification times: shards that were made from copied files are the same."""
    return hashlib.sha256(re.sub(rb'(?m)^ "times": .*\n', b"", text)).hexdigest()


def write_names(directory: Path, split: str, names: Iterable[str]) -> None:
    """Write names-SPLIT.txt: the name in the source of each image, one a line, in the order of sample ids."""
    with files.anew(directory / f"names-{split}.txt", encoding="utf-8", newline="\n") as file:
        file.writelines(line_of(name) + "\n" for name in names)


def line_of(name: str) -> str:
    """A name as a line of a list: as it is, or, if it holds what no line of UTF-8 can (a line break, bytes of another encoding) or would
    not come back, as a string of JSON."""
    return json.dumps(name) if re.search(r'[\r\n\ud800-\udfff]|^[\s"#]|\s$', name) else name


def name_in(line: str) -> str:
    """The name that `line_of` wrote. Other lines are names as they are."""
    if line.startswith('"') and line.endswith('"'):
        try:
            return str(json.loads(line))
        except ValueError:
            pass
    return line


def read_names(directory: Path, split: str, examples: int) -> list[str] | None:
    """The names of the `examples` images of a split; None if there are none: the source gave pixels, or an earlier version prepared the
    shards.

    Raises UserError if the file has another number of names."""
    path = directory / f"names-{split}.txt"
    if not path.is_file():
        return None
    names = [name_in(line) for line in files.read_text(path, _INSTEAD).split("\n")[:-1]]
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
    files.require_small(path, _INSTEAD)
    manifest = Manifest.from_json(files.read_text(path, _INSTEAD), path)
    if look:
        require_sizes(directory, manifest.part(groups, group))
    return manifest


def require_sizes(directory: Path, shards: Iterable[Shard]) -> None:
    """Raise UserError if one of `shards` is missing, Corrupt if one has another size: a process that reads a mapped shard behind its end
    is killed without a word (SIGBUS)."""
    for shard in shards:
        file = directory / shard.name
        if not file.is_file():
            raise UserError(f"shard {shard.name} of {directory} is missing; prepare the data again")
        size = file.stat().st_size
        if size != shard.bytes:
            said = f"shard {shard.name} of {directory} has {size:,} bytes, the manifest says {shard.bytes:,}; prepare it again"
            raise Corrupt(said, shard.name)
