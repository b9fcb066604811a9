"""Runs of a source's pictures in plain values, which another process can read: what a job by parts hands out.

One process lists a source and cuts it into portions. A portion carries its names, splits and classes, so that who reads it neither lists
a folder or a prefix nor asks for files of classes. An archive or a table is opened by each process, once.
"""

from __future__ import annotations

import base64
import functools
import itertools
import os
import socket
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from simclr import files
from simclr.data.s3.uri import address
from simclr.data.sources.names import pack, unpack
from simclr.data.sources.open import is_named_set, listed, loose_reader, open_source
from simclr.data.sources.reading import Reading
from simclr.data.sources.source import Data, Item, Part, Source, Tree, captioned
from simclr.errors import UserError


@dataclass(frozen=True, slots=True)
class Portion:
    """Some consecutive pictures of one part of a source."""

    number: int
    """From 0, in the order of the source."""
    first: int | None
    """Place of its first picture among all of the source; None where earlier parts are counted only when they are read."""
    part: str
    """`Part.name`."""
    names: tuple[str, ...] = ()
    """() = all pictures of a part whose names are known only when they are read."""
    splits: tuple[str, ...] = ()
    """Of each name; () = the source says it when it is read."""
    labels: tuple[str | None, ...] = ()
    loose: bool = False
    """As in `Source`."""
    captions: tuple[str, ...] = ()
    """Of each name, where captions were asked for."""

    def to_dict(self) -> dict[str, Any]:
        """In plain values; names, splits and classes are one packed text, of some twelve letters a picture."""
        packed = base64.b64encode(pack([self.names, self.splits, self.labels, self.captions])).decode()
        return {"number": self.number, "first": self.first, "part": self.part, "pictures": packed, "loose": self.loose}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        names, splits, labels, captions = map(tuple, unpack(base64.b64decode(values["pictures"])))
        return cls(values["number"], values["first"], values["part"], names, splits, labels, values["loose"], captions)


def portions(source: Source, images: int) -> Iterator[Portion]:
    """The pictures of `source` in its order, at most `images` in each portion. Parts without names are one portion each; loose pictures of
    several parts may be in one."""
    number, first = 0, 0
    known = True
    for part in _runs(source, images):
        if not part.names:
            yield Portion(number, first if known else None, part.name)
            number, known = number + 1, False
            continue
        yield portion_of(source, part, number, first if known else None)
        number, first = number + 1, first + len(part.names)


def portion_of(source: Source, part: Part, number: int = 0, first: int | None = None) -> Portion:
    """A part of the source, or some pictures of one, with the split and class of each name."""
    names = tuple(part.names)
    placed = [source.place(name) for name in names] if source.place else []
    splits, labels = tuple(split for split, _ in placed), tuple(label for _, label in placed)
    captions = tuple(map(source.caption, names)) if source.caption else ()
    return Portion(number, first, part.name, names, splits, labels, source.loose, captions)


def _runs(source: Source, images: int) -> Iterator[Part]:
    """The source's parts, divided and, where a part is no more than a number of files, put together."""
    left: list[str] = []
    for part in source.parts:
        names = [*left, *part.names]
        end = len(names) // images * images if source.loose else len(names)
        yield from (Part(part.name, tuple(names[begin : begin + images])) for begin in range(0, end, images))
        left = names[end:]
        if not part.names:
            yield part
    if left:
        yield Part(source.parts[-1].name, tuple(left))


def elsewhere(spec: str) -> str:
    """`spec` for a process with another working directory: paths become whole."""
    if address(spec) is not None or is_named_set(spec):
        return spec
    return str(files.user_path(spec).absolute())


def reader(spec: str, reading: Reading | Mapping[str, Any] | None = None, identity: str = "") -> Callable[[Portion], Iterator[Item]]:
    """A function that reads portions of the source that another process has opened as `open_source(spec, reading)`. Nothing is opened
    before it is asked for. `reading`, or its fields in plain values, counts for parts whose names are not known alone; for these it names
    no files, and for others its files need not be on this machine, if it is given in plain values. `identity`: the source's own; "" =
    unknown.

    The function raises UserError where this machine does not see the source, or sees another copy of its archives or tables.
    """
    return _Reader(spec, reading, identity).read


class _Reader:
    """What a process keeps open of a source while it reads portions."""

    def __init__(self, spec: str, reading: Reading | Mapping[str, Any] | None, identity: str) -> None:
        self.spec, self.reading, self.identity = spec, reading, identity
        self.passing: _Passing | None = None

    def read(self, portion: Portion) -> Iterator[Item]:
        part = Part(portion.part, portion.names)
        if not portion.splits:
            yield from self.source.read(part)
            return
        pictures: Iterator[tuple[str, Data]]
        if portion.loose:
            pictures = self.loose(part)
            if address(self.spec) is None:
                _require_some(files.user_path(self.spec), portion)
        elif portion.part in self.one_pass:
            pictures = self._passed(part)
        else:
            pictures = self.tree.read(part)
        captions = portion.captions or ("",) * len(portion.names)
        for (name, data), split, label, caption in zip(pictures, portion.splits, portion.labels, captions, strict=True):
            yield captioned(Item(split, label, name, data, caption)) if portion.captions else Item(split, label, name, data)

    @functools.cached_property
    def loose(self) -> Callable[[Part], Iterator[tuple[str, Data]]]:
        _require_seen(self.spec)
        return loose_reader(self.spec)

    @functools.cached_property
    def tree(self) -> Tree:
        _require_seen(self.spec)
        tree = listed(self.spec, sidecars=False)
        self._require_same(tree.identity)
        return tree

    @functools.cached_property
    def one_pass(self) -> frozenset[str]:
        return frozenset(part.name for part in self.tree.parts if part.one_pass)

    @functools.cached_property
    def source(self) -> Source:
        _require_seen(self.spec)
        given = self.reading
        if isinstance(given, Mapping):
            fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
            given = Reading(**fields)
        source = open_source(self.spec, given)
        self._require_same(source.identity)
        return source

    def _require_same(self, identity: str) -> None:
        if self.identity and identity != self.identity:
            raise UserError(
                f"{socket.gethostname()} sees another {self.spec} than was listed: names, sizes or contents of its files differ; give all "
                "machines the same files or, if these have changed, run the command again"
            )

    def _passed(self, part: Part) -> Iterator[tuple[str, Data]]:
        """The pictures of a portion of a compressed archive. Each portion behind the last goes on where that one ended: else all that lies
        before would be unpacked anew for each."""
        passing, self.passing = self.passing, None
        if passing is None or passing.part != part.name:
            passing = _Passing(part.name)
            passing.pictures = self.tree.read(Part(part.name, passing))
        passing.waiting.extend(part.names)
        yield from itertools.islice(passing.pictures, len(part.names))
        self.passing = passing  # all were read: another portion may follow


class _Passing(Sequence[str]):
    """Names of a part that are asked for one by one; more may be added behind."""

    pictures: Iterator[tuple[str, Data]]

    def __init__(self, part: str) -> None:
        self.part, self.waiting = part, deque[str]()

    def __len__(self) -> int:
        return len(self.waiting)

    def __getitem__(self, at: Any) -> Any:
        return self.waiting[at]

    def __iter__(self) -> Iterator[str]:
        while self.waiting:
            yield self.waiting.popleft()


def _require_seen(spec: str) -> None:
    if address(spec) is not None or is_named_set(spec) or "{" in spec or files.user_path(spec).exists():
        return
    raise UserError(
        f"{socket.gethostname()} does not see {files.user_path(spec)}, where the pictures are read by several machines; give a folder that "
        "all of them see under one path, or s3://, or run without --address"
    )


def _require_some(root: Path, portion: Portion) -> None:
    """Raise UserError where none of a portion's files is there: the folder is another one than that which was listed."""
    if not any(os.path.lexists(root / name) for name in portion.names):
        raise UserError(
            f"{socket.gethostname()} sees none of {len(portion.names):,} files in {root} that were listed, as {portion.names[0]}; give a "
            "folder that all machines see under one path, or s3://, or list it anew: run the command again"
        )
