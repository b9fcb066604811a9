"""Sources of pictures that a test holds in its hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from simclr.data.sources.patterns import CLASSES, render
from simclr.data.sources.source import Data, Item, Part, Source, is_image


def source_of(items: Sequence[Item], spec: str = "made", known: bool = True, **more: Any) -> Source:
    """A source of one part. Where it is not `known`, it has neither names nor a total, like a compressed archive."""
    names = tuple(item.name for item in items)

    def read(part: Part) -> Iterator[Item]:
        wanted = set(part.names)
        yield from (item for item in items if not wanted or item.name in wanted)

    return Source(spec=spec, parts=[Part("all", names if known else ())], read=read, total=len(items) if known else None, **more)


def source_of_files(files: Mapping[str, Data] | Sequence[bytes], labels: str | None = None, spec: str = "made", **more: Any) -> Source:
    """A training split of the `files`, by name or numbered; `labels` has a letter for each class, which come by turns."""
    named = files if isinstance(files, Mapping) else {f"{i}.jpg": data for i, data in enumerate(files)}
    items = [Item("train", labels and labels[i % len(labels)], name, data) for i, (name, data) in enumerate(named.items())]
    return source_of(items, spec, **more)


def source_of_folder(folder: Path, **more: Any) -> Source:
    """The pictures of a folder, by their names, unlabelled and in the order of their names."""
    found = sorted(path for path in folder.iterdir() if is_image(path.name) and not path.is_dir())
    return source_of_files({path.name: path for path in found}, spec=str(folder), **more)


def breaking(items: Sequence[Item], after: int, error: Callable[[], Exception], spec: str = "made", **more: Any) -> Source:
    """A source that breaks off behind so many items, not yet when it is read for the first time, as a sample."""
    whole, reads = source_of(items, spec, **more), itertools.count()

    def read(part: Part) -> Iterator[Item]:
        breaks = next(reads) > 0
        for item in whole.read(part):
            if item is items[after] and breaks:
                raise error()
            yield item

    return Source(spec=spec, parts=whole.parts, read=read, total=whole.total, **more)


def patterns(train: int, test: int, size_px: int = 32) -> Source:
    """Rendered patterns as pixels, which have no names."""
    images, labels = render(np.arange(train + test), 0, size_px, False)
    splits = ["train"] * train + ["test"] * test
    items = [Item(split, CLASSES[labels[i]], f"{split}/{i}", images[i]) for i, split in enumerate(splits)]
    return source_of(items, f"patterns:train={train},test={test},size={size_px}")
