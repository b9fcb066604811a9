"""What an FFCV file says of its samples. The door to FFCV's reader.

FFCV's own code believes what a file states: how many samples it has, where each lies. Here all of it is held against the file first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import simclr.data.ffcv.imports  # noqa: F401  (first: it makes the next import fast)

# isort: split
from ffcv.fields import IntField, RGBImageField
from ffcv.reader import Reader
from ffcv.types import ALLOC_TABLE_TYPE, FieldDescType, HeaderType, get_handlers, get_metadata_type
from numpy.typing import NDArray

from simclr.data.manifest import Manifest, Shard
from simclr.data.pixels import MOST_PIXELS
from simclr.data.s3.uri import Corrupt

_FIELDS = (RGBImageField, IntField)
HEAD_BYTES = HeaderType.itemsize + len(_FIELDS) * FieldDescType.itemsize
SAMPLE_BYTES: int = get_metadata_type([RGBImageField(), IntField()]).itemsize
"""Of the files of our writer: bytes in front of the samples' rows, and of a row."""


class Unfit(Exception):
    """A file that is no FFCV file of images as the loader reads them; the message says why."""


def read_rows(path: Path) -> tuple[Any, NDArray[np.int64], Any]:
    """Metadata rows, labels (−1 where there are none) and rows of the allocation table (ptr, size) of the samples of an FFCV file of one
    image and at most one whole number a sample, whatever the fields are called and whichever comes first. Raises Unfit for other files;
    places are not checked."""
    try:
        _require_room_for_what_it_states(path)
        reader = Reader(str(path))
        stored, table, fields = reader.metadata, reader.alloc_table, reader.handlers
    except Exception as error:  # FFCV and numpy may raise anything for a damaged header
        raise Unfit(str(error) or type(error).__name__) from None
    column = {kind: [n for n, field in zip(stored.dtype.names, fields.values(), strict=True) if type(field) is kind] for kind in _FIELDS}
    if len(column[RGBImageField]) != 1 or len(column[IntField]) > 1 or sum(map(len, column.values())) < len(fields):
        kinds = ", ".join(f"{name}: {type(field).__name__}" for name, field in fields.items())
        raise Unfit(f"its fields are {kinds}, and not one RGBImageField with one IntField")
    if len(stored) != reader.num_samples:
        raise Unfit(f"{len(stored)} images")
    table = table[np.argsort(table["sample_id"], kind="stable")]  # FFCV's own writer notes samples as its processes are done with them
    image = stored[column[RGBImageField][0]].copy()
    if not np.array_equal(table["sample_id"], np.arange(len(stored))):
        raise Unfit("another table of samples")
    label = stored[column[IntField][0]].copy() if column[IntField] else np.full(len(stored), -1, np.int64)
    return image, label, table


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
    try:
        image, label, table = read_rows(path)
        if len(image) != shard.samples:
            raise Unfit(f"{len(image)} images")
    except Unfit as error:
        raise Corrupt(
            f"shard {path} is damaged: its header does not describe {shard.samples} labelled images ({error}); {instead}", shard.name
        ) from None
    at, size, height, width = image["data_ptr"], table["size"], image["height"], image["width"]
    bad = (at != table["ptr"]) | (size == 0) | (at > shard.bytes) | (size > shard.bytes - np.minimum(at, shard.bytes))
    for side, (least, most) in ((height, manifest.height_px), (width, manifest.width_px)):
        bad |= (side < least) | (side > most)
    raw = image["mode"] == 1
    pixels = height.astype(np.uint64) * width
    bad |= (image["mode"] > 1) | (raw & (3 * pixels != size)) | (~raw & (pixels > 2 * MOST_PIXELS))  # twice: see `Options.max_pixels`
    if manifest.kind == "raw":  # other shards may have images as pixels, too: FFCV's writer has such a mode
        bad |= ~raw
    # The loader finds a sample's size by its place: of two samples in one place both have to have the same.
    order = np.argsort(at, kind="stable")
    bad[order[1:]] |= (at[order][1:] == at[order][:-1]) & (size[order][1:] != size[order][:-1])
    bad |= (label < -1) | (label >= max(len(manifest.classes), 1))
    if bad.any():
        raise Corrupt(
            f"shard {path}: sample {int(np.flatnonzero(bad)[0])} is damaged: its place, size or label contradicts the file; {instead}",
            shard.name,
        )
    return image, label, size
