"""Keys of earlier batches as negatives: the queue of MoCo (arXiv:1911.05722, Sec. 3.2), and SimCLR v2's optional one (arXiv:2006.10029,
Sec. 2). A moving average of the trained network makes the keys, so that those of a thousand steps ago are still comparable.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from simclr.methods.average import average_of, move
from simclr.networks.initial import deviates


class Queue(nn.Module):
    """The moving averages of an encoder and its head, and a ring of unit rows (size, d) that they made, the same on every rank.

    Every step writes as many rows, whose number divides `size`: so the step gives the place to write and the number of rows written.
    Everything is a parameter or a buffer, so a checkpoint holds it.
    """

    rows: Tensor

    def __init__(self, encoder: nn.Module, head: nn.Module, rows: Tensor) -> None:
        super().__init__()
        self.encoder, self.head = average_of(encoder), average_of(head)
        self.register_buffer("rows", rows)

    def negatives(self, step: int, batch: int) -> Tensor:
        """(filled, d) the rows that steps before `step` (0-based) wrote, `batch` each; (0, d) at the first."""
        return self.rows[: min(step * batch, len(self.rows))]

    def follow(self, encoder: nn.Module, head: nn.Module, keep: float) -> None:
        """Move the averages towards `encoder` and `head`; they keep this share of themselves."""
        move(self.encoder, encoder, keep)
        move(self.head, head, keep)

    @torch.no_grad()
    def enqueue(self, rows: Tensor, step: int) -> None:
        """Store the unit rows (m, d) of step `step`, all ranks' in the order of the batch: the oldest m give way."""
        at = step * len(rows) % len(self.rows)
        self.rows[at : at + len(rows)] = rows


def random_rows(size: int, d: int, seed: int) -> Tensor:
    """(size, d) normal deviates of `seed` as rows of length 1, the first content of MoCo's queue; the same bits on every machine."""
    rows = torch.empty(size, d)
    if not rows.is_meta:
        block = max((1 << 18) // d, 1)  # rows at a time: deviates take some arrays of 8 bytes each
        for first in range(0, size, block):
            last = min(first + block, size)
            z = deviates(seed, "queue", first * d, last * d, False).reshape(last - first, d)
            squares = np.zeros(last - first)
            for column in range(d):  # one after another: every machine adds in this order
                squares += z[:, column] ** 2
            rows[first:last] = torch.from_numpy(z / np.sqrt(squares)[:, None])
    return rows
