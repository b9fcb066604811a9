"""A batch larger than memory: its exact gradient from pieces (gradient caching).

The loss needs all of a batch at once: the gradients of smaller batches, added up, belong to another objective, in which each image has
fewer negatives. But the loss sees only the network's outputs, which are small. So every piece first goes through the network without a
graph; the loss of the whole batch gives the gradient of each output; then each piece goes through the network again, with a graph, and
backpropagates its rows of that gradient. A method's inputs are keyed, so both times they are the same to the bit, and memory use is that
of one piece, whatever N is (arXiv:2101.06983, Sec. 3.2).

A piece does not have the statistics of the whole batch: BatchNorm normalises over one piece of every rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from simclr.networks.batchnorm import BatchNorm
from simclr.shares import share

Rows = dict[str, Tensor]
"""Name → (crops, n, …), rows of n images: pieces are cut along n and joined along n. Tensors alone, so that DDP and compile take them."""
Loss = tuple[Tensor, Rows]


def cached_gradient(
    network: nn.Module,
    state: nn.Module,
    inputs: Callable[[slice], Rows],
    forward: Callable[[Rows], Rows],
    targets: Callable[[Rows], Rows],
    loss: Callable[[Rows, Rows], Loss],
    images: int,
    pieces: int,
) -> tuple[Rows, Rows, Tensor, Rows]:
    """Leave the gradient of the loss of this rank's `images` in the parameters of `network`, in so many `pieces`, which are alike or differ
    by one image. Every rank has as many pieces, whose collectives meet.

    Rows are (crops, n, …), pieces are cut along n. inputs(images) → input rows, the same at every call; forward(input rows) → output
    rows, through `network`; targets(input rows) → target rows, which may go through `state`; loss(outputs, targets) of all images →
    (loss, sums). Returns (outputs, targets, loss, sums). Autocast belongs inside `forward`: gradients are computed here.
    """
    cuts = [share(images, piece, pieces) for piece in range(pieces)]
    statistics, beside = _Statistics(network), _Statistics(state)
    outputs, wanted_of = [], []
    for rows in cuts:
        given = inputs(rows)
        with torch.no_grad():
            outputs.append(forward(given))
        statistics.back()  # only the second pass counts
        wanted_of.append(targets(given))
        beside.count()
    whole = {name: x.requires_grad_() for name, x in _joined(outputs).items()}
    taught = _joined(wanted_of)
    del given, outputs, wanted_of  # a piece's views, which the loss and the second pass have no use for
    found, sums = loss(whole, taught)
    gradients = dict(zip(whole, torch.autograd.grad(found, list(whole.values()), allow_unused=True), strict=True))
    for rows in cuts:
        waits = isinstance(network, DistributedDataParallel) and rows is not cuts[-1]  # ranks exchange gradients once, at the end
        with network.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]
            again = forward(inputs(rows))
            shares = [(again[name] * g[:, rows]).sum() for name, g in gradients.items() if g is not None]
            torch.stack(shares).sum().backward()
        statistics.count()
    statistics.move(pieces)
    beside.move(pieces)
    return {name: x.detach() for name, x in whole.items()}, taught, found.detach(), {name: x.detach() for name, x in sums.items()}


class _Statistics:
    """Running statistics of a module's BatchNorms. They move once in a step, by the mean over pieces. (A momentum for each piece would do
    it too, but would be compiled anew each time.)"""

    def __init__(self, module: nn.Module) -> None:
        norms = [m for m in module.modules() if isinstance(m, BatchNorm) and m.training]
        self.now = [b for m in norms for b in (m.running_mean, m.running_var)]
        self.before, self.moved = [b.clone() for b in self.now], [torch.zeros_like(b) for b in self.now]

    def back(self) -> None:
        """What they were before the step."""
        if self.now:
            torch._foreach_copy_(self.now, self.before)

    def count(self) -> None:
        """Count a piece's, and go back."""
        if self.now:
            torch._foreach_add_(self.moved, self.now)
            self.back()

    def move(self, pieces: int) -> None:
        """Move by the mean over all pieces."""
        if self.now:
            torch._foreach_copy_(self.now, torch._foreach_div(self.moved, float(pieces)))


def _joined(pieces: list[Rows]) -> Rows:
    return {name: torch.cat([piece[name] for piece in pieces], 1) for name in pieces[0]}
