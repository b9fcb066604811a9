"""The kernels of `simclr.kernels.stem`: pixels as (n, h, w, c) in memory, channels side by side, h and w even.

Imported only where they run: Triton is not on every machine. A cell is one window of the pooling, and the 2 × 2 pixels where it begins; a
program passes over `per` cells, ROWS at a time. Sums are in a fixed order, as those of `simclr.kernels.norm_triton`.
"""

# Types of Triton's language are its compiler's business.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from simclr.kernels.norm_triton import _columns, _store_sums


@triton.jit
def _cells(start, cells, H, W, ROWS: tl.constexpr):
    """Of ROWS cells: number, row and column in the pooled image, its upper left pixel's number, and which cells there are."""
    cell = start + tl.arange(0, ROWS)
    q = cell % (W // 2)
    p = (cell // (W // 2)) % (H // 2)
    image = cell // ((H // 2) * (W // 2))
    return cell, p, q, (image * H + 2 * p) * W + 2 * q, cell < cells


@triton.jit
def _at(pixel, column, C):
    return pixel.to(tl.int64)[:, None] * C + column[None, :]


@triton.jit
def _of_channel(values, column, there):
    return tl.load(values + column, mask=there, other=0.0)[None, :]


@triton.jit
def pool_kernel(x, scale, level, out, which, cells, per, H, W, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The largest ReLU(scale · x + level) of each window into out, and which of the 9 it is, the first of equals; 9 where all are cut."""
    column, there = _columns(C, COLUMNS)
    a, b = _of_channel(scale, column, there), _of_channel(level, column, there)
    first = tl.program_id(1) * per
    for start in range(first, tl.minimum(first + per, cells), ROWS):
        cell, p, q, pixel, inside = _cells(start, cells, H, W, ROWS)
        best = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
        tap = tl.full((ROWS, COLUMNS), 9, tl.int32)
        for k in tl.static_range(9):
            valid = inside & (2 * p + k // 3 < H) & (2 * q + k % 3 < W)
            y = tl.load(x + _at(pixel + (k // 3) * W + k % 3, column, C), mask=valid[:, None] & there[None, :], other=0.0)
            y = tl.fma(y.to(tl.float32), a, b).to(x.dtype.element_ty).to(tl.float32)  # rounded as it would be stored: it decides ties
            y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
            better = valid[:, None] & ((y > best) | (y != y))
            best = tl.where(better, y, best)
            tap = tl.where(better, k, tap)
        at = _at(cell, column, C)
        stored = inside[:, None] & there[None, :]
        tl.store(out + at, best, mask=stored)
        tl.store(which + at, tl.where(best <= 0, 9, tap).to(tl.uint8), mask=stored)


@triton.jit
def _gradient_of(grad, which, cell, p, q, column, there, inside, up: tl.constexpr, left: tl.constexpr, W, C):
    """Gradient and choice of the window `up` rows above and `left` columns before each cell's; no choice where there is none."""
    valid = (inside & (p >= up) & (q >= left))[:, None] & there[None, :]
    at = _at(cell - up * (W // 2) - left, column, C)
    return tl.load(grad + at, mask=valid, other=0.0).to(tl.float32), tl.load(which + at, mask=valid, other=9).to(tl.int32)


@triton.jit
def _gradients(grad, which, cell, p, q, column, there, inside, W, C):
    """Gradients of a cell's 2 × 2 pixels: of each what the windows over it send that chose it, in a fixed order."""
    g00, w00 = _gradient_of(grad, which, cell, p, q, column, there, inside, 0, 0, W, C)
    g01, w01 = _gradient_of(grad, which, cell, p, q, column, there, inside, 0, 1, W, C)
    g10, w10 = _gradient_of(grad, which, cell, p, q, column, there, inside, 1, 0, W, C)
    g11, w11 = _gradient_of(grad, which, cell, p, q, column, there, inside, 1, 1, W, C)
    upper_left = tl.where(w00 == 0, g00, 0.0) + tl.where(w01 == 2, g01, 0.0) + tl.where(w10 == 6, g10, 0.0) + tl.where(w11 == 8, g11, 0.0)
    upper_right = tl.where(w00 == 1, g00, 0.0) + tl.where(w10 == 7, g10, 0.0)
    lower_left = tl.where(w00 == 3, g00, 0.0) + tl.where(w01 == 5, g01, 0.0)
    return upper_left, upper_right, lower_left, tl.where(w00 == 4, g00, 0.0)


@triton.jit
def _pixels(x, pixel, column, W, C, stored):
    """Where the 2 × 2 pixels of each cell lie, and their values."""
    a0, a1 = _at(pixel, column, C), _at(pixel + 1, column, C)
    a2, a3 = _at(pixel + W, column, C), _at(pixel + W + 1, column, C)
    x0, x1 = tl.load(x + a0, mask=stored, other=0.0), tl.load(x + a1, mask=stored, other=0.0)
    x2, x3 = tl.load(x + a2, mask=stored, other=0.0), tl.load(x + a3, mask=stored, other=0.0)
    return a0, a1, a2, a3, x0.to(tl.float32), x1.to(tl.float32), x2.to(tl.float32), x3.to(tl.float32)


@triton.jit
def pool_gradient_sums_kernel(grad, which, x, mean, partial, cells, per, H, W, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Σ g and Σ g (x − mean) of `per` cells, into partial (2, programs, c)."""
    column, there = _columns(C, COLUMNS)
    centre = _of_channel(mean, column, there)
    first = tl.zeros((ROWS, COLUMNS), tl.float32)
    second = tl.zeros((ROWS, COLUMNS), tl.float32)
    begin = tl.program_id(1) * per
    for start in range(begin, tl.minimum(begin + per, cells), ROWS):
        cell, p, q, pixel, inside = _cells(start, cells, H, W, ROWS)
        _, _, _, _, x0, x1, x2, x3 = _pixels(x, pixel, column, W, C, inside[:, None] & there[None, :])
        g0, g1, g2, g3 = _gradients(grad, which, cell, p, q, column, there, inside, W, C)
        first += g0 + g1 + (g2 + g3)
        second += g0 * (x0 - centre) + g1 * (x1 - centre) + (g2 * (x2 - centre) + g3 * (x3 - centre))
    _store_sums(partial, first, second, tl.program_id(1), column, there, C)


@triton.jit
def pool_gradient_kernel(
    grad, which, x, scale, slope, offset, out, cells, per, H, W, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """scale · g + slope · x + offset into out."""
    column, there = _columns(C, COLUMNS)
    a, s, o = _of_channel(scale, column, there), _of_channel(slope, column, there), _of_channel(offset, column, there)
    begin = tl.program_id(1) * per
    for start in range(begin, tl.minimum(begin + per, cells), ROWS):
        cell, p, q, pixel, inside = _cells(start, cells, H, W, ROWS)
        stored = inside[:, None] & there[None, :]
        a0, a1, a2, a3, x0, x1, x2, x3 = _pixels(x, pixel, column, W, C, stored)
        g0, g1, g2, g3 = _gradients(grad, which, cell, p, q, column, there, inside, W, C)
        tl.store(out + a0, g0 * a + (x0 * s + o), mask=stored)
        tl.store(out + a1, g1 * a + (x1 * s + o), mask=stored)
        tl.store(out + a2, g2 * a + (x2 * s + o), mask=stored)
        tl.store(out + a3, g3 * a + (x3 * s + o), mask=stored)
