"""NT-Xent's kernels on a GPU: which tiles, how many programs, and their launches (`simclr.kernels.nt_xent_triton` has the kernels).

bfloat16 and float16 rows are multiplied as they are. A float32 row times 2^10 is the sum of two float16, which hold 22 of its 24 bits, and
a product is three of float16: high · low, low · high, high · high. So a cosine is at most 3 · 2^-22 off, like one by three products of
TF32, which tensor cores multiply at half the speed. Sums are float32 throughout.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from simclr.kernels.device import Gpu, takes_triton

FIXED_FROM = 0.024
"""τ from which all exponents have the shift 1 / τ. Rows rounded to bfloat16 are up to 1 + 2^-9 long, so −1.004 ≤ cos ≤ 1.004, and
exp((cos − 1) / τ) ≥ exp(−83.6) is a normal number of float32, which end at exp(−87.3); none is above 1.18, and the reciprocal of a sum
is at most exp(83.6). Below, a maximum runs along."""
_WIDEST = {torch.float32: 256, torch.bfloat16: 512, torch.float16: 512}  # dimensions of z; wider rows go block by block
_PARTS_SCALE = 2.0**10  # of float32 rows: the low parts of all entries above 1e-4 are normal numbers of float16
_LIFT = 14  # p ≤ 2, times 2^14 in a tile: what matters of it is a normal number of float16
_ENTRIES = 2048  # of the rows of a program behind the tiles: 16 for each of 128 threads


def in_tiles(x: Tensor) -> bool:
    """Whether rows like x (n, d) are multiplied in their own dtype, in tiles: if one holds a row's whole width."""
    return x.shape[1] <= _WIDEST.get(x.dtype, 0) and takes_triton(x.device)


def parts(x: Tensor) -> Tensor:
    """x (n, d) as the kernels multiply it: float32 as (2, n, d) of float16, whose sum is x · 2^10."""
    if x.dtype != torch.float32:
        return x.contiguous()
    found = torch.empty(2, *x.shape, dtype=torch.float16, device=x.device)
    scaled = x * _PARTS_SCALE
    found[0] = scaled
    found[1] = scaled.sub_(found[0])
    return found


def forward(queries: Tensor, keys: Tensor, offset: int, temperature: float, on: Gpu) -> tuple[Tensor, Tensor]:
    """Losses (2n,) of `parts` of the queries and keys, and what `gradients` needs of each query's sum (2n,)."""
    from simclr.kernels.nt_xent_triton import losses_kernel, sums_kernel

    rows, count = queries.shape[-2], keys.shape[-2]
    slope, shift, fixed = _exponent(queries, temperature)
    common, tile = _common(queries, fixed), _tile("sums", queries, keys, on)
    grid = _grid(rows, count, tile, on)
    sums = torch.empty(1 if fixed else 2, grid[1], rows, dtype=torch.float32, device=queries.device)
    sums_kernel[grid](queries, keys, sums, rows, count, rows // 2, 0, offset, slope, shift, **common, **tile)
    share, losses = torch.empty(2, rows, dtype=torch.float32, device=queries.device)
    few = _ENTRIES // common["WIDE"]
    losses_kernel[(-(-rows // few),)](
        queries, keys, sums, share, losses, rows, count, offset, grid[1], slope, shift, **common, ROWS=few
    )  # fmt: skip
    return losses, share


def gradients(
    queries: Tensor, keys: Tensor | None, share: Tensor, offset: int, temperature: float, grad: Tensor, dtype: torch.dtype, on: Gpu
) -> tuple[Tensor, Tensor | None]:
    """Gradients of grad × the mean of the losses, in dtype; without keys these are the queries, which then have the whole gradient."""
    of = functools.partial(_gradient, share=share, queries=queries.shape[-2], temperature=temperature, grad=grad, dtype=dtype, on=on)
    if keys is None:
        return of(queries, queries, outer_at=0, inner_at=0, by_outer=True, by_inner=True), None
    return (
        of(queries, keys, outer_at=0, inner_at=offset, by_outer=True, by_inner=False),
        of(keys, queries, outer_at=offset, inner_at=0, by_outer=False, by_inner=True),
    )


def _gradient(
    outer: Tensor, inner: Tensor, *, share: Tensor, queries: int, outer_at: int, inner_at: int, by_outer: bool, by_inner: bool,
    temperature: float, grad: Tensor, dtype: torch.dtype, on: Gpu,
) -> Tensor:  # fmt: skip
    """Gradient towards the outer rows; of the sums of the outer rows, of the inner ones, or both."""
    from simclr.kernels.nt_xent_triton import gradient_kernel, weighted_kernel

    outers, inners, d = outer.shape[-2], inner.shape[-2], outer.shape[-1]
    slope, shift, fixed = _exponent(outer, temperature)
    common, tile = _common(outer, fixed) | {"BY_OUTER": by_outer, "BY_INNER": by_inner}, _tile("weighted", outer, inner, on)
    grid = _grid(outers, inners, tile, on)
    places = (outers, inners, queries // 2, outer_at, inner_at)
    weighted = torch.empty(grid[1], outers, d, dtype=torch.float32, device=outer.device)
    weighted_kernel[grid](outer, inner, share, weighted, *places, slope, shift - _LIFT, **common, **tile)
    out = torch.empty(outers, d, dtype=dtype, device=outer.device)
    scale, few = 1 / (queries * temperature * _row_scale(outer)), _ENTRIES // common["WIDE"]
    gradient_kernel[(-(-outers // few),)](
        outer, inner, share, weighted, grad, out, *places, grid[1], slope, shift, 2.0**-_LIFT, scale, **common, ROWS=few
    )  # fmt: skip
    return out


def _row_scale(rows: Tensor) -> float:
    return _PARTS_SCALE if rows.ndim == 3 else 1.0


def _exponent(rows: Tensor, temperature: float) -> tuple[float, float, bool]:
    """slope and shift in base 2, and whether the shift is fixed: exp(cos / τ) = 2^(slope · product of rows)."""
    fixed = temperature >= FIXED_FROM
    base = math.log2(math.e) / temperature
    return base / _row_scale(rows) ** 2, base if fixed else 0.0, fixed


def _common(rows: Tensor, fixed: bool) -> dict[str, Any]:
    d = rows.shape[-1]
    return {"D": d, "WIDE": _wide(d), "PARTS": 2 if rows.ndim == 3 else 1, "FIXED": fixed}


def _wide(d: int) -> int:
    return max(16, 1 << (d - 1).bit_length())


# ── Tiles and programs ─────────────────────────────────────────────────────────────────────────────────────────────

# Rows of outer, rows of inner, warps and stages, of `sums_kernel` and `weighted_kernel`, by the number of parts and the width: the largest
# without spilled registers, by Triton 3.6 and 3.9 (tests/simclr/kernels/test_nt_xent_tiles.py compiles them), whose rows are loaded at
# least one tile ahead. With two stages the compiler's code waits for a tile's rows right after it asks for them. Blocks of 4 warps work in
# pairs on a multiprocessor: one multiplies while the other one takes exponentials, or waits; so two stages do for them, if registers allow
# no more. H100, H200 and B200 multiply 64 rows or more from shared memory, of which they have 227 KiB; other GPUs multiply from registers,
# and 99 KiB are common to those from the A100 on.
_HOPPER = {
    (1, 64): ((128, 64, 4, 4), (64, 128, 4, 2)),
    (1, 128): ((128, 64, 4, 4), (64, 128, 4, 2)),
    (1, 256): ((128, 64, 8, 3), (64, 64, 8, 3)),
    (1, 512): ((64, 32, 8, 3), (64, 32, 8, 3)),
    (2, 64): ((128, 64, 8, 3), (128, 64, 8, 3)),
    (2, 128): ((128, 64, 8, 3), (128, 64, 8, 3)),
    (2, 256): ((64, 32, 4, 3), (32, 16, 8, 3)),
}
# Of larger tiles Triton 3.6 makes a program that does nothing but stop.
_BLACKWELL = _HOPPER | {(2, 128): ((128, 64, 8, 3), (64, 64, 8, 3))}
_OLDER = {
    (1, 64): ((128, 64, 4, 3), (128, 64, 8, 3)),
    (1, 128): ((128, 64, 4, 3), (128, 64, 8, 3)),
    (1, 256): ((64, 64, 8, 3), (64, 32, 8, 3)),
    (1, 512): ((32, 32, 4, 3), (32, 16, 4, 3)),
    (2, 64): ((128, 32, 8, 3), (128, 32, 8, 3)),
    (2, 128): ((128, 32, 8, 3), (64, 32, 4, 3)),
    (2, 256): ((32, 32, 4, 3), (32, 16, 8, 3)),
}


def _tile(kernel: str, outer: Tensor, inner: Tensor, on: Gpu) -> dict[str, Any]:
    """The kernel's compile-time settings."""
    wide = _wide(outer.shape[-1])
    by = {9: _HOPPER, 10: _BLACKWELL}.get(on.capability // 10, _OLDER)
    rows, columns, warps, stages = by[outer.ndim - 1, max(wide, 64)][kernel == "weighted"]
    whole = inner.shape[-2] >= columns and inner.shape[-1] == wide
    return {"OUTER": rows, "INNER": columns, "WHOLE": whole, "num_warps": warps, "num_stages": stages}


def _grid(outers: int, inners: int, tile: dict[str, Any], on: Gpu) -> tuple[int, int]:
    """Programs: tiles of outer rows × splits of the inner ones."""
    at_once = on.multiprocessors * 8 // tile["num_warps"]
    tiles = -(-outers // tile["OUTER"])
    return tiles, _splits(tiles, -(-inners // tile["INNER"]), at_once)


@functools.cache
def _splits(tiles: int, inner_tiles: int, at_once: int) -> int:
    """Into how many parts each tile's way over the inner rows is split, so that all multiprocessors work to the end.

    The time is that of the turns of `at_once` programs, in tiles of the way, and of writing and adding the splits' results, which take as
    long as 1 / 50 tile each. Above eight turns a last one that is not full matters no more, and memory stays small: 66 MiB at d = 128.
    """

    def time(splits: int) -> float:
        return -(-tiles * splits // at_once) * -(-inner_tiles // splits) + tiles * splits / 50

    return min(range(1, min(inner_tiles, max(8 * at_once // tiles, 1)) + 1), key=time)
