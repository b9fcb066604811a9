"""The pictures behind rows of features, where they can still be read: small copies for a page."""

from __future__ import annotations

import contextlib
import itertools
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.parts import plan
from pipelines.terminal import say
from simclr.data import encode
from simclr.data.depth import Rule
from simclr.data.feature_parts import About
from simclr.data.pixels import Unreadable
from simclr.data.s3.uri import Address, address
from simclr.data.sources import prepared
from simclr.data.sources.archives import is_archive
from simclr.data.sources.portions import Portion
from simclr.data.sources.reading import Reading
from simclr.data.sources.source import Data, Part
from simclr.errors import UserError

_SIDE = 192  # px
_MOST_BYTES = 64 << 20  # of an object in S3


def thumbnails(about: About, wanted: Sequence[tuple[int, str, str]]) -> dict[int, NDArray[np.uint8]]:
    """Index in `wanted` → the picture (h, w, 3), at most 192 px on a side. `about` says whence the features are, `wanted` are (id, split,
    path) of rows. Pictures that are not there any more, that cannot be read, or that lie in archives within archives, are left out."""
    source, rule = about.source, about.rule()
    found: dict[int, NDArray[np.uint8]] = {}
    try:
        words = shlex.split(source)
    except ValueError:  # features may come from others
        return {}
    if words and wanted:
        say(f"pictures for the page are read from {source}, which the features name")
    for word in words:
        open_still = {i: row for i, row in enumerate(wanted) if i not in found}
        with contextlib.suppress(UserError, OSError):  # the source has gone, or others may not read it
            for i, data in _files(word, open_still):
                if (small := thumbnail(data, rule)) is not None:
                    found[i] = small
    return found


def thumbnail(data: Data, rule: Rule) -> NDArray[np.uint8] | None:
    """A picture with at most 192 px on a side; None where it cannot be read."""
    try:
        if isinstance(data, np.ndarray):
            pixels = data
        elif isinstance(data, bytes | Path):
            pixels = encode.decoded(data, rule).pixels
        else:
            return None
    except (Unreadable, OSError):
        return None
    scale = min(1.0, _SIDE / max(pixels.shape[:2]))
    if scale == 1:
        return pixels
    size = (max(round(pixels.shape[1] * scale), 1), max(round(pixels.shape[0] * scale), 1))
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).resize(size, Image.Resampling.LANCZOS))


def _files(word: str, wanted: dict[int, tuple[int, str, str]]) -> Iterator[tuple[int, Data]]:
    """(key, picture) of those `wanted` that the source `word` has."""
    at, local = address(word), Path(word)
    if at is None and not local.exists():  # no dataset is downloaded for a page
        return
    if prepared.manifest_of(word) is not None:
        yield from _stored(word, wanted)
    elif at is not None and not is_archive(at.name):
        yield from _objects(at, wanted)
    elif at is None and local.is_dir():
        apart = dict(wanted)
        for i, (_, _, path) in wanted.items():
            if _below(path) and (local / path).is_file():
                yield i, local / path
                del apart[i]
        # A folder without archives is not walked: the features, which may come from others, may name any.
        if apart and any(is_archive(inside.name) or inside.suffix == ".parquet" for inside in local.iterdir()):
            yield from _members(word, apart)
    elif at is None and any(path == word for _, _, path in wanted.values()):
        yield from ((i, local) for i, (_, _, path) in wanted.items() if path == word)
    elif at is None and local.suffix == ".npy":
        rows = {path: i for i, (_, _, path) in wanted.items() if path.isdigit()}
        read = plan.reader({"kind": "array", "spec": word}, Reading(), local.parent)
        yield from ((rows[item.name], item.data) for item in read(Portion(0, 0, "files", tuple(rows))))
    else:
        yield from _members(word, wanted)


def _below(path: str) -> bool:
    """Whether a path leads nowhere but below its source. Features may come from others."""
    parts = PurePosixPath(path)
    return bool(path) and not parts.is_absolute() and ".." not in parts.parts


def _objects(at: Address, wanted: dict[int, tuple[int, str, str]]) -> Iterator[tuple[int, Data]]:
    from simclr.data.s3.answers import Missing
    from simclr.data.s3.store import Store

    store = Store()
    for i, (_, _, path) in wanted.items():
        with contextlib.suppress(Missing):
            if _below(path):
                yield i, store.read(at / path, _MOST_BYTES)


def _stored(word: str, wanted: dict[int, tuple[int, str, str]]) -> Iterator[tuple[int, Data]]:
    """Of prepared shards, in which an id is a place among the images of all splits."""
    manifest = prepared.manifest_of(word)
    assert manifest is not None
    with tempfile.TemporaryDirectory(prefix="simclr-pictures-") as scratch:
        read = prepared.reader(word, Path(scratch))
        portions = [portion for portion in prepared.portions(word, manifest, 1 << 62) if portion.first is not None]
        firsts = [portion.first or 0 for portion in portions]
        for i, (number, split, path) in sorted(wanted.items(), key=lambda one: one[1][0]):
            portion = portions[max(int(np.searchsorted(firsts, number, side="right")) - 1, 0)]
            own, shard, begin, count, within = portion.part.split(" ")
            place = number - (portion.first or 0)
            if own != split or not 0 <= place < int(count):
                continue
            one = Portion(0, number, f"{own} {shard} {int(begin) + place} 1 {int(within) + place}")
            for item in read(one):
                if item.name == path:
                    yield i, item.data


def _members(word: str, wanted: dict[int, tuple[int, str, str]]) -> Iterator[tuple[int, Data]]:
    """Of archives and tables whose members have names before they are read."""
    from simclr.data.sources.open import open_source

    source = open_source(word)
    by_path = {path: i for i, (_, _, path) in wanted.items()}
    for part in source.parts:
        if names := tuple(name for name in part.names if name in by_path):
            for item in itertools.islice(source.read(Part(part.name, names)), len(names)):
                yield by_path[item.name], item.data
