"""The parts of a prepare: consecutive pictures of a source that make about a shard, encoded by whoever takes them.

A part that is made has left its shards, and then its note; the same part gives the same bytes wherever it is made. A source is read
strictly in its order, so that an archive is not read once for each split: a part that holds pictures of both splits makes shards of both.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import itertools
import json
import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from simclr import files
from simclr.data import note, outputs
from simclr.data.depth import Rule, deeper
from simclr.data.encode import Encoded, encode
from simclr.data.ffcv.writer import MOST_SAMPLES, SplitWriter, relabel
from simclr.data.manifest import Shard
from simclr.data.options import Options
from simclr.data.outputs import Output
from simclr.data.sources.portions import Portion, portion_of, reader
from simclr.data.sources.source import PART_IMAGES, Item, Part, Source, bundles
from simclr.data.survey import Choice, sizes_differ
from simclr.errors import UserError

Plain = dict[str, Any]
_AHEAD_BYTES = 256 << 20  # of encoded files in memory
_MOST_LARGER = 1.25  # than asked for: a shard that would be larger is divided
_MOST_UNNAMED_PARTS = 1024  # of a source whose pictures are counted when they are read


@dataclass(frozen=True, slots=True)
class Run:
    """Some consecutive pictures of a part of a source; all of them where their names are not known, or cannot be told apart cheaply."""

    part: Part
    begin: int
    end: int

    def read(self, source: Source) -> Iterator[Item]:
        """The pictures, in this process."""
        whole = not self.part.names or self.end - self.begin == len(self.part.names)
        return source.read(self.part if whole else Part(self.part.name, tuple(self.part.names[self.begin : self.end])))

    def portion(self, source: Source) -> Plain:
        """In plain values, for another process."""
        return portion_of(source, Part(self.part.name, self.part.names[self.begin : self.end])).to_dict()


def plan(source: Source, choice: Choice, options: Options) -> list[tuple[Run, ...]]:
    """The parts, in the source's order; the place of each is its number.

    Files of their own are divided at will, and so are small parts of archives and tables. Others stay whole: a compressed tar is read from
    its beginning, a table by its groups of rows, and what has no names is not known yet.
    """
    each = pictures_of_a_part(choice, options)
    unnamed = sum(not part.names for part in source.parts)
    together = max(each // max(choice.images_unnamed, 1), -(-unnamed // _MOST_UNNAMED_PARTS), 1)
    room, most = 0, each * together  # a picture takes `together` of it, a part without names `each`
    parts: list[list[Run]] = []
    for part in source.parts:
        begin, size = 0, len(part.names)
        if not size or part.one_pass or (size > PART_IMAGES and not source.loose):
            takes = size * together or each
            if takes > room:
                parts.append([])
                room = most
            parts[-1].append(Run(part, 0, size))
            room -= takes
            continue
        while begin < size:
            if room < together:
                parts.append([])
                room = most
            end = min(size, begin + room // together)
            parts[-1].append(Run(part, begin, end))
            room -= (end - begin) * together
            begin = end
    return [tuple(runs) for runs in parts]


def pictures_of_a_part(choice: Choice, options: Options) -> int:
    """How many pictures make about a shard."""
    return min(max(int((options.shard_mib << 20) / max(choice.mean_bytes, 1.0)), 1), MOST_SAMPLES)


@dataclass(frozen=True, kw_only=True, slots=True)
class Making:
    """What holds for every part."""

    source: str
    """`Source.spec`, for messages."""
    key: str
    """Identifies source, options, choice and versions."""
    options: Options
    choice: Choice
    classes: tuple[str, ...]
    """Class names that the listing has; labels are the ranks of these. With fewer than two, nothing is told apart."""
    captioned: bool = False
    """Whether captions go into the shards."""
    videos: bool = False
    """Whether the pictures are frames of videos."""

    @property
    def rule(self) -> Rule:
        """How pixels become 8-bit RGB."""
        return self.options.rule(self.choice.ranges)

    def to_dict(self) -> Plain:
        """In plain values, for another process."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Plain) -> Making:
        """What `to_dict` gave, also after it went through JSON."""
        options: Plain = {name: tuple(value) if isinstance(value, list) else value for name, value in values["options"].items()}
        choice = dict(values["choice"])
        choice["ranges"] = {kind: tuple(found) for kind, found in choice["ranges"].items()}
        choice["size_px"] = tuple(choice["size_px"])
        return cls(
            source=values["source"],
            key=values["key"],
            options=Options(**options),
            choice=Choice(**choice),
            classes=tuple(values["classes"]),
            captioned=values["captioned"],
            videos=values["videos"],
        )


class Again(Exception):
    """An image does not fit what the sample decided; the message says what is done instead."""

    def __init__(self, sentence: str, kind: Literal["raw", "jpeg"], ranges: dict[str, tuple[float, float]]) -> None:
        super().__init__(sentence)
        self.kind, self.ranges = kind, ranges


def ranked_by(classes: Sequence[str]) -> str:
    """A hash of the class names whose ranks labels are."""
    return hashlib.sha256(json.dumps(list(classes) if len(classes) > 1 else []).encode()).hexdigest()


class Maker:
    """Makes parts in this process."""

    def __init__(self, making: Making, output: Output, threads: int, progress: Callable[[], None] = lambda: None) -> None:
        """`progress` is called for each picture."""
        self.making, self.output, self.progress, self.ahead = making, output, progress, 4 * threads
        self.rule, self.ranked = making.rule, ranked_by(making.classes)
        classes = making.classes if len(making.classes) > 1 else ()
        self.ranks: dict[str | None, int] = {name: rank for rank, name in enumerate(classes)}
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="encode")
        self.behind = ThreadPoolExecutor(1, thread_name_prefix="flush")  # in order: a note is written behind its shards

    def make(
        self, number: int, items: Iterator[Item], judge: Callable[[note.Writer], None] = lambda written: None
    ) -> tuple[note.Writer, Future[Plain]]:
        """Make a part. judge gets what there is of its note, behind each image that could not be used, and may raise.

        Returns the note, and, for when all is on the disk or in S3, what the driver is told: rows, skipped, first, reasons. Raises Again
        and Refused for an image that contradicts the sample."""
        written = note.Writer(note.About(key=self.making.key, number=number, ranked=self.ranked), self.making.videos)
        most = int((self.making.options.shard_mib << 20) * _MOST_LARGER)
        captioned = self.making.captioned
        writers = {
            split: SplitWriter(self.output.scratch, split, number, most, self.output.keep, self.behind, captioned) for split in note.SPLITS
        }
        try:
            for encoded in self._in_order(items):
                written.add(encoded)
                if encoded.skipped:
                    judge(written)
                else:
                    self._require_expected(encoded)
                    writers[encoded.item.split].add(encoded, self.ranks.get(encoded.item.label, -1))
                self.progress()
            for writer in writers.values():
                writer.end()
        finally:
            for writer in writers.values():
                writer.abandon()
        return written, self.behind.submit(self._noted, number, written, {split: writer.shards for split, writer in writers.items()})

    def _noted(self, number: int, written: note.Writer, shards: dict[str, list[Future[Shard]]]) -> Plain:
        """Write the note of a part whose shards are done, or raise what ended one of them."""
        about, whole = written.about, [(split, shard.result()) for split, of in shards.items() for shard in of]
        about.shards = [(split, s.name, s.bytes, s.sha256, s.samples) for split, s in whole]
        written.write(self.output.keep_note(number))
        self.output.sent(number)
        return {"rows": about.rows, "skipped": about.skipped, "first": about.first, "reasons": about.reasons}

    def _require_expected(self, encoded: Encoded) -> None:
        """Raise Again, or Refused, for an image that contradicts the sample."""
        choice, name, size = self.making.choice, encoded.item.name, (encoded.height, encoded.width)
        if choice.size_px and choice.size_px != size:
            height, width = choice.size_px
            if self.making.options.kind == "raw":
                raise Refused(sizes_differ(name, size, (height, width)))
            said = f"{name} has {size[1]} × {size[0]} px, the images before it {width} × {height}; it begins again and stores JPEG"
            raise Again(said, "jpeg", choice.ranges)
        if encoded.rescaled and (ranges := deeper(self.rule, encoded.high)):
            said = (
                f"{name} has pixels up to {encoded.high:,.0f}, the images of the sample none above "
                f"{self.rule.ranges['integers'][1]:,.0f}; it begins again with white at {ranges['integers'][1]:,.0f}"
            )
            raise Again(said, choice.kind, ranges)

    def _in_order(self, items: Iterator[Item]) -> Iterator[Encoded]:
        """Encoded images in the order of the source, whichever thread is done first, at most `ahead` chunks in memory."""
        pending: deque[tuple[Future[list[Encoded]], int]] = deque()
        options, kind, in_memory = self.making.options, self.making.choice.kind, 0
        how = (kind, options.max_side_px, options.jpeg_quality, self.rule)
        for chunk in bundles(items, 64 if kind == "raw" else 4, _AHEAD_BYTES):
            size = sum(len(row.data) for row in chunk if isinstance(row.data, bytes))
            while pending and (len(pending) >= self.ahead or in_memory + size > _AHEAD_BYTES):
                done, taken = pending.popleft()
                yield from done.result()
                in_memory -= taken
            pending.append((self.pool.submit(lambda rows: [encode(row, *how) for row in rows], chunk), size))
            in_memory += size
        for done, _ in pending:
            yield from done.result()

    def close(self, at_once: bool = False) -> None:
        """End the threads. What they have begun to put where it belongs is waited for, but transfers end where this is to be `at_once`."""
        if at_once:
            self.output.end()
        self.pool.shutdown(wait=not at_once, cancel_futures=True)
        self.behind.shutdown(wait=True, cancel_futures=at_once)


class Refused(Exception):
    """The source cannot be trained on; the message says why, and what to do."""


def ranked_again(output: Output, number: int, key: str, classes: Sequence[str]) -> Plain:
    """Write the labels of a part's shards again, as ranks of `classes`."""
    known = output.notes(key, [number]).get(number)
    if known is None:
        raise UserError(
            f"part {number} is not seen in {output} on {socket.gethostname()}; use a disk that all nodes share, or --out s3://…"
        )
    ranks = {name: rank for rank, name in enumerate(classes if len(classes) > 1 else ())}
    split, label, reason = known.columns("split", "label", "reason")
    of_label = np.array([ranks.get(name, -1) for name in known.about.labels] + [-1], np.int64)  # the last is that of −1
    used = np.array([not text for text in reason], bool)
    shards = []
    for place, name in enumerate(note.SPLITS):
        labels, at = of_label[label[used & (split == place)]], 0
        for shard in known.about.of(name):
            with output.changing(shard) as path:
                changed = relabel(path, labels[at : at + shard.samples], shard)
                output.kept(changed)
            shards.append((name, changed))
            at += shard.samples
    known.ranked_anew(ranked_by(classes), shards)
    output.sent(number)
    return {}


# ── In another process ─────────────────────────────────────────────────────────────────────────────────────────────


def make_parts(settings: Plain) -> Callable[[Plain], Plain]:
    """A function that makes parts (their number and their portions) of the source that `settings` name."""
    outputs.enter(settings["from"])
    making = Making.from_dict(settings["making"])
    opened = contextlib.ExitStack()
    output = opened.enter_context(outputs.opened(settings["out"]))
    atexit.register(opened.close)
    output.require_seen()
    read = reader(making.source, settings["reading"], settings["identity"])
    maker = Maker(making, output, settings["threads"])

    def make(part: Plain) -> Plain:
        items = itertools.chain.from_iterable(read(Portion.from_dict(portion)) for portion in part["portions"])
        return told(maker, lambda: maker.make(part["number"], items)[1].result())

    return make


def told(maker: Maker, make: Callable[[], Plain]) -> Plain:
    """What `make` returns, or in `again`, `refused` or `full` why the part cannot be made so, in plain values."""
    try:
        return make()
    except Again as again:
        return {"again": {"sentence": str(again), "kind": again.kind, "ranges": again.ranges}}
    except Refused as refused:
        return {"refused": str(refused)}
    except OSError as error:
        if error.errno not in files.FULL:
            raise
        return {"full": str(maker.output.scratch)}


def make_ranks(settings: Plain) -> Callable[[Plain], Plain]:
    """A function that ranks the labels of a part anew."""
    outputs.enter(settings["from"])
    opened = contextlib.ExitStack()
    output = opened.enter_context(outputs.opened(settings["out"]))
    atexit.register(opened.close)
    return lambda part: ranked_again(output, part["number"], settings["key"], settings["classes"])
