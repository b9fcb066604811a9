"""What a prepare would write and how long it would take here, from a sample of the source."""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from simclr.data.depth import Rule
from simclr.data.encode import encode
from simclr.data.options import Options
from simclr.data.pixels import Unreadable, opened
from simclr.data.raster import file_bytes
from simclr.data.sources.source import Item, Source
from simclr.data.survey import Choice, survey

_TIMED = 128  # images that are encoded
_MOST_S = 5.0  # of encoding
_PAGE_SHARE = 1.02  # pages of 2 MiB are not quite full


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What a sample shows."""

    choice: Choice
    timed: int
    """Images that were read and encoded."""
    formats: Counter[str]
    """JPEG, PNG …, with the mode of the pixels where it is not RGB."""
    heights: tuple[int, int]
    """Smallest and largest, as a shard would store them."""
    widths: tuple[int, int]
    bytes_each: float
    """As stored, of one that can be used."""
    seconds_each: float
    """To decode and encode one that was read, in one thread."""
    skipped: tuple[tuple[str, str], ...]
    """Name and reason of those that cannot be used."""
    threads: int
    shard_mib: int

    def lines(self, total: int | None, splits: int = 1) -> list[str]:
        """For people; `total` images in all, in so many splits."""
        size = " × ".join(f"{low} to {high}" if low != high else f"{low}" for low, high in (self.widths, self.heights))
        kinds = ", ".join(f"{name} {count}" for name, count in self.formats.most_common())
        lines = [f"  of {self.timed} images looked at: {kinds}; {size} px as stored"]
        for kind, (black, white) in self.choice.ranges.items():
            lines.append(f"  {kind} of more than 8 bits: {black:g} becomes black, {white:g} white, in all pictures")
        if self.skipped:
            lines.append(f"  {len(self.skipped)} of them cannot be read, the first: {': '.join(self.skipped[0])}")
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        stored = "pixels as they are (raw)" if self.choice.kind == "raw" else "JPEG"
        if total is None:
            each = f"{self.bytes_each / 2**10:,.1f} KiB an image"
            return [*lines, f"  would write {stored}, {each}; {1000 * self.seconds_each / self.threads:.2f} ms an image with {threads}"]
        size_bytes = total * (1 - len(self.skipped) / max(self.timed, 1)) * self.bytes_each * _PAGE_SHARE
        shards = max(math.ceil(size_bytes / (self.shard_mib << 20)), splits, 1)
        seconds = total * self.seconds_each / self.threads
        return [
            *lines,
            f"  would write about {_bytes(size_bytes)} of {stored} in about {shards} shard{'s' * (shards > 1)}",
            f"  would take about {_time(seconds)} on this machine with {threads} "
            f"({1000 * self.seconds_each:.1f} ms to encode an image in one), if reading keeps up",
        ]


def forecast(source: Source, options: Options, threads: int) -> Forecast:
    """Look at a sample and encode some of it. Raises UserError as `survey` does."""
    with ThreadPoolExecutor(threads) as pool:
        choice = survey(source, options, pool)
    rule = options.rule(choice.ranges)
    formats: Counter[str] = Counter()
    heights, widths, sizes = [], [], []
    skipped: list[tuple[str, str]] = []
    spent, timed = 0.0, 0
    items = source.sample(_TIMED)
    while spent < _MOST_S:
        item = next(items, None)
        if item is None:
            break
        if isinstance(item.data, Path):
            with contextlib.suppress(OSError):  # what cannot be read is said by `encode`
                item.data.read_bytes()  # so that the time is not the disk's
        began = time.perf_counter()
        found = encode(item, choice.kind, options.max_side_px, options.jpeg_quality, rule)
        spent += time.perf_counter() - began
        timed += 1
        if found.skipped:
            skipped.append((item.name, found.skipped))
            formats["not readable"] += 1
            continue
        formats[_format(item, rule)] += 1
        heights.append(found.height)
        widths.append(found.width)
        sizes.append(len(found.stored))
    return Forecast(
        choice=choice,
        timed=timed,
        formats=formats,
        heights=(min(heights, default=0), max(heights, default=0)),
        widths=(min(widths, default=0), max(widths, default=0)),
        bytes_each=float(np.mean(sizes)) if sizes else 0.0,
        seconds_each=spent / max(timed, 1),
        skipped=tuple(skipped),
        threads=threads,
        shard_mib=options.shard_mib,
    )


def _format(item: Item, rule: Rule) -> str:
    if isinstance(item.data, np.ndarray):
        return "pixels"
    try:
        image = opened(file_bytes(item.data, rule))
    except Unreadable:
        return "TIFF of many bands or bits"
    return f"{image.format}{'' if image.mode == 'RGB' else f' ({image.mode})'}"


def _bytes(count: float) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB" if count >= 2**20 else f"{count / 2**10:,.1f} KiB"


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.0f} min" if seconds >= 90 else f"{max(seconds, 1):.0f} s"
