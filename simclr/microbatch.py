"""A batch larger than memory: its exact gradient from pieces (gradient caching).

Contrast needs all of a batch at once, so adding up the gradients of smaller batches is another objective: each would see
fewer negatives. But the loss sees only z, which is small. So every piece is embedded without a graph; the loss of the whole
batch gives dL/dz; then each piece is embedded again, now with a graph, and handed its rows of dL/dz. Views are keyed, so the
second time they are the same to the bit, and memory is that of one piece, whatever N is (arXiv:2101.06983, Sec. 3.2).

What a piece cannot have is the statistics of the whole batch: BatchNorm normalises over one piece of every rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from simclr.batchnorm import BatchNorm


def cached_gradient(
    network: nn.Module,
    views_of: Callable[[slice], Tensor],
    images: int,
    piece: int,
    contrast: Callable[[Tensor], Tensor],
    classify: Callable[[Tensor, slice], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Leave in the parameters of `network` the gradient of contrast(z) + the classifier's loss over `images` of this rank, of
    which `piece` are embedded at a time.

    network: views (2m, 3, H, W) → (h, z, logits); views_of(rows): both views of some of the images; contrast: z (2n, d) → loss;
    classify(logits, rows) → (loss, hits) as means over those rows. Returns (z (2n, d), loss, classifier's loss, hits).
    """
    pieces = [slice(at, min(at + piece, images)) for at in range(0, images, piece)]
    with torch.no_grad(), _tracking(network, 0.0):
        found = [network(views_of(rows))[1].chunk(2) for rows in pieces]
    z = torch.cat([part[view] for view in range(2) for part in found]).requires_grad_()
    loss = contrast(z)
    (wanted,) = torch.autograd.grad(loss, z)
    losses, hits = [], []
    for number, rows in enumerate(pieces):
        share = (rows.stop - rows.start) / images
        last = rows is pieces[-1]
        waits = isinstance(network, DistributedDataParallel) and not last  # ranks exchange gradients once, with the last piece
        # Running statistics move once in a step, by the mean of the pieces': the i-th of P has this weight in them.
        weight = _MOMENTUM / (len(pieces) - (len(pieces) - 1 - number) * _MOMENTUM)
        with network.no_sync() if waits else contextlib.nullcontext(), _tracking(network, weight):  # type: ignore[operator]
            _, again, logits = network(views_of(rows))
            classified, right = classify(logits, rows)
            target = torch.cat([wanted[rows], wanted[images + rows.start : images + rows.stop]])
            ((again * target).sum() + share * classified).backward()
        losses.append(share * classified.detach())
        hits.append(share * right)
    return z.detach(), loss.detach(), torch.stack(losses).sum(), torch.stack(hits).sum()


_MOMENTUM = 0.1  # of BatchNorm


@contextlib.contextmanager
def _tracking(network: nn.Module, momentum: float):  # type: ignore[no-untyped-def]
    """Inside, running statistics move by `momentum`."""
    norms = [m for m in network.modules() if isinstance(m, BatchNorm)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = momentum
    try:
        yield
    finally:
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum
