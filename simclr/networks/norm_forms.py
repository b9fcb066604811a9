"""Other forms of `simclr.networks.batchnorm.BatchNorm`, of the same parameters, statistics and numbers up to rounding.

They are for the benches and tests until they are measured on a GPU; the loop takes BatchNorm as it is. "sums" writes the statistics as
shifted sums, which torch.compile turns into plain reductions in the place of Welford's. "kernels" also takes in the ReLU that follows, in
a block's end the shortcut, its norm and the addition, and in the stem the pooling: two passes forward and two backward
(`simclr.kernels.norm`, `simclr.kernels.stem`).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from simclr.collectives import all_reduce_sum
from simclr.kernels.norm import KERNELS, PLAIN, Passes
from simclr.kernels.stem import pool_gradient_operation, pool_gradient_sums_operation, pool_operation
from simclr.networks.batchnorm import BatchNorm, Over
from simclr.networks.pooling import SameMaxPool, even

Form = Literal["sums", "kernels"]


def give_form(network: nn.Module, form: Form) -> None:
    """Put BatchNorms of `form` in the place of those in `network`, with the same parameters and buffers under the same names."""
    for module in list(network.modules()):
        children = list(module.named_children())
        for at, (name, child) in enumerate(children):
            if type(child) is not BatchNorm or child.weight is None:
                continue
            if form == "sums":
                setattr(module, name, SumsNorm(child))
                continue
            follow = children[at + 1 : at + 3] if isinstance(module, nn.Sequential) else []
            relu = bool(follow) and isinstance(follow[0][1], nn.ReLU)
            pool = follow[1][1] if relu and len(follow) == 2 and isinstance(follow[1][1], SameMaxPool) else None
            setattr(module, name, KernelNorm(child, relu=relu, pool=pool))
            for taken, _ in follow[: relu + (pool is not None)]:
                setattr(module, taken, nn.Identity())


class SumsNorm(BatchNorm):
    """BatchNorm from shifted sums, in plain torch."""

    def __init__(self, norm: BatchNorm) -> None:
        super().__init__(len(norm.running_mean), beta=norm.bias is not None, ranks=norm.ranks)
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.momentum, self.eps, self.shared = norm.momentum, norm.eps, norm.shared
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        return self._normalised(x, False, False) if self.training else super().forward(x)

    def _normalised(self, x: Tensor, relu: bool, kernels: bool) -> Tensor:
        y: Tensor
        y, mean, var = _Normalised.apply(x, self.weight, self.bias, self.before(), self.over(), self.eps, relu, kernels)
        self.move(mean, var)
        return y


class KernelNorm(SumsNorm):
    """BatchNorm, ReLU where `relu` is set, and the pooling that follows it."""

    def __init__(self, norm: BatchNorm, *, relu: bool, pool: SameMaxPool | None = None) -> None:
        super().__init__(norm)
        self.relu, self.pool = relu, pool

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.pool is not None and even(x):
            pooled: Tensor
            pooled, mean, var = _Pooled.apply(x, self.weight, self.bias, self.before(), self.over(), self.eps)
            self.move(mean, var)
            return pooled
        if self.training:
            y = self._normalised(x, self.relu, True)
        else:
            y = super().forward(x)
            y = F.relu(y) if self.relu else y
        return y if self.pool is None else self.pool(y)

    def end(self, x: Tensor, beside: Tensor, projected: KernelNorm | None) -> tuple[Tensor, Tensor]:
        """A block's end: ReLU of this norm of x + `beside`, or + the norm `projected` of it. It comes twice, for the next block's body and
        for its shortcut: so their gradients arrive one by one, and the pass that cuts them adds them."""
        if not self.training:
            y = F.relu(super().forward(x) + (beside if projected is None else projected(beside)))
            return y, y
        others = (None, None, None) if projected is None else (projected.weight, projected.bias, projected.before())
        y, again, *moved = _End.apply(x, beside, self.weight, self.bias, self.before(), *others, self.over(), self.eps)
        self.move(*moved[:2])
        if projected is not None:
            projected.move(*moved[2:])
        return y, again


class _Map(NamedTuple):
    """A norm of one batch: x → scale · x + level. All (c,) but the last."""

    mean: Tensor
    var: Tensor
    invstd: Tensor
    scale: Tensor
    level: Tensor
    rows: Tensor | None
    """(1,): rows of x on all ranks, where ranks are uneven."""


def _map(passes: Passes, x: Tensor, weight: Tensor, bias: Tensor | None, shift: Tensor, over: Over, eps: float) -> _Map:
    """One all-reduce of 2c numbers. The shift, the running mean, is the same on each of them, so their sums add up. Uneven ranks add their
    count."""
    sums, rows = passes.sums(x, shift), None
    if over.ranks > 1 and over.uneven:
        flat, rows = all_reduce_sum(torch.cat([sums.flatten(), sums.new_full((1,), len(x))]), over.group).split([sums.numel(), 1])
        sums = flat.view_as(sums)
    elif over.ranks > 1:
        sums = all_reduce_sum(sums, over.group)
    offset, second = (sums / _count(x, over, rows)).unbind()
    mean, var = shift + offset, (second - offset.square()).clamp_min(0)
    invstd = (var + eps).rsqrt()
    scale = weight * invstd
    return _Map(mean, var, invstd, scale, -mean * scale if bias is None else bias - mean * scale, rows)


def _slopes(sums: Tensor, of: _Map, x: Tensor, over: Over) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From the sums of g: slope and offset of x in its gradient, and the gradients of weight and bias. One all-reduce of 2c numbers."""
    grad_bias, grad_weight = sums[0], sums[1] * of.invstd
    # The input's gradient needs the global sums; the parameters' gradients stay local, DDP averages them.
    whole = torch.stack([grad_bias, grad_weight])
    if over.ranks > 1:
        whole = all_reduce_sum(whole, over.group)
    mean_grad, mean_grad_xhat = (whole / _count(x, over, of.rows)).unbind()
    slope = -of.scale * of.invstd * mean_grad_xhat
    return slope, -of.scale * mean_grad - slope * of.mean, grad_weight, grad_bias


def _count(x: Tensor, over: Over, rows: Tensor | None) -> int | Tensor:
    each = x.numel() // x.shape[1]
    return over.ranks * each if rows is None else rows * (each // len(x))


class _Normalised(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        shift: Tensor,
        over: Over,
        eps: float,
        relu: bool,
        kernels: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        passes = KERNELS if kernels else PLAIN
        found = _map(passes, x, weight, bias, shift, over, eps)
        ctx.save_for_backward(x, *found)
        ctx.passes, ctx.relu, ctx.over, ctx.beta = passes, relu, over, bias is not None
        ctx.mark_non_differentiable(found.mean, found.var)
        return passes.affine(x, found.scale, found.level, None, None, relu), found.mean, found.var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, *rest = ctx.saved_tensors
        of = _Map(*rest)
        sums = ctx.passes.gradient_sums(grad, x, of.mean, of.scale, of.level, ctx.relu)
        slope, offset, grad_weight, grad_bias = _slopes(sums, of, x, ctx.over)
        grad_x = ctx.passes.gradient(grad, x, of.scale, of.level, slope, offset, ctx.relu)
        return grad_x, grad_weight, grad_bias if ctx.beta else None, *[None] * 5


class _End(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        beside: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        shift: Tensor,
        other_weight: Tensor | None,
        other_bias: Tensor | None,
        other_shift: Tensor | None,
        over: Over,
        eps: float,
    ) -> tuple[Tensor, ...]:
        """The parameters of the norm of x, and of that of `beside`, if there is one."""
        found = _map(KERNELS, x, weight, bias, shift, over, eps)
        ctx.over, ctx.beta, ctx.projected = over, (bias is not None, other_bias is not None), other_weight is not None
        if other_weight is None or other_shift is None:
            y = KERNELS.affine(x, found.scale, found.level, beside, None, True)
            ctx.save_for_backward(x, y, *found)
            moved: tuple[Tensor, ...] = found[:2]
        else:
            other = _map(KERNELS, beside, other_weight, other_bias, other_shift, over, eps)
            y = KERNELS.affine(x, found.scale, found.level + other.level, beside, other.scale, True)
            ctx.save_for_backward(x, y, *found, beside, *other)
            moved = (*found[:2], *other[:2])
        ctx.mark_non_differentiable(*moved)
        return y, y.view_as(y), *moved

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, other_grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, y, *rest = ctx.saved_tensors
        of = _Map(*rest[:6])
        g, sums = KERNELS.end_gradient_sums(grad, other_grad, x, of.mean, y)
        slope, offset, grad_weight, grad_bias = _slopes(sums, of, x, ctx.over)
        grad_x = KERNELS.gradient(g, x, of.scale, of.level, slope, offset, False)
        own = grad_weight, grad_bias if ctx.beta[0] else None, None
        if not ctx.projected:
            return grad_x, g, *own, *[None] * 5
        beside, other = rest[6], _Map(*rest[7:])
        sums = KERNELS.gradient_sums(g, beside, other.mean, other.scale, other.level, False)
        slope, offset, grad_weight, grad_bias = _slopes(sums, other, x, ctx.over)
        grad_beside = KERNELS.gradient(g, beside, other.scale, other.level, slope, offset, False)
        return grad_x, grad_beside, *own, grad_weight, grad_bias if ctx.beta[1] else None, *[None] * 3


class _Pooled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, shift: Tensor, over: Over, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        found = _map(KERNELS, x, weight, bias, shift, over, eps)
        pooled, which = pool_operation(x, found.scale, found.level)
        ctx.save_for_backward(x, which, *found)
        ctx.over, ctx.beta = over, bias is not None
        ctx.mark_non_differentiable(found.mean, found.var)
        return pooled, found.mean, found.var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, which, *rest = ctx.saved_tensors
        of = _Map(*rest)
        sums = pool_gradient_sums_operation(grad, which, x, of.mean)
        slope, offset, grad_weight, grad_bias = _slopes(sums, of, x, ctx.over)
        grad_x = pool_gradient_operation(grad, which, x, of.scale, slope, offset)
        return grad_x, grad_weight, grad_bias if ctx.beta else None, *[None] * 3
