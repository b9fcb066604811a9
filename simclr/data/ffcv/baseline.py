"""FFCV's own way to two crops: the baseline of `simclr bench loader`, which alone imports it.

Two pipelines over one image field, each with FFCV's decoder: every image is decoded twice, each crop drawn from numba's
per-thread generator (no seed reaches it) by torchvision's sampler, and resized by OpenCV's INTER_AREA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import simclr.data.ffcv.imports  # noqa: F401  (first: it makes the next import fast)

# isort: split
from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
from ffcv.loader import Loader
from ffcv.pipeline import PipelineSpec
from ffcv.reader import Reader


def ffcv_two_crops(beton: Path, size_px: int, batch_size: int, batches: int, threads: int) -> Callable[[], Iterator[Any]]:
    """A function that starts an epoch of `batches` batches of a shard: each (view 0, view 1), (batch_size, size, size, 3) uint8.

    FFCV drains its queue at the end of an epoch. Images repeat within an epoch, so that the rate does not depend on the shard's size.
    """

    def decoder() -> Any:
        return RandomResizedCropRGBImageDecoder((size_px, size_px))

    pipelines = {"image": [decoder()], "second view": PipelineSpec("image", decoder=decoder()), "label": None}
    samples = int(Reader(str(beton)).num_samples)
    indices = np.resize(np.random.default_rng(0).permutation(samples), batches * batch_size).astype(np.uint64)
    loader = Loader(str(beton), batch_size=batch_size, num_workers=threads, indices=indices, pipelines=pipelines)
    return loader.__iter__  # type: ignore[no-any-return]
