"""The stem's BatchNorm, ReLU and 3 × 3 max-pool of stride 2 in the passes of `simclr.kernels.norm`, for images of even sizes.

The map between norm and pooling, four times as large as what is pooled from it, is not stored: forward keeps which pixel of a window won,
one byte, and backward gathers the gradient from there. (torch's compiler scatters it by atomic additions, whose order changes from run to
run.) As there: the definition in plain torch, launches, and operations that torch.compile leaves whole.

x (n, c, h, w) with h and w even; pooled, its gradient and `which` (n, c, h / 2, w / 2). `which` counts a window's pixels row by row; it is
9 where ReLU cuts all of them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from simclr.kernels import norm
from simclr.kernels.norm import empty_like, in_kernels, side_by_side, total, wide


def pool(x: Tensor, scale: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """(pooled, which) of ReLU(scale · x + level), rounded to x's dtype; the last windows end with the image."""
    y, found = F.max_pool2d(norm.affine(x, scale, level, None, None, True), 3, 2, 0, ceil_mode=True, return_indices=True)
    rows, columns = (torch.arange(size, device=x.device) for size in y.shape[2:])
    row, column = found // x.shape[3] - 2 * rows[:, None], found % x.shape[3] - 2 * columns
    return y, torch.where(y <= 0, 9, 3 * row + column).to(torch.uint8)


def pool_gradient_sums(grad: Tensor, which: Tensor, x: Tensor, mean: Tensor) -> Tensor:
    """`norm.gradient_sums` of the gradient before the pooling."""
    return norm.gradient_sums(_before(grad, which), x, mean, mean, mean, False)


def pool_gradient(grad: Tensor, which: Tensor, x: Tensor, scale: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    """`norm.gradient` of the gradient before the pooling."""
    return norm.gradient(_before(grad, which), x, scale, scale, slope, offset, False)


def _before(grad: Tensor, which: Tensor) -> Tensor:
    """Each window's gradient at the pixel that won it."""
    n, c, h, w = grad.shape
    g = wide(grad).new_zeros(n, c, 2 * h + 1, 2 * w + 1)
    for tap in range(9):
        row, column = divmod(tap, 3)
        g[:, :, row : row + 2 * h : 2, column : column + 2 * w : 2] += torch.where(which == tap, grad, 0.0)
    return g[:, :, :-1, :-1]


# ── The launches ───────────────────────────────────────────────────────────────────────────────────────────────────

_PROGRAMS = 2048


def _grid(x: Tensor) -> tuple[tuple[int, int], tuple[int, ...], dict[str, int]]:
    """The grid, the integers and the settings of a launch."""
    n, c, h, w = x.shape
    cells = n * (h // 2) * (w // 2)
    columns = min(64, max(8, 1 << (c - 1).bit_length()))
    tile = {"ROWS": 1024 // columns, "COLUMNS": columns}
    per = -(-cells // (_PROGRAMS * tile["ROWS"])) * tile["ROWS"]
    return (-(-c // columns), -(-cells // per)), (cells, per, h, w, c), tile


def launch_pool(x: Tensor, scale: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    from simclr.kernels.stem_triton import pool_kernel

    grid, integers, tile = _grid(x)
    pooled, which = _pooled_like(x)
    pool_kernel[grid](side_by_side(x), scale, level, pooled, which, *integers, **tile)
    return pooled, which


def launch_pool_gradient_sums(grad: Tensor, which: Tensor, x: Tensor, mean: Tensor) -> Tensor:
    from simclr.kernels.stem_triton import pool_gradient_sums_kernel

    grid, integers, tile = _grid(x)
    partial = torch.empty(2, grid[1], x.shape[1], dtype=torch.float32, device=x.device)
    pool_gradient_sums_kernel[grid](side_by_side(grad), side_by_side(which), side_by_side(x), mean, partial, *integers, **tile)
    return total(partial)


def launch_pool_gradient(grad: Tensor, which: Tensor, x: Tensor, scale: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    from simclr.kernels.stem_triton import pool_gradient_kernel

    (grid, integers, tile), out = _grid(x), empty_like(x)
    tensors = side_by_side(grad), side_by_side(which), side_by_side(x), scale, slope, offset
    pool_gradient_kernel[grid](*tensors, out, *integers, **tile)
    return out


def _pooled_like(x: Tensor) -> tuple[Tensor, Tensor]:
    n, c, h, w = x.shape
    pooled, which = (
        torch.empty(n, c, h // 2, w // 2, dtype=kind, device=x.device, memory_format=torch.channels_last) for kind in (x.dtype, torch.uint8)
    )
    return pooled, which


# ── The operations ─────────────────────────────────────────────────────────────────────────────────────────────────


@torch.library.custom_op("simclr::stem_pool", mutates_args=())
def pool_operation(x: Tensor, scale: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    if in_kernels(x):
        return launch_pool(x, scale, level)
    pooled, which = pool(x, scale, level)
    return side_by_side(pooled), side_by_side(which)


@pool_operation.register_fake
def _(x: Tensor, scale: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    return _pooled_like(x)


@torch.library.custom_op("simclr::stem_pool_gradient_sums", mutates_args=())
def pool_gradient_sums_operation(grad: Tensor, which: Tensor, x: Tensor, mean: Tensor) -> Tensor:
    return (launch_pool_gradient_sums if in_kernels(x) else pool_gradient_sums)(grad, which, x, mean)


@pool_gradient_sums_operation.register_fake
def _(grad: Tensor, which: Tensor, x: Tensor, mean: Tensor) -> Tensor:
    return wide(x).new_empty(2, x.shape[1])


@torch.library.custom_op("simclr::stem_pool_gradient", mutates_args=())
def pool_gradient_operation(grad: Tensor, which: Tensor, x: Tensor, scale: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    if in_kernels(x):
        return launch_pool_gradient(grad, which, x, scale, slope, offset)
    return side_by_side(pool_gradient(grad, which, x, scale, slope, offset))


@pool_gradient_operation.register_fake
def _(grad: Tensor, which: Tensor, x: Tensor, scale: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    return empty_like(x)
