"""The passes of BatchNorm (+ residual) (+ ReLU) over memory, forward and backward: formulas in plain torch, and the same as kernels.

Sums per channel, then one affine map; backward again sums, then one pass. Between them lie only a few numbers per channel, which ranks add
up. Five functions are the definition (`PLAIN`): torch.compile may merge them with what stands around them. `KERNELS` are operations of
the same arguments that torch.compile leaves whole: Triton on a GPU, the definition elsewhere.

All take x (n, c, …) with channels in dimension 1, and numbers per channel (c,) in float32 (float64 where x is). A block's end is the
output whose residual was added; ReLU follows it, and it is stored, so backward reads its mask from it. Two gradients arrive at it, from the
next block's body and shortcut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from simclr.kernels.device import takes_triton

# ── The definition ─────────────────────────────────────────────────────────────────────────────────────────────────


def sums(x: Tensor, shift: Tensor) -> Tensor:
    """(2, c): Σ (x − shift) and Σ (x − shift)². Digits of the variance are lost as (mean − shift)² grows beyond it."""
    off = wide(x) - per_channel(shift, x)
    return torch.stack([off.sum(_others(x)), off.square().sum(_others(x))])


def affine(x: Tensor, scale: Tensor, level: Tensor, residual: Tensor | None, times: Tensor | None, relu: bool) -> Tensor:
    """scale · x + level (+ residual, or + times · residual), and ReLU of it, rounded once to x's dtype."""
    y = wide(x) * per_channel(scale, x) + per_channel(level, x)
    if residual is not None:
        y = y + (residual if times is None else wide(residual) * per_channel(times, x))
    y = y.relu() if relu else y
    # Not `to` alone: if it has nothing to convert, torch 2.11 compiles a program that forgets the gradient of this output, without a word.
    return y if y.dtype == x.dtype else y.to(x.dtype)


def gradient_sums(grad: Tensor, x: Tensor, mean: Tensor, scale: Tensor, level: Tensor, relu: bool) -> Tensor:
    """(2, c): Σ g and Σ g (x − mean); g is `grad`, with `relu` only where scale · x + level > 0."""
    g = _cut(wide(grad), x, scale, level) if relu else wide(grad)
    return torch.stack([g.sum(_others(x)), (g * (wide(x) - per_channel(mean, x))).sum(_others(x))])


def end_gradient_sums(grad: Tensor, other: Tensor, x: Tensor, mean: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The same sums of a block's end y, and g itself: `grad` + `other` where y > 0, which is the residual's gradient."""
    g = torch.where(y > 0, grad + other, 0.0).to(x.dtype)
    return g, gradient_sums(g, x, mean, mean, mean, False)


def gradient(grad: Tensor, x: Tensor, scale: Tensor, level: Tensor, slope: Tensor, offset: Tensor, relu: bool) -> Tensor:
    """scale · g + (slope · x + offset), where slope · x and offset nearly cancel; g as in `gradient_sums`."""
    g = _cut(wide(grad), x, scale, level) if relu else wide(grad)
    return (g * per_channel(scale, x) + (wide(x) * per_channel(slope, x) + per_channel(offset, x))).to(x.dtype)


def _cut(g: Tensor, x: Tensor, scale: Tensor, level: Tensor) -> Tensor:
    return torch.where(wide(x) * per_channel(scale, x) + per_channel(level, x) > 0, g, 0.0)


def wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.view([1, -1] + [1] * (x.ndim - 2))


def _others(x: Tensor) -> list[int]:
    """The dimensions that are not the channels'."""
    return [0, *range(2, x.ndim)]


# ── The launches ───────────────────────────────────────────────────────────────────────────────────────────────────

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# About as many programs of 4 warps as an H100's 132 multiprocessors hold at once.
_PROGRAMS = 1024
_TILE = 1024  # elements: 8 per thread, one load of 16 bytes in bfloat16
_DEEP = 4  # tiles at once: as many loads of each tensor are under way in a thread
_FOUR_TENSORS = {"DEEP": 2}  # where four are loaded
_WIDEST = 128  # channels of a tile
_SLABS = 256  # slabs that are added at once


def in_kernels(x: Tensor) -> bool:
    """Whether x goes through Triton."""
    return x.dtype in _DTYPES and takes_triton(x.device)


def launch_sums(x: Tensor, shift: Tensor) -> Tensor:
    from simclr.kernels.norm_triton import sums_kernel

    rows, over = side_by_side(x), _Grid.over(x)
    partial = over.partial(x)
    sums_kernel[over.grid](rows, shift, partial, *over.arguments, **over.tile)
    return total(partial)


def launch_affine(x: Tensor, scale: Tensor, level: Tensor, residual: Tensor | None, times: Tensor | None, relu: bool) -> Tensor:
    from simclr.kernels.norm_triton import affine_kernel

    rows, over, out = side_by_side(x), _Grid.over(x), empty_like(x)
    added = rows if residual is None else side_by_side(residual)
    flags = {"RESIDUAL": residual is not None, "TIMES": times is not None, "RELU": relu}
    factors = scale if times is None else times
    affine_kernel[over.grid](rows, added, scale, level, factors, out, *over.arguments, **flags, **over.tile)
    return out


def launch_gradient_sums(grad: Tensor, x: Tensor, mean: Tensor, scale: Tensor, level: Tensor, relu: bool) -> Tensor:
    from simclr.kernels.norm_triton import gradient_sums_kernel

    g, rows, over = side_by_side(grad), side_by_side(x), _Grid.over(x)
    partial = over.partial(x)
    gradient_sums_kernel[over.grid](g, rows, mean, scale, level, partial, *over.arguments, RELU=relu, **over.tile)
    return total(partial)


def launch_end_gradient_sums(grad: Tensor, other: Tensor, x: Tensor, mean: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    from simclr.kernels.norm_triton import end_gradient_sums_kernel

    tensors, over, masked = [side_by_side(t) for t in (grad, other, x, y)], _Grid.over(x), empty_like(x)
    partial = over.partial(x)
    end_gradient_sums_kernel[over.grid](*tensors, mean, masked, partial, *over.arguments, **over.tile | _FOUR_TENSORS)
    return masked, total(partial)


def launch_gradient(grad: Tensor, x: Tensor, scale: Tensor, level: Tensor, slope: Tensor, offset: Tensor, relu: bool) -> Tensor:
    from simclr.kernels.norm_triton import gradient_kernel

    g, rows, over, out = side_by_side(grad), side_by_side(x), _Grid.over(x), empty_like(x)
    gradient_kernel[over.grid](g, rows, scale, level, slope, offset, out, *over.arguments, RELU=relu, **over.tile)
    return out


@dataclass(frozen=True, slots=True)
class _Grid:
    """How a tensor is cut among programs: by its shape alone, so sums do not depend on the GPU."""

    rows: int
    channels: int
    slabs: int
    per: int
    """Rows of a slab."""
    tile: dict[str, int]

    @classmethod
    def over(cls, x: Tensor) -> _Grid:
        channels = x.shape[1]
        rows = x.numel() // channels
        columns = min(_WIDEST, max(8, 1 << (channels - 1).bit_length()))
        tile = {"DEEP": _DEEP, "ROWS": _TILE // columns, "COLUMNS": columns}
        at_once = _DEEP * tile["ROWS"]
        steps = -(-rows // at_once)
        per = -(-steps // max(_PROGRAMS // -(-channels // columns), 1)) * at_once
        return cls(rows, channels, -(-rows // per), per, tile)

    @property
    def grid(self) -> tuple[int, int]:
        return -(-self.channels // self.tile["COLUMNS"]), self.slabs

    @property
    def arguments(self) -> tuple[int, int, int]:
        return self.rows, self.per, self.channels

    def partial(self, x: Tensor) -> Tensor:
        return torch.empty(2, self.slabs, self.channels, dtype=torch.float32, device=x.device)


def total(partial: Tensor) -> Tensor:
    """(2, slabs, c) → (2, c)."""
    from simclr.kernels.norm_triton import total_kernel

    _, slabs, channels = partial.shape
    out = torch.empty(2, channels, dtype=torch.float32, device=partial.device)
    total_kernel[(-(-channels // 16), 2)](partial, out, slabs, channels, SLABS=_SLABS, COLUMNS=16)
    return out


def side_by_side(x: Tensor) -> Tensor:
    """x with its channels side by side in memory: itself, if it is channels last already."""
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x.contiguous()


def empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last if x.ndim == 4 else torch.contiguous_format)


# ── The operations ─────────────────────────────────────────────────────────────────────────────────────────────────


@torch.library.custom_op("simclr::norm_sums", mutates_args=())
def _sums(x: Tensor, shift: Tensor) -> Tensor:
    return launch_sums(x, shift) if in_kernels(x) else sums(x, shift)


@_sums.register_fake
def _(x: Tensor, shift: Tensor) -> Tensor:
    return wide(x).new_empty(2, x.shape[1])


@torch.library.custom_op("simclr::norm_affine", mutates_args=())
def _affine(x: Tensor, scale: Tensor, level: Tensor, residual: Tensor | None, times: Tensor | None, relu: bool) -> Tensor:
    if in_kernels(x):
        return launch_affine(x, scale, level, residual, times, relu)
    return side_by_side(affine(x, scale, level, residual, times, relu))


@_affine.register_fake
def _(x: Tensor, scale: Tensor, level: Tensor, residual: Tensor | None, times: Tensor | None, relu: bool) -> Tensor:
    return empty_like(x)


@torch.library.custom_op("simclr::norm_gradient_sums", mutates_args=())
def _gradient_sums(grad: Tensor, x: Tensor, mean: Tensor, scale: Tensor, level: Tensor, relu: bool) -> Tensor:
    return (launch_gradient_sums if in_kernels(x) else gradient_sums)(grad, x, mean, scale, level, relu)


@_gradient_sums.register_fake
def _(grad: Tensor, x: Tensor, mean: Tensor, scale: Tensor, level: Tensor, relu: bool) -> Tensor:
    return wide(x).new_empty(2, x.shape[1])


@torch.library.custom_op("simclr::norm_end_gradient_sums", mutates_args=())
def _end_gradient_sums(grad: Tensor, other: Tensor, x: Tensor, mean: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if in_kernels(x):
        return launch_end_gradient_sums(grad, other, x, mean, y)
    masked, found = end_gradient_sums(grad, other, x, mean, y)
    return side_by_side(masked), found


@_end_gradient_sums.register_fake
def _(grad: Tensor, other: Tensor, x: Tensor, mean: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return empty_like(x), wide(x).new_empty(2, x.shape[1])


@torch.library.custom_op("simclr::norm_gradient", mutates_args=())
def _gradient(grad: Tensor, x: Tensor, scale: Tensor, level: Tensor, slope: Tensor, offset: Tensor, relu: bool) -> Tensor:
    if in_kernels(x):
        return launch_gradient(grad, x, scale, level, slope, offset, relu)
    return side_by_side(gradient(grad, x, scale, level, slope, offset, relu))


@_gradient.register_fake
def _(grad: Tensor, x: Tensor, scale: Tensor, level: Tensor, slope: Tensor, offset: Tensor, relu: bool) -> Tensor:
    return empty_like(x)


@dataclass(frozen=True, slots=True)
class Passes:
    """The five passes, of one kind."""

    sums: Callable[..., Tensor]
    affine: Callable[..., Tensor]
    gradient_sums: Callable[..., Tensor]
    end_gradient_sums: Callable[..., Any]
    gradient: Callable[..., Tensor]


PLAIN = Passes(sums, affine, gradient_sums, end_gradient_sums, gradient)
KERNELS = Passes(_sums, _affine, _gradient_sums, _end_gradient_sums, _gradient)
