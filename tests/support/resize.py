"""Resizing a crop, written out in float64."""

from __future__ import annotations

import numpy as np

from simclr.config import Resize


def weights(length: int, size: int, kind: Resize) -> np.ndarray:
    """(size, length): each output pixel's weights over the pixels of the box, by the definition."""
    pixel, x = np.arange(length)[None], np.arange(size)[:, None]
    low, high = x * length / size, (x + 1) * length / size
    centre = (low + high) / 2 - 0.5
    if kind == "area":
        found = np.minimum(high, pixel + 1) - np.maximum(low, pixel)
    elif kind == "bilinear":
        found = 1 - np.abs(pixel - centre.clip(0, length - 1))
    else:
        t = np.abs(pixel - centre)
        found = np.where(t < 1, 1.5 * t**3 - 2.5 * t**2 + 1, np.where(t < 2, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2, 0))
        return found / found.sum(1, keepdims=True)
    return found.clip(0) / found.clip(0).sum(1, keepdims=True)


def reference(image: np.ndarray, box: tuple[int, ...] | np.ndarray, size: int, kind: Resize = "bicubic") -> np.ndarray:
    """Levels (size, size, 3) in float64, in [0, 255]."""
    top, left, height, width = (int(side) for side in box)
    part = image[top : top + height, left : left + width].astype(float)
    rows, columns = weights(height, size, kind), weights(width, size, kind)
    return np.einsum("yi,ijc,xj->yxc", rows, part, columns, optimize=True).clip(0, 255)
