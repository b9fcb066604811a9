"""What an FFCV file says of its samples. The door to FFCV's reader.

FFCV's own code believes what a file states: how many samples it has, where each lies. Here all of it is held against the file first.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import simclr.data.ffcv.imports  # noqa: F401  (first: it makes the next import fast)

# isort: split
from ffcv.fields import BytesField, IntField, RGBImageField
from ffcv.reader import Reader
from ffcv.types import ALLOC_TABLE_TYPE, FieldDescType, HeaderType, get_handlers, get_metadata_type
from numpy.typing import NDArray

from simclr.data.manifest import Manifest, Shard
from simclr.data.pixels import MOST_PIXELS
from simclr.data.s3.uri import Corrupt

_FIELDS = (RGBImageField, IntField)
CAPTION: Any = BytesField().metadata_type
"""Type of a caption's row: ptr, size."""
IMAGE: Any = RGBImageField().metadata_type
"""Type of an image's row: mode, width, height, data_ptr."""
ALLOCATION_BYTES = ALLOC_TABLE_TYPE.itemsize
HEAD_BYTES = HeaderType.itemsize + len(_FIELDS) * FieldDescType.itemsize
SAMPLE_BYTES: int = get_metadata_type([RGBImageField(), IntField()]).itemsize
"""Of the files of our writer: bytes in front of the samples' rows, and of a row."""


MOST_CAPTION_BYTES = 1 << 16
"""A caption goes into a shard up to here: no tokenizer reads on."""


class Unfit(Exception):
    """A file that is no FFCV file of images as the loader reads them; the message says why."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a file states what it has: the byte of sample 0's row, label and bytes, for who looks them up in the file itself."""

    image_at: int
    step: int
    """Bytes from one sample's row, or label, to the next one's."""
    label_at: int
    """−1: no sample has a label."""
    size_at: int
    """In the allocation table, whose rows are `ALLOCATION_BYTES` long."""
    caption_at: int
    """As `label_at`; −1: there are no captions."""
    place: NDArray[np.uint32] | None
    """Per sample, its row in that table; None where this is its own number, as in files of ours."""


def read_rows(path: Path) -> tuple[Any, NDArray[np.int64], Any]:
    """Metadata rows, labels (−1 where there are none) and rows of the allocation table (ptr, size) of the samples of an FFCV file of one
    image and at most one whole number a sample, whatever the fields are called and whichever comes first. Raises Unfit for other files;
    places are not checked."""
    image, label, table, _, _ = _read(path)
    return image, label, table


def _read(path: Path, captioned: bool = False) -> tuple[Any, NDArray[np.int64], Any, Layout, Any]:
    try:
        _require_room_for_what_it_states(path)
        reader = Reader(str(path))
        stored, table, fields = reader.metadata, reader.alloc_table, reader.handlers
    except Exception as error:  # FFCV and numpy may raise anything for a damaged header
        raise Unfit(str(error) or type(error).__name__) from None
    kinds = (*_FIELDS, BytesField) if captioned else _FIELDS
    column = {kind: [n for n, field in zip(stored.dtype.names, fields.values(), strict=True) if type(field) is kind] for kind in kinds}
    several = len(column[IntField]) > 1 or len(column.get(BytesField, [""])) != 1
    if len(column[RGBImageField]) != 1 or several or sum(map(len, column.values())) < len(fields):
        found = ", ".join(f"{name}: {type(field).__name__}" for name, field in fields.items())
        pairs = " and, of pairs, one BytesField" if captioned else ""
        raise Unfit(f"its fields are {found}, and not one RGBImageField with one IntField{pairs}")
    if len(stored) != reader.num_samples:
        raise Unfit(f"{len(stored)} images")
    samples, place = np.arange(len(stored)), None
    texts = None
    if captioned:  # of our writer alone: the images' rows, then the captions'
        (caption,) = column[BytesField]
        texts, others, table = stored[caption].copy(), table[len(stored) :], table[: len(stored)]
        same = np.array_equal(others["sample_id"], samples) and all(
            np.array_equal(others[a], texts[b]) for a, b in (("ptr", "ptr"), ("size", "size"))
        )
        if not same:
            raise Unfit("another table of captions")
    if not np.array_equal(table["sample_id"], samples):  # FFCV's own writer notes samples as its processes are done with them
        place = np.argsort(table["sample_id"], kind="stable").astype(np.uint32)
        table = table[place]
        if not np.array_equal(table["sample_id"], samples):
            raise Unfit("another table of samples")
    (image,), labels = column[RGBImageField], column[IntField]
    first, offset = HeaderType.itemsize + reader.field_descriptors.nbytes, {name: field[1] for name, field in stored.dtype.fields.items()}
    layout = Layout(
        image_at=first + offset[image],
        step=stored.dtype.itemsize,
        label_at=first + offset[labels[0]] if labels else -1,
        size_at=int(reader.header["alloc_table_ptr"]) + ALLOC_TABLE_TYPE.fields["size"][1],
        caption_at=first + offset[caption] if captioned else -1,
        place=place,
    )
    return stored[image].copy(), stored[labels[0]].copy() if labels else np.full(len(stored), -1, np.int64), table, layout, texts


def _require_room_for_what_it_states(path: Path) -> None:
    """Raise Unfit if the tables that the header states do not fit the file: their size is what FFCV allocates."""
    header, size = np.fromfile(path, HeaderType, 1), path.stat().st_size
    if not len(header):
        raise Unfit("it is shorter than a header")
    fields, samples, table = (int(header[0][name]) for name in ("num_fields", "num_samples", "alloc_table_ptr"))
    least = fields * FieldDescType.itemsize + samples * ALLOC_TABLE_TYPE.itemsize
    if least > size or not 0 < table <= size or (size - table) // ALLOC_TABLE_TYPE.itemsize > fields * samples:
        raise Unfit(f"{samples:,} images of {fields} fields and a table at byte {table:,}, in {size:,} bytes")


def tables_at(path: Path, shard: Shard) -> tuple[int, int]:
    """(end of the rows of samples, begin of the allocation table) in an FFCV file, by its header, which may be all that is there so far.
    Raises Corrupt if it has no such header."""
    try:
        _require_room_for_what_it_states(path)
        header = np.fromfile(path, HeaderType, 1)[0]
        fields = np.fromfile(path, FieldDescType, int(header["num_fields"]), offset=HeaderType.itemsize)
        row = get_metadata_type(get_handlers(fields)).itemsize
    except Exception as error:  # FFCV and numpy may raise anything for a damaged header
        raise Corrupt(f"shard {path} is damaged: it has no header of an FFCV file ({error})", shard.name) from None
    return HeaderType.itemsize + fields.nbytes + row * int(header["num_samples"]), int(header["alloc_table_ptr"])


def open_shard(
    path: Path, shard: Shard, manifest: Manifest, instead: str = "prepare the data again"
) -> tuple[Any, NDArray[np.int64], NDArray[np.uint64]]:
    """Metadata rows, labels and bytes of the samples of a shard.

    FFCV reads through raw pointers. A pointer outside the file would crash the process, so it is an error here; `instead` says what to do.
    """
    return open_in_place(path, shard, manifest, instead)[:3]


def open_in_place(
    path: Path, shard: Shard, manifest: Manifest, instead: str = "prepare the data again"
) -> tuple[Any, NDArray[np.int64], NDArray[np.uint64], Layout]:
    """As `open_shard`, and where the shard has all that."""
    try:
        image, label, table, layout, texts = _read(path, manifest.captions)
        if len(image) != shard.samples:
            raise Unfit(f"{len(image)} images")
    except Unfit as error:
        raise Corrupt(
            f"shard {path} is damaged: its header does not describe {shard.samples} labelled images ({error}); {instead}", shard.name
        ) from None
    at, size = image["data_ptr"], table["size"]
    bad = (at != table["ptr"]) | contradicting(image, label, size, shard.bytes, manifest)
    # The loader finds a sample's size by its place: of two samples in one place both have to have the same.
    order = np.argsort(at, kind="stable")
    bad[order[1:]] |= (at[order][1:] == at[order][:-1]) & (size[order][1:] != size[order][:-1])
    if texts is not None:
        bad |= straying(texts, shard.bytes)
    if bad.any():
        raise contradiction(path, shard, int(np.flatnonzero(bad)[0]), instead)
    return image, label, size, layout


def contradicting(
    image: Any, label: NDArray[np.int64], size: NDArray[np.uint64], shard_bytes: NDArray[np.uint64] | int, manifest: Manifest
) -> NDArray[np.bool_]:
    """(n,) samples whose place leaves their shard of `shard_bytes`, or whose place, size or label the manifest excludes."""
    at, height, width = image["data_ptr"], image["height"], image["width"]
    bad: NDArray[np.bool_] = (size == 0) | (at > shard_bytes) | (size > shard_bytes - np.minimum(at, shard_bytes))
    for side, (least, most) in ((height, manifest.height_px), (width, manifest.width_px)):
        bad |= (side < least) | (side > most)
    raw = image["mode"] == 1
    pixels = height.astype(np.uint64) * width
    bad |= (image["mode"] > 1) | (raw & (3 * pixels != size)) | (~raw & (pixels > 2 * MOST_PIXELS))  # twice: see `Options.max_pixels`
    if manifest.kind == "raw":  # other shards may have images as pixels, too: FFCV's writer has such a mode
        bad |= ~raw
    return bad | (label < -1) | (label >= max(len(manifest.classes), 1))


def straying(captions: Any, shard_bytes: NDArray[np.uint64] | int) -> NDArray[np.bool_]:
    """(n,) captions whose bytes leave their shard of `shard_bytes`, or are none, or more than a caption has."""
    at, size = captions["ptr"], captions["size"]
    bad: NDArray[np.bool_] = (
        (size == 0) | (size > MOST_CAPTION_BYTES) | (at > shard_bytes) | (size > shard_bytes - np.minimum(at, shard_bytes))
    )
    return bad


def contradiction(path: Path, shard: Shard, sample: int, instead: str = "prepare the data again") -> Corrupt:
    """The error for a sample that is `contradicting`."""
    return Corrupt(f"shard {path}: sample {sample} is damaged: its place, size or label contradicts the file; {instead}", shard.name)
