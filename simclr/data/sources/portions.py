"""Runs of a source's pictures in plain values, which another process can read: what a job by parts hands out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Self

from simclr.data.sources.reading import Reading
from simclr.data.sources.source import Item, Part, Source


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

    def to_dict(self) -> dict[str, Any]:
        """In plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        lists = {name: tuple(values[name]) for name in ("names", "splits", "labels")}
        return cls(values["number"], values["first"], values["part"], **lists)


def portions(source: Source, images: int) -> Iterator[Portion]:
    """The pictures of `source` in its order, at most `images` in each portion. Parts without names are one portion each."""
    number, first = 0, 0
    known = True
    for part in source.parts:
        if not part.names:
            yield Portion(number, first if known else None, part.name)
            number, known = number + 1, False
            continue
        for begin in range(0, len(part.names), images):
            names = part.names[begin : begin + images]
            placed = [source.place(name) for name in names] if source.place else []
            splits, labels = tuple(split for split, _ in placed), tuple(label for _, label in placed)
            yield Portion(number, first if known else None, part.name, tuple(names), splits, labels)
            number, first = number + 1, first + len(names)


def reader(spec: str, reading: Reading) -> Callable[[Portion], Iterator[Item]]:
    """A function that reads portions of the source that another process has opened as `open_source(spec, reading)`. Raises UserError
    where this machine does not see the source."""
    from simclr.data.sources.open import open_source

    source = open_source(spec, reading)

    def read(portion: Portion) -> Iterator[Item]:
        yield from source.read(Part(portion.part, portion.names))

    return read
