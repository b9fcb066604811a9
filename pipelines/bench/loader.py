"""`simclr bench loader`: crops from one decode, against FFCV's two pipelines over the same shard with the same threads."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipelines.bench.result import WARM_STEPS, Row, compared, in_turn
from simclr.config import Config, Train, Views
from simclr.data import shards
from simclr.data.encode import PAGE
from simclr.data.ffcv.baseline import ffcv_two_crops
from simclr.data.ffcv.resize import KINDS
from simclr.data.loader import batches
from simclr.data.manifest import read_manifest, write_manifest
from simclr.data.sources.open import open_source
from simclr.data.sources.patterns import render
from simclr.errors import UserError
from simclr.sections import Local
from simclr.views.draw import Crop

_IMAGES, _WIDTH_PX, _HEIGHT_PX = 300, 500, 375
_FFCV = "FFCV, two pipelines"


def loader(
    data: Path | None, batch_size: int, steps: int, trials: int, threads: int, size_px: int = 224, crops: str | None = None
) -> list[Row]:
    """Print and return, for each kind of resize, our images/s ÷ FFCV's: the median over pairs of trials. With `crops`, as "2x224+6x96", of
    these crops, of the first of them alone and of as many of the first size, in place of the kinds of resize.

    An image counts once its two crops are there. Both sides prepare batches in advance and get the next request at once, so the
    preparation is timed.
    """
    torch_threads = torch.get_num_threads()  # FFCV's loader sets it
    with tempfile.TemporaryDirectory(prefix="simclr-bench-") as folder:
        shard = _one_shard(data or _rendered(Path(folder)), Path(folder) / "one")
        samples = read_manifest(shard).examples("train")
        if samples < batch_size:
            raise UserError(f"the first shard has {samples} photographs; use --batch-size {samples} or less")
        beton = next(shard.glob("*.beton"))
        several = _several(crops) if crops is not None else {}
        size_px = next(iter(several.values()))[0].size_px if several else size_px
        sides: dict[str, Callable[[], Iterator[Any]]] = {_FFCV: ffcv_two_crops(beton, size_px, batch_size, steps, threads)}
        for kind in () if several else KINDS:
            config = Config(train=Train(batch_size=batch_size), views=Views(size_px=size_px, resize=kind))
            sides[kind] = lambda config=config: batches(config, shard, 0, 0, 1, threads)  # type: ignore[misc]
        for name, some in several.items():
            config = Config(train=Train(batch_size=batch_size), views=some[0].views)
            sides[name] = lambda config=config, some=some: batches(config, shard, 0, 0, 1, threads, crops=some)  # type: ignore[misc]
        for name in sides:  # compiles; runs to its end, because FFCV's thread cannot be stopped and numba's threads allow no second user
            _rate(sides[name](), steps, batch_size)
        rates = in_turn({name: partial(_fresh, side, steps, batch_size) for name, side in sides.items()}, trials, "images/s")
        kib = (beton.stat().st_size - PAGE) / samples / 1024
    torch.set_num_threads(torch_threads)
    print(
        f"{crops or f'two crops of {size_px} px'} from each of {samples} JPEGs of about {kib:.0f} KiB, {threads} threads, "
        f"{steps - WARM_STEPS} batches of {batch_size}, median of n = {trials}"
    )
    rows = compared(rates, "images/s", _FFCV)
    for row in rows:
        name = row["name"]
        than = "" if name == _FFCV else f"   {row['ratio']:.2f} × (pairs {row['low']:.2f} … {row['high']:.2f})"
        label = name if name == _FFCV else f"decoded once, {name}" + (" (default)" if name == Views().resize else "")
        than += f", {_megapixels(several[name]):.2f} megapixels an image" if name in several else ""
        print(f"{label:<32} {row['median']:8,.0f} images/s{than}")
    return rows


def _several(text: str) -> dict[str, tuple[Crop, ...]]:
    """Name → crops, of a text as "2x224+6x96": the first of them alone, all, and as many of the first size."""
    found = re.findall(r"(?:^|\+)(\d+)x(\d+)(?=\+|$)", text)
    if "+".join(f"{count}x{size}" for count, size in found) != text or not all(int(n) >= 1 for pair in found for n in pair):
        raise UserError(f"--crops is {text!r}; expected numbers and sizes of crops, as 2x224+6x96")
    sizes = [(int(count), int(size)) for count, size in found]
    views = Views(size_px=sizes[0][1])
    small = [Crop(count=count, views=replace(Local(), size_px=size).of(views)) for count, size in sizes[1:]]
    crops = (Crop(count=sizes[0][0], views=views), *small)
    named = {f"{sizes[0][0]}x{sizes[0][1]}": crops[:1], text: crops}
    if len(crops) > 1:
        total = sum(count for count, _ in sizes)
        named[f"{total}x{sizes[0][1]}"] = (Crop(count=total, views=views),)
    return named


def _megapixels(crops: tuple[Crop, ...]) -> float:
    return sum(crop.count * crop.size_px**2 for crop in crops) / 1e6


def _fresh(side: Callable[[], Iterator[Any]], steps: int, batch_size: int) -> float:
    return _rate(side(), steps, batch_size)


def _rate(stream: Iterator[Any], steps: int, batch_size: int) -> float:
    """Images per second from batch WARM_STEPS, when the queue is full, to batch `steps`."""
    for _ in range(WARM_STEPS):
        next(stream)
    began = time.perf_counter()
    for _ in range(steps - WARM_STEPS):
        next(stream)
    seconds = time.perf_counter() - began
    if isinstance(stream, Generator):
        stream.close()
    return (steps - WARM_STEPS) * batch_size / seconds


def _one_shard(data: Path, folder: Path) -> Path:
    """The first training shard of `data` as a dataset: FFCV's loader reads one file."""
    manifest = read_manifest(data)
    if manifest.kind != "jpeg":
        raise UserError(f"{data} holds whole images, which nothing decodes; `simclr bench loader` takes photographs")
    first = manifest.splits["train"][0]
    folder.mkdir()
    (folder / first.name).symlink_to((data / first.name).absolute())
    write_manifest(folder, replace(manifest, splits={"train": (first,)}))
    return folder


def _rendered(folder: Path) -> Path:
    """Shards of 300 rendered pictures with grain, as JPEGs of quality 90: some 60 KiB each, as small photographs are."""
    photos, out = folder / "photos", folder / "shards"
    photos.mkdir()
    for first in range(0, _IMAGES, 20):
        images, _ = render(np.arange(first, first + 20), 0, _WIDTH_PX, True)
        for i, image in enumerate(images):
            Image.fromarray(image[:_HEIGHT_PX]).save(photos / f"{first + i:03}.jpg", quality=90)
    shards.prepare(open_source(str(photos)), out, shards.Options(), 2, lambda done: None)
    return out
