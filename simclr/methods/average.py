"""Moving averages of networks, which make the targets of MoCo (arXiv:1911.05722, Eq. 2) and BYOL (arXiv:2006.07733, Eq. 1)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from simclr.compiling import compiled

M = TypeVar("M", bound=nn.Module)


def average_of(module: M) -> M:
    """A copy of `module` that needs no gradient: its moving average before the first step."""
    return copy.deepcopy(module).requires_grad_(False)


def forward_of(network: nn.Module, compile: bool) -> Callable[[Tensor], Tensor]:
    """The forward pass of an average or a teacher, with `compile` by torch.compile; `network` itself, and the names of its tensors in a
    checkpoint, stay as they are. On the meta device nothing is compiled."""
    real = next(network.parameters()).device.type != "meta"
    return compiled(network) if compile and real else network


@torch.no_grad()
def move(average: nn.Module, module: nn.Module, keep: float) -> None:
    """average ← keep · average + (1 − keep) · module, parameter by parameter, in the parameters' dtype, which bfloat16 leaves float32.

    BatchNorm's scales and shifts are averaged like the rest. Its running statistics are neither averaged nor copied: in training mode the
    average normalises by the batch, and keeps statistics of its own passes. No method of the family does otherwise.
    """
    torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), 1 - keep)


def cosine_to_one(step: int, total: int, base: float) -> float:
    """Share that an average keeps at `step` (0-based) of `total`: from `base` to 1 by half a cosine (BYOL, Sec. 3.2; MoCo v3)."""
    return 1 - (1 - base) * 0.5 * (1 + math.cos(math.pi * min(step, total) / max(total, 1)))
