"""FFCV's file format, written from a stream. The door to the FFCV writer.

A shard is a header, the fields' descriptors, one metadata row per sample, pages of 2 MiB with the images, and a table of
what lies where. Labels stand in the metadata and are ranks of class names that are known only at the end of the source:
they are written last.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

import simclr.data.ffcv_import  # noqa: F401  (first: it makes the next import fast)

# isort: split
from ffcv.fields import IntField, RGBImageField
from ffcv.types import ALLOC_TABLE_TYPE, CURRENT_VERSION, FieldDescType, HeaderType, get_metadata_type
from numpy.typing import NDArray

from simclr.data.manifest import Shard

PAGE = 1 << 21
"""Bytes: FFCV's smallest page. An image lies within one."""
_FIELDS = (("image", 2, RGBImageField()), ("label", 1, IntField()))  # name, FFCV's type id, field
METADATA: Any = get_metadata_type([f for _, _, f in _FIELDS])
"""Type of a sample's row: image (mode, width, height, data_ptr), label."""
_IMAGE, _LABEL = METADATA.names
# The metadata stands before the images, and its length is known after them: it has what is left of the first page.
_METADATA_AT = HeaderType.itemsize + len(_FIELDS) * FieldDescType.itemsize
_MOST_SAMPLES = (PAGE - _METADATA_AT) // METADATA.itemsize


@dataclass
class SplitWriter:
    """Appends a split's images to shards of about `shard_bytes`, named `.writing-{split}-{number}.beton` in `out`."""

    out: Path
    split: str
    shard_bytes: int
    file: IO[bytes] | None = None
    rows: list[tuple[int, int, int, int, int, int]] = field(default_factory=list)
    """Of the shard being written: mode, width, height, pointer, bytes, provisional label."""
    full: list[tuple[str, NDArray[Any]]] = field(default_factory=list)
    """Shard's name, its samples' metadata with provisional labels."""

    def add(self, stored: bytes, jpeg: bool, height: int, width: int, label: int) -> None:
        """Append an image: a JPEG file, or its (H, W, 3) bytes. `label` may be provisional, −1 = none."""
        if self.file is None:
            self.file = (self.out / f".writing-{self.split}-{len(self.full):05d}.beton").open("wb")
            self.file.write(bytes(PAGE))
        at, size = self.file.tell(), len(stored)
        if at % PAGE + size > PAGE:  # an image never lies across two pages
            at += self.file.write(bytes(-at % PAGE))
        self.file.write(stored)
        self.rows.append((0 if jpeg else 1, width, height, at, size, label))
        if at + size - PAGE >= self.shard_bytes or len(self.rows) == _MOST_SAMPLES:
            self._end_shard(self.file)

    def _end_shard(self, file: IO[bytes]) -> None:
        table = np.array(self.rows, np.int64)
        metadata = np.zeros(len(table), METADATA)
        image = metadata[_IMAGE]
        image["mode"], image["width"], image["height"], image["data_ptr"] = table[:, :4].T
        metadata[_LABEL] = table[:, 5]
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
        file.seek(0)
        file.write(header.tobytes() + descriptors.tobytes())
        file.close()
        self.full.append((f"{self.split}-{len(self.full):05d}.beton", metadata))
        self.file, self.rows = None, []

    def bytes_written(self) -> int:
        """Of all shards, the last one ended."""
        if self.file is not None:
            self._end_shard(self.file)
        return sum((self.out / f".writing-{name}").stat().st_size for name, _ in self.full)

    def finish(self, rank: NDArray[np.int64], pool: ThreadPoolExecutor) -> Iterator[Shard]:
        """Write the labels, now that they are known (rank: provisional label → label), and hash every shard."""
        if self.file is not None:
            self._end_shard(self.file)
        yield from pool.map(lambda full: self._seal(full[0], full[1], np.append(rank, -1)), self.full)

    def _seal(self, name: str, metadata: NDArray[Any], rank: NDArray[np.int64]) -> Shard:
        path = self.out / f".writing-{name}"
        metadata[_LABEL] = rank[metadata[_LABEL]]
        with path.open("r+b") as file:
            file.seek(_METADATA_AT)
            file.write(metadata.tobytes())
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Shard(name, path.stat().st_size, digest, len(metadata))

    def abandon(self) -> None:
        """Close what is open, on a full disk too, where closing fails once more."""
        if self.file is not None:
            with contextlib.suppress(OSError):
                self.file.close()
