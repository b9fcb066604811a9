"""`simclr bench prepare`: images → shards, kept for the other benches: of small labelled images, or of photographs."""

from __future__ import annotations

import os
import shutil
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from pipelines.bench.result import Row
from pipelines.terminal import Bar
from simclr import files
from simclr.data import shards
from simclr.data.sources.open import open_source
from simclr.data.sources.patterns import render
from simclr.errors import UserError

PICTURES = (".jpg", ".jpeg", ".png")
Kind = Literal["small", "photographs"]
_DIFFERENT = 64  # photographs to render; the others are copies
_WIDTH_PX, _HEIGHT_PX = 500, 375


def prepare(kind: Kind, data: Path | None, out: Path, images: int, threads: int) -> list[Row]:
    """Print and return images/s of writing the shards in `out`; n = 1.

    small: all images of the archive or folder `data`, in splits and classes; without `data`, patterns of 32 px, `images` to train and a
    fifth as many to test. photographs: the pictures of `data`, or rendered ones, repeated until there are `images`.
    """
    if images < 1:
        raise UserError(f"--images is {images}; expected at least 1")
    if data is not None and not data.exists():
        raise UserError(f"{data} does not exist; --data names an archive or a folder of images, nothing = rendered ones")
    if out.exists():
        raise UserError(f"{out} exists already, and this bench times the writing; use another --out")
    files.require_writable(out)
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="simclr-bench-", dir=out.absolute().parent) as folder:
        if kind == "photographs":
            different = photographs(data, Path(folder), images)
            source = str(Path(folder) / "many")
            of = f"{images:,} photographs, {'rendered, ' if data is None else ''}{different} different ones"
        elif data is None:
            source, of = f"patterns:train={images},test={max(images // 5, 1)}", "rendered patterns, 32 px"
        else:
            source, of = str(data), data.name
        began = time.perf_counter()
        opened = open_source(source)
        with Bar("prepare", opened.total) as bar:
            manifest = shards.prepare(opened, out, shards.Options(), max(threads, 1), bar.update)
        seconds = time.perf_counter() - began
    count, size = sum(s.samples for s in manifest.shards), sum(s.bytes for s in manifest.shards)
    print(f"{of}: {count:,} images, {size / 2**20:,.1f} MiB in {seconds:.1f} s, {count / seconds:,.0f} images/s, {threads} threads")
    name = of if data is None or kind == "small" else f"{data.name}, {of}"
    row: Row = {"name": name, "kind": manifest.kind, "images": count, "mib": size / 2**20}
    return [row | {"seconds": seconds, "images_per_s": count / seconds}]


def photographs(data: Path | None, folder: Path, images: int) -> int:
    """Write `images` files to folder/many; returns the number of different ones."""
    found = folder / "found"
    if data is None:
        found.mkdir()
        for first in range(0, min(_DIFFERENT, images), 16):  # 12 MiB at a time
            pictures, _ = render(np.arange(first, min(first + 16, images)), 0, _WIDTH_PX, True)
            for i, picture in enumerate(pictures):
                Image.fromarray(picture[:_HEIGHT_PX]).save(found / f"{first + i:03}.jpg", quality=90)
    elif data.is_dir():
        found = data
    else:
        with tarfile.open(data) as archive:
            archive.extractall(found, filter="data")
    photos = sorted(path for path in found.rglob("*") if path.suffix.lower() in PICTURES)[:images]
    if not photos:
        raise UserError(f"{data} holds no photographs ({', '.join(PICTURES)})")
    (folder / "many").mkdir()
    for i in range(images):
        path = photos[i % len(photos)]
        copy = folder / "many" / f"{i // len(photos)}-{i % len(photos):05}{path.suffix}"
        try:
            os.link(path, copy)
        except OSError:  # another disk, or one without links
            shutil.copy(path, copy)
    return len(photos)
