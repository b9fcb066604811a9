"""v2's optional queue: projections of earlier batches as further negatives (arXiv:2006.10029, Sec. 2; MoCo, arXiv:1911.05722).

A moving average of the trained network makes them, so that projections of a thousand steps ago are still comparable. The paper gives
their number (64K) and the decay (0.999). It does not say the following, which is chosen here: both views of a batch are stored; the
average embeds the same views as the loss, after its own update, with the statistics of the batch.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from simclr.collectives import all_gather


class Queue(nn.Module):
    """The moving average of encoder and head, and the queue, a ring of `size` unit projections that it made, the same on every rank.

    `size` is a multiple of 2N and every step writes 2N rows, so the step gives the place to write and the number of filled rows.
    Everything is a parameter or a buffer, so a checkpoint holds it.
    """

    rows: Tensor

    def __init__(self, encoder: nn.Module, head: nn.Module, size: int, d_out: int, decay: float) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.head = copy.deepcopy(head).requires_grad_(False)
        self.decay = decay
        self.register_buffer("rows", torch.zeros(size, d_out))

    def negatives(self, step: int, batch: int) -> Tensor:
        """(filled, d) unit projections before step `step` (0-based) of `batch` rows over all ranks; (0, d) at the first."""
        return self.rows[: min(step * batch, len(self.rows))]

    @torch.no_grad()
    def enqueue(self, views: Tensor, encoder: nn.Module, head: nn.Module, step: int, images: int | None = None) -> None:
        """Move the average towards `encoder` and `head` as step `step` left them, then store its projections of that step's views
        (2n, 3, H, W), and those of the other ranks, of N `images`: the oldest 2N give way."""
        for average, module in ((self.encoder, encoder), (self.head, head)):
            torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), 1 - self.decay)
        z = nn.functional.normalize(self.head(self.encoder(views))[-1].to(self.rows.dtype), dim=1)
        z = all_gather(z, images)
        at = step * len(z) % len(self.rows)
        self.rows[at : at + len(z)] = z
