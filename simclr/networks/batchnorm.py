"""Batch normalisation over the global batch, on any backend (arXiv:2002.05709, Sec. 2.1).

With statistics of the local images only, the positive pair of an image shares a device with few others, and the
network can find the partner by the batch's statistics instead of by content: the loss falls and the representation
does not improve. `nn.SyncBatchNorm` prevents that on CUDA only and refuses CPU tensors; this one needs only an all-reduce. Statistics of
some ranks in a row, as a node's, are between the two: large enough, and no rank waits for another node.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from simclr.collectives import all_reduce_sum, broadcast, own_group, rows_of_group, world_size


class Over(NamedTuple):
    """The ranks that share statistics."""

    ranks: int
    """How many; 1 = this one alone."""
    uneven: bool = False
    """Whether they hold different numbers of rows."""
    group: dist.ProcessGroup | None = None
    """These ranks; None = all, in the group of all collectives."""


class BatchNorm(nn.Module):
    """Normalises channel dimension 1 of (n, c) or (n, c, h, w) with the statistics of all ranks' rows.

    As in the official code: running statistics move by 0.1 per step, the running variance is the *biased* batch
    variance (torch's own is unbiased), eps is 1e-5; `beta=False` leaves out the shift, as in the head's last layer,
    `affine=False` scale and shift.
    `ranks` gives the statistics of so many ranks in a row, 1 those of the local rows only. Every rank must hold equally many rows; for
    others, and for groups of ranks, see `share_statistics`.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, *, beta: bool = True, affine: bool = True, zero_init: bool = False, ranks: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels) if zero_init else torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine and beta else None
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.momentum, self.eps, self.ranks = 0.1, 1e-5, ranks
        self.shared: Over | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        over = self.over()
        if over.ranks == 1:
            y, mean, invstd = torch.native_batch_norm(x, self.weight, self.bias, None, None, True, self.momentum, self.eps)
            mean, var = mean.detach(), invstd.detach().pow(-2) - self.eps
        else:
            weight = self.weight if self.weight is not None else torch.ones_like(self.running_mean)
            shift = _before(self.running_mean) if _MUTATED_SAVED and torch.compiler.is_compiling() else self.running_mean.clone()
            y, mean, var = _GlobalBatchNorm.apply(x, weight, self.bias, shift, self.eps, over)
        self.move(mean, var)
        return y

    def over(self) -> Over:
        """The ranks that share statistics: without `share_statistics` all, or this one."""
        if self.shared is not None:
            return self.shared
        together = min(self.ranks or world_size(), world_size())
        if 1 < together < world_size():
            raise RuntimeError(f"BatchNorm over {together} of {world_size()} ranks has no group of them: call share_statistics first")
        return Over(together)

    @torch.no_grad()
    def move(self, mean: Tensor, var: Tensor) -> None:
        """Move the running statistics towards those of this step."""
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(var.to(self.running_var.dtype), self.momentum)

    def extra_repr(self) -> str:
        gamma, beta = self.weight is not None, self.bias is not None
        return f"{len(self.running_mean)}, gamma={gamma}, beta={beta}, ranks={self.ranks or 'all'}"


def share_statistics(networks: Iterable[nn.Module], batch_size: int) -> None:
    """Prepare the training BatchNorms of `networks`, before they are compiled, for steps of `batch_size` images over all ranks. Every rank
    must call it, in the same order.

    Their sums get a process group of their own (`own_group`): all ranks', or one for each group of ranks. Where ranks hold different
    numbers of images, each sends its count along with its sums: so the weights are right for any piece of its share, and no collective is
    added. Where they hold equally many, they send none.
    """
    world = world_size()
    norms = [module for network in networks for module in network.modules() if isinstance(module, BatchNorm) and module.training]
    sizes = {min(norm.ranks or world, world) for norm in norms}
    over = {size: Over(size, batch_size % world != 0, own_group(size)) for size in sorted(sizes)}
    for norm in norms:
        norm.shared = over[min(norm.ranks or world, world)]


@torch.no_grad()
def take_first_ranks(network: nn.Module) -> None:
    """Give every rank the running statistics of rank 0, which are those that a checkpoint has, for an evaluation that ranks share. Where
    all share statistics they have them already. Training does not read them: `_GlobalBatchNorm` says how groups do without."""
    norms = [
        module for module in network.modules() if isinstance(module, BatchNorm) and module.training and module.over().ranks < world_size()
    ]
    buffers = [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var)]
    if buffers:
        first = broadcast(torch.cat(buffers))
        torch._foreach_copy_(buffers, list(first.split([len(buffer) for buffer in buffers])))


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
    one also has their counts. In groups it is an all-gather, see below."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, shift: Tensor, eps: float, over: Over
    ) -> tuple[Tensor, Tensor, Tensor]:
        few_bits = x.dtype in (torch.bfloat16, torch.float16) and not x.is_cuda
        mean, var = torch.batch_norm_update_stats(x.float() if few_bits else x, None, None, 0.0)  # a CPU gives the result in the dtype of x
        own, rows = mean.new_full((1,), len(x)) if over.uneven else None, None
        if over.group is not None and over.ranks < world_size():
            mean, var, rows = _of_group(mean, var, own, over.group)
        else:
            # E[x²] − E[x]² cancels where |mean| ≫ standard deviation. So ranks combine local *variances*, and means as distances from
            # `shift`, the running mean, which is the same on every rank and close to all of them.
            offset = mean - shift
            both = torch.cat([offset, var + offset.square()])
            if own is not None:
                both, rows = all_reduce_sum(torch.cat([both * own, own]), over.group).split([len(both), 1])
            offset, second = (both / rows if rows is not None else all_reduce_sum(both, over.group) / over.ranks).chunk(2)
            mean, var = shift + offset, (second - offset.square()).clamp_min(0)
        y = nn.functional.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)
        ctx.save_for_backward(x, weight, mean, var, rows)
        ctx.eps, ctx.beta, ctx.over = eps, bias is not None, over
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, rows = ctx.saved_tensors
        eps: float = ctx.eps
        invstd = (var + eps).rsqrt()
        # A CPU reads mean and variance; CUDA's kernel wants mean and 1 / σ too, and fails without them.
        _, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, var, mean, invstd, False, eps, [False, True, True]
        )
        # The input's gradient needs the global sums; the parameters' gradients stay local, DDP averages them.
        sums = all_reduce_sum(torch.cat([grad_bias, grad_weight]), ctx.over.group)
        count = ctx.over.ranks * x.numel() // x.shape[1] if rows is None else rows * (x.numel() // len(x) // x.shape[1])
        mean_grad, mean_grad_xhat = (sums / count).chunk(2)
        shape = [1, -1] + [1] * (x.ndim - 2)
        slope = -weight * invstd.square() * mean_grad_xhat
        level = -weight * invstd * mean_grad - slope * mean
        # In float32, as the statistics, also where x is bfloat16, and rounded once: slope · x and level nearly cancel.
        grad_x = torch.addcmul(level.view(shape), x, slope.view(shape)).addcmul_(grad, (weight * invstd).view(shape)).to(x.dtype)
        return grad_x, grad_weight, grad_bias if ctx.beta else None, None, None, None


def _of_group(mean: Tensor, var: Tensor, own: Tensor | None, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor | None]:
    """Mean, variance and, of uneven ranks, the count of all rows of `group`, from each rank's.

    Groups have no shift in common that a resumed run would have too, since a checkpoint has one running mean: so each rank's mean and
    variance travel, and are combined in the order of ranks.
    """
    table = rows_of_group(torch.cat([mean, var] if own is None else [mean, var, own]), group)
    means, variances, counts = table.split([len(mean), len(mean), table.shape[1] - 2 * len(mean)], 1)
    rows = None if own is None else counts.sum(0)
    share = 1 / len(table) if rows is None else counts / rows
    mean = (means * share).sum(0)
    return mean, ((variances + (means - mean).square()) * share).sum(0), rows
