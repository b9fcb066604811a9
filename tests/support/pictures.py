"""Pictures of many kinds, made by a test, and their pixels as shards hold them."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from simclr.data import shards
from simclr.data.manifest import Manifest
from simclr.data.options import Options
from simclr.data.sources.source import Data, Source
from tests.support.sources import source_of_files

# isort: split
from ffcv.reader import Reader

SHAPE = (72, 96)


def ramp(low: float, high: float, kind: Any = np.uint16, shape: tuple[int, ...] = SHAPE) -> NDArray[Any]:
    """From `low` to `high`, both included."""
    return np.linspace(low, high, int(np.prod(shape))).reshape(shape).astype(kind)


def tiff(values: NDArray[Any], **options: Any) -> bytes:
    """A TIFF; of three bands RGB, of four RGBA, unless `options` say otherwise."""
    if values.ndim == 3 and "photometric" not in options:
        options |= {"photometric": "rgb", "planarconfig": "contig", "extrasamples": (2,) * (values.shape[2] - 3)}
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, **options)
    return buffer.getvalue()


def png(values: NDArray[Any]) -> bytes:
    """A PNG of grey, RGB or RGBA."""
    order = [2, 1, 0, 3][: values.shape[-1]]
    return bytes(cv2.imencode(".png", values if values.ndim == 2 else values[..., order])[1])


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rgb(seed: int = 0) -> NDArray[np.uint8]:
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize(SHAPE[::-1], Image.Resampling.BICUBIC))


def prepared(out: Path, files: dict[str, Data] | Source, says: Any = None, **options: Any) -> tuple[Manifest, dict[str, NDArray[np.uint8]]]:
    """The manifest, and the pixels of each name, which are stored raw."""
    source = files if isinstance(files, Source) else source_of_files(files)
    manifest = shards.prepare(source, out, Options(**{"kind": "raw"} | options), 2, lambda done: None, says=says or (lambda line: None))
    found = []
    for shard in manifest.splits["train"]:
        stored = np.fromfile(out / shard.name, np.uint8)
        for row in Reader(str(out / shard.name)).alloc_table:
            at, size = int(row["ptr"]), int(row["size"])
            found.append(stored[at : at + size].reshape(manifest.height_px[0], manifest.width_px[0], 3))
    names = (out / "names-train.txt").read_text().splitlines()
    return manifest, dict(zip(names, found, strict=True))


def reasons(out: Path) -> dict[str, str]:
    with (out / "skipped.csv").open(newline="", encoding="utf-8") as file:
        return dict(list(csv.reader(file))[1:])
