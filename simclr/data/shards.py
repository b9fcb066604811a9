"""Writing shards: images of a source → FFCV .beton files and their manifest.

FFCV's own DatasetWriter hangs for ever when one of its processes dies (on a full disk, for example) and needs the number of images
beforehand. Here a pool of threads decodes and encodes images, in order, one writer (`ffcv.writer`) appends them, and no file gets its
final name before it is whole. A JPEG is first decoded as the loader will decode it, so a picture that only Pillow can read never reaches
a shard unchanged.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import math
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np

from simclr import files
from simclr.data.agreement import Identity, agreed, content, existing, unfinished
from simclr.data.copies import copies, shown, write_copies, write_list
from simclr.data.depth import Rule, deeper, remarks
from simclr.data.encode import Encoded, encode
from simclr.data.ffcv.writer import Note, SplitWriter
from simclr.data.manifest import LISTS, Manifest, Shard, write_manifest, write_names
from simclr.data.options import Kind, Options, stated
from simclr.data.sources.reading import counted, essence
from simclr.data.sources.source import Item, Source, bundles
from simclr.data.survey import Choice, Unusable, saved, sizes_differ, survey
from simclr.errors import UserError

__all__ = ["Identity", "Kind", "Options", "agreed", "existing", "prepare"]

_LOCK = ".writing-lock"
_CHOICE = ".writing-choice.json"
_AHEAD_BYTES = 256 << 20  # of encoded files in memory
_ENOUGH = 1000  # images, from which on the share of unreadable ones counts before the end


def prepare(
    source: Source,
    out: Path,
    options: Options,
    threads: int,
    progress: Callable[[int], None],
    resumed: Callable[[int], None] = lambda done: None,
    sealing: Callable[[int, int], None] = lambda done, of: None,
    *,
    identity: Identity = "times",
    says: Callable[[str], None] = lambda line: None,
) -> Manifest:
    """Write the shards of `source` and their manifest into the directory `out`; a manifest that it has already is returned.

    Labels are the ranks of the sorted class names. The bytes depend on source and options, not on `threads`. progress gets
    the number of images so far; then, while shards are hashed, sealing gets their bytes so far and in all. says gets sentences for the
    user: what was done to pictures, and why it begins again, where an image shows that the sample had misled.

    If it is interrupted, killed or cut off from its source, the full shards stay; the next call continues after them (resumed gets the
    number of their images), and the bytes are those of an uninterrupted call. So it is if more images are unreadable than
    `options.max_skipped_pct`: then, at the latest at the end, it raises UserError, and a call with a larger share goes on. Raises
    UserError if `out` holds something else or another process writes to it; and, with nothing left behind, for fewer than two images,
    for raw images of different sizes, for a full disk.
    """
    found = existing(source, out, options, identity)
    if found is not None:
        return found
    made = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    with _alone(out):
        try:
            while True:
                try:
                    return _Job(source, out, options, threads, identity).whole(_Told(progress, resumed, sealing, says))
                except Again as again:
                    says(str(again))
        finally:
            if made and not (out / "manifest.json").exists() and not list(out.glob(".writing-*.beton.json")):
                shutil.rmtree(out)


class Again(Exception):
    """An image does not fit what the sample decided; the message says what is done instead."""


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Keep a second prepare out of the same directory."""
    path = out / _LOCK
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(files.locked(path, wait=False))
        except BlockingIOError:
            raise UserError(f"another prepare is writing to {out}; wait for it, or use another --out") from None
        stack.callback(path.unlink, missing_ok=True)
        yield


@dataclass(frozen=True, slots=True)
class _Told:
    """Whom a running prepare tells what."""

    progress: Callable[[int], None]
    resumed: Callable[[int], None]
    sealing: Callable[[int, int], None]
    says: Callable[[str], None]


class _Job:
    """A running prepare."""

    def __init__(self, source: Source, out: Path, options: Options, threads: int, identity: Identity) -> None:
        self.source, self.out, self.options, self.ahead = source, out, options, 4 * threads
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="encode")
        self.flushers = ThreadPoolExecutor(2, thread_name_prefix="flush")  # own threads: flushing does not wait behind encoding
        self.writers: dict[str, SplitWriter] = {}
        self.identity = identity
        self.about = [source.spec, source.identity, source.total, essence(source.understood), stated(options), _versions()]

    def whole(self, told: _Told) -> Manifest:
        """Run, and on failure leave full shards, or nothing where they are of no use."""
        try:
            return self._run(told)
        except BaseException as error:
            self.pool.shutdown(wait=isinstance(error, Exception), cancel_futures=True)
            # Wait for full shards that are being flushed to the disk; on Ctrl-C for at most two seconds.
            wait([f for writer in self.writers.values() for f in writer.flushing], None if isinstance(error, Exception) else 2)
            written = sum(path.stat().st_size for path in unfinished(self.out))
            for writer in self.writers.values():
                writer.abandon()
            full = isinstance(error, OSError) and error.errno in files.FULL
            if isinstance(error, Unusable) or full:
                for path in (*unfinished(self.out), *(self.out / name for name in LISTS)):
                    path.unlink(missing_ok=True)
            if isinstance(error, Again):
                self._remove_unfinished(set())
            if full:
                raise UserError(
                    f"no space left on the disk of {self.out}: its {shutil.disk_usage(self.out).free / 2**20:,.0f} MiB were full after "
                    f"{written / 2**20:,.0f} MiB of shards; free some, or use another --out"
                ) from None
            raise
        finally:
            for pool in (self.pool, self.flushers):
                pool.shutdown(wait=False, cancel_futures=True)

    def _remove_unfinished(self, kept: set[str]) -> None:
        for path in unfinished(self.out):
            if path.name not in (*kept, _LOCK, _CHOICE):
                path.unlink(missing_ok=True)

    def _run(self, told: _Told) -> Manifest:
        choice = saved(self.out / _CHOICE, _hash(self.about))
        if choice is None or (self.identity != "names" and choice.times != self.source.times):
            choice = survey(self.source, self.options, self.pool)
            choice.save(self.out / _CHOICE, _hash(self.about))
        rule, key = self.options.rule(choice.ranges), _hash([self.about, choice.times, choice.kind, choice.ranges])
        behind = {}
        for split in ("train", "test"):
            self.writers[split] = SplitWriter(self.out, split, self.options.shard_mib << 20, key, self.flushers)
            behind[split] = self.writers[split].resume()
        count = sum(behind.values())
        kept = {f".writing-{name}{end}" for w in self.writers.values() for name, _ in w.full for end in ("", ".json")}
        if not count and list(self.out.glob(".writing-*.beton.json")):
            told.says(f"the unfinished shards in {self.out} are of another source or version, or of other options; it begins again")
        self._remove_unfinished(kept)
        if count:
            told.resumed(count)
        if self.source.total is not None:
            # A lower bound: if more is needed, a write fails later.
            files.require_space(self.out, (self.source.total - count) * choice.bytes_each, "at least", "use another --out")
        self._fill(choice, rule, _skipping(self.source.items(), behind), told.progress, count)
        return self._finish(choice, rule, told)

    def _fill(self, choice: Choice, rule: Rule, items: Iterator[Item], progress: Callable[[int], None], count: int) -> None:
        size: tuple[int, int] | None = None
        for note in (note for note in self._notes() if note.which):
            size = note.height_px[0], note.width_px[0]
        seen, skipped = sum(note.items for note in self._notes()), sum(len(note.skipped) for note in self._notes())
        for encoded in _in_order(self.pool, items, choice.kind, self.options, rule, self.ahead):
            writer = self.writers[encoded.item.split]
            seen += 1
            self._require_readable(skipped, seen - 1)
            if encoded.skipped:
                writer.note.skip(encoded)
                skipped += 1
                continue
            size = size or (encoded.height, encoded.width)
            if choice.kind == "raw" and size != (encoded.height, encoded.width):
                if self.options.kind == "raw":
                    raise Unusable(sizes_differ(encoded.item.name, (encoded.height, encoded.width), size))
                self._again(
                    replace(choice, kind="jpeg", bytes_each=1 << 8),
                    f"{encoded.item.name} has {encoded.width} × {encoded.height} px, the images before it {size[1]} × {size[0]}; "
                    "it begins again and stores JPEG",
                )
            if encoded.rescaled and (ranges := deeper(rule, encoded.high)):
                self._again(
                    replace(choice, ranges=ranges),
                    f"{encoded.item.name} has pixels up to {encoded.high:,.0f}, the images of the sample none above "
                    f"{rule.ranges['integers'][1]:,.0f}; it begins again with white at {ranges['integers'][1]:,.0f}",
                )
            writer.add(encoded)
            count += 1
            progress(count)
        self._require_readable(skipped, seen, ended=True)

    def _again(self, choice: Choice, sentence: str) -> NoReturn:
        choice.save(self.out / _CHOICE, _hash(self.about))
        raise Again(sentence)

    def _require_readable(self, skipped: int, seen: int, ended: bool = False) -> None:
        """Raise UserError once more images are skipped than may be: of all where their number is known, else of those seen so far."""
        most, total = self.options.max_skipped_pct, self.source.total
        of = seen if ended or total is None else max(total, seen)
        if skipped <= most / 100 * of or not (ended or seen >= _ENOUGH):
            return
        first = "" if ended or seen == total else "the first "
        rows = [row for note in self._notes() for row in note.skipped]
        reasons = Counter(reason for _, reason in rows).most_common(3)
        done = sum(note.items for writer in self.writers.values() for _, note in writer.full)
        share = f"{math.ceil(1000 * skipped / seen) / 10:g}{' or above' if first else ''}"
        stays = f"; the same command then goes on behind the {done:,} images that are done" if done else ""
        raise UserError(
            f"{skipped:,} of {first}{seen:,} images of {self.source.spec} cannot be read, more than {most:g} %"
            f"{f' of all {total:,}' if first and total else ''}; the first: {': '.join(rows[0])}; "
            f"most often: {', '.join(f'{reason} ({times})' for reason, times in reasons)}; "
            f"mend the source, or allow more with --max-skipped-pct {share}{stays}"
        )

    def _notes(self) -> list[Note]:
        return [note for writer in self.writers.values() for note in writer.notes()]

    def _finish(self, choice: Choice, rule: Rule, told: _Told) -> Manifest:
        notes = {split: writer.notes() for split, writer in self.writers.items()}
        everything = [note for split in notes for note in notes[split]]
        count, skipped = sum(len(note.which) for note in everything), [row for note in everything for row in note.skipped]
        if count < 2 or not any(note.which for note in notes["train"]):
            why = f" ({len(skipped)} could not be read, the first: {': '.join(skipped[0])})" if skipped else ""
            usable = f"{count} usable image{'s' * (count != 1)}"
            raise Unusable(f"{self.source.spec} has {usable} to train on{why}; contrasting needs at least 2")
        # Only now, at the end of the stream, is the rank of a class name known. A single folder of images names no classes.
        labels = {label for note in everything for label in note.labels if label is not None}
        classes = tuple(sorted(labels)) if len(labels) > 1 else ()
        written, sealed = sum(writer.end() for writer in self.writers.values()), 0
        splits: dict[str, tuple[Shard, ...]] = {}
        for split, writer in self.writers.items():
            for shard in writer.seal(classes, self.pool):
                splits[split] = (*splits.get(split, ()), shard)
                told.sealing(sealed := sealed + shard.bytes, written)
        for shard in (s for shards in splits.values() for s in shards):
            (self.out / f".writing-{shard.name}").rename(self.out / shard.name)
        same, conflicts = copies(notes)
        write_list(self.out / "skipped.csv", ("name", "reason"), skipped)
        write_copies(self.out, same, conflicts)
        for split in splits:
            if all(len(note.names) == len(note.which) for note in notes[split]):
                write_names(self.out, split, (name for note in notes[split] for name in note.names))
        mean, square = np.sum([note.sums for note in notes["train"]], 0) / sum(len(note.which) for note in notes["train"])
        sides = [[side for note in everything for side in getattr(note, name)] for name in ("height_px", "width_px")]
        counts: dict[str, Any] = {name: sum(note.counts[name] for note in everything) for name in everything[0].counts}
        pixels = counts | {"ranges": {kind: [*found] for kind, found in rule.ranges.items()}, "stated": rule.stated}
        manifest = Manifest(
            splits=splits,
            classes=classes,
            kind=choice.kind,
            height_px=(min(sides[0]), max(sides[0])),
            width_px=(min(sides[1]), max(sides[1])),
            mean=tuple(round(float(m), 6) for m in mean),  # type: ignore[arg-type]
            std=tuple(round(float(s), 6) for s in np.sqrt(np.maximum(square - mean**2, 0))),  # type: ignore[arg-type]
            source=self.source.spec,
            identity=self.source.identity,
            times=self.source.times,
            content=content((split, digest) for split in notes for note in notes[split] for digest in note.content()),
            understood=counted(self.source.understood, {name: _classes(notes[name]) for name in notes}),
            options=stated(self.options),
            skipped=len(skipped),
            duplicates=len(same),
            conflicts=len(conflicts),
            pixels=pixels if any(pixels[name] for name in everything[0].counts) else {},
            versions=_versions(),
        )
        write_manifest(self.out, manifest)
        for path in unfinished(self.out):
            if ".writing-" in path.name:
                path.unlink()
        for line in (*remarks(manifest.pixels), shown(conflicts)):
            if line:
                told.says(line)
        return manifest


def _skipping(items: Iterator[Item], behind: dict[str, int]) -> Iterator[Item]:
    """`items` without the first `behind[split]` of each split."""
    passed = Counter[str]()
    for item in items:
        passed[item.split] += 1
        if passed[item.split] > behind[item.split]:
            yield item


def _classes(notes: list[Note]) -> Counter[str | None]:
    """Class → images of a split; None = without one."""
    return Counter(note.labels[which] for note in notes for which in note.which)


def _hash(about: object) -> str:
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("ffcv", "pillow", "numpy")}


def _in_order(
    pool: ThreadPoolExecutor, items: Iterator[Item], kind: Literal["raw", "jpeg"], options: Options, rule: Rule, ahead: int
) -> Iterator[Encoded]:
    """Encoded images in the order of the source, whichever thread is done first, at most `ahead` chunks in memory."""
    pending: deque[tuple[Future[list[Encoded]], int]] = deque()
    how, in_memory = (kind, options.max_side_px, options.jpeg_quality, rule), 0
    for chunk in bundles(items, 64 if kind == "raw" else 4, _AHEAD_BYTES):
        size = sum(len(row.data) for row in chunk if isinstance(row.data, bytes))
        while pending and (len(pending) >= ahead or in_memory + size > _AHEAD_BYTES):
            done, taken = pending.popleft()
            yield from done.result()
            in_memory -= taken
        pending.append((pool.submit(lambda rows: [encode(row, *how) for row in rows], chunk), size))
        in_memory += size
    for done, _ in pending:
        yield from done.result()
