"""Exact nearest rows by cosine over features that are read in blocks: memory is that of blocks, however many rows there are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_QUERIES = 1024  # compared with a block at a time


@dataclass(frozen=True, slots=True)
class Bank:
    """Rows of unit length, or all zeros, in blocks on a device. Blocks are read anew at each pass over them."""

    rows: int
    blocks: Callable[[], Iterator[tuple[int, Tensor]]]
    """Yields (number of the first row, (b, d) float32), in order, all rows once."""
    take: Callable[[NDArray[np.int64]], Tensor]
    """Row numbers (m,) → (m, d)."""


@dataclass(frozen=True, slots=True)
class Found:
    """The nearest rows of each query, nearest first; of equal cosines the earlier row comes first. (Those of copies may differ in the last
    bit, since sums of another block are of another shape.)"""

    index: Tensor
    """(m, k) row numbers, on the queries' device."""
    similarity: Tensor
    """(m, k) cosines."""


@torch.no_grad()
def search(
    queries: Tensor, bank: Bank, k: int, own: NDArray[np.int64] | None = None, progress: Callable[[int], None] = lambda rows: None
) -> Found:
    """The k rows of `bank` nearest to each of `queries` (m, d), unit vectors, in one pass over its blocks.

    `own` (m,) are rows that the queries themselves are, and that are left out; −1: it is none. k is at most the number of rows that
    remain for each.
    """
    k = min(k, bank.rows - (own is not None))
    keep = k + (own is not None)  # a query's own row is among them, or is further away than all
    m, device = len(queries), queries.device
    index, similarity = torch.empty(m, 0, dtype=torch.int64, device=device), torch.empty(m, 0, device=device)
    for first, block in bank.blocks():
        parts = [_best(some @ block.T, min(keep, len(block)), first) for some in queries.split(_QUERIES)]
        similarity = torch.cat([similarity, torch.cat([values for values, _ in parts])], 1)
        index = torch.cat([index, torch.cat([rows for _, rows in parts])], 1)
        order = index.argsort(1)
        index, similarity = index.gather(1, order), similarity.gather(1, order)
        if similarity.shape[1] > keep:
            kept = similarity.argsort(dim=1, descending=True, stable=True)[:, :keep].sort(1).values
            index, similarity = index.gather(1, kept), similarity.gather(1, kept)
        progress(first + len(block))
    if own is not None:
        similarity = similarity.masked_fill(index == torch.from_numpy(own).to(device)[:, None], -torch.inf)
    order = similarity.argsort(dim=1, descending=True, stable=True)[:, :k]
    return Found(index.gather(1, order), similarity.gather(1, order))


def _best(cosines: Tensor, k: int, first: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row; of equal ones the earlier. `topk` alone takes any of those that equal the smallest that it takes."""
    values, rows = cosines.topk(k, dim=1)
    least = values[:, -1:]
    tied = torch.nonzero((cosines == least).sum(1) > (values == least).sum(1))[:, 0]
    if len(tied):
        rows[tied] = cosines[tied].argsort(dim=1, descending=True, stable=True)[:, :k]
        values[tied] = cosines[tied].gather(1, rows[tied])
    return values, rows + first
