"""The nearest neighbours of features and their votes (arXiv:1805.01978)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from simclr.evaluation.metrics import accuracy
from simclr.evaluation.rows import Rows, rows_of

_BANK = 1 << 25  # numbers of a block of the bank
_COSINES = 1 << 25  # in memory at a time


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The k nearest training rows of each query, nearest first, and their votes."""

    index: Tensor
    """(m, k) rows of the training features."""
    similarity: Tensor
    """(m, k) cosines."""
    votes: Tensor
    """(m, classes) sum of exp(cosine / temperature) over the neighbours of each class; those without a label do not vote."""


@torch.no_grad()
def nearest(
    train_h: Tensor | Rows,
    train_y: Tensor,
    test_h: Tensor | Rows,
    k: int,
    temperature: float,
    block: int = 1024,
    bank_block: int | None = None,
) -> Neighbours:
    """Exact cosine neighbours of test_h (m, d) among train_h (n, d); k is at most n.

    The bank is read once, `bank_block` rows at a time (None = 128 MiB of them, and of cosines), each block normalised on its own;
    `block` queries at a time keep their k nearest so far. Beside the bank it takes the queries, normalised, and 12 k bytes for each.
    """
    bank, tests = rows_of(train_h), rows_of(test_h)
    device, k = bank.at, min(k, len(bank))
    classes = int(train_y.max()) + 1 if len(train_y) and int(train_y.max()) >= 0 else 1
    queries = torch.empty(len(tests), tests.d, device=device)
    for at, x in tests.blocks(block):
        queries[at] = F.normalize(x, dim=1)
    similarity = queries.new_empty(len(tests), 0)
    index = torch.empty(len(tests), 0, dtype=torch.int64, device=device)
    for among, x in bank.blocks(bank_block or min(max(_BANK // max(bank.d, 1), 1024), max(_COSINES // block, 1))):
        rows = F.normalize(x, dim=1)
        parts = [
            _merged(s, i, q @ rows.T, among.start, k)
            for q, s, i in zip(queries.split(block), similarity.split(block), index.split(block), strict=True)
        ]
        similarity, index = (torch.cat([part[place] for part in parts]) for place in range(2))
    y, votes = train_y.to(device), []
    for s, i in zip(similarity.split(block), index.split(block), strict=True):
        # The largest cosine is subtracted before exp: the ranking of votes is the same and a small temperature cannot overflow.
        weight = ((s - s[:, :1]) / temperature).exp() * (y[i] >= 0)
        votes.append(weight.new_zeros(len(s), classes).scatter_add_(1, y[i].clamp_min(0), weight))
    return Neighbours(index, similarity, torch.cat(votes))


def _merged(s: Tensor, i: Tensor, cosines: Tensor, first: int, k: int) -> tuple[Tensor, Tensor]:
    """The k best of those kept so far, s and i, and of the bank's next rows, which begin at `first`."""
    best = cosines.topk(min(k, cosines.shape[1]), dim=1)
    s, i = torch.cat([s, best.values], 1), torch.cat([i, best.indices + first], 1)
    if s.shape[1] > k:
        s, kept = s.topk(k, dim=1)
        i = i.gather(1, kept)
    return s, i


def knn(train_h: Tensor | Rows, train_y: Tensor, test_h: Tensor | Rows, test_y: Tensor, k: int, temperature: float) -> dict[str, float]:
    """Weighted kNN accuracy (arXiv:1805.01978, Sec. 3.4): {"top1", "top5"}, shares in [0, 1].

    Each of the k nearest training rows by cosine votes for its class with weight exp(cosine / temperature).
    """
    votes = nearest(train_h, train_y, test_h, k, temperature).votes
    return accuracy(votes, test_y.to(votes.device))
