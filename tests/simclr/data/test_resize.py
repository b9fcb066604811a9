"""Both resizes, the decoder's in whole numbers and the device's as matrix products, against one written out in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from simclr.config import Resize
from simclr.data.ffcv.resize import KINDS, REDUCE, resize_box
from simclr.views import ops
from tests.conftest import Within
from tests.support.paths import GOLDEN
from tests.support.resize import reference

HEIGHT, WIDTH = 61, 83
BOXES = {
    "whole image": (0, 0, HEIGHT, WIDTH),
    "upper left": (0, 0, 20, 31),
    "lower right": (HEIGHT - 33, WIDTH - 7, 33, 7),
    "inside": (7, 3, 40, 60),
    "one pixel": (30, 40, 1, 1),
    "last pixel": (HEIGHT - 1, WIDTH - 1, 1, 1),
    "one row": (10, 0, 1, WIDTH),
    "two columns": (5, 50, 50, 2),
    "three by three": (0, WIDTH - 3, 3, 3),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [8, 17, 32, 101])
def test_whole_numbers_are_the_float_reference_to_a_level(within: Within, kind: Resize, size: int) -> None:
    """Half a level is the rounding to bytes. Noise of 0 and 255 is the worst case: neighbours differ as much as they can."""
    random = np.random.default_rng(size)
    for image in (random.integers(0, 256, (HEIGHT, WIDTH, 3)), 255 * random.integers(0, 2, (HEIGHT, WIDTH, 3))):
        for box in BOXES.values():
            out = np.empty((size, size, 3), np.uint8)
            resize_box(image.astype(np.uint8), np.array(box, np.int32), out, KINDS.index(kind))
            within(f"{kind}, in levels", float(np.abs(out - reference(image, box, size, kind)).max()), 0.6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [0.05, 0.3, 2.6])
def test_a_constant_image_stays_constant(kind: Resize, scale: float) -> None:
    for level in (0, 1, 127, 254, 255):
        image = np.full((HEIGHT, WIDTH, 3), level, np.uint8)
        out = np.empty((round(HEIGHT * scale),) * 2 + (3,), np.uint8)
        resize_box(image, np.array([0, 0, HEIGHT, WIDTH], np.int32), out, KINDS.index(kind))
        assert (out == level).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [8, 17, 101])
def test_the_devices_resize_is_the_float_reference(within: Within, kind: Resize, size: int) -> None:
    image = np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH, 3))
    x = torch.tensor(image).permute(2, 0, 1)[None].double() / 255
    for box in BOXES.values():
        ours = ops.crop_resize(x, torch.tensor([box]), size, kind)[0].permute(1, 2, 0).numpy()
        within(f"{kind}, of [0, 1]", float(np.abs(ours - reference(image, box, size, kind) / 255).max()), 1e-12)


@pytest.mark.parametrize(("side", "size"), [(65, 64), (97, 64), (128, 64), (131, 64), (700, 64)])
def test_whole_numbers_reduce_as_torch_with_antialiasing(within: Within, side: int, size: int) -> None:
    random = np.random.default_rng(side)
    for image in (random.integers(0, 256, (side, side, 3)), 255 * random.integers(0, 2, (side, side, 3))):
        out = np.empty((size, size, 3), np.uint8)
        resize_box(image.astype(np.uint8), np.array([0, 0, side, side], np.int32), out, REDUCE)
        x = torch.tensor(image).permute(2, 0, 1)[None].double()
        expected = F.interpolate(x, (size, size), mode="bicubic", antialias=True).clamp(0, 255)[0].permute(1, 2, 0).numpy()
        within("in levels", float(np.abs(out - expected).max()), 0.6)


@pytest.mark.parametrize("kind", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [24, 96])
def test_whole_numbers_resize_as_the_official_code(within: Within, kind: Resize, size: int) -> None:
    """Golden pixels of TensorFlow 2.21. Their input is rounded to bytes here, which may take two more halves of a level."""
    data = np.load(GOLDEN / "resize.npz")
    image = np.rint(data["input"] * 255).astype(np.uint8)
    out = np.empty((size, size, 3), np.uint8)
    resize_box(image, np.array([0, 0, *image.shape[:2]], np.int32), out, KINDS.index(kind))
    within(f"{kind}, in levels", float(np.abs(out - data[f"{size}x{size}|{kind}"].clip(0, 1) * 255).max()), 1.25)
