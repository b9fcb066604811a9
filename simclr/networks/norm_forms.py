"""Other forms of `simclr.networks.batchnorm.BatchNorm`, of the same parameters, statistics and numbers up to rounding.

They are for the benches and tests until they are measured on a GPU; the loop takes BatchNorm as it is. "sums" writes the statistics as
shifted sums, which torch.compile turns into plain reductions in the place of Welford's. "kernels" also takes in the ReLU that follows,
and in a block's end the addition of the shortcut: two passes forward and two backward (`simclr.kernels.norm`).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from simclr.collectives import all_reduce_sum, world_size
from simclr.kernels.norm import KERNELS, PLAIN, Passes
from simclr.networks.batchnorm import BatchNorm

Form = Literal["sums", "kernels"]


def give_form(network: nn.Module, form: Form) -> None:
    """Put BatchNorms of `form` in the place of those in `network`, with the same parameters and buffers under the same names."""
    for module in list(network.modules()):
        children = list(module.named_children())
        for at, (name, child) in enumerate(children):
            if type(child) is not BatchNorm:
                continue
            followed = isinstance(module, nn.Sequential) and at + 1 < len(children) and isinstance(children[at + 1][1], nn.ReLU)
            if form == "sums":
                setattr(module, name, SumsNorm(child))
            else:
                setattr(module, name, KernelNorm(child, relu=followed))
                if followed:
                    setattr(module, children[at + 1][0], nn.Identity())


class SumsNorm(BatchNorm):
    """BatchNorm from shifted sums, in plain torch."""

    def __init__(self, norm: BatchNorm) -> None:
        super().__init__(norm.weight.numel(), beta=norm.bias is not None, per_worker=norm.per_worker)
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.momentum, self.eps = norm.momentum, norm.eps
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        return _normalised(self, x, None, False, PLAIN)[0] if self.training else super().forward(x)


class KernelNorm(SumsNorm):
    """BatchNorm, and ReLU where `relu` is set."""

    def __init__(self, norm: BatchNorm, *, relu: bool) -> None:
        super().__init__(norm)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return _normalised(self, x, None, self.relu, KERNELS)[0]
        y = super().forward(x)
        return F.relu(y) if self.relu else y

    def end(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """A block's end, ReLU of the norm of x + residual, twice: for the next block's body and for its shortcut. So their gradients arrive
        one by one, and the pass that cuts them adds them."""
        if self.training:
            y, again = _normalised(self, x, residual, True, KERNELS)
            assert again is not None
            return y, again
        y = F.relu(super().forward(x) + residual)
        return y, y


def _normalised(norm: BatchNorm, x: Tensor, residual: Tensor | None, relu: bool, passes: Passes) -> tuple[Tensor, Tensor | None]:
    ranks = 1 if norm.per_worker else world_size()
    found: tuple[Tensor, Tensor | None, Tensor, Tensor]
    found = _Normalised.apply(x, residual, norm.weight, norm.bias, norm.before(), ranks, norm.eps, relu, passes is KERNELS)
    norm.move(*found[2:])
    return found[:2]


class _Normalised(torch.autograd.Function):
    """As `simclr.networks.batchnorm._GlobalBatchNorm`: one all-reduce of 2c numbers forward and one backward. The same shift on every
    rank, the running mean, so that ranks add up their sums."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        shift: Tensor,
        ranks: int,
        eps: float,
        relu: bool,
        kernels: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        passes = KERNELS if kernels else PLAIN
        sums, count = passes.sums(x, shift), ranks * (x.numel() // x.shape[1])
        if ranks > 1:
            sums = all_reduce_sum(sums)
        offset, second = (sums / count).unbind()
        mean, var = shift + offset, (second - offset.square()).clamp_min(0)
        invstd = (var + eps).rsqrt()
        scale = weight * invstd
        level = -mean * scale if bias is None else bias - mean * scale
        y = passes.affine(x, scale, level, residual, relu)
        end = residual is not None
        ctx.save_for_backward(x, y if end else None, mean, invstd, scale, level)
        ctx.passes, ctx.relu, ctx.end, ctx.ranks, ctx.count, ctx.beta = passes, relu, end, ranks, count, bias is not None
        ctx.mark_non_differentiable(mean, var)
        return y, y.view_as(y) if end else None, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, other: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, y, mean, invstd, scale, level = ctx.saved_tensors
        passes: Passes = ctx.passes
        if ctx.end:
            grad, sums = passes.end_gradient_sums(grad, other, x, mean, y)
        else:
            sums = passes.gradient_sums(grad, x, mean, scale, level, ctx.relu)
        grad_bias, grad_weight = sums[0], sums[1] * invstd
        # The input's gradient needs the global sums; the parameters' gradients stay local, DDP averages them.
        whole = torch.stack([grad_bias, grad_weight])
        if ctx.ranks > 1:
            whole = all_reduce_sum(whole)
        mean_grad, mean_grad_xhat = (whole / ctx.count).unbind()
        slope = -scale * invstd * mean_grad_xhat
        offset = -scale * mean_grad - slope * mean
        grad_x = passes.gradient(grad, x, scale, level, slope, offset, ctx.relu and not ctx.end)
        return grad_x, grad if ctx.end else None, grad_weight, grad_bias if ctx.beta else None, *[None] * 5
