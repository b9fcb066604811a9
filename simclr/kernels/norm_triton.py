"""The kernels of `simclr.kernels.norm`: activations as (rows, c) in memory, channels side by side.

Imported only where they run: Triton is not on every machine. The grid is (blocks of COLUMNS channels, slabs of rows): a program passes
over a slab of `per` rows, DEEP × ROWS of them at a time. All loads of such a piece come before its first store, behind which the compiler
would move none. scale · x + level is rounded once, so its sign is exact, and backward cuts just what forward did. Sums are float32: a
slab's in a fixed order, then the slabs' in a fixed order, so they are the same to the bit in every run.
"""

# Types of Triton's language are its compiler's business.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _columns(C, COLUMNS: tl.constexpr):
    """This program's channels, and which of them there are."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    return column, column < C


@triton.jit
def _slab(slab, rows, per, C):
    """Where a slab begins, in elements, and its number of rows."""
    return slab.to(tl.int64) * per * C, tl.minimum(per, rows - slab * per)


@triton.jit
def _piece(start, count, column, there, C, DEEP: tl.constexpr, ROWS: tl.constexpr):
    """(DEEP, ROWS, COLUMNS) offsets of a piece of a slab, and which of them there are. A thread has one load in each of DEEP layers, so
    sums over these layers stay in the thread."""
    row = start + (tl.arange(0, DEEP) * ROWS)[:, None, None] + tl.arange(0, ROWS)[None, :, None]
    return row * C + column[None, None, :], (row < count) & there[None, None, :]


@triton.jit
def _of_channel(values, column, there):
    return tl.load(values + column, mask=there, other=0.0)[None, None, :]


@triton.jit
def _store_sums(partial, first, second, slab, column, there, C):
    slabs = tl.num_programs(1)
    tl.store(partial + slab * C + column, tl.sum(first, 0), mask=there)
    tl.store(partial + (slabs + slab) * C + column, tl.sum(second, 0), mask=there)


@triton.jit
def sums_kernel(x, shift, partial, rows, per, C, DEEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Σ (x − shift) and Σ (x − shift)² of each slab, into partial (2, slabs, c)."""
    column, there = _columns(C, COLUMNS)
    base, count = _slab(tl.program_id(1), rows, per, C)
    x += base
    centre = _of_channel(shift, column, there)
    first = tl.zeros((ROWS, COLUMNS), tl.float32)
    second = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, count, DEEP * ROWS):
        at, inside = _piece(start, count, column, there, C, DEEP, ROWS)
        off = tl.where(inside, tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - centre, 0.0)
        first += tl.sum(off, 0)
        second += tl.sum(off * off, 0)
    _store_sums(partial, first, second, tl.program_id(1), column, there, C)


@triton.jit
def total_kernel(partial, out, slabs, C, SLABS: tl.constexpr, COLUMNS: tl.constexpr):
    """The sum over slabs of partial (2, slabs, c), into out (2, c)."""
    column, there = _columns(C, COLUMNS)
    which = tl.program_id(1)
    found = tl.zeros((SLABS, COLUMNS), tl.float32)
    for start in range(0, slabs, SLABS):
        slab = start + tl.arange(0, SLABS)
        inside = (slab < slabs)[:, None] & there[None, :]
        found += tl.load(partial + (which * slabs + slab)[:, None] * C + column[None, :], mask=inside, other=0.0)
    tl.store(out + which * C + column, tl.sum(found, 0), mask=there)


@triton.jit
def affine_kernel(
    x, residual, scale, level, times, out, rows, per, C,
    RESIDUAL: tl.constexpr, TIMES: tl.constexpr, RELU: tl.constexpr, DEEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """scale · x + level (+ residual, or + times · residual), and ReLU of it, into out."""
    column, there = _columns(C, COLUMNS)
    # Backwards: what the sums read last may still lie in the cache.
    base, count = _slab(tl.num_programs(1) - 1 - tl.program_id(1), rows, per, C)
    x += base
    residual += base
    out += base
    a, b = _of_channel(scale, column, there), _of_channel(level, column, there)
    if TIMES:
        t = _of_channel(times, column, there)
    for start in range(0, count, DEEP * ROWS):
        at, inside = _piece(start, count, column, there, C, DEEP, ROWS)
        y = tl.load(x + at, mask=inside, other=0.0)
        if RESIDUAL:
            more = tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
            if TIMES:
                more *= t
            y = tl.fma(y.to(tl.float32), a, b) + more
        else:
            y = tl.fma(y.to(tl.float32), a, b)
        if RELU:
            y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(out + at, y, mask=inside)


@triton.jit
def gradient_sums_kernel(
    grad, x, mean, scale, level, partial, rows, per, C,
    RELU: tl.constexpr, DEEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Σ g and Σ g (x − mean) of each slab, into partial (2, slabs, c). With RELU, g is cut where scale · x + level was."""
    column, there = _columns(C, COLUMNS)
    base, count = _slab(tl.program_id(1), rows, per, C)
    grad += base
    x += base
    centre = _of_channel(mean, column, there)
    if RELU:
        a, b = _of_channel(scale, column, there), _of_channel(level, column, there)
    first = tl.zeros((ROWS, COLUMNS), tl.float32)
    second = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, count, DEEP * ROWS):
        at, inside = _piece(start, count, column, there, C, DEEP, ROWS)
        g = tl.load(grad + at, mask=inside, other=0.0)
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        g = g.to(tl.float32)
        if RELU:
            g = tl.where(tl.fma(value, a, b) > 0, g, 0.0)
        first += tl.sum(g, 0)
        second += tl.sum(g * (value - centre), 0)
    _store_sums(partial, first, second, tl.program_id(1), column, there, C)


@triton.jit
def end_gradient_sums_kernel(
    grad, other, x, y, mean, masked, partial, rows, per, C, DEEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """The same with g = grad + other where y, the stored output, is above 0; g goes into `masked`."""
    column, there = _columns(C, COLUMNS)
    base, count = _slab(tl.program_id(1), rows, per, C)
    grad += base
    other += base
    x += base
    y += base
    masked += base
    centre = _of_channel(mean, column, there)
    first = tl.zeros((ROWS, COLUMNS), tl.float32)
    second = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, count, DEEP * ROWS):
        at, inside = _piece(start, count, column, there, C, DEEP, ROWS)
        g = tl.load(grad + at, mask=inside, other=0.0)
        more = tl.load(other + at, mask=inside, other=0.0)
        end = tl.load(y + at, mask=inside, other=0.0)
        value = tl.load(x + at, mask=inside, other=0.0)
        g = tl.where(end > 0, g.to(tl.float32) + more.to(tl.float32), 0.0).to(masked.dtype.element_ty)
        tl.store(masked + at, g, mask=inside)
        g = g.to(tl.float32)
        first += tl.sum(g, 0)
        second += tl.sum(g * (value.to(tl.float32) - centre), 0)
    _store_sums(partial, first, second, tl.program_id(1), column, there, C)


@triton.jit
def gradient_kernel(
    grad, x, scale, level, slope, offset, out, rows, per, C,
    RELU: tl.constexpr, DEEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """scale · g + slope · x + offset into out; with RELU, g is cut where scale · x + level was."""
    column, there = _columns(C, COLUMNS)
    base, count = _slab(tl.num_programs(1) - 1 - tl.program_id(1), rows, per, C)
    grad += base
    x += base
    out += base
    a, s, o = _of_channel(scale, column, there), _of_channel(slope, column, there), _of_channel(offset, column, there)
    if RELU:
        b = _of_channel(level, column, there)
    for start in range(0, count, DEEP * ROWS):
        at, inside = _piece(start, count, column, there, C, DEEP, ROWS)
        g = tl.load(grad + at, mask=inside, other=0.0)
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        g = g.to(tl.float32)
        if RELU:
            g = tl.where(tl.fma(value, a, b) > 0, g, 0.0)
        tl.store(out + at, g * a + (value * s + o), mask=inside)
