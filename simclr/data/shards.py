"""Writing shards: images of a source → FFCV .beton files and their manifest. The door to the FFCV writer.

FFCV's own DatasetWriter hangs for ever when one of its processes dies (on a full disk, say) and needs to know the number
of images beforehand. This writes the same format from a stream: images are decoded and encoded by a pool of threads, in
order, one writer appends them, and nothing stands under its final name before it is whole.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import io
import itertools
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from ffcv.fields import IntField, RGBImageField
from ffcv.types import ALLOC_TABLE_TYPE, CURRENT_VERSION, FieldDescType, HeaderType, get_metadata_type
from numpy.typing import NDArray
from PIL import Image, ImageOps

from simclr.data.manifest import Manifest, Shard, read_manifest, write_manifest
from simclr.data.sources import Item, Source

_PAGE = 1 << 21  # FFCV's smallest
_RAW_SIDE_PX = 64
_MOMENTS_OF = 10_000
_MOST_SKIPPED = 0.01
_FIELDS = (("image", 2, RGBImageField()), ("label", 1, IntField()))  # name, FFCV's type id, field
_METADATA = get_metadata_type([f for _, _, f in _FIELDS])
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
    """raw: pixels of one size; jpeg: photographs; auto: raw where the first image's sides are at most 64 px."""
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
    is nothing. Raises ValueError where it holds something else."""
    if (out / "manifest.json").exists():
        manifest = read_manifest(out)
        if (manifest.source, manifest.options) != (source.spec, _stated(options)):
            raise ValueError(f"{out} already holds shards of {manifest.source} with other options or source; use another --out or remove it")
        return manifest
    left = [p.name for p in out.iterdir() if not p.name.startswith(".writing-")] if out.is_dir() else []
    if left or (out.exists() and not out.is_dir()):
        raise ValueError(f"{out} exists and is no dataset (it holds {', '.join(sorted(left)[:3]) or 'no directory'}); use another --out")
    return None


def prepare(source: Source, out: Path, options: Options, threads: int, progress: Callable[[int], None]) -> Manifest:
    """Write the shards of `source` into the directory `out`, which must be empty or new, and its manifest.

    Labels are the ranks of the sorted class names. progress gets the number of images so far. Raises ValueError for fewer
    than two images, for more than 1 % that cannot be read, and for raw images of different sizes; OSError for a full disk.
    After a failure nothing of it is left in `out`.
    """
    made = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob(".writing-*"):  # of a prepare that was killed
        old.unlink()
    writers: dict[str, _SplitWriter] = {}
    try:
        with ThreadPoolExecutor(threads, thread_name_prefix="encode") as pool:
            manifest = _write(source, out, options, pool, 4 * threads, progress, writers)
    except BaseException:
        for path in (*out.glob(".writing-*"), *out.glob("*.beton"), out / "skipped.csv"):
            path.unlink(missing_ok=True)
        if made:
            shutil.rmtree(out, ignore_errors=True)
        raise
    return manifest


def _write(
    source: Source,
    out: Path,
    options: Options,
    pool: ThreadPoolExecutor,
    ahead: int,
    progress: Callable[[int], None],
    writers: dict[str, _SplitWriter],
) -> Manifest:
    kind, items = _decide(source, options)
    if source.total is not None:
        _require_space(out, source.total, kind)
    labels: dict[str, int] = {}
    skipped: list[tuple[str, str]] = []
    moments: list[NDArray[np.float64]] = []
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
            writers[item.split] = _SplitWriter(out, item.split, options.shard_mib << 20)
        if len(moments) < _MOMENTS_OF and item.split == "train":
            moments.append(encoded.moments)
        if not sizes or kind == "jpeg":
            sizes.append((encoded.height, encoded.width))
        label = -1 if item.label is None else labels.setdefault(item.label, len(labels))
        writers[item.split].add(encoded, label)
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
    classes = tuple(sorted(labels))
    # Only now, at the end of the stream, is the rank of a class name known.
    rank = np.array([classes.index(name) for name in labels], np.int64)
    splits = {split: writers[split].finish(rank) for split in sorted(writers, reverse=True)}
    if skipped:
        with (out / "skipped.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("name", "reason"), *skipped])
    mean, square = np.mean(moments, 0)
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


def _decide(source: Source, options: Options) -> tuple[Literal["raw", "jpeg"], Iterator[Item]]:
    """raw or jpeg, by the first image that can be read; and all items, that one included."""
    items = source.items()
    seen: list[Item] = []
    for item in items:
        seen.append(item)
        first = _encode(item, "raw", options)
        if not first.skipped:
            small = max(first.height, first.width) <= _RAW_SIDE_PX
            kind: Literal["raw", "jpeg"] = "raw" if options.kind == "raw" or (options.kind == "auto" and small) else "jpeg"
            return kind, itertools.chain(seen, items)
        if len(seen) >= 1000:
            break
    reason = f"; the first: {seen[0].name}: {_encode(seen[0], 'raw', options).skipped}" if seen else ""
    raise ValueError(f"{source.spec} has no image that can be read ({len(seen)} tried{reason}); expected JPEG, PNG or other pictures")


def _require_space(out: Path, images: int, kind: str) -> None:
    """A lower bound, before anything is written; what is not known beforehand is found out by the write that fails."""
    needed, free = images * (3 * 8 * 8 if kind == "raw" else 1024), shutil.disk_usage(out).free
    if free < needed:
        raise ValueError(
            f"no space left on the disk of {out}: {free / 2**20:,.0f} MiB free, at least {needed / 2**20:,.0f} MiB needed; "
            "free some, or use another --out"
        )


def _in_order(pool: ThreadPoolExecutor, items: Iterator[Item], kind: Literal["raw", "jpeg"], options: Options, ahead: int) -> Iterator[Encoded]:
    """Encoded images in the order of the source, whichever thread is done first, at most `ahead` chunks in memory."""
    pending: deque[Future[list[Encoded]]] = deque()
    size = 64 if kind == "raw" else 4
    try:
        while True:
            chunk = list(itertools.islice(items, size))
            if chunk:
                pending.append(pool.submit(lambda rows: [_encode(row, kind, options) for row in rows], chunk))
            if pending and (not chunk or len(pending) >= ahead):
                yield from pending.popleft().result()
            if not chunk and not pending:
                return
    finally:
        for future in pending:
            future.cancel()


def _encode(item: Item, kind: Literal["raw", "jpeg"], options: Options) -> Encoded:
    """Decode, turn upright, convert to RGB, reduce, and encode as `kind`; or say why not."""
    try:
        if isinstance(item.data, np.ndarray):
            image, unchanged = Image.fromarray(item.data), False
        else:
            if not item.data:
                raise ValueError("the file is empty or cannot be read")
            opened = Image.open(io.BytesIO(item.data))
            opened.load()
            image = _upright_rgb(opened)
            unchanged = opened.format == "JPEG" and image is opened
        if max(image.size) > options.max_side_px:
            scale = options.max_side_px / max(image.size)
            image = image.resize((max(round(image.width * scale), 1), max(round(image.height * scale), 1)), Image.Resampling.BOX)
            unchanged = False
        pixels = np.asarray(image)
        if kind == "raw":
            stored = pixels.tobytes()
        elif unchanged and isinstance(item.data, bytes):
            stored = item.data
        else:
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=options.jpeg_quality, subsampling=0)
            stored = buffer.getvalue()
        if len(stored) > _PAGE:
            raise ValueError(f"its {len(stored):,} bytes exceed a page of {_PAGE:,}")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return Encoded(item, b"", False, 0, 0, np.zeros((2, 3)), reason or type(error).__name__)
    flat = pixels.reshape(-1, 3)[:: max(len(pixels) * pixels.shape[1] // 4096, 1)].astype(np.float64) / 255
    return Encoded(item, stored, kind == "jpeg", image.height, image.width, np.stack([flat.mean(0), (flat**2).mean(0)]))


def _upright_rgb(image: Image.Image) -> Image.Image:
    """As a person would see it: EXIF rotation applied, transparency over white, 16 bits reduced, grey and CMYK converted.

    Returns the same object where nothing had to be done.
    """
    if image.getexif().get(0x0112, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, np.float64)
        return Image.fromarray(np.clip(values / (257 if values.max() > 255 else 1), 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


@dataclass
class _SplitWriter:
    """Appends a split's images to shards. A shard's pages go to a temporary file first: the table of samples stands before
    them in the format, and its length is known only at the end."""

    out: Path
    split: str
    shard_bytes: int
    pages: Any = None
    at: int = 0
    rows: list[tuple[int, int, int, int, int, int]] = field(default_factory=list)
    """mode, width, height, pointer, bytes, provisional label"""
    full: list[tuple[Path, list[tuple[int, int, int, int, int, int]]]] = field(default_factory=list)

    def add(self, image: Encoded, label: int) -> None:
        if self.pages is None:
            self.pages = (self.out / f".writing-{self.split}-{len(self.full):05d}.pages").open("wb")
        size = len(image.stored)
        if self.at % _PAGE + size > _PAGE:  # an image never lies across two pages
            padding = -self.at % _PAGE
            self.pages.write(bytes(padding))
            self.at += padding
        self.pages.write(image.stored)
        self.rows.append((0 if image.jpeg else 1, image.width, image.height, self.at, size, label))
        self.at += size
        if self.at >= self.shard_bytes:
            self._end_shard()

    def _end_shard(self) -> None:
        self.pages.write(bytes(-self.at % _PAGE))
        self.pages.close()
        self.full.append((Path(self.pages.name), self.rows))
        self.pages, self.at, self.rows = None, 0, []

    def finish(self, rank: NDArray[np.int64]) -> tuple[Shard, ...]:
        """Write every shard in FFCV's format, under its final name. rank: provisional label → label."""
        if self.pages is not None:
            self._end_shard()
        return tuple(self._assemble(number, pages, rows, rank) for number, (pages, rows) in enumerate(self.full))

    def _assemble(self, number: int, pages: Path, rows: list[tuple[int, int, int, int, int, int]], rank: NDArray[np.int64]) -> Shard:
        table = np.array(rows, np.int64)
        descriptors = np.zeros(len(_FIELDS), FieldDescType)
        for row, (name, kind, ffcv_field) in zip(descriptors, _FIELDS, strict=True):
            row["type_id"] = kind
            row["name"][: len(name)] = np.frombuffer(name.encode(), "<u1")
            row["arguments"][:] = ffcv_field.to_binary()[0]
        begin = HeaderType.itemsize + descriptors.nbytes + len(rows) * _METADATA.itemsize
        begin += -begin % _PAGE
        metadata = np.zeros(len(rows), _METADATA)
        image, label = (metadata[name] for name in _METADATA.names or ())
        image["mode"], image["width"], image["height"] = table[:, 0], table[:, 1], table[:, 2]
        image["data_ptr"] = begin + table[:, 3]
        label[:] = np.append(rank, -1)[table[:, 5]]
        allocations = np.zeros(len(rows), ALLOC_TABLE_TYPE)
        allocations["sample_id"], allocations["ptr"], allocations["size"] = np.arange(len(rows)), image["data_ptr"], table[:, 4]
        header = np.zeros(1, HeaderType)
        header["version"], header["num_fields"], header["page_size"] = CURRENT_VERSION, len(_FIELDS), _PAGE
        header["num_samples"], header["alloc_table_ptr"] = len(rows), begin + pages.stat().st_size

        final = self.out / f"{self.split}-{number:05d}.beton"
        scratch = self.out / f".writing-{final.name}"
        digest = hashlib.sha256()
        with scratch.open("wb") as file, pages.open("rb") as content:
            head = header.tobytes() + descriptors.tobytes() + metadata.tobytes()
            parts = itertools.chain([head, bytes(begin - len(head))], iter(lambda: content.read(1 << 22), b""), [allocations.tobytes()])
            for part in parts:
                file.write(part)
                digest.update(part)
            file.flush()
            os.fsync(file.fileno())
        pages.unlink()
        scratch.rename(final)
        return Shard(final.name, final.stat().st_size, digest.hexdigest(), len(rows))
