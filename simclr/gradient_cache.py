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

from simclr.networks.batchnorm import BatchNorm


def cached_gradient(
    network: nn.Module,
    embed: Callable[[slice], tuple[Tensor, Tensor, Tensor]],
    images: int,
    piece: int,
    contrast: Callable[[Tensor], Tensor],
    classify: Callable[[Tensor, slice], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Leave in the parameters of `network` the gradient of contrast(z) + the classifier's loss over `images` of this rank, of
    which `piece` are embedded at a time.

    embed(rows) → (h, z, logits) of both views of some of the images, through `network`; contrast: z (2n, d) → loss;
    classify(logits, rows) → (loss, a mean over those rows; hits, counts of them). Returns (z (2n, d), loss, classifier's loss, hits).
    Autocast, where there is any, belongs into `embed`: gradients are taken here.
    """
    pieces = [slice(at, min(at + piece, images)) for at in range(0, images, piece)]
    statistics = [b for m in network.modules() if isinstance(m, BatchNorm) for b in (m.running_mean, m.running_var)]
    before = [b.clone() for b in statistics]
    found = []
    with torch.no_grad():
        for rows in pieces:
            found.append(embed(rows)[1].chunk(2))
            torch._foreach_copy_(statistics, before)  # the second time counts
    z = torch.cat([part[view] for view in range(2) for part in found]).requires_grad_()
    loss = contrast(z)
    (wanted,) = torch.autograd.grad(loss, z)
    losses, hits = [], []
    moved = [torch.zeros_like(b) for b in statistics]
    for rows in pieces:
        share = (rows.stop - rows.start) / images
        waits = isinstance(network, DistributedDataParallel) and rows is not pieces[-1]  # ranks exchange gradients once, at the end
        with network.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]
            _, again, logits = embed(rows)
            classified, right = classify(logits, rows)
            target = torch.cat([wanted[rows], wanted[images + rows.start : images + rows.stop]])
            ((again * target).sum() + share * classified).backward()
        losses.append(share * classified.detach())
        hits.append(right)
        torch._foreach_add_(moved, statistics)
        torch._foreach_copy_(statistics, before)
    # Running statistics move once in a step, by the mean of the pieces'. (A momentum of each piece's own would do it too, and be
    # compiled anew each time.)
    torch._foreach_copy_(statistics, torch._foreach_div(moved, float(len(pieces))))
    return z.detach(), loss.detach(), torch.stack(losses).sum(), torch.stack(hits).sum(0)
