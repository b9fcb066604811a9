"""What a part of a prepare leaves beside its shards: a row for each of its pictures, in Parquet. Lists and manifest are made of these.

A part with a note is done. Whoever may write to the folder may have put a note there, so it is read with bounds, and what does not fit
counts as no note.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from numpy.typing import NDArray

from simclr import fields, files
from simclr.data.encode import Encoded
from simclr.data.manifest import Shard
from simclr.data.sources.parquet_pages import require_modest
from simclr.data.sources.videos import video_of
from simclr.errors import UserError

SPLITS = ("train", "test")
_HEAD = b"simclr"
_SCHEMA = pyarrow.schema(
    [
        ("split", pyarrow.int8()),  # its place in SPLITS
        ("label", pyarrow.int32()),  # its class's place in `About.labels`; −1 = unlabelled
        ("digest", pyarrow.uint64()),
        ("name", pyarrow.binary()),  # null where the source gives pixels
        ("reason", pyarrow.binary()),  # why it could not be used; null = it is in a shard
    ]
)
_MOST_ROWS, _MOST_BYTES, _MOST_HEAD_BYTES = 1 << 26, 1 << 32, 1 << 28
_MOST_REASONS = 20


@dataclass(kw_only=True, slots=True)
class About:
    """What a note says of its part as a whole."""

    key: str
    """Identifies source, options and versions: a note with another key belongs to other shards."""
    number: int
    """Of the part."""
    ranked: str
    """A hash of the class names whose ranks the labels in the shards are."""
    labels: list[str] = field(default_factory=list)
    """Class names, in order of appearance."""
    shards: list[tuple[str, str, int, str, int]] = field(default_factory=list)
    """Split, and name, bytes, sha256 and samples, of each shard, in order."""
    rows: int = 0
    """Pictures that the part accounts for."""
    skipped: int = 0
    """Of these, those that could not be used."""
    first: list[tuple[str, str]] = field(default_factory=list)
    """Name and reason of the first of these."""
    reasons: dict[str, int] = field(default_factory=dict)
    """The most frequent reasons."""
    counts: dict[str, int] = field(default_factory=lambda: {"grey": 0, "rescaled": 0, "clipped": 0})
    """Samples that had one channel, had more than 8 bits, had pixels outside the range."""
    sums: list[list[float]] = field(default_factory=lambda: [[0.0] * 3, [0.0] * 3])
    """(2, 3): sums of the training samples' moments."""
    height_px: list[int] = field(default_factory=list)
    """Smallest and largest; empty without a sample."""
    width_px: list[int] = field(default_factory=list)

    nameless: list[str] = field(default_factory=list)
    """Splits with a sample that has no name."""
    videos: list[tuple[str, str, int, int, int]] = field(default_factory=list)
    """Of videos: name, split, samples, and their height and width, of each run of samples that have all but the third in common."""

    def of(self, split: str) -> list[Shard]:
        """The shards of a split."""
        return [Shard(name, size, sha256, samples) for of, name, size, sha256, samples in self.shards if of == split]

    def whole(self) -> list[Shard]:
        """The shards of both splits."""
        return [shard for split in SPLITS for shard in self.of(split)]


class Writer:
    """Collects the rows of a part that is being made."""

    def __init__(self, about: About, videos: bool = False) -> None:
        """`videos`: the pictures are frames, each in its video's folder."""
        self.about, self.videos = about, videos
        self.rows: dict[str, list[Any]] = {name: [] for name in _SCHEMA.names}
        self.places: dict[str | None, int] = {None: -1}
        self.reasons: Counter[str] = Counter()

    def add(self, encoded: Encoded) -> None:
        """Count an image, whether it can be used or not."""
        item, about = encoded.item, self.about
        if item.label not in self.places:
            self.places[item.label] = len(about.labels)
            about.labels.append(str(item.label))
        pixels = isinstance(item.data, np.ndarray)
        values = (SPLITS.index(item.split), self.places[item.label], encoded.digest, None if pixels else _bytes(item.name))
        for name, value in zip(_SCHEMA.names, (*values, _bytes(encoded.skipped) if encoded.skipped else None), strict=True):
            self.rows[name].append(value)
        about.rows += 1
        if encoded.skipped:
            about.skipped += 1
            about.first = about.first or [(item.name, encoded.skipped)]
            self.reasons[encoded.skipped] += 1
            self.rows["name"][-1] = _bytes(item.name)  # it is listed by its name
            return
        if pixels and item.split not in about.nameless:
            about.nameless.append(item.split)
        for name in about.counts:
            about.counts[name] += getattr(encoded, name)
        if self.videos:
            run = (video_of(item.name), item.split, encoded.height, encoded.width)
            before = about.videos[-1] if about.videos else ("", "", 0, 0, 0)
            goes_on = run == (*before[:2], *before[3:])
            about.videos[len(about.videos) - goes_on :] = [(*run[:2], goes_on * before[2] + 1, *run[2:])]
        if item.split == "train":
            about.sums = (np.array(about.sums) + encoded.moments).tolist()
        about.height_px = [min([*about.height_px, encoded.height]), max([*about.height_px, encoded.height])]
        about.width_px = [min([*about.width_px, encoded.width]), max([*about.width_px, encoded.width])]

    def write(self, path: Path) -> None:
        """Write the note: all of it or nothing."""
        self.about.reasons = dict(self.reasons.most_common(_MOST_REASONS))
        _write(path, pyarrow.table(self.rows, schema=_SCHEMA), self.about)


class Note:
    """A note that was written before. Its rows are read when they are asked for."""

    def __init__(self, path: Path, about: About) -> None:
        self.path, self.about = path, about

    def columns(self, *names: str) -> list[NDArray[Any]]:
        """Whole columns: split, label, digest as numbers; name and reason as text, "" where there is none. Raises UserError for a note that
        was damaged since it was opened."""
        return [_array(column) for column in _table(self.path, list(names)).columns]

    def labels(self) -> NDArray[np.object_]:
        """(classes + 1,): class names by their places; None for −1."""
        return np.array([*self.about.labels, None], object)

    def ranked_anew(self, ranked: str, shards: Sequence[tuple[str, Shard]]) -> None:
        """Write the note again, of `shards` (split, shard) whose labels are other ranks now."""
        self.about.ranked = ranked
        self.about.shards = [(split, shard.name, shard.bytes, shard.sha256, shard.samples) for split, shard in shards]
        _write(self.path, _table(self.path, _SCHEMA.names), self.about)


def opened(path: Path, key: str, number: int) -> Note | None:
    """The note at `path`, if it is one of this user's, of that key and number, and whole."""
    try:
        state = path.lstat()
        if not files.is_own(state, path.parent) or state.st_size > _MOST_BYTES:
            return None
        with open(path, "rb", opener=files.plain) as file:
            found = pyarrow.parquet.ParquetFile(file)
            head = (found.schema_arrow.metadata or {}).get(_HEAD, b"")
            if not found.schema_arrow.equals(_SCHEMA) or len(head) > _MOST_HEAD_BYTES or found.metadata.num_rows > _MOST_ROWS:
                return None
            require_modest(path, found.metadata)
            rows = found.metadata.num_rows
        about = fields.build(About, files.json_in(head, path, "it is made again"), path, "it is made again")
        note = Note(path, about)
        if (about.key, about.number, about.rows) != (key, number, rows):
            return None
        split, label, reason = note.columns("split", "label", "reason")
    except (OSError, UserError, pyarrow.ArrowException):
        return None
    fits = bool(((split >= 0) & (split < len(SPLITS)) & (label >= -1) & (label < len(about.labels))).all()) and _holds(about, split, reason)
    return note if fits else None


def _holds(about: About, split: NDArray[Any], reason: NDArray[Any]) -> bool:
    """Whether the shards are called as they should be, and have as many samples as rows tell."""
    used = np.array([not text for text in reason], bool)
    numbers = [*about.counts.values(), about.rows, about.skipped, *about.reasons.values()]
    sides = (about.height_px, about.width_px)
    if about.counts.keys() != About(key="", number=0, ranked="").counts.keys() or min(numbers) < 0 or about.skipped != int((~used).sum()):
        return False
    if [len(row) for row in about.sums] != [3, 3] or any(len(side) != (2 if used.any() else 0) for side in sides):
        return False
    if len(about.first) != bool(about.skipped):
        return False
    if any(of not in SPLITS or min(numbers) < 1 for _, of, *numbers in about.videos):
        return False
    for place, name in enumerate(SPLITS):
        shards = about.of(name)
        if about.videos and sum(samples for _, of, samples, *_ in about.videos if of == name) != int((used & (split == place)).sum()):
            return False
        called = [f"{name}-{about.number:05d}{f'-{roll}' if roll else ''}.beton" for roll in range(len(shards))]
        counts = [shard.samples for shard in shards]
        if [shard.name for shard in shards] != called or min([1, *counts]) < 1 or sum(counts) != int((used & (split == place)).sum()):
            return False
    return True


def _table(path: Path, names: list[str]) -> Any:
    try:
        with open(path, "rb", opener=files.plain) as file:
            return pyarrow.parquet.read_table(file, columns=names, use_threads=False)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is damaged ({(str(error).splitlines() or [''])[0]}); remove it, and run the same command again") from None


def _write(path: Path, table: Any, about: About) -> None:
    with files.whole(path) as scratch, open(scratch, "xb", opener=files.plain) as file:
        pyarrow.parquet.write_table(table.replace_schema_metadata({_HEAD: json.dumps(asdict(about)).encode()}), file, compression="zstd")
        file.flush()
        os.fsync(file.fileno())


def _bytes(text: str) -> bytes:
    """Names of files may hold bytes of any encoding."""
    return text.encode("utf-8", "surrogatepass")


def _array(column: Any) -> NDArray[Any]:
    if column.type != pyarrow.binary():
        return column.combine_chunks().to_numpy(zero_copy_only=False)  # type: ignore[no-any-return]
    texts = np.full(len(column), "", object)
    there = np.flatnonzero(column.is_valid().combine_chunks().to_numpy(zero_copy_only=False))
    if len(there):  # of reasons there are few
        texts[there] = [value.decode("utf-8", "surrogatepass") for value in column.drop_null().to_pylist()]
    return texts
