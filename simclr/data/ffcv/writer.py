"""FFCV's file format, written from a stream. The door to the FFCV writer.

A shard is a header, the fields' descriptors, one metadata row per sample, pages of 2 MiB with the images, and an allocation table. The
metadata holds the labels: the ranks of class names. Where the names were not known beforehand, they are written again at the end. A set of
pairs has a third field, the bytes of each caption in UTF-8, which lie behind its image.
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
from ffcv.fields import BytesField, IntField, RGBImageField
from ffcv.types import ALLOC_TABLE_TYPE, CURRENT_VERSION, FieldDescType, HeaderType, get_metadata_type

from simclr import files
from simclr.data.encode import PAGE, Encoded
from simclr.data.ffcv.reader import MOST_CAPTION_BYTES
from simclr.data.manifest import Shard

_FIELDS = (("image", 2, RGBImageField()), ("label", 1, IntField()), ("caption", 3, BytesField()))  # name, FFCV's type id, field
METADATA: Any = get_metadata_type([f for _, _, f in _FIELDS[:2]])
"""Type of a sample's row: image (mode, width, height, data_ptr), label; in pairs, caption (ptr, size) too."""
_PAIRS: Any = get_metadata_type([f for _, _, f in _FIELDS])
_IMAGE, _LABEL, _CAPTION = _PAIRS.names
# The metadata comes before the images, but its length is known only after them: it gets the rest of the first page.
_METADATA_AT = HeaderType.itemsize + 2 * FieldDescType.itemsize
MOST_SAMPLES: int = (PAGE - HeaderType.itemsize - 3 * FieldDescType.itemsize) // _PAIRS.itemsize
"""Of a shard: so many rows fit the first page, also those of pairs."""


class SplitWriter:
    """Appends the images of a part that are of one split to shards called train-00003.beton, then train-00003-1.beton, and so on.

    finished gets each that is whole and on the disk of `folder`, under a temporary name there, and puts it where it belongs. That, and
    what goes before it, is done by `behind`, while the next images are encoded."""

    def __init__(
        self,
        folder: Path,
        split: str,
        number: int,
        most_bytes: int,
        finished: Callable[[Path, Shard], None],
        behind: ThreadPoolExecutor,
        captioned: bool = False,
    ) -> None:
        self.folder, self.split, self.number, self.most_bytes, self.finished = folder, split, number, most_bytes, finished
        self.behind, self.captioned = behind, captioned
        self.shards: list[Future[Shard]] = []
        self.file: IO[bytes] | None = None
        self.rows: list[tuple[int, int, int, int, int, int]] = []
        """Rows of the shard being written: mode, width, height, pointer, bytes, label."""
        self.captions: list[tuple[int, int]] = []
        """Pointer and bytes of each caption, if there are captions."""

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
        if self.captioned:
            # FFCV finds a value's size by its place, so that each has one: of a caption without letters a space.
            text = stored_caption(encoded.item.caption) or b" "
            at += size
            if at % PAGE + len(text) > PAGE:
                at += self.file.write(bytes(-at % PAGE))
            self.file.write(text)
            self.captions.append((at, len(text)))

    def end(self) -> None:
        """End the shard that is being written, if there is one, and hand it on."""
        if self.file is None:
            return
        file, table = self.file, np.array(self.rows, np.int64)
        fields, texts = _FIELDS[: 2 + self.captioned], np.array(self.captions, np.int64).reshape(-1, 2)
        metadata = np.zeros(len(table), _PAIRS if self.captioned else METADATA)
        image = metadata[_IMAGE]
        image["mode"], image["width"], image["height"], image["data_ptr"] = table[:, :4].T
        metadata[_LABEL] = table[:, 5]
        if self.captioned:
            metadata[_CAPTION]["ptr"], metadata[_CAPTION]["size"] = texts.T
        allocations = np.zeros(len(table) + len(texts), ALLOC_TABLE_TYPE)  # the images', then the captions'
        allocations["sample_id"] = np.tile(np.arange(len(table)), 1 + self.captioned)
        allocations["ptr"], allocations["size"] = np.concatenate([table[:, 3:5], texts]).T
        file.write(bytes(-file.tell() % PAGE))
        header = np.zeros(1, HeaderType)
        header["version"], header["num_fields"], header["page_size"] = CURRENT_VERSION, len(fields), PAGE
        header["num_samples"], header["alloc_table_ptr"] = len(table), file.tell()
        descriptors = np.zeros(len(fields), FieldDescType)
        for row, (name, kind, ffcv_field) in zip(descriptors, fields, strict=True):
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
        self.file, self.rows, self.captions = None, [], []

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
        captioned = np.frombuffer(file.read(HeaderType.itemsize), HeaderType)[0]["num_fields"] == len(_FIELDS)
        row, at = (_PAIRS, _METADATA_AT + FieldDescType.itemsize) if captioned else (METADATA, _METADATA_AT)
        file.seek(at)
        metadata = np.frombuffer(bytearray(file.read(shard.samples * row.itemsize)), row)
        metadata[_LABEL] = labels
        file.seek(at)
        file.write(metadata.tobytes())
        flush(file)
    return Shard(shard.name, shard.bytes, _sha256(path), shard.samples)


def stored_caption(caption: str) -> bytes:
    """A caption as a shard has it: UTF-8, without white space around it, and no longer than MOST_CAPTION_BYTES."""
    text = caption.strip().encode("utf-8", "replace")
    return text if len(text) <= MOST_CAPTION_BYTES else text[:MOST_CAPTION_BYTES].decode(errors="ignore").encode()


def flush(file: IO[bytes]) -> None:
    """Bring a file to the disk: a part whose shards are not there must not count as done."""
    file.flush()
    os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    with open(path, "rb", opener=files.plain) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
