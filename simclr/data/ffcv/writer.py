"""FFCV's file format, written from a stream. The door to the FFCV writer.

A shard is a header, the fields' descriptors, one metadata row per sample, pages of 2 MiB with the images, and an allocation table. The
metadata holds the labels: the ranks of class names. Where the names were not known beforehand, they are written again at the end.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

import simclr.data.ffcv.imports  # noqa: F401  (first: it makes the next import fast)

# isort: split
from ffcv.fields import IntField, RGBImageField
from ffcv.types import ALLOC_TABLE_TYPE, CURRENT_VERSION, FieldDescType, HeaderType, get_metadata_type

from simclr import files
from simclr.data.encode import PAGE, Encoded
from simclr.data.manifest import Shard

_FIELDS = (("image", 2, RGBImageField()), ("label", 1, IntField()))  # name, FFCV's type id, field
METADATA: Any = get_metadata_type([f for _, _, f in _FIELDS])
"""Type of a sample's row: image (mode, width, height, data_ptr), label."""
_IMAGE, _LABEL = METADATA.names
# The metadata comes before the images, but its length is known only after them: it gets the rest of the first page.
_METADATA_AT = HeaderType.itemsize + len(_FIELDS) * FieldDescType.itemsize
MOST_SAMPLES: int = (PAGE - _METADATA_AT) // METADATA.itemsize
"""Of a shard: so many rows fit the first page."""


class SplitWriter:
    """Appends the images of a part that are of one split to shards called train-00003.beton, then train-00003-1.beton, and so on.

    finished gets each that is whole and on the disk of `folder`, under a temporary name there, and puts it where it belongs. That, and
    what goes before it, is done by `behind`, while the next images are encoded."""

    def __init__(
        self, folder: Path, split: str, number: int, most_bytes: int, finished: Callable[[Path, Shard], None], behind: ThreadPoolExecutor
    ) -> None:
        self.folder, self.split, self.number, self.most_bytes, self.finished = folder, split, number, most_bytes, finished
        self.behind = behind
        self.shards: list[Future[Shard]] = []
        self.file: IO[bytes] | None = None
        self.rows: list[tuple[int, int, int, int, int, int]] = []
        """Rows of the shard being written: mode, width, height, pointer, bytes, label."""

    def add(self, encoded: Encoded, label: int) -> None:
        """Append an image."""
        if self.file is not None and (len(self.rows) == MOST_SAMPLES or self.file.tell() - PAGE + len(encoded.stored) > self.most_bytes):
            self.end()
        if self.file is None:
            self.file = files.anew(self.folder / f".writing-{secrets.token_hex(8)}.beton", "xb")
            self.file.write(bytes(PAGE))
        at, size = self.file.tell(), len(encoded.stored)
        if at % PAGE + size > PAGE:  # an image never lies across two pages
            at += self.file.write(bytes(-at % PAGE))
        self.file.write(encoded.stored)
        self.rows.append((0 if encoded.jpeg else 1, encoded.width, encoded.height, at, size, label))

    def end(self) -> None:
        """End the shard that is being written, if there is one, and hand it on."""
        if self.file is None:
            return
        file, table = self.file, np.array(self.rows, np.int64)
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
        size = file.tell()
        file.seek(0)
        file.write(header.tobytes() + descriptors.tobytes() + metadata.tobytes())
        roll = f"-{len(self.shards)}" if self.shards else ""
        name = f"{self.split}-{self.number:05d}{roll}.beton"
        self.shards.append(self.behind.submit(self._finish, file, name, size, len(table)))
        self.file, self.rows = None, []

    def _finish(self, file: IO[bytes], name: str, size: int, samples: int) -> Shard:
        path = Path(file.name)
        try:
            with file:
                flush(file)
            shard = Shard(name, size, _sha256(path), samples)
            self.finished(path, shard)
        finally:
            path.unlink(missing_ok=True)  # where it was not put elsewhere
        return shard

    def abandon(self) -> None:
        """Close and remove the shard that is being written, also on a full disk, where closing fails again."""
        if self.file is not None:
            with contextlib.suppress(OSError):
                self.file.close()
            Path(self.file.name).unlink(missing_ok=True)
            self.file = None


def relabel(path: Path, labels: NDArray[np.int64], shard: Shard) -> Shard:
    """Write `labels` (samples,) into the shard at `path`. Returns it with its new hash."""
    with open(path, "r+b", opener=files.plain) as file:
        file.seek(_METADATA_AT)
        metadata = np.frombuffer(bytearray(file.read(shard.samples * METADATA.itemsize)), METADATA)
        metadata[_LABEL] = labels
        file.seek(_METADATA_AT)
        file.write(metadata.tobytes())
        flush(file)
    return Shard(shard.name, shard.bytes, _sha256(path), shard.samples)


def flush(file: IO[bytes]) -> None:
    """Bring a file to the disk: a part whose shards are not there must not count as done."""
    file.flush()
    os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    with open(path, "rb", opener=files.plain) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
