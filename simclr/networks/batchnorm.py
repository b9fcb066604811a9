"""Batch normalisation over the global batch, on any backend (arXiv:2002.05709, Sec. 2.1).

With statistics of the local images only, the positive pair of an image shares a device with few others, and the
network can find the partner by the batch's statistics instead of by content: the loss falls and the representation
does not improve. `nn.SyncBatchNorm` prevents that on CUDA only and refuses CPU tensors; this one needs only an all-reduce.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from simclr.collectives import all_reduce_sum, world_size


class BatchNorm(nn.Module):
    """Normalises channel dimension 1 of (n, c) or (n, c, h, w) with the statistics of all ranks' rows.

    As in the official code: running statistics move by 0.1 per step, the running variance is the *biased* batch
    variance (torch's own is unbiased), eps is 1e-5; `beta=False` leaves out the shift, as in the head's last layer.
    `per_worker=True` uses the local rows only. Ranks hold equally many rows, unless `uneven` is set (`share_statistics`).
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, *, beta: bool = True, zero_init: bool = False, per_worker: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels) if zero_init else torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels)) if beta else None
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.momentum, self.eps, self.per_worker, self.uneven = 0.1, 1e-5, per_worker, False

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        if self.per_worker or world_size() == 1:
            y, mean, invstd = torch.native_batch_norm(x, self.weight, self.bias, None, None, True, self.momentum, self.eps)
            mean, var = mean.detach(), invstd.detach().pow(-2) - self.eps
        else:
            y, mean, var = _GlobalBatchNorm.apply(x, self.weight, self.bias, self.before(), self.eps, self.uneven)
        self.move(mean, var)
        return y

    def before(self) -> Tensor:
        """A copy of the running mean as it is before this step moves it."""
        return _before(self.running_mean) if _MUTATED_SAVED and torch.compiler.is_compiling() else self.running_mean.clone()

    @torch.no_grad()
    def move(self, mean: Tensor, var: Tensor) -> None:
        """Move the running statistics towards those of this step."""
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(var.to(self.running_var.dtype), self.momentum)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, beta={self.bias is not None}, per_worker={self.per_worker}"


def share_statistics(networks: Iterable[nn.Module], batch_size: int) -> None:
    """Prepare the BatchNorms of `networks`, before they are compiled, for steps of `batch_size` images over all ranks.

    Where ranks hold equally many images, their sums weigh the same. Elsewhere each rank sends its count along with its sums: so the weights
    are right for any piece of its share, and no collective is added.
    """
    uneven = batch_size % world_size() != 0
    for module in (module for network in networks for module in network.modules()):
        if isinstance(module, BatchNorm):
            module.uneven = uneven


# torch 2.11 drops the copy of an input that the forward graph changes at its end, and the backward graph computes the mean again from the
# changed input: wrong gradients, silently (seen with Inductor on two ranks; 2.15 marks such inputs, the versions between were not
# tested). A custom operation is computed once, and its result is kept for the backward pass.
_MUTATED_SAVED = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 15)


@torch.library.custom_op("simclr::before", mutates_args=())
def _before(x: Tensor) -> Tensor:
    """A copy of x as it is now."""
    return x.clone()


@_before.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class _GlobalBatchNorm(torch.autograd.Function):
    """One all-reduce of 2c numbers forward and one backward; torch's native kernels compute the sums. If ranks are `uneven`, the forward
    one also has their counts."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None, shift: Tensor, eps: float, uneven: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        # E[x²] − E[x]² cancels where |mean| ≫ standard deviation. So ranks combine local *variances*, and means as distances from
        # `shift`, the running mean, which is the same on every rank and close to all of them.
        few_bits = x.dtype in (torch.bfloat16, torch.float16) and not x.is_cuda
        mean, var = torch.batch_norm_update_stats(x.float() if few_bits else x, None, None, 0.0)  # a CPU gives the result in the dtype of x
        offset = mean - shift
        both, rows = torch.cat([offset, var + offset.square()]), None
        if uneven:
            both, rows = all_reduce_sum(torch.cat([both * len(x), both.new_full((1,), len(x))])).split([len(both), 1])
        offset, second = (both / rows if rows is not None else all_reduce_sum(both) / world_size()).chunk(2)
        mean, var = shift + offset, (second - offset.square()).clamp_min(0)
        y = nn.functional.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)
        ctx.save_for_backward(x, weight, mean, var, rows)  # type: ignore[arg-type]
        ctx.eps, ctx.beta = eps, bias is not None  # type: ignore[attr-defined]
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, rows = ctx.saved_tensors  # type: ignore[attr-defined]
        eps: float = ctx.eps  # type: ignore[attr-defined]
        _, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, var, None, None, False, eps, [False, True, True]
        )
        # The input's gradient needs the global sums; the parameters' gradients stay local, DDP averages them.
        sums = all_reduce_sum(torch.cat([grad_bias, grad_weight]))
        count = world_size() * x.numel() // x.shape[1] if rows is None else rows * (x.numel() // len(x) // x.shape[1])
        mean_grad, mean_grad_xhat = (sums / count).chunk(2)
        shape = [1, -1] + [1] * (x.ndim - 2)
        invstd = (var + eps).rsqrt()
        slope = -weight * invstd.square() * mean_grad_xhat
        level = -weight * invstd * mean_grad - slope * mean
        # In float32, as the statistics, also where x is bfloat16, and rounded once: slope · x and level nearly cancel.
        grad_x = torch.addcmul(level.view(shape), x, slope.view(shape)).addcmul_(grad, (weight * invstd).view(shape)).to(x.dtype)
        return grad_x, grad_weight, grad_bias if ctx.beta else None, None, None, None  # type: ignore[attr-defined]
