"""What every kind of source gives: parts with the names of their pictures, and a way to read one part.

A source is listed first (`Tree`: names, sizes, small text files, nothing decoded); from the names `layout.understand` tells splits and
classes; what results is a `Source`, whose items go into shards. A folder in a folder, a tar in a folder and a tar in a tar are all the
same to it: an archive counts as a folder that is called like it, without its ending.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simclr.extras import has


@dataclass(frozen=True, slots=True)
class Unread:
    """A picture that was not read from its source."""

    reason: str


Data = bytes | Path | NDArray[np.uint8] | Unread
"""A picture: an encoded file, its path, or pixels (H, W, 3); or why there is none."""


@dataclass(frozen=True, slots=True)
class Item:
    """One image on its way into a shard."""

    split: str
    """train or test."""
    label: str | None
    """Class name; None = unlabelled."""
    name: str
    """Its name in the source, for messages."""
    data: Data
    caption: str = ""
    """What its source says in words of it, where captions were asked for."""


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a source that is read at a time: files of a folder, a run of an archive's members, an inner archive, rows of a table.
    Plain values: another machine that opens the same source can read it."""

    name: str
    """What it is called in messages: a folder, an archive, a table."""
    names: Sequence[str] = ()
    """Its pictures, in the order in which they are read, by their paths in the source: a tuple, or `Packed`. () = known only when they are
    read, and then they lie below `name`/."""
    one_pass: bool = False
    """Whether a picture is read only behind all that lie before it, as in a compressed archive."""


class Together(Collection[str]):
    """The names of all `parts`, one part after the other, unpacked anew in each pass; of a part whose pictures are not known its own, with
    a slash behind."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts, self.count = parts, sum(len(part.names) or 1 for part in parts)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[str]:
        for part in self.parts:
            yield from part.names or (f"{part.name}/",)

    def __contains__(self, name: object) -> bool:
        return any(name == other for other in self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tree:
    """A source as it was listed. `layout.understand` makes a `Source` of it."""

    spec: str
    """The source as the user named it; with the options, it identifies the shards made from it."""
    parts: Sequence[Part]
    read: Callable[[Part], Iterator[tuple[str, Data]]]
    """(name, picture) of each of `part.names`, in their order, or of all where the part has no names. The names may be some of the
    part's only: so a sample is read."""
    stated: Mapping[str, str] = field(default_factory=dict)
    """Picture → its class, where the source itself states it in data (a table's column, WebDataset's .cls), not in folders' names."""
    captions: Callable[[], Mapping[str, str | bytes | list[Any]]] = dict
    """Reads what the source itself says of pictures in words (a table's column, WebDataset's .txt): picture → caption, or captions, as
    they are stored; bytes where they are not UTF-8."""
    worded: frozenset[str] = frozenset()
    """Pictures whose stated class is what their caption would be."""
    texts: Mapping[str, Callable[[], bytes]] = field(default_factory=dict)
    """Files that may hold labels, by their paths: .txt .csv .tsv .jsonl .mat, each with a way to read it."""
    ignored: Counter[str] = field(default_factory=Counter)
    """Ending → number of files whose names are not those of pictures."""
    junk: Counter[str] = field(default_factory=Counter)
    """Name of a folder that is no folder of pictures (.ipynb_checkpoints, @eaDir, __MACOSX …) → number of files in such."""
    identity: str = ""
    """A hash that changes with the source: of names and sizes."""
    times: str = ""
    """A hash of the files' modification times, or what else changes with content of the same size (an ETag); "" = unknown."""
    notes: tuple[str, ...] = ()
    """Sentences about what was found, for the user."""
    loose: bool = False
    """Whether each picture is a file of its own, called by its name below `spec`: then it can be read without a listing."""
    bare: Sequence[str] = ()
    """Folders in which no file is a picture's and no folder lies."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A set of images that is read from front to back, always in the same order: part by part."""

    spec: str
    parts: Sequence[Part]
    read: Callable[[Part], Iterator[Item]]
    place: Callable[[str], tuple[str, str | None]] | None = None
    """Name of a picture → its split and class; None = they are known only when it is read."""
    captioned: bool = False
    """Whether its items have captions, which go into the shards."""
    caption: Callable[[str], str] | None = None
    """Name of a picture → its caption, as `place`."""
    loose: bool = False
    """As in `Tree`."""
    total: int | None = None
    """Number of images, if it is known without reading."""
    identity: str = ""
    times: str = ""
    videos: bool = False
    """Whether a folder of pictures is a video: they are frames in their order, and follow each other."""
    understood: dict[str, object] = field(default_factory=dict)
    """How splits and classes were found, in plain values; it goes into the manifest."""

    def items(self) -> Iterator[Item]:
        """The images of all parts, one after the other."""
        for part in self.parts:
            yield from self.read(part)

    def sample(self, count: int) -> Iterator[Item]:
        """Some `count` images, evenly spaced over the whole as far as names are known; of parts without names, the first ones."""
        every = max(sum(len(part.names) or 1 for part in self.parts) / max(count, 1), 1.0)
        due = at = 0.0
        for part in self.parts:
            if not part.names:
                if at >= due:
                    first = next(self.read(part), None)
                    due += every
                    if first is not None:
                        yield first
                at += 1
                continue
            chosen = []
            while due < at + len(part.names):
                chosen.append(part.names[int(due - at)])
                due += every
            at += len(part.names)
            if chosen:
                yield from self.read(Part(part.name, tuple(chosen)))


IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".avif"}
    | {".jp2", ".j2k", ".ppm", ".pgm", ".pbm", ".pnm", ".tga"}
    | ({".heic", ".heif"} if has("pillow_heif") else set())  # the extra `images`; without it `pixels.unread` says so
)
TEXT_SUFFIXES = frozenset({".txt", ".csv", ".tsv", ".jsonl", ".mat"})
_JUNK = frozenset({"@eadir", "__macosx", "$recycle.bin", "system volume information", "lost+found", "__pycache__"})
MOST_TEXT_BYTES = 64 << 20
"""A larger text is not looked at for classes."""
MOST_TEXTS = 50
"""Of one ending in a folder; a folder with more has one for each picture: boxes, or captions."""
MOST_DEPTH, MOST_NAME = 64, 4096
"""Folders above a picture, and letters of its path: no disk holds longer ones."""
PART_IMAGES = 1024
"""Pictures of a part, where they can be divided at will."""


def is_image(name: str) -> bool:
    """Whether `name` has an image's suffix. Hidden files, such as macOS's `._*` in archives, are no images."""
    return ending(name) in IMAGE_SUFFIXES


def is_text(name: str) -> bool:
    """Whether the file may hold labels, by its name."""
    return ending(name) in TEXT_SUFFIXES


def is_junk(folder: str) -> bool:
    """Whether a folder of this name holds no pictures of its owner: a hidden one, thumbnails of a file server, a wastebasket."""
    return (folder.startswith(".") and folder not in (".", "..")) or folder.lower() in _JUNK


def ending(name: str) -> str:
    """The suffix of a file's name in lower case; "hidden" or "none" where that says more."""
    file = name.rpartition("/")[2]
    if file.startswith("."):
        return "hidden"
    stem, dot, suffix = file.rpartition(".")
    return f".{suffix.lower()}" if stem and dot and suffix else "none"


def too_long(path: str) -> bool:
    """Whether a path in a source has more letters or folders than one on a disk may have. Each folder costs time and memory."""
    return len(path) > MOST_NAME or path.count("/") > MOST_DEPTH


def bundles(items: Iterator[Item], count: int, most_bytes: int) -> Iterator[list[Item]]:
    """`items` in lists of at most `count`, and of at most `most_bytes` if they are several: encoded files are in memory."""
    bundle: list[Item] = []
    size = 0
    for item in items:
        bundle.append(item)
        size += len(item.data) if isinstance(item.data, bytes) else 0
        if len(bundle) == count or size >= most_bytes:
            yield bundle
            bundle, size = [], 0
    if bundle:
        yield bundle


def divided(name: str, names: Sequence[str], most: int = PART_IMAGES) -> list[Part]:
    """Parts of at most `most` of the `names`, in their order."""
    return [Part(name, tuple(names[begin : begin + most])) for begin in range(0, len(names), most)]


def captioned(item: Item) -> Item:
    """The image of a pair; a training image without a caption is none, and is listed with those that cannot be used."""
    return item if item.caption.strip() or item.split != "train" else replace(item, data=Unread("it has no caption"))


class Digest:
    """16 hex digits of parts that come one after the other."""

    def __init__(self) -> None:
        self._hashed = hashlib.sha256()

    def add(self, part: str | bytes) -> None:
        self._hashed.update((part if isinstance(part, bytes) else part.encode(errors="surrogateescape")) + b"\0")

    def __str__(self) -> str:
        return self._hashed.hexdigest()[:16]


def digest(*parts: str | bytes) -> str:
    """16 hex digits of `parts`."""
    whole = Digest()
    for part in parts:
        whole.add(part)
    return str(whole)
