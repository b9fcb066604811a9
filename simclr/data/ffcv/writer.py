"""FFCV's file format, written from a stream. The door to the FFCV writer.

A shard is a header, the fields' descriptors, one metadata row per sample, pages of 2 MiB with the images, and an allocation table. The
metadata holds the labels. They are written last, because a label is the rank of its class name, which is known only at the end of the
source. Until then a full shard has a temporary name and, beside it, a note of its content: from these a writer resumes after it was
killed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

import simclr.data.ffcv.imports  # noqa: F401  (first: it makes the next import fast)

# isort: split
from ffcv.fields import IntField, RGBImageField
from ffcv.types import ALLOC_TABLE_TYPE, CURRENT_VERSION, FieldDescType, HeaderType, get_metadata_type

from simclr import files
from simclr.data.encode import PAGE, Encoded
from simclr.data.manifest import Shard
from simclr.errors import UserError

_FIELDS = (("image", 2, RGBImageField()), ("label", 1, IntField()))  # name, FFCV's type id, field
METADATA: Any = get_metadata_type([f for _, _, f in _FIELDS])
"""Type of a sample's row: image (mode, width, height, data_ptr), label."""
_IMAGE, _LABEL = METADATA.names
# The metadata comes before the images, but its length is known only after them: it gets the rest of the first page.
_METADATA_AT = HeaderType.itemsize + len(_FIELDS) * FieldDescType.itemsize
_MOST_SAMPLES = (PAGE - _METADATA_AT) // METADATA.itemsize


@dataclass
class Note:
    """The content of a shard and the images of the source that it accounts for: `.writing-NAME.json`."""

    items: int = 0
    """Images of the source that went into it, skipped ones included."""
    labels: list[str | None] = field(default_factory=list)
    """Class names, in order of appearance; None = unlabelled."""
    which: list[int] = field(default_factory=list)
    """Per sample, the index of its class in `labels`."""
    names: list[str] = field(default_factory=list)
    """Per sample, its file's name in the source; empty where the source gives pixels."""
    digests: list[int] = field(default_factory=list)
    """Per sample, the hash of its content."""
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """Name and reason of each image that could not be used."""
    unused: list[tuple[int, int]] = field(default_factory=list)
    """Of each of these, its place among the images of this note, and the hash of its content."""
    counts: dict[str, int] = field(default_factory=lambda: {"grey": 0, "rescaled": 0, "clipped": 0})
    """Samples that had one channel, had more than 8 bits, had pixels outside the range."""
    sums: list[list[float]] = field(default_factory=lambda: [[0.0] * 3, [0.0] * 3])
    """(2, 3): sums of the samples' moments."""
    height_px: list[int] = field(default_factory=list)
    """Smallest and largest; empty without a sample."""
    width_px: list[int] = field(default_factory=list)
    bytes: int = 0
    """Size of the finished file."""

    def skip(self, encoded: Encoded) -> None:
        """Count an image that could not be used."""
        self.unused.append((self.items, encoded.digest))
        self.items += 1
        self.skipped.append((encoded.item.name, encoded.skipped))

    def content(self) -> Iterator[int]:
        """The hash of every image that this note accounts for, in the source's order."""
        unused, used = dict(self.unused), iter(self.digests)
        for place in range(self.items):
            yield unused[place] if place in unused else next(used)

    def add(self, encoded: Encoded, places: dict[str | None, int]) -> None:
        """Count an image that is being stored; `places` has the index of each class in `labels`."""
        label = encoded.item.label
        if label not in places:
            places[label] = len(self.labels)
            self.labels.append(label)
        self.items += 1
        self.which.append(places[label])
        if not isinstance(encoded.item.data, np.ndarray):
            self.names.append(encoded.item.name)
        self.digests.append(encoded.digest)
        for name in self.counts:
            self.counts[name] += getattr(encoded, name)
        self.sums = (np.array(self.sums) + encoded.moments).tolist()
        self.height_px = [min([*self.height_px, encoded.height]), max([*self.height_px, encoded.height])]
        self.width_px = [min([*self.width_px, encoded.width]), max([*self.width_px, encoded.width])]


@dataclass
class SplitWriter:
    """Appends a split's images to shards of about `shard_bytes`, named `.writing-{split}-{number}.beton` in `out`."""

    out: Path
    split: str
    shard_bytes: int
    key: str
    """Identifies source and options: a note with another key belongs to other shards."""
    flushers: ThreadPoolExecutor
    """Flush full shards to the disk while the next one is being filled."""
    file: IO[bytes] | None = None
    rows: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    """Rows of the shard being written: mode, width, height, pointer, bytes."""
    note: Note = field(default_factory=Note)
    """Note of the shard being written."""
    places: dict[str | None, int] = field(default_factory=dict)
    full: list[tuple[str, Note]] = field(default_factory=list)
    """Name and note of each shard that is full."""
    flushing: list[Future[None]] = field(default_factory=list)

    def resume(self) -> int:
        """Take over the full shards that an earlier writer with the same key left. Returns how many of the source's images
        of this split they account for."""
        assert not self.full and self.file is None
        while True:
            name = f"{self.split}-{len(self.full):05d}.beton"
            path = self.out / f".writing-{name}"
            try:
                text = files.read_json(_beside(path), "it is made again")
                if (self.out / name).exists():  # the writer was killed after it sealed and renamed this shard
                    (self.out / name).rename(path)
                size = path.stat().st_size
            except (OSError, UserError):  # no note, or a damaged one
                break
            if text.pop("key", "") != self.key or size != text["bytes"]:
                break
            self.full.append((name, Note(**text)))
        return sum(note.items for _, note in self.full)

    def add(self, encoded: Encoded) -> None:
        """Append an image."""
        if self.file is None:
            self.file = files.anew(self.out / f".writing-{self.split}-{len(self.full):05d}.beton", "xb")
            self.file.write(bytes(PAGE))
        at, size = self.file.tell(), len(encoded.stored)
        if at % PAGE + size > PAGE:  # an image never lies across two pages
            at += self.file.write(bytes(-at % PAGE))
        self.file.write(encoded.stored)
        self.rows.append((0 if encoded.jpeg else 1, encoded.width, encoded.height, at, size))
        self.note.add(encoded, self.places)
        if at + size - PAGE >= self.shard_bytes or len(self.rows) == _MOST_SAMPLES:
            self._end_shard(self.file)

    def _end_shard(self, file: IO[bytes]) -> None:
        table = np.array(self.rows, np.int64)
        metadata = np.zeros(len(table), METADATA)
        image = metadata[_IMAGE]
        image["mode"], image["width"], image["height"], image["data_ptr"] = table[:, :4].T
        allocations = np.zeros(len(table), ALLOC_TABLE_TYPE)
        allocations["sample_id"], allocations["ptr"], allocations["size"] = np.arange(len(table)), table[:, 3], table[:, 4]
        file.write(bytes(-file.tell() % PAGE))
        header = np.zeros(1, HeaderType)
        header["version"], header["num_fields"], header["page_size"] = CURRENT_VERSION, len(_FIELDS), PAGE
        header["num_samples"], header["alloc_table_ptr"] = len(table), file.tell()
        descriptors = np.zeros(len(_FIELDS), FieldDescType)
        for row, (name, kind, ffcv_field) in zip(descriptors, _FIELDS, strict=True):
            row["type_id"] = kind
            row["name"][: len(name)] = np.frombuffer(name.encode(), "<u1")
            row["arguments"][:] = ffcv_field.to_binary()[0]
        file.write(allocations.tobytes())
        self.note.bytes = file.tell()
        file.seek(0)
        file.write(header.tobytes() + descriptors.tobytes() + metadata.tobytes())
        name = f"{self.split}-{len(self.full):05d}.beton"
        self.full.append((name, self.note))
        self.flushing.append(self.flushers.submit(_flush, file, self.out / f".writing-{name}", self.note, self.key))
        self.file, self.rows, self.note, self.places = None, [], Note(), {}
        for flushed in self.flushing:
            if flushed.done():
                flushed.result()  # reports a full disk now, not at the end

    def end(self) -> int:
        """End the last shard and wait until all are on the disk. Returns the bytes of all."""
        if self.file is not None:
            self._end_shard(self.file)
        for flushed in self.flushing:
            flushed.result()
        return sum(note.bytes for _, note in self.full)

    def seal(self, classes: tuple[str, ...], pool: ThreadPoolExecutor) -> Iterator[Shard]:
        """After `end`: write the labels, now that they are known, and hash every shard."""
        yield from pool.map(lambda full: self._seal(full[0], full[1], classes), self.full)

    def _seal(self, name: str, note: Note, classes: tuple[str, ...]) -> Shard:
        path = self.out / f".writing-{name}"
        rank = np.array([classes.index(label) if label in classes else -1 for label in note.labels], np.int64)
        with path.open("r+b") as file:
            file.seek(_METADATA_AT)
            metadata = np.frombuffer(bytearray(file.read(len(note.which) * METADATA.itemsize)), METADATA)
            metadata[_LABEL] = rank[note.which]
            file.seek(_METADATA_AT)
            file.write(metadata.tobytes())
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Shard(name, note.bytes, digest, len(metadata))

    def notes(self) -> list[Note]:
        """The notes of every shard, and one of the images skipped after the last shard."""
        return [*(note for _, note in self.full), self.note]

    def abandon(self) -> None:
        """Close and remove the shard that is being written, also on a full disk, where closing fails again."""
        if self.file is not None:
            with contextlib.suppress(OSError):
                self.file.close()
            Path(self.file.name).unlink(missing_ok=True)
            self.file = None


def _beside(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _flush(file: IO[bytes], path: Path, note: Note, key: str) -> None:
    """Flush a full shard to the disk, then its note: a shard with a note is whole."""
    with file:
        file.flush()
        os.fsync(file.fileno())
    files.write_text(_beside(path), json.dumps(asdict(note) | {"key": key}))
