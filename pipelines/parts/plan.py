"""The pictures that a command is given, as parts: files, folders, archives, tables, buckets, prepared shards, arrays."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.parts.run import Plain
from pipelines.terminal import say
from simclr.data import arrays
from simclr.data.depth import Rule, decided
from simclr.data.options import Options
from simclr.data.pixels import unread
from simclr.data.s3.uri import address
from simclr.data.sources import portions, prepared
from simclr.data.sources.open import open_source
from simclr.data.sources.portions import Portion
from simclr.data.sources.reading import Reading
from simclr.data.sources.source import Item, Source
from simclr.errors import UserError

_RULE = 1  # how sources are divided; another rule gives other parts
_LEAST, _MOST, _PARTS = 64, 8192, 256
_SAMPLE = 256  # pictures that decide how pixels of more than 8 bits are scaled
_JPEG = (".jpg", ".jpeg", ".jpe", ".jfif")


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done."""

    parts: list[Plain]
    """number, from 0; first: id of its first picture, None where earlier parts are counted only when they are read; source: index in
    `sources`; portion."""
    sources: list[Plain]
    """kind and spec of each, as `reader` takes them."""
    total: int | None
    """Pictures, if they can be counted beforehand."""
    ranges: dict[str, tuple[float, float]]
    """Black and white of pixels of more than 8 bits, by a sample."""
    key: str
    """A hash of the pictures and of their division into parts."""


@dataclass(slots=True)
class _Opened:
    kind: str
    spec: str
    total: int | None
    identity: object
    divided: Callable[[int], Iterator[Portion]]
    sample: Callable[[], Iterator[Item]] = field(default=lambda: iter(()))
    listed: str = ""
    """The identity that whoever opens the source must find; "" = any."""


def plan(words: Sequence[str], reading: Reading, options: Options) -> Plan:
    """The parts of all sources that `words` name, one after the other. What was left out of a source is said.

    Raises UserError where there is no such source, or nothing in it.
    """
    opened = _opened(words, reading, options)
    total = sum(one.total or 0 for one in opened) if all(one.total is not None for one in opened) else None
    images = min(max((total or _PARTS * 1024) // _PARTS, _LEAST), _MOST)
    parts: list[Plain] = []
    first: int | None = 0
    for index, one in enumerate(opened):
        for portion in one.divided(images):
            at = first + portion.first if first is not None and portion.first is not None else None
            parts.append({"number": len(parts), "first": at, "source": index, "portion": portion.to_dict()})
        first = first + one.total if first is not None and one.total is not None else None
    ranges = {} if options.value_range else _ranges((item for one in opened for item in one.sample()), options.rule({}))
    about = [[one.kind, one.spec, one.total, one.identity] for one in opened]
    key = hashlib.sha256(json.dumps([_RULE, about, images, reading.to_dict()]).encode()).hexdigest()
    # Another process may have another working directory.
    sources: list[Plain] = [{"kind": one.kind, "spec": portions.elsewhere(one.spec), "identity": one.listed} for one in opened]
    return Plan(parts, sources, total, ranges, key)


def id_of(part: Plain, place: int) -> int:
    """The id of the picture at `place` of a part: counted through all sources or, where that cannot be known, through the part."""
    first: int | None = part["first"]
    return first + place if first is not None else (int(part["number"]) + 1 << 32) + place


def reader(source: Plain, reading: Reading | Plain, scratch: Path) -> Callable[[Portion], Iterator[Item]]:
    """A function that gives the pictures of a portion, in this process. It may put files into the folder `scratch`."""
    match source["kind"]:
        case "shards":
            return prepared.reader(source["spec"], scratch)
        case "files":
            folder = Path(source["spec"])
            return lambda portion: (Item("train", None, name, folder / name) for name in portion.names)
        case "array":
            array = _array(Path(source["spec"]))
            return lambda portion: (Item("train", None, name, np.array(array[int(name)])) for name in portion.names)
        case _:
            return portions.reader(source["spec"], reading, source["identity"])


def _opened(words: Sequence[str], reading: Reading, options: Options) -> list[_Opened]:
    """Each source; picture files that are named one by one are one source together."""
    found: list[_Opened] = []
    single: list[str] = []
    for word in words:
        path = Path(word)
        if address(word) is None and path.suffix == ".npy" and path.is_file():
            found.append(_of_array(path, options.max_pixels))
        elif (manifest := prepared.manifest_of(word)) is not None:
            total = sum(manifest.examples(split) for split in manifest.splits)
            identity = hashlib.sha256(json.dumps([asdict(shard) for shard in manifest.shards]).encode()).hexdigest()
            found.append(_Opened("shards", word, total, identity, lambda n, w=word, m=manifest: prepared.portions(w, m, n)))  # type: ignore[misc]
        elif address(word) is None and path.is_file() and not _holds_many(path):
            single.append(word)
        else:
            source = open_source(word, reading)
            _tell(source)
            about = [source.identity, source.times, source.spec]
            divided = lambda n, s=source: portions.portions(s, n)  # noqa: E731
            found.append(_Opened("source", word, source.total, about, divided, lambda s=source: _sample(s), source.identity))  # type: ignore[misc]
    if single:
        states = [Path(name).stat() for name in single]
        marks = [[name, s.st_size, s.st_mtime_ns] for name, s in zip(single, states, strict=True)]
        found.insert(0, _Opened("files", ".", len(single), marks, lambda n: _of_names(single, n), lambda: _of_files(single)))
    return found


def _holds_many(path: Path) -> bool:
    from simclr.data.sources.archives import is_archive_file

    return path.suffix.lower() in (".parquet", ".beton", ".ffcv") or is_archive_file(path)


def _tell(source: Source) -> None:
    """Say what of a source is left out, and what may not be meant so."""
    understood: dict[str, Any] = source.understood
    left = understood.get("left_out", {})
    if left:
        kinds = [f"{count:,} {ending}{f' ({why})' if (why := unread(ending)) else ''}" for ending, count in left.items()]
        say(f"{source.spec}: left out: {', '.join(kinds[:6])}{' …' if len(kinds) > 6 else ''}")
    for note in understood.get("notes", ()):
        say(f"{source.spec}: {note}")


def _of_names(names: Sequence[str], images: int) -> Iterator[Portion]:
    for number, begin in enumerate(range(0, len(names), images)):
        yield Portion(number, begin, "files", tuple(names[begin : begin + images]))


def _of_files(names: Sequence[str]) -> Iterator[Item]:
    for name in names[:: max(len(names) // _SAMPLE, 1)]:
        yield Item("train", None, name, Path(name))


def _sample(source: Source) -> Iterator[Item]:
    """Pictures that may have more than 8 bits. Where all are JPEG by their names, none is read."""
    if not source.understood or all(part.names and all(name.lower().endswith(_JPEG) for name in part.names) for part in source.parts):
        return
    yield from source.sample(_SAMPLE)


def _ranges(sample: Iterable[Item], rule: Rule) -> dict[str, tuple[float, float]]:
    from simclr.data.encode import look

    seen = [look(item, 1 << 14, rule).values for item in sample if not item.name.lower().endswith(_JPEG)]
    return decided([values for values in seen if values])


def _of_array(path: Path, most: int) -> _Opened:
    array = _array(path, most)
    state = path.stat()
    names = [str(row) for row in range(len(array))]
    return _Opened("array", str(path), len(array), [state.st_size, state.st_mtime_ns], lambda n: _of_names(names, n))


def _array(path: Path, most: int | None = None) -> Any:
    try:
        arrays.require_plain_headers(path)
        array = np.load(path, mmap_mode="r")
    except Exception as error:  # NumPy raises nearly anything for a damaged header; nothing here computes
        raise UserError(f"{path} is no .npy file that can be read ({error}); expected uint8 (n, H, W, 3)") from None
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path} is an .npz file; expected an .npy file of uint8 (n, H, W, 3)")
    if array.ndim != 4 or array.shape[3] != 3 or array.dtype != np.uint8 or not len(array):
        raise UserError(f"{path} holds {array.dtype} {array.shape}; expected uint8 (n, H, W, 3)")
    if most is not None and array.shape[1] * array.shape[2] > most:
        raise UserError(
            f"{path} holds images of {array.shape[2]:,} × {array.shape[1]:,} pixels, which would fill the memory; "
            f"--max-pixels {array.shape[1] * array.shape[2]} reads them"
        )
    return array
