"""Collectives with gradient. Without a process group every function is the identity, so callers never ask."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx


def rank() -> int:
    """This process's rank, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """W, the number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_gather(x: Tensor) -> Tensor:
    """(n, ...) on each rank → (W n, ...) on every rank, in rank order.

    The gradient of a rank's rows is the *sum* of what every rank's loss asks of them. With a loss that is a mean over
    the local rows, and DDP's average over ranks, the parameters then get the exact gradient of the global mean.
    (`torch.distributed.all_gather` has no gradient: built on it, a loss has the right value and 1/W of the cross terms.)
    """
    if world_size() == 1:
        return x
    gathered: Tensor = _AllGather.apply(x)
    return gathered


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum over ranks, of a tensor that needs no gradient. In place where there is a process group; returns it."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def mean_over_ranks(values: Tensor) -> Tensor:
    """Mean over ranks of a detached copy of `values`."""
    return all_reduce_sum(values.detach().clone()) / world_size()


def from_rank_zero(value: Any) -> Any:
    """Rank 0's `value` (anything that pickles) on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        out = x.new_empty((world_size() * x.shape[0], *x.shape[1:]))
        dist.all_gather_into_tensor(out, x.contiguous())
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        mine = grad.new_empty((grad.shape[0] // world_size(), *grad.shape[1:]))
        dist.reduce_scatter_tensor(mine, grad.contiguous())
        return mine
