"""Preparing: images of a source → FFCV .beton files and their manifest, by parts.

A source is listed, a sample decides how its images are stored, and a plan cuts it into parts that make about a shard each. Whoever takes
a part leaves its shards and then its note; at the end lists and manifest are made of the notes. So a prepare that was killed goes on with
the parts that have no note, and one process gives the bytes of a hundred.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import itertools
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from simclr import files
from simclr.data import merge, outputs
from simclr.data.agreement import Identity, agreed, existing
from simclr.data.depth import remarks
from simclr.data.manifest import Manifest, write_manifest
from simclr.data.note import Note, Writer
from simclr.data.options import Kind, Options, stated
from simclr.data.outputs import Output
from simclr.data.shard_parts import Again, Maker, Making, Plain, Refused, Run, make_parts, make_ranks, plan, ranked_again, ranked_by, told
from simclr.data.sources.reading import Reading, essence
from simclr.data.sources.source import Item, Source
from simclr.data.survey import Choice, Unusable, chosen_again, saved, survey
from simclr.errors import UserError

__all__ = ["Elsewhere", "Identity", "Kind", "Options", "agreed", "existing", "held", "prepare"]

_ENOUGH = 1000  # images, from which on the share of unreadable ones counts before the end


@dataclass(frozen=True, kw_only=True, slots=True)
class Elsewhere:
    """Other processes that make parts."""

    run: Callable[[Callable[[Plain], Callable[[Plain], Plain]], Plain, Sequence[Plain]], Iterator[tuple[Plain, Plain]]]
    """What makes the function for parts (called once in each process), its settings, parts → (part, result) of each. It adds `threads` to
    the settings: of each process."""
    reading: Reading
    """How the source was opened."""


def prepare(
    source: Source,
    out: Path,
    options: Options,
    threads: int,
    progress: Callable[[int], None],
    resumed: Callable[[int], None] = lambda done: None,
    *,
    identity: Identity = "times",
    says: Callable[[str], None] = lambda line: None,
    elsewhere: Elsewhere | None = None,
) -> Manifest:
    """Write the shards of `source` and their manifest into `out`, a directory or s3://bucket/prefix; a manifest that it has already is
    returned.

    Labels are the ranks of the sorted class names. The bytes depend on source and options, not on `threads`, nor on whether other
    processes make the parts (`elsewhere`). progress gets the number of images so far. says gets sentences for the user: what was done to
    pictures, and why it begins again, where an image shows that the sample had misled.

    If it is interrupted, killed or cut off from its source, the parts that are done stay; the next call continues with the others
    (resumed gets the number of the images that are done), and the bytes are those of an uninterrupted call. So it is if more images are
    unreadable than `options.max_skipped_pct`: then it raises UserError once that is certain, and a call with a larger share goes on.
    Raises UserError if `out` holds something else or another process writes to it; and, with nothing left behind, for fewer than two
    images, for raw images of different sizes, for a full disk.
    """
    with outputs.opened(out) as output:
        found = output.existing(source, options, identity)
        if found is not None:
            return found
        with output.alone(says):
            if (found := output.existing(source, options, identity)) is not None:  # another prepare has ended meanwhile
                return found
            job = _Job(source, output, options, threads, identity, _Told(progress, resumed, says), elsewhere)
            while True:
                try:
                    return job.whole()
                except Again as again:
                    says(str(again))


def held(source: Source, out: Path, options: Options, identity: Identity = "times") -> Manifest | None:
    """The manifest in `out`, a directory or s3://bucket/prefix, if it was made from the same source with the same options; None if there is
    none. Raises UserError as `existing` does."""
    with outputs.opened(out) as output:
        return output.existing(source, options, identity)


@dataclass(frozen=True, slots=True)
class _Told:
    """Whom a running prepare tells what."""

    progress: Callable[[int], None]
    resumed: Callable[[int], None]
    says: Callable[[str], None]


@dataclass(slots=True)
class _Tally:
    """What the parts that are done say of images that could not be read."""

    rows: int = 0
    skipped: int = 0
    first: dict[int, Sequence[str]] = field(default_factory=dict)
    """Number of a part → name and reason of its first one."""
    reasons: Counter[str] = field(default_factory=Counter)

    def copy(self) -> _Tally:
        """The same, to which more can be added."""
        return _Tally(self.rows, self.skipped, dict(self.first), Counter(self.reasons))

    def add(self, number: int, rows: int, skipped: int, first: Sequence[Sequence[str]], reasons: Mapping[str, int]) -> None:
        """Count a part."""
        self.rows, self.skipped = self.rows + rows, self.skipped + skipped
        self.reasons.update(reasons)
        if first:
            self.first[number] = first[0]


class _Job:
    """A running prepare."""

    def __init__(
        self, source: Source, output: Output, options: Options, threads: int, identity: Identity, tells: _Told, elsewhere: Elsewhere | None
    ) -> None:
        self.source, self.output, self.options, self.threads, self.identity = source, output, options, threads, identity
        self.told, self.elsewhere = tells, elsewhere
        self.about = [source.spec, source.identity, source.total, essence(source.understood), stated(options), _versions()]

    def whole(self) -> Manifest:
        """Run, and on failure leave the parts that are done, or nothing where they are of no use. Raises Again."""
        try:
            return self._run(self._choice())
        except (Refused, Unusable) as error:
            self.output.clear({}, everything=True)
            raise UserError(str(error)) from None
        except OSError as error:
            if error.errno not in files.FULL:
                raise
            raise self._full(str(self.output.scratch)) from None

    def _full(self, folder: str) -> UserError:
        """The error for a full disk, which is cleared of all that was written."""
        written = self.output.unfinished()
        self.output.clear({}, everything=True)
        return UserError(
            f"no space left on the disk of {folder}: its {shutil.disk_usage(self.output.scratch).free / 2**20:,.0f} MiB were full after "
            f"{written / 2**20:,.0f} MiB of shards; free some, or use another --out"
        )

    def _choice(self) -> Choice:
        """What a sample decides: now, or before, for the same source and options."""
        choice = saved(self.output.choice(), _hash(self.about))
        if choice is None or (self.identity != "names" and choice.times != self.source.times):
            with ThreadPoolExecutor(self.threads, thread_name_prefix="survey") as pool:
                choice = self._chosen(survey(self.source, self.options, pool))
        return choice

    def _chosen(self, choice: Choice) -> Choice:
        choice.save(self.output.scratch / outputs.CHOICE, _hash(self.about))
        self.output.keep_choice()
        return choice

    def _run(self, choice: Choice) -> Manifest:
        key = _hash([self.about, choice.times, choice.kind, choice.ranges, choice.size_px, choice.mean_bytes, choice.images_unnamed])
        source, options = self.source, self.options
        making = Making(source=source.spec, key=key, options=options, choice=choice, classes=_listed(source), videos=source.videos)
        making = replace(making, captioned=source.captioned)
        parts = plan(self.source, choice, self.options)
        notes = self.output.notes(key, range(len(parts)))
        if not notes and self.output.has_shards():
            self.told.says(f"the unfinished shards in {self.output} are of another source or version, or of other options; it begins again")
        self.output.clear(notes)
        tally = _Tally()
        for number, note in notes.items():
            about = note.about
            tally.add(number, about.rows, about.skipped, about.first, about.reasons)
        if tally.rows:
            self.told.resumed(tally.rows)
        if self.source.total is not None:
            # A lower bound: if more is needed, a write fails later.
            self.output.require_space((self.source.total - tally.rows) * choice.bytes_each)
        self._require_readable(tally)
        # What ends this ends the workers, before another begin.
        with contextlib.closing(self._made(making, {n: parts[n] for n in range(len(parts)) if n not in notes}, tally)) as made:
            for number, result in made:
                self._require_made(choice, result)
                tally.add(number, result["rows"], result["skipped"], result["first"], result["reasons"])
                self._require_readable(tally)
        self._require_readable(tally, ended=True)
        return self._finished(making, self._notes(key, len(parts)))

    def _made(self, making: Making, parts: dict[int, tuple[Run, ...]], tally: _Tally) -> Generator[tuple[int, Plain]]:
        """(number, result) of each part that is made."""
        count = tally.rows
        if self.elsewhere is None:
            counted = itertools.count(count + 1)
            maker = Maker(making, self.output, self.threads, lambda: self.told.progress(next(counted)))
            encoded = tally.copy()
            waiting: tuple[int, Callable[[], Plain]] | None = None  # a part that is being flushed while the next is encoded
            try:
                for number, runs in parts.items():
                    items = itertools.chain.from_iterable(run.read(self.source) for run in runs)
                    begun = told(maker, functools.partial(self._begun, maker, number, items, encoded))
                    if waiting is not None:
                        yield waiting[0], told(maker, waiting[1])
                    if "future" not in begun:
                        yield number, begun
                    waiting = number, begun["future"].result
                if waiting is not None:
                    yield waiting[0], told(maker, waiting[1])
            except BaseException as error:
                maker.close(at_once=not isinstance(error, Exception | GeneratorExit))
                raise
            maker.close()
            return
        settings = {"making": making.to_dict(), "out": str(self.output), "from": str(Path.cwd())}
        settings |= {"reading": {name: getattr(self.elsewhere.reading, name) for name in Reading.__dataclass_fields__}}
        settings |= {"identity": self.source.identity}
        plain = [{"number": number, "portions": [run.portion(self.source) for run in runs]} for number, runs in parts.items()]
        for part, result in self.elsewhere.run(make_parts, settings, plain):
            self.told.progress(count := count + result.get("rows", 0))
            yield part["number"], result

    def _begun(self, maker: Maker, number: int, items: Iterator[Item], encoded: _Tally) -> Plain:
        """A part whose images are encoded, and which is on its way to the disk or to S3."""
        written, future = maker.make(number, items, functools.partial(self._judge, encoded, number))
        encoded.add(number, written.about.rows, written.about.skipped, written.about.first, written.reasons)
        return {"future": future}

    def _require_made(self, choice: Choice, result: Plain) -> None:
        """Raise what ended a part."""
        if "again" in result:
            again = result["again"]
            # Of ranges the largest counts in the end, whichever part is the first to ask for more.
            ranges = {kind: tuple(found) for kind, found in again["ranges"].items()}
            with ThreadPoolExecutor(self.threads, thread_name_prefix="survey") as pool:
                self._chosen(chosen_again(self.source, self.options, replace(choice, kind=again["kind"], ranges=ranges), pool))
            self.output.clear({})
            raise Again(again["sentence"], again["kind"], ranges)
        if "refused" in result:
            raise Refused(result["refused"])
        if "full" in result:
            raise self._full(result["full"])

    def _judge(self, tally: _Tally, number: int, written: Writer) -> None:
        """`_require_readable` of the parts that are done and of what there is of another one."""
        about, seen = written.about, tally.copy()
        seen.add(number, about.rows, about.skipped, about.first, written.reasons)
        self._require_readable(seen, done=tally.rows)

    def _require_readable(self, tally: _Tally, ended: bool = False, done: int | None = None) -> None:
        """Raise UserError once more images are skipped than may be: of all where their number is known, else of those seen so far."""
        most, total, skipped, seen = self.options.max_skipped_pct, self.source.total, tally.skipped, tally.rows
        of = seen if ended or total is None else max(total, seen)
        if skipped <= most / 100 * of or not (ended or seen >= _ENOUGH):
            return
        first = "" if ended or seen == total else "the first "
        share = f"{math.ceil(1000 * skipped / seen) / 10:g}{' or above' if first else ''}"
        done = seen if done is None else done
        stays = f"; the same command then goes on behind the {done:,} images that are done" if done else ""
        if skipped == seen:  # of no use
            self.output.clear({}, everything=True)
            stays = ""
        raise UserError(
            f"{skipped:,} of {first}{seen:,} images of {self.source.spec} cannot be read, more than {most:g} %"
            f"{f' of all {total:,}' if first and total else ''}; the first: {': '.join(tally.first[min(tally.first)])}; "
            f"most often: {', '.join(f'{reason} ({times})' for reason, times in tally.reasons.most_common(3))}; "
            f"mend the source, or allow more with --max-skipped-pct {share}{stays}"
        )

    def _notes(self, key: str, parts: int) -> list[Note]:
        """The notes of all parts."""
        notes = self.output.notes(key, range(parts))
        if missing := parts - len(notes):
            raise UserError(
                f"{missing:,} of {parts:,} parts that were made are not seen in {self.output} from here; use a disk that all nodes share, "
                "or --out s3://…, and run the same command again"
            )
        return [notes[number] for number in range(parts)]

    def _finished(self, making: Making, notes: list[Note]) -> Manifest:
        found = merge.found_in(self.source, notes)
        stale = [note.about.number for note in notes if note.about.shards and note.about.ranked != ranked_by(found.names)]
        if stale:
            self._rank_again(making.key, stale, found.names)
            notes = self._notes(making.key, len(notes))
        folder = self.output.finish(tuple(shard for note in notes for shard in note.about.whole()))
        manifest, conflicts = merge.merged(self.source, self.options, making.choice, making.rule, notes, found, _versions(), folder)
        write_manifest(folder, manifest)
        self.output.finished(manifest)
        for line in (*remarks(manifest.pixels), conflicts, merge.uneven(notes)):
            if line:
                self.told.says(line)
        return manifest

    def _rank_again(self, key: str, numbers: Sequence[int], classes: Sequence[str]) -> None:
        """Label the shards of these parts by `classes`, which were not known when they were made."""
        if self.elsewhere is None:
            with ThreadPoolExecutor(self.threads, thread_name_prefix="rank") as pool:
                list(pool.map(lambda number: ranked_again(self.output, number, key, classes), numbers))
            return
        settings: dict[str, Any] = {"out": str(self.output), "from": str(Path.cwd()), "key": key, "classes": list(classes)}
        for _ in self.elsewhere.run(make_ranks, settings, [{"number": number} for number in numbers]):
            pass


def _listed(source: Source) -> tuple[str, ...]:
    """The class names that the listing has, sorted."""
    understood: dict[str, Any] = source.understood
    return tuple(sorted({label for split in understood.get("splits", {}).values() for label in split["classes"]}))


def _hash(about: object) -> str:
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("ffcv", "pillow", "numpy")}
