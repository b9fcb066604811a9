"""Crops to normalised views on the CPU, one view at a time in the cache. Twin of `simclr.views.ops.distort`, which defines it.

The plain form passes over all views once per operation and copies the rows concerned; it spends most of its time on moving memory. Here a
view is read once, as bytes, and written once, channels last, as the encoder reads it.
"""

from __future__ import annotations

import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_f32 = np.float32
_Bools = NDArray[np.bool_]
_Floats = NDArray[np.float32]
# No sum here overflows or is undefined, so the compiler may reorder and vectorise them.
_compiled = numba.njit(nogil=True, fastmath=True, error_model="numpy")


def crops_to_views(
    crops: Tensor,
    flip: _Bools,
    jitter: _Bools,
    order: NDArray[np.int64],
    factors: NDArray[np.float64],
    grey: _Bools,
    sigma: NDArray[np.float64],
    solarise: _Bools,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Tensor:
    """Views (v·n, 3, size, size) float32, channels last, of crops (n, v, size, size, 3) uint8 on the CPU: [view 0; view 1; …].

    The parameters (v·n, …) are the fields of `simclr.views.draw.Colours`; mean and std are those of the normalisation. Uses as many
    threads as torch.
    """
    total, size = len(crops) * crops.shape[1], crops.shape[2]
    out = torch.empty(total, size, size, 3)
    scale = (1 / np.array(std)).astype(np.float32)
    shift = (-np.array(mean) / np.array(std)).astype(np.float32)
    arguments = (flip, jitter, order, factors.astype(np.float32), grey, sigma, solarise, scale, shift)
    source, target = np.ascontiguousarray(crops.numpy()), out.numpy()
    # Plain threads, not numba's: the loader's may be running at this moment, and two parallel regions at once abort the process.
    workers = min(torch.get_num_threads(), total)
    if workers <= 1:
        _views(source, 0, total, *arguments, target)
    else:
        with ThreadPoolExecutor(workers) as pool:
            cuts = [total * i // workers for i in range(workers + 1)]
            for done in [pool.submit(_views, source, a, b, *arguments, target) for a, b in itertools.pairwise(cuts)]:
                done.result()
    return out.permute(0, 3, 1, 2)


@_compiled
def _views(
    crops: NDArray[np.uint8],
    begin: int,
    end: int,
    flip: _Bools,
    jitter: _Bools,
    order: NDArray[np.int64],
    factors: _Floats,
    grey: _Bools,
    sigma: NDArray[np.float64],
    solarise: _Bools,
    scale: _Floats,
    shift: _Floats,
    out: _Floats,
) -> None:
    n, size = crops.shape[0], crops.shape[2]
    r, g, b = np.empty(size * size, np.float32), np.empty(size * size, np.float32), np.empty(size * size, np.float32)
    half, padded = np.empty((size, size), np.float32), np.zeros(size + 2 * (size // 20), np.float32)
    for view in range(begin, end):
        pixels = crops[view % n, view // n].reshape(-1, 3)
        for i in range(size * size):
            r[i], g[i], b[i] = pixels[i, 0] * _f32(1 / 255), pixels[i, 1] * _f32(1 / 255), pixels[i, 2] * _f32(1 / 255)
        if jitter[view]:
            for position in range(4):
                operation = order[view, position]
                factor = factors[view, operation]
                if operation == 0:
                    _affine(r, factor, _f32(0))
                    _affine(g, factor, _f32(0))
                    _affine(b, factor, _f32(0))
                elif operation == 1:
                    for plane in (r, g, b):
                        _affine(plane, factor, _mean(plane, size) * (_f32(1) - factor))
                elif operation == 2:
                    _saturation(r, g, b, factor)
                else:
                    _hue(r, g, b, factor)
        if grey[view]:
            for i in range(size * size):
                r[i] = r[i] * _f32(0.2989) + g[i] * _f32(0.5870) + b[i] * _f32(0.1140)
            g[:] = r
            b[:] = r
        if sigma[view] > 0:
            weights = _taps(sigma[view], size // 20)
            for plane in (r, g, b):
                _blur(plane.reshape(size, size), weights, half, padded)
        if solarise[view]:
            for plane in (r, g, b):
                for i in range(size * size):
                    plane[i] = min(plane[i], _f32(1) - plane[i])
        for y in range(size):
            row = slice(y * size, (y + 1) * size)
            red, green, blue, target = r[row], g[row], b[row], out[view, y]
            if flip[view]:  # last: no operation before it tells left from right
                red, green, blue = red[::-1], green[::-1], blue[::-1]
            for x in range(size):
                target[x, 0] = red[x] * scale[0] + shift[0]
                target[x, 1] = green[x] * scale[1] + shift[1]
                target[x, 2] = blue[x] * scale[2] + shift[2]


@_compiled
def _mean(plane: _Floats, size: int) -> np.float32:
    total = 0.0
    for y in range(size):  # sums a row in float32, rows in float64: an error of a few 1e-7
        row = _f32(0)
        for x in range(size):
            row += plane[y * size + x]
        total += float(row)
    return _f32(total / (size * size))


@_compiled
def _affine(plane: _Floats, factor: np.float32, offset: np.float32) -> None:
    for i in range(len(plane)):
        plane[i] = min(max(plane[i] * factor + offset, _f32(0)), _f32(1))


@_compiled
def _saturation(r: _Floats, g: _Floats, b: _Floats, factor: np.float32) -> None:
    for i in range(len(r)):
        v, low = max(r[i], g[i], b[i]), min(r[i], g[i], b[i])
        by = min(factor, v / max(v - low, _f32(1e-12)))
        r[i] = min(max(v - (v - r[i]) * by, _f32(0)), _f32(1))
        g[i] = min(max(v - (v - g[i]) * by, _f32(0)), _f32(1))
        b[i] = min(max(v - (v - b[i]) * by, _f32(0)), _f32(1))


@_compiled
def _hue(r: _Floats, g: _Floats, b: _Floats, turn: np.float32) -> None:
    zero, one, six = _f32(0), _f32(1), _f32(6)
    for i in range(len(r)):
        red, green, blue = r[i], g[i], b[i]
        v, low = max(red, green, blue), min(red, green, blue)
        chroma = v - low
        c = one / max(chroma, _f32(1e-12))
        sector = (green - blue) * c if v == red else (_f32(2) + (blue - red) * c if v == green else _f32(4) + (red - green) * c)
        sector += six * turn
        k = sector + _f32(5)
        k -= six * _f32(math.floor(k * _f32(1 / 6)))
        r[i] = v - chroma * max(min(k, _f32(4) - k, one), zero)
        k = sector + _f32(3)
        k -= six * _f32(math.floor(k * _f32(1 / 6)))
        g[i] = v - chroma * max(min(k, _f32(4) - k, one), zero)
        k = sector + one
        k -= six * _f32(math.floor(k * _f32(1 / 6)))
        b[i] = v - chroma * max(min(k, _f32(4) - k, one), zero)


@_compiled
def _taps(sigma: float, radius: int) -> _Floats:
    weights = np.empty(2 * radius + 1, np.float64)
    for k in range(2 * radius + 1):
        weights[k] = math.exp(-0.5 * ((k - radius) / sigma) ** 2)
    found: _Floats = (weights / weights.sum()).astype(np.float32)
    return found


@_compiled
def _blur(plane: _Floats, weights: _Floats, half: _Floats, padded: _Floats) -> None:
    """Down the columns into `half`, then along its rows, which `padded` holds with the zeros beyond the border."""
    size, radius = plane.shape[0], len(weights) // 2
    for y in range(size):
        line = half[y]
        line[:] = _f32(0)
        for other in range(max(y - radius, 0), min(y + radius + 1, size)):
            weight, row = weights[other - y + radius], plane[other]
            for x in range(size):
                line[x] += weight * row[x]
    for y in range(size):
        padded[radius : radius + size] = half[y]
        line = plane[y]
        line[:] = _f32(0)
        for k in range(len(weights)):
            weight, row = weights[k], padded[k : k + size]
            for x in range(size):
                line[x] += weight * row[x]
