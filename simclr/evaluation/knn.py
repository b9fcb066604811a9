"""The nearest neighbours of features and their votes (arXiv:1805.01978)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from simclr.evaluation.metrics import accuracy


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
    train_h: Tensor, train_y: Tensor, test_h: Tensor, k: int, temperature: float, block: int = 1024, bank_block: int = 1 << 18
) -> Neighbours:
    """Exact cosine neighbours of test_h (m, d) among train_h (n, d); k is at most n.

    `block` queries are compared with `bank_block` rows at a time and keep the k nearest so far: 1 GiB of cosines at most.
    """
    bank = F.normalize(train_h.float(), dim=1)
    k = min(k, len(bank))
    classes = int(train_y.max()) + 1 if len(train_y) and int(train_y.max()) >= 0 else 1
    index, similarity, votes = [], [], []
    for queries in test_h.split(block):
        q = F.normalize(queries.float(), dim=1)
        s, i = q.new_empty(len(q), 0), torch.empty(len(q), 0, dtype=torch.int64, device=q.device)
        for first in range(0, len(bank), bank_block):
            cosines = q @ bank[first : first + bank_block].T
            best = cosines.topk(min(k, cosines.shape[1]), dim=1)
            s, i = torch.cat([s, best.values], 1), torch.cat([i, best.indices + first], 1)
            if s.shape[1] > k:
                s, kept = s.topk(k, dim=1)
                i = i.gather(1, kept)
        # The largest cosine is subtracted before exp: the ranking of votes is the same and a small temperature cannot overflow.
        weight = ((s - s[:, :1]) / temperature).exp() * (train_y[i] >= 0)
        votes.append(weight.new_zeros(len(queries), classes).scatter_add_(1, train_y[i].clamp_min(0), weight))
        index.append(i)
        similarity.append(s)
    return Neighbours(torch.cat(index), torch.cat(similarity), torch.cat(votes))


def knn(train_h: Tensor, train_y: Tensor, test_h: Tensor, test_y: Tensor, k: int, temperature: float) -> dict[str, float]:
    """Weighted kNN accuracy (arXiv:1805.01978, Sec. 3.4): {"top1", "top5"}, shares in [0, 1].

    Each of the k nearest training rows by cosine votes for its class with weight exp(cosine / temperature).
    """
    return accuracy(nearest(train_h, train_y, test_h, k, temperature).votes, test_y)
