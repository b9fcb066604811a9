"""Prepared shards as a source of pictures, for another pass over them than training: whole pictures, as they are stored."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simclr import files
from simclr.data.manifest import Manifest, name_in, read_manifest
from simclr.data.s3.place import Place
from simclr.data.s3.uri import address
from simclr.data.sources.portions import Portion
from simclr.data.sources.source import Item
from simclr.errors import UserError

_EVERY = 1024  # lines between those of a list of names whose places in the file are known


def manifest_of(spec: str) -> Manifest | None:
    """The manifest of prepared shards at `spec`, a folder or s3://prefix; None if it is something else."""
    at = address(spec)
    if at is not None:
        from simclr.data.s3 import remote

        found = remote.manifest_at(at, Place(spec).store)
        return found[0] if found else None
    path = files.user_path(spec)
    return read_manifest(path) if (path / "manifest.json").is_file() else None


def portions(spec: str, manifest: Manifest, images: int) -> Iterator[Portion]:
    """At most `images` of a shard in each portion; of shards in S3 a whole one, since a portion's reader fetches it."""
    number, first = 0, 0
    for split, shards in sorted(manifest.splits.items(), key=lambda of: of[0] != "train"):  # so a train image's id is its sample id
        within = 0
        for shard in shards:
            each = shard.samples if address(spec) is not None else images
            for begin in range(0, shard.samples, each):
                count = min(each, shard.samples - begin)
                yield Portion(number, first, f"{split} {shard.name} {begin} {count} {within + begin}")
                number, first = number + 1, first + count
            within += shard.samples


def reader(spec: str, scratch: Path) -> Callable[[Portion], Iterator[Item]]:
    """A function that gives the pictures of a portion. One shard from S3 at a time lies in the folder `scratch`."""
    from simclr.data.ffcv.reader import open_shard  # other pictures are read without FFCV

    manifest = manifest_of(spec)
    if manifest is None:
        raise UserError(f"there are no shards at {spec} on {os.uname().nodename}; give a disk that all nodes see, or s3://")
    place = Place(spec) if address(spec) is not None else Place(files.user_path(spec))
    by_name = {shard.name: shard for shard in manifest.shards}
    names: dict[str, _Lines | None] = {}

    def read(portion: Portion) -> Iterator[Item]:
        split, shard_name, *numbers = portion.part.split(" ")
        begin, count, within = map(int, numbers)
        if split not in names:
            names[split] = _lines(place, split, manifest.examples(split), scratch)
        lines = names[split]
        called = lines.some(within, count) if lines else [f"{split}/{within + i}" for i in range(count)]
        shard = by_name[shard_name]
        path = _fetched(place, shard_name, shard.bytes, shard.sha256, scratch)
        image, labels, sizes = open_shard(path, shard, manifest)
        with path.open("rb") as file:
            for row, name in zip(range(begin, begin + count), called, strict=True):
                data: bytes | NDArray[np.uint8] = os.pread(file.fileno(), int(sizes[row]), int(image["data_ptr"][row]))
                if image["mode"][row] == 1:
                    data = np.frombuffer(data, np.uint8).reshape(int(image["height"][row]), int(image["width"][row]), 3)
                label = int(labels[row])
                yield Item(split, manifest.classes[label] if 0 <= label < len(manifest.classes) else None, name, data)

    return read


def names_of(data: Path, split: str, ids: Sequence[int], at: str | Path = "") -> list[str]:
    """The names of images of a split of the shards in the folder `data`, by their sample ids; "" for each where the shards have none. If
    `data` is a copy of shards `at` s3://…, the list is fetched."""
    if (source := address(at)) is not None:
        from simclr.data.s3.remote import fetch_names
        from simclr.data.s3.store import Store

        fetch_names(source, data, split, Store())
    lines = _lines(Place(data), split, read_manifest(data, look=False).examples(split), data)
    return [lines.some(int(i), 1)[0] if lines else "" for i in ids]


def _fetched(place: Place, name: str, size: int, sha256: str, scratch: Path) -> Path:
    if place.at is None:
        return place.path / name
    path = scratch / name
    if not path.is_file():
        for old in scratch.glob("*.beton"):
            old.unlink()
        place.store.download(place.at / name, path, size, sha256)
    return path


def _lines(place: Place, split: str, examples: int, scratch: Path) -> _Lines | None:
    name = f"names-{split}.txt"
    if name not in place.names():
        return None
    return _Lines(place.get(name, scratch), examples)


class _Lines:
    """The lines of a list of names, read where they are asked for."""

    def __init__(self, path: Path, examples: int) -> None:
        self.path, self.places = path, [0]  # bytes before every thousandth line
        count = at = 0
        with path.open("rb") as file:
            for line in file:
                count, at = count + 1, at + len(line)
                if count % _EVERY == 0:
                    self.places.append(at)
        if count != examples:
            raise UserError(f"{path} has {count:,} names, the split {examples:,} images; prepare the data again")

    def some(self, first: int, count: int) -> list[str]:
        """The names on `count` lines from line `first` (from 0) on."""
        with self.path.open("rb") as file:
            file.seek(self.places[first // _EVERY])
            wanted = itertools.islice(file, first % _EVERY, first % _EVERY + count)
            return [name_in(line.decode(errors="replace").removesuffix("\n")) for line in wanted]
