"""An image on its way into a shard, a source of images, and the split and class that a file's path states."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm"})


_SPLITS = {"train": "train", "training": "train", "test": "test", "val": "test", "valid": "test", "validation": "test"}


@dataclass(frozen=True, slots=True)
class Item:
    """One image on its way into a shard."""

    split: str
    """train or test."""
    label: str | None
    """Class name; None = unlabelled."""
    name: str
    """Its name in the source, for messages."""
    data: bytes | Path | NDArray[np.uint8]
    """An encoded file, its path, or pixels (H, W, 3)."""


@dataclass(frozen=True, slots=True)
class Source:
    """A set of images that can be read once from front to back, always in the same order."""

    spec: str
    """The source as the user named it; with the options, it identifies the shards made from it."""
    total: int | None
    """Number of images, if it is known without reading."""
    items: Callable[[], Iterator[Item]]
    identity: str = ""
    """A hash that changes with the source: of a folder's file names and sizes, of an archive's size and ends."""
    ignored: Counter[str] = field(default_factory=Counter)
    """Ending → number of files whose names are not those of images; of an archive, those seen so far."""


def place(parts: tuple[str, ...]) -> tuple[str, str | None]:
    """(split, class) of a file from the folders above it: split/…/class/file, class/file, or just file."""
    split = "train"
    folders = list(parts[:-1])
    for depth, folder in enumerate(folders):
        if folder.lower() in _SPLITS:
            split = _SPLITS[folder.lower()]
            folders = folders[depth + 1 :]
            break
    return split, folders[-1] if folders else None


def is_image(name: str) -> bool:
    """Whether `name` has an image's suffix. Hidden files, such as macOS's `._*` in archives, are no images."""
    path = PurePosixPath(name)
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def ending(name: str) -> str:
    path = PurePosixPath(name)
    return "hidden" if path.name.startswith(".") else path.suffix.lower() or "none"


def digest(*parts: str | bytes) -> str:
    """16 hex digits of `parts`."""
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update((part if isinstance(part, bytes) else part.encode(errors="surrogateescape")) + b"\0")
    return hashed.hexdigest()[:16]
