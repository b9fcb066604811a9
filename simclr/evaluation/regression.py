"""Multinomial logistic regression on standardised features, over rows that are read block by block: objective, gradient, logits."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from simclr.evaluation.cores import Cores
from simclr.evaluation.rows import Rows


@dataclass(frozen=True, slots=True)
class Scale:
    """What standardises features: mean and standard deviation, (d,)."""

    mean: Tensor
    std: Tensor


class Regression:
    """The mean loss of rows with labels y (n,), plus decay / 2 · |kernel|², for weights (classes, d + 1) with the bias as last column."""

    def __init__(self, rows: Rows, y: Tensor, scale: Scale, classes: int, cores: Cores) -> None:
        self.n, self.scale, self.cores = len(rows), scale, cores
        step = rows.rows_at_once(classes)
        blocks = -(-self.n // step)
        count = max(min(cores.count, blocks), 1)
        cuts = [blocks * i // count * step for i in range(count)] + [self.n]
        self.spans = [_Span(rows.between(a, b), y[a:b], scale, classes, step) for a, b in itertools.pairwise(cuts)]

    def __call__(self, weights: Tensor, decay: float) -> tuple[Tensor, Tensor]:
        """(the objective as a float32 scalar, its gradient, shaped like weights)."""
        scaled = _scaled(weights, self.scale)
        found = self.cores.map(lambda span: span(*scaled), self.spans)
        loss, kernel_gradient, bias_gradient = (sum(part[i] for part in found[1:]) + found[0][i] for i in range(3))
        kernel = weights[:, :-1]
        gradient = torch.cat([kernel_gradient / self.scale.std / self.n + decay * kernel, bias_gradient[:, None] / self.n], dim=1)
        # In float32, in which two losses become equal where the search has to end.
        return (loss / self.n).float() + 0.5 * decay * kernel.square().sum(), gradient


def logits(rows: Rows, weights: Tensor, scale: Scale) -> Iterator[tuple[slice, Tensor]]:
    """(which rows, their logits (≤ rows, classes)), block by block."""
    kernel, bias = _scaled(weights, scale)
    for at, x in rows.blocks(rows.rows_at_once(len(bias))):
        yield at, ((x - scale.mean) @ kernel.T)[:, : len(bias)] + bias


def _scaled(weights: Tensor, scale: Scale) -> tuple[Tensor, Tensor]:
    """(kernel for centred features, bias): the kernel is divided by the standard deviation instead of the features.

    On a CPU it has a multiple of sixteen rows, the last of them zeros: products with ten take longer than those with sixteen.
    """
    more = -len(weights) % 16 if weights.device.type == "cpu" else 0
    return F.pad(weights[:, :-1] / scale.std, (0, 0, 0, more)), weights[:, -1]


class _Span:
    """A part of the rows, and the memory that its blocks are computed in: fresh memory for each block would cost as much as a product."""

    def __init__(self, rows: Rows, y: Tensor, scale: Scale, classes: int, step: int) -> None:
        self.rows, self.y, self.mean, self.step = rows, y[:, None], scale.mean, step
        self.centred = scale.mean.new_empty(min(step, len(rows)), rows.d)
        self.away = scale.mean.new_full((len(self.centred), 1), -1.0)
        self.gradient = scale.mean.new_empty(classes, rows.d)

    @torch.no_grad()
    def __call__(self, kernel: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sums over the rows: the loss (float64), its gradient by the kernel of the centred features, and by the bias."""
        loss = torch.zeros((), dtype=torch.float64, device=bias.device)
        by_kernel, by_bias = self.gradient.zero_(), torch.zeros_like(bias)
        for at, h in self.rows.blocks(self.step):
            x, y = torch.sub(h, self.mean, out=self.centred[: len(h)]), self.y[at]
            # The gradient by hand: autograd multiplies in an order that is six times slower for few classes.
            log_p = F.log_softmax((x @ kernel.T)[:, : len(bias)] + bias, dim=1)
            loss -= log_p.gather(1, y).sum(dtype=torch.float64)
            residual = log_p.exp_().scatter_add_(1, y, self.away[: len(y)])
            by_kernel.addmm_(residual.T, x)
            by_bias += residual.sum(0)
        return loss, by_kernel, by_bias
