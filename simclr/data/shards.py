"""Writing shards: images of a source → FFCV .beton files and their manifest.

FFCV's own DatasetWriter hangs for ever when one of its processes dies (on a full disk, for example) and needs the number of images
beforehand. Here a pool of threads decodes and encodes images, in order, one writer (`ffcv.writer`) appends them, and no file gets its
final name before it is whole. A JPEG is first decoded as the loader will decode it, so a picture that only Pillow can read never reaches
a shard unchanged.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import hashlib
import importlib.metadata
import itertools
import json
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from simclr import files
from simclr.data.encode import Encoded, encode
from simclr.data.ffcv.writer import Note, SplitWriter
from simclr.data.manifest import LISTS, Manifest, Shard, read_manifest, write_manifest, write_names
from simclr.data.sources.source import Item, Source
from simclr.errors import UserError

_RAW_SIDE_PX = 64
_LOOKED_AT, _TRIED = 32, 1000  # images that decide raw or jpeg, and how many are tried to find them
_LOCK = ".writing-lock"
Kind = Literal["auto", "raw", "jpeg"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How images are stored."""

    kind: Kind = "auto"
    """raw: pixels of one size; jpeg: photographs; auto: raw where the first 32 images have one size of at most 64 px."""
    max_side_px: int = 500
    """A larger image is reduced until its longer side has this many pixels."""
    jpeg_quality: int = 90
    """JPEG quality of images that are encoded here; a JPEG that needs no change is stored as it is."""
    shard_mib: int = 1024
    """Approximate size of a shard, in MiB."""
    max_skipped_pct: float = 1.0
    """Share of the images, in per cent, that may be unreadable; they are skipped and listed in skipped.csv."""

    def __post_init__(self) -> None:
        if self.max_side_px < 8:
            raise UserError(f"--max-side-px is {self.max_side_px}; expected at least 8 pixels")
        if not 1 <= self.jpeg_quality <= 100:
            raise UserError(f"--jpeg-quality is {self.jpeg_quality}; expected 1 to 100")
        if self.shard_mib < 1:
            raise UserError(f"--shard-mib is {self.shard_mib}; expected at least 1")
        if not 0 <= self.max_skipped_pct <= 100:
            raise UserError(f"--max-skipped-pct is {self.max_skipped_pct}; expected 0 to 100")


def existing(source: Source, out: Path, options: Options) -> Manifest | None:
    """The manifest in `out`, if it was made from the same source with the same options; None if `out` is empty or holds an interrupted
    prepare. Raises UserError if it holds something else, or cannot be written."""
    files.require_writable(out)
    if (out / "manifest.json").exists():
        return agreed(read_manifest(out), source, out, options)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; --out names a directory for the shards")
    ours = {path.name for path in _unfinished(out)} if out.exists() else set()
    left = sorted(p.name for p in out.iterdir() if p.name not in ours) if out.exists() else []
    if left:
        raise UserError(f"{out} is not empty and no dataset (it holds {', '.join(left[:3])}); use another --out")
    return None


def agreed(manifest: Manifest, source: Source, out: object, options: Options) -> Manifest:
    """The `manifest` of `out`. Raises UserError if it was not made from the same source with the same options."""
    if (manifest.source, manifest.options) != (source.spec, _stated(options)):
        differ = [f"source {manifest.source}"] if manifest.source != source.spec else []
        differ += [f"{k} {v}" for k, v in manifest.options.items() if _stated(options).get(k) != v]
        raise UserError(f"{out} already holds shards made with {', '.join(differ)}; use another --out, or remove it")
    if manifest.identity and manifest.identity != source.identity:
        raise UserError(f"{source.spec} has changed since {out} was made from it; use another --out, or remove it")
    held = sum(manifest.examples(split) for split in manifest.splits) + manifest.skipped
    if source.total not in (None, held):
        raise UserError(f"{out} holds {held:,} images, {source.spec} has {source.total:,} now; use another --out, or remove it")
    return manifest


def prepare(
    source: Source,
    out: Path,
    options: Options,
    threads: int,
    progress: Callable[[int], None],
    resumed: Callable[[int], None] = lambda done: None,
    sealing: Callable[[int, int], None] = lambda done, of: None,
) -> Manifest:
    """Write the shards of `source` and their manifest into the directory `out`; a manifest that it has already is returned.

    Labels are the ranks of the sorted class names. The bytes depend on source and options, not on `threads`. progress gets
    the number of images so far; then, while shards are hashed, sealing gets their bytes so far and in all.

    If it is interrupted, killed or cut off from its source, the full shards stay; the next call continues after them (resumed gets the
    number of their images), and the bytes are those of an uninterrupted call. Raises UserError if `out` holds something else or another
    process writes to it; and, with nothing left behind, for fewer than two images, for more unreadable ones than
    `options.max_skipped_pct`, for raw images of different sizes, for a full disk.
    """
    found = existing(source, out, options)
    if found is not None:
        return found
    made = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    with _alone(out):
        job = _Job(source, out, options, ThreadPoolExecutor(threads, thread_name_prefix="encode"), 4 * threads)
        try:
            return job.run(progress, resumed, sealing)
        except BaseException as error:
            job.pool.shutdown(wait=isinstance(error, Exception), cancel_futures=True)
            # Wait for full shards that are being flushed to the disk; on Ctrl-C for at most two seconds.
            wait([f for writer in job.writers.values() for f in writer.flushing], None if isinstance(error, Exception) else 2)
            written = sum(path.stat().st_size for path in _unfinished(out))
            for writer in job.writers.values():
                writer.abandon()
            if isinstance(error, Unusable) or (isinstance(error, OSError) and error.errno in files.FULL):
                for path in (*_unfinished(out), *(out / name for name in LISTS)):
                    path.unlink(missing_ok=True)
            free = shutil.disk_usage(out).free
            if made and not list(out.glob(".writing-*.beton.json")):
                shutil.rmtree(out)
            if isinstance(error, OSError) and error.errno in files.FULL:
                raise UserError(
                    f"no space left on the disk of {out}: its {free / 2**20:,.0f} MiB were full after {written / 2**20:,.0f} MiB of "
                    "shards; free some, or use another --out"
                ) from None
            raise
        finally:
            for pool in (job.pool, job.flushers):
                pool.shutdown(wait=False, cancel_futures=True)


class Unusable(UserError):
    """The source cannot be trained on; a resumed prepare would fail in the same way."""


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Keep a second prepare out of the same directory."""
    path = out / _LOCK
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another prepare is writing to {out}; wait for it, or use another --out") from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _unfinished(out: Path) -> list[Path]:
    """Files of an unfinished prepare: temporary files, and shards that have their final name but no manifest yet."""
    waiting = [p for p in out.iterdir() if ".writing-" in p.name]
    named = [out / p.name.removeprefix(".writing-").removesuffix(".json") for p in waiting if p.name.endswith(".beton.json")]
    lists = [out / name for name in LISTS if named]
    return [*waiting, *(p for p in (*named, *lists) if p.exists())]


class _Job:
    """A running prepare."""

    def __init__(self, source: Source, out: Path, options: Options, pool: ThreadPoolExecutor, ahead: int) -> None:
        self.source, self.out, self.options, self.pool, self.ahead = source, out, options, pool, ahead
        self.flushers = ThreadPoolExecutor(2, thread_name_prefix="flush")  # own threads: flushing does not wait behind encoding
        self.writers: dict[str, SplitWriter] = {}

    def run(self, progress: Callable[[int], None], resumed: Callable[[int], None], sealing: Callable[[int, int], None]) -> Manifest:
        kind, bytes_each, items = _decide(self.source, self.options)
        about = [self.source.spec, self.source.identity, self.source.total, _stated(self.options), kind, _versions()]
        key = hashlib.sha256(json.dumps(about).encode()).hexdigest()
        behind = {}
        for split in ("train", "test"):
            self.writers[split] = SplitWriter(self.out, split, self.options.shard_mib << 20, key, self.flushers)
            behind[split] = self.writers[split].resume()
        count = sum(behind.values())
        kept = {f".writing-{name}{end}" for w in self.writers.values() for name, _ in w.full for end in ("", ".json")}
        for path in _unfinished(self.out):
            if path.name not in kept and path.name != _LOCK:
                path.unlink(missing_ok=True)
        if count:
            resumed(count)
        if self.source.total is not None:
            # A lower bound: if more is needed, a write fails later.
            files.require_space(self.out, (self.source.total - count) * bytes_each, "at least", "use another --out")
        self._fill(kind, _skipping(items, behind), progress, count)
        return self._finish(kind, sealing)

    def _fill(self, kind: Literal["raw", "jpeg"], items: Iterator[Item], progress: Callable[[int], None], count: int) -> None:
        size: tuple[int, int] | None = None
        for note in (note for writer in self.writers.values() for note in writer.notes() if note.which):
            size = note.height_px[0], note.width_px[0]
        for encoded in _in_order(self.pool, items, kind, self.options, self.ahead):
            writer = self.writers[encoded.item.split]
            if encoded.skipped:
                writer.note.skip(encoded.item.name, encoded.skipped)
                continue
            size = size or (encoded.height, encoded.width)
            if kind == "raw" and size != (encoded.height, encoded.width):
                raise Unusable(
                    f"{encoded.item.name} has {encoded.width} × {encoded.height} px, the images before it {size[1]} × {size[0]}; "
                    "raw shards hold one size: use --kind jpeg"
                )
            writer.add(encoded)
            count += 1
            progress(count)

    def _finish(self, kind: Literal["raw", "jpeg"], sealing: Callable[[int, int], None]) -> Manifest:
        notes = {split: writer.notes() for split, writer in self.writers.items()}
        everything = [note for split in notes for note in notes[split]]
        count, skipped = sum(len(note.which) for note in everything), [row for note in everything for row in note.skipped]
        if count < 2 or not any(note.which for note in notes["train"]):
            why = f" ({len(skipped)} could not be read, the first: {': '.join(skipped[0])})" if skipped else ""
            usable = f"{count} usable image{'s' * (count != 1)}"
            raise Unusable(f"{self.source.spec} has {usable} to train on{why}; contrasting needs at least 2")
        most = self.options.max_skipped_pct
        if len(skipped) > most / 100 * (count + len(skipped)):
            reasons = Counter(reason for _, reason in skipped).most_common(3)
            raise Unusable(
                f"{len(skipped)} of {count + len(skipped)} images of {self.source.spec} cannot be read, more than {most:g} %; "
                f"the first: {': '.join(skipped[0])}; most often: {', '.join(f'{reason} ({times})' for reason, times in reasons)}; "
                "mend the source, or allow more with --max-skipped-pct"
            )
        # Only now, at the end of the stream, is the rank of a class name known. A single folder of images names no classes.
        labels = {label for note in everything for label in note.labels if label is not None}
        classes = tuple(sorted(labels)) if len(labels) > 1 else ()
        written, sealed = sum(writer.end() for writer in self.writers.values()), 0
        splits: dict[str, tuple[Shard, ...]] = {}
        for split, writer in self.writers.items():
            for shard in writer.seal(classes, self.pool):
                splits[split] = (*splits.get(split, ()), shard)
                sealing(sealed := sealed + shard.bytes, written)
        for shard in (s for shards in splits.values() for s in shards):
            (self.out / f".writing-{shard.name}").rename(self.out / shard.name)
        copies = _copies(notes)
        _write_list(self.out / "skipped.csv", ("name", "reason"), skipped)
        _write_list(self.out / "duplicates.csv", ("split", "sample", "same_as_split", "same_as_sample"), copies)
        for split in splits:
            if all(len(note.names) == len(note.which) for note in notes[split]):
                write_names(self.out, split, (name for note in notes[split] for name in note.names))
        mean, square = np.sum([note.sums for note in notes["train"]], 0) / sum(len(note.which) for note in notes["train"])
        sides = [[side for note in everything for side in getattr(note, name)] for name in ("height_px", "width_px")]
        manifest = Manifest(
            splits=splits,
            classes=classes,
            kind=kind,
            height_px=(min(sides[0]), max(sides[0])),
            width_px=(min(sides[1]), max(sides[1])),
            mean=tuple(round(float(m), 6) for m in mean),  # type: ignore[arg-type]
            std=tuple(round(float(s), 6) for s in np.sqrt(np.maximum(square - mean**2, 0))),  # type: ignore[arg-type]
            source=self.source.spec,
            identity=self.source.identity,
            options=_stated(self.options),
            skipped=len(skipped),
            duplicates=len(copies),
            versions=_versions(),
        )
        write_manifest(self.out, manifest)
        for path in _unfinished(self.out):
            if ".writing-" in path.name:
                path.unlink()
        return manifest


def _skipping(items: Iterator[Item], behind: dict[str, int]) -> Iterator[Item]:
    """`items` without the first `behind[split]` of each split."""
    passed = Counter[str]()
    for item in items:
        passed[item.split] += 1
        if passed[item.split] > behind[item.split]:
            yield item


def _copies(notes: dict[str, list[Note]]) -> list[tuple[str, int, str, int]]:
    """Samples that are copies of an earlier one: (split, sample, split and sample of the first)."""
    first: dict[int, tuple[str, int]] = {}
    copies = []
    for split in notes:
        for sample, digest in enumerate(digest for note in notes[split] for digest in note.digests):
            if digest in first:
                copies.append((split, sample, *first[digest]))
            else:
                first[digest] = (split, sample)
    return copies


def _write_list(path: Path, head: tuple[str, ...], rows: Sequence[tuple[object, ...]]) -> None:
    """Write a CSV file, if there are rows."""
    if rows:
        with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            csv.writer(file).writerows([head, *rows])


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("ffcv", "pillow", "numpy")}


def _stated(options: Options) -> dict[str, int]:
    kinds = {"auto": 0, "raw": 1, "jpeg": 2}
    return {
        "kind": kinds[options.kind],
        "max_side_px": options.max_side_px,
        "jpeg_quality": options.jpeg_quality,
        "shard_mib": options.shard_mib,
    }


def _decide(source: Source, options: Options) -> tuple[Literal["raw", "jpeg"], int, Iterator[Item]]:
    """raw or jpeg, by the first readable images; the least bytes per image; and all items, including those read here."""
    items = source.items()
    seen: list[Item] = []
    # Tried as JPEG unless raw was asked for: pixels of a photograph may exceed a page.
    trial: Literal["raw", "jpeg"] = "raw" if options.kind == "raw" else "jpeg"
    sizes: list[tuple[int, int]] = []
    for item in itertools.islice(items, _TRIED):
        seen.append(item)
        first = encode(item, trial, options.max_side_px, options.jpeg_quality)
        if not first.skipped:
            sizes.append((first.height, first.width))
        if len(sizes) == _LOOKED_AT or (sizes and max(sizes[-1]) > _RAW_SIDE_PX):
            break
    if not sizes:
        reason = f"; the first: {seen[0].name}: {encode(seen[0], trial, options.max_side_px, options.jpeg_quality).skipped}" if seen else ""
        raise UserError(f"{source.spec} has no image that can be read ({len(seen)} tried{reason}); expected JPEG, PNG or other pictures")
    small = len(set(sizes)) == 1 and max(sizes[0]) <= _RAW_SIDE_PX
    everything = itertools.chain(seen, items)
    if options.kind == "raw" or (options.kind == "auto" and small):
        return "raw", 3 * sizes[0][0] * sizes[0][1], everything
    return "jpeg", 1 << 8, everything


def _in_order(
    pool: ThreadPoolExecutor, items: Iterator[Item], kind: Literal["raw", "jpeg"], options: Options, ahead: int
) -> Iterator[Encoded]:
    """Encoded images in the order of the source, whichever thread is done first, at most `ahead` chunks in memory."""
    pending: deque[Future[list[Encoded]]] = deque()
    size = 64 if kind == "raw" else 4
    while True:
        chunk = list(itertools.islice(items, size))
        if chunk:
            pending.append(pool.submit(lambda rows: [encode(row, kind, options.max_side_px, options.jpeg_quality) for row in rows], chunk))
        if pending and (not chunk or len(pending) >= ahead):
            yield from pending.popleft().result()
        if not chunk and not pending:
            return
