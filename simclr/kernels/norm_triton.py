"""The kernels of `simclr.kernels.norm`: activations as (rows, c) in memory, channels side by side.

Imported only where they run: Triton is not on every machine. The grid is (blocks of COLUMNS channels, slabs of rows): a program passes
over a slab of `per` rows, UNROLL tiles of (ROWS, COLUMNS) at a time. Sums are float32: a slab's in a fixed order, then the slabs' in a
fixed order, so they are the same to the bit in every run.
"""

# Types of Triton's language are its compiler's business.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sums_kernel(x, shift, partial, rows, per, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr, UNROLL: tl.constexpr):
    """Σ (x − shift) and Σ (x − shift)² of each slab, into partial (2, slabs, c)."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    slab, slabs = tl.program_id(1), tl.num_programs(1)
    there, count = column < C, tl.minimum(per, rows - slab * per)
    x += slab.to(tl.int64) * per * C
    level = tl.load(shift + column, mask=there, other=0.0)
    first = tl.zeros((ROWS, COLUMNS), tl.float32)
    second = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, count, ROWS * UNROLL):
        for tile in tl.static_range(UNROLL):
            row = start + tile * ROWS + tl.arange(0, ROWS)
            inside = (row < count)[:, None] & there[None, :]
            off = tl.load(x + row[:, None] * C + column[None, :], mask=inside, other=0.0).to(tl.float32) - level[None, :]
            off = tl.where(inside, off, 0.0)
            first += off
            second += off * off
    tl.store(partial + slab * C + column, tl.sum(first, 0), mask=there)
    tl.store(partial + (slabs + slab) * C + column, tl.sum(second, 0), mask=there)


@triton.jit
def total_kernel(partial, out, slabs, C, SLABS: tl.constexpr, COLUMNS: tl.constexpr):
    """The sum over slabs of partial (2, slabs, c), into out (2, c)."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    which = tl.program_id(1)
    found = tl.zeros((SLABS, COLUMNS), tl.float32)
    for start in range(0, slabs, SLABS):
        slab = start + tl.arange(0, SLABS)
        inside = (slab < slabs)[:, None] & (column < C)[None, :]
        found += tl.load(partial + (which * slabs + slab)[:, None] * C + column[None, :], mask=inside, other=0.0)
    tl.store(out + which * C + column, tl.sum(found, 0), mask=column < C)


@triton.jit
def affine_kernel(
    x, residual, scale, level, out, rows, per, C,
    RESIDUAL: tl.constexpr, RELU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """scale · x + level (+ residual), and ReLU of it, into out."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    slab = tl.num_programs(1) - 1 - tl.program_id(1)  # backwards: what the sums read last may still lie in the cache
    there, count = column < C, tl.minimum(per, rows - slab * per)
    base = slab.to(tl.int64) * per * C
    x += base
    residual += base
    out += base
    a = tl.load(scale + column, mask=there, other=0.0)
    b = tl.load(level + column, mask=there, other=0.0)
    for start in range(0, count, ROWS * UNROLL):
        for tile in tl.static_range(UNROLL):
            row = start + tile * ROWS + tl.arange(0, ROWS)
            inside = (row < count)[:, None] & there[None, :]
            at = row[:, None] * C + column[None, :]
            y = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * a[None, :] + b[None, :]
            if RESIDUAL:
                y += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
            if RELU:
                y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
            tl.store(out + at, y, mask=inside)


@triton.jit
def gradient_sums_kernel(
    grad, x, y, mean, scale, level, masked, partial, rows, per, C,
    RELU: tl.constexpr, END: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Σ g and Σ g (x − mean) of each slab, into partial (2, slabs, c). With RELU, g is cut where scale · x + level was; with END where y,
    the stored output, is 0, and is written into `masked`."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    slab, slabs = tl.program_id(1), tl.num_programs(1)
    there, count = column < C, tl.minimum(per, rows - slab * per)
    base = slab.to(tl.int64) * per * C
    grad += base
    x += base
    y += base
    masked += base
    centre = tl.load(mean + column, mask=there, other=0.0)
    if RELU:
        a = tl.load(scale + column, mask=there, other=0.0)
        b = tl.load(level + column, mask=there, other=0.0)
    first = tl.zeros((ROWS, COLUMNS), tl.float32)
    second = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, count, ROWS * UNROLL):
        for tile in tl.static_range(UNROLL):
            row = start + tile * ROWS + tl.arange(0, ROWS)
            inside = (row < count)[:, None] & there[None, :]
            at = row[:, None] * C + column[None, :]
            g = tl.load(grad + at, mask=inside, other=0.0)
            value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
            if RELU:
                g = tl.where(value * a[None, :] + b[None, :] > 0, g, 0.0)
            if END:
                g = tl.where(tl.load(y + at, mask=inside, other=0.0) > 0, g, 0.0)
                tl.store(masked + at, g, mask=inside)
            first += g.to(tl.float32)
            second += g.to(tl.float32) * (value - centre[None, :])
    tl.store(partial + slab * C + column, tl.sum(first, 0), mask=there)
    tl.store(partial + (slabs + slab) * C + column, tl.sum(second, 0), mask=there)


@triton.jit
def gradient_kernel(
    grad, x, scale, level, slope, offset, out, rows, per, C,
    RELU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """scale · g + slope · x + offset into out; with RELU, g is cut where scale · x + level was."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    slab = tl.num_programs(1) - 1 - tl.program_id(1)
    there, count = column < C, tl.minimum(per, rows - slab * per)
    base = slab.to(tl.int64) * per * C
    grad += base
    x += base
    out += base
    a = tl.load(scale + column, mask=there, other=0.0)
    s = tl.load(slope + column, mask=there, other=0.0)
    o = tl.load(offset + column, mask=there, other=0.0)
    if RELU:
        b = tl.load(level + column, mask=there, other=0.0)
    for start in range(0, count, ROWS * UNROLL):
        for tile in tl.static_range(UNROLL):
            row = start + tile * ROWS + tl.arange(0, ROWS)
            inside = (row < count)[:, None] & there[None, :]
            at = row[:, None] * C + column[None, :]
            g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
            value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
            if RELU:
                g = tl.where(value * a[None, :] + b[None, :] > 0, g, 0.0)
            tl.store(out + at, g * a[None, :] + (value * s[None, :] + o[None, :]), mask=inside)
