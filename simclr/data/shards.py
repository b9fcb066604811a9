"""Writing shards: images of a source → FFCV .beton files and their manifest.

FFCV's own DatasetWriter hangs for ever when one of its processes dies (on a full disk, say) and needs to know the number
of images beforehand. Here images are decoded and encoded by a pool of threads, in order, one writer (`beton`) appends
them, and nothing stands under its final name before it is whole. What is stored as JPEG is
first decoded as the loader will decode it, so a picture that only Pillow can read never reaches a shard as it is.
"""

from __future__ import annotations

import csv
import importlib.metadata
import io
import itertools
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from simclr import disk
from simclr.data.beton import PAGE, SplitWriter
from simclr.data.decode import decode
from simclr.data.manifest import Manifest, Shard, read_manifest, write_manifest
from simclr.data.pixels import upright_rgb
from simclr.data.sources import Item, Source

_RAW_SIDE_PX = 64
_MOST_SKIPPED = 0.01
_LOOKED_AT, _TRIED = 32, 1000  # images that decide raw or jpeg, and how many are tried to find them
Kind = Literal["auto", "raw", "jpeg"]


@dataclass(frozen=True, slots=True)
class Encoded:
    """An image as a shard stores it; `skipped` says why there is none."""

    item: Item
    stored: bytes
    jpeg: bool
    height: int
    width: int
    moments: NDArray[np.float64]
    """(2, 3): per channel mean and mean square, of pixels in [0, 1]."""
    skipped: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How images are stored."""

    kind: Kind = "auto"
    """raw: pixels of one size; jpeg: photographs; auto: raw where the first 32 images have one size of at most 64 px."""
    max_side_px: int = 500
    """A larger image is reduced until its longer side has this many pixels."""
    jpeg_quality: int = 90
    """Of images that are encoded here; a JPEG that needs no change is stored as it is."""
    shard_mib: int = 1024
    """Size of a shard, in MiB, about."""

    def __post_init__(self) -> None:
        if self.max_side_px < 8:
            raise ValueError(f"--max-side-px is {self.max_side_px}; expected at least 8 pixels")
        if not 1 <= self.jpeg_quality <= 100:
            raise ValueError(f"--jpeg-quality is {self.jpeg_quality}; expected 1 to 100")
        if self.shard_mib < 1:
            raise ValueError(f"--shard-mib is {self.shard_mib}; expected at least 1")


def existing(source: Source, out: Path, options: Options) -> Manifest | None:
    """What `out` holds already: the manifest where it was made from the same source with the same options, None where there
    is nothing. Raises ValueError where it holds something else, or cannot be written."""
    disk.require_writable(out)
    if (out / "manifest.json").exists():
        return agreed(read_manifest(out), source, out, options)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; --out names a directory for the shards")
    left = sorted(p.name for p in out.iterdir() if not p.name.startswith(".writing-")) if out.exists() else []
    if left:
        raise ValueError(f"{out} is not empty and no dataset (it holds {', '.join(left[:3])}); use another --out")
    return None


def agreed(manifest: Manifest, source: Source, out: object, options: Options) -> Manifest:
    """The manifest of `out`, which was made from the same source with the same options. Raises ValueError where it was not."""
    if (manifest.source, manifest.options) != (source.spec, _stated(options)):
        differ = [f"source {manifest.source}"] if manifest.source != source.spec else []
        differ += [f"{k} {v}" for k, v in manifest.options.items() if _stated(options).get(k) != v]
        raise ValueError(f"{out} already holds shards made with {', '.join(differ)}; use another --out, or remove it")
    held = sum(manifest.examples(split) for split in manifest.splits) + manifest.skipped
    if source.total not in (None, held):
        raise ValueError(f"{out} holds {held:,} images, {source.spec} has {source.total:,} now; use another --out, or remove it")
    return manifest


def prepare(
    source: Source,
    out: Path,
    options: Options,
    threads: int,
    progress: Callable[[int], None],
    sealing: Callable[[int, int], None] = lambda done, of: None,
) -> Manifest:
    """Write the shards of `source` and their manifest into the directory `out`; what it holds already is returned.

    Labels are the ranks of the sorted class names. The bytes depend on source and options, not on `threads`. progress gets
    the number of images so far; then, while shards are hashed, sealing gets their bytes so far and in all. Raises
    ValueError for fewer than two images, for more than 1 % that cannot be read, for raw images of different sizes, for an
    `out` that holds something else, and for a full disk. A failure leaves nothing behind.
    """
    found = existing(source, out, options)
    if found is not None:
        return found
    made = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob(".writing-*"):  # of a prepare that was killed
        old.unlink()
    writers: dict[str, SplitWriter] = {}
    pool = ThreadPoolExecutor(threads, thread_name_prefix="encode")
    try:
        return _write(source, out, options, pool, 4 * threads, progress, sealing, writers)
    except BaseException as error:
        pool.shutdown(cancel_futures=True)
        written = sum(path.stat().st_size for path in out.glob(".writing-*"))
        for writer in writers.values():
            writer.abandon()
        for path in (*out.glob(".writing-*"), *out.glob("*.beton"), out / "skipped.csv"):
            path.unlink(missing_ok=True)
        free = shutil.disk_usage(out).free
        if made:
            out.rmdir()
        if isinstance(error, OSError) and error.errno in disk.FULL:
            raise ValueError(
                f"no space left on the disk of {out}: its {free / 2**20:,.0f} MiB were full after {written / 2**20:,.0f} MiB of shards; "
                "free some, or use another --out"
            ) from None
        raise
    finally:
        pool.shutdown()


def _write(
    source: Source,
    out: Path,
    options: Options,
    pool: ThreadPoolExecutor,
    ahead: int,
    progress: Callable[[int], None],
    sealing: Callable[[int, int], None],
    writers: dict[str, SplitWriter],
) -> Manifest:
    kind, bytes_each, items = _decide(source, options)
    if source.total is not None:
        _require_space(out, source.total * bytes_each)
    labels: dict[str, int] = {}
    skipped: list[tuple[str, str]] = []
    moments, trained = np.zeros((2, 3)), 0
    sizes: list[tuple[int, int]] = []
    count = 0
    for encoded in _in_order(pool, items, kind, options, ahead):
        item = encoded.item
        if encoded.skipped:
            skipped.append((item.name, encoded.skipped))
            continue
        if kind == "raw" and sizes and sizes[0] != (encoded.height, encoded.width):
            raise ValueError(
                f"{item.name} has {encoded.width} × {encoded.height} px, the images before it {sizes[0][1]} × {sizes[0][0]}; "
                "raw shards hold one size: use --kind jpeg"
            )
        if item.split not in writers:
            writers[item.split] = SplitWriter(out, item.split, options.shard_mib << 20)
        if item.split == "train":  # all of it: sources come sorted by class, and the first classes are no fair sample
            moments, trained = moments + encoded.moments, trained + 1
        if not sizes or kind == "jpeg":
            sizes.append((encoded.height, encoded.width))
        label = -1 if item.label is None else labels.setdefault(item.label, len(labels))
        writers[item.split].add(encoded.stored, encoded.jpeg, encoded.height, encoded.width, label)
        count += 1
        progress(count)
    if count < 2 or "train" not in writers:
        why = f" ({len(skipped)} could not be read, the first: {': '.join(skipped[0])})" if skipped else ""
        raise ValueError(f"{source.spec} has {count} usable image{'s' * (count != 1)} to train on{why}; contrasting needs at least 2")
    if len(skipped) > _MOST_SKIPPED * (count + len(skipped)):
        raise ValueError(
            f"{len(skipped)} of {count + len(skipped)} images of {source.spec} cannot be read, more than {_MOST_SKIPPED:.0%}; "
            f"the first: {': '.join(skipped[0])}"
        )
    # Only now, at the end of the stream, is the rank of a class name known. A single folder of images names no classes.
    classes = tuple(sorted(labels)) if len(labels) > 1 else ()
    rank = np.array([classes.index(name) if classes else -1 for name in labels], np.int64)
    splits: dict[str, tuple[Shard, ...]] = {}
    written, sealed = sum(writer.bytes_written() for writer in writers.values()), 0
    for split in sorted(writers, reverse=True):
        splits[split] = ()
        for shard in writers[split].finish(rank, pool):
            splits[split] += (shard,)
            sealing(sealed := sealed + shard.bytes, written)
    for shard in (s for shards in splits.values() for s in shards):
        (out / f".writing-{shard.name}").rename(out / shard.name)
    if skipped:
        with (out / "skipped.csv").open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            csv.writer(file).writerows([("name", "reason"), *skipped])
    mean, square = moments / trained
    heights, widths = zip(*sizes, strict=True)
    manifest = Manifest(
        splits=splits,
        classes=classes,
        kind=kind,
        height_px=(min(heights), max(heights)),
        width_px=(min(widths), max(widths)),
        mean=tuple(round(float(m), 6) for m in mean),  # type: ignore[arg-type]
        std=tuple(round(float(s), 6) for s in np.sqrt(np.maximum(square - mean**2, 0))),  # type: ignore[arg-type]
        source=source.spec,
        options=_stated(options),
        skipped=len(skipped),
        versions={name: importlib.metadata.version(name) for name in ("ffcv", "pillow", "numpy")},
    )
    write_manifest(out, manifest)
    return manifest


def _stated(options: Options) -> dict[str, int]:
    kinds = {"auto": 0, "raw": 1, "jpeg": 2}
    return {
        "kind": kinds[options.kind],
        "max_side_px": options.max_side_px,
        "jpeg_quality": options.jpeg_quality,
        "shard_mib": options.shard_mib,
    }


def _decide(source: Source, options: Options) -> tuple[Literal["raw", "jpeg"], int, Iterator[Item]]:
    """raw or jpeg, by the first images that can be read; bytes per image, at least; and all items, those included."""
    items = source.items()
    seen: list[Item] = []
    # As JPEG, where the choice is open: pixels of a photograph may exceed a page.
    trial: Literal["raw", "jpeg"] = "raw" if options.kind == "raw" else "jpeg"
    sizes: list[tuple[int, int]] = []
    for item in itertools.islice(items, _TRIED):
        seen.append(item)
        first = _encode(item, trial, options)
        if not first.skipped:
            sizes.append((first.height, first.width))
        if len(sizes) == _LOOKED_AT or (sizes and max(sizes[-1]) > _RAW_SIDE_PX):
            break
    if not sizes:
        reason = f"; the first: {seen[0].name}: {_encode(seen[0], trial, options).skipped}" if seen else ""
        raise ValueError(f"{source.spec} has no image that can be read ({len(seen)} tried{reason}); expected JPEG, PNG or other pictures")
    small = len(set(sizes)) == 1 and max(sizes[0]) <= _RAW_SIDE_PX
    everything = itertools.chain(seen, items)
    if options.kind == "raw" or (options.kind == "auto" and small):
        return "raw", 3 * sizes[0][0] * sizes[0][1], everything
    return "jpeg", 1 << 8, everything


def _require_space(out: Path, needed: int) -> None:
    """A lower bound, before anything is written; what is not known beforehand is found out by the write that fails."""
    free = shutil.disk_usage(out).free
    if free < needed:
        raise ValueError(
            f"no space left on the disk of {out}: {free / 2**20:,.0f} MiB free, at least {needed / 2**20:,.0f} MiB needed; "
            "free some, or use another --out"
        )


def _in_order(
    pool: ThreadPoolExecutor, items: Iterator[Item], kind: Literal["raw", "jpeg"], options: Options, ahead: int
) -> Iterator[Encoded]:
    """Encoded images in the order of the source, whichever thread is done first, at most `ahead` chunks in memory."""
    pending: deque[Future[list[Encoded]]] = deque()
    size = 64 if kind == "raw" else 4
    while True:
        chunk = list(itertools.islice(items, size))
        if chunk:
            pending.append(pool.submit(lambda rows: [_encode(row, kind, options) for row in rows], chunk))
        if pending and (not chunk or len(pending) >= ahead):
            yield from pending.popleft().result()
        if not chunk and not pending:
            return


def _encode(item: Item, kind: Literal["raw", "jpeg"], options: Options) -> Encoded:
    """Decode, turn upright, convert to RGB, reduce, and encode as `kind`; or say why not."""
    try:
        if isinstance(item.data, np.ndarray):
            image = Image.fromarray(item.data)
        elif not item.data:
            raise ValueError("the file is empty or cannot be read")
        else:
            opened = Image.open(io.BytesIO(item.data))
            as_is = _decoded_as_stored(opened, item.data, options) if kind == "jpeg" else None
            if as_is is not None:
                return Encoded(item, item.data, True, as_is.shape[0], as_is.shape[1], _moments(as_is))
            opened.draft(None, (options.max_side_px, options.max_side_px))  # lets a far larger JPEG be decoded smaller
            image = upright_rgb(opened)
        if max(image.size) > options.max_side_px:
            scale = options.max_side_px / max(image.size)
            image = image.resize((max(round(image.width * scale), 1), max(round(image.height * scale), 1)), Image.Resampling.BOX)
        pixels = np.asarray(image)
        if kind == "raw":
            stored = pixels.tobytes()
        else:
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=options.jpeg_quality, subsampling=0)
            stored = buffer.getvalue()
        if len(stored) > PAGE:
            raise ValueError(f"its {len(stored):,} bytes exceed a page of {PAGE:,}; use a smaller --max-side-px")
    except Exception as error:  # Pillow raises nearly anything at a damaged file: struct.error, IndexError, zlib.error …
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        return Encoded(item, b"", False, 0, 0, np.zeros((2, 3)), reason)
    return Encoded(item, stored, kind == "jpeg", image.height, image.width, _moments(pixels))


def _decoded_as_stored(opened: Image.Image, data: bytes, options: Options) -> NDArray[np.uint8] | None:
    """Pixels (H, W, 3) of a file that may go into a shard byte for byte: an upright RGB JPEG, not too large, that the loader's
    own decoder accepts. That one refuses what Pillow forgives (stray bytes before a marker, a missing end)."""
    if opened.format != "JPEG" or opened.mode != "RGB" or max(opened.size) > options.max_side_px or len(data) > PAGE:
        return None
    if opened.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        return None
    return decode(data, opened.height, opened.width)


def _moments(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """(2, 3): per channel mean and mean square, in [0, 1], of some 4,000 evenly spaced pixels."""
    rows = pixels.reshape(-1, 3)
    some = rows[:: max(len(rows) // 4096, 1)].astype(np.float64) / 255
    return np.stack([some.mean(0), (some**2).mean(0)])
