"""Which pictures to train on, from their features: groups of near duplicates, a diverse choice, outliers.

Each reads a `Bank` in blocks and keeps a few numbers for every row. The cosine distance is 1 − cosine, half the squared distance of unit
vectors, so what is nearest or farthest by one is so by the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from simclr.evaluation.search import Bank, search

Progress = Callable[[int], None]
_AT_ONCE = 1024  # rows compared with a block
_PAIRS = 1 << 22  # kept before they are joined to groups
_POOL = 1024  # the farthest rows of a pass, from which the next ones are chosen
_SAME = 1e-6  # two features that differ by rounding alone


@torch.no_grad()
def groups(bank: Bank, above: float, progress: Progress = lambda rows: None) -> NDArray[np.int64]:
    """(rows,) the first row of the group of each row. Rows whose cosine is at least `above` are in one group, and so are those that such
    pairs connect (single linkage). Every pair is compared: n² d / 2 products, in a pass over the blocks for each block."""
    known = _Groups(bank.rows)
    for first, block in bank.blocks():
        for start, other in bank.blocks():
            if start < first:
                continue
            for at in range(0, len(block), _AT_ONCE):
                near = block[at : at + _AT_ONCE] @ other.T >= above
                if start == first:
                    near = near.triu(diagonal=1 + at)
                a, b = (found.cpu().numpy() for found in near.nonzero(as_tuple=True))
                known.join(a + first + at, b + start)
        progress(first + len(block))
    return known.roots()


class _Groups:
    """Connected components of pairs that come in pieces. It keeps n numbers, and a few million pairs that are not joined yet."""

    def __init__(self, rows: int) -> None:
        self.root = np.arange(rows, dtype=np.int64)
        self.waiting: list[NDArray[np.int64]] = []
        self.pairs = 0

    def join(self, a: NDArray[np.int64], b: NDArray[np.int64]) -> None:
        a, b = self.root[a], self.root[b]
        if not len(apart := np.flatnonzero(a != b)):
            return
        self.waiting.append(np.stack([a[apart], b[apart]]))
        self.pairs += len(apart)
        if self.pairs >= _PAIRS:
            self.roots()

    def roots(self) -> NDArray[np.int64]:
        """(rows,) the first row of each row's group."""
        if self.waiting:
            rows, edges = len(self.root), np.concatenate(self.waiting, 1)
            _, found = connected_components(coo_matrix((np.ones(edges.shape[1], np.int8), edges), (rows, rows)), directed=False)
            lowest = np.full(rows, rows, np.int64)
            np.minimum.at(lowest, found, np.arange(rows))
            self.root = lowest[found[self.root]]
            self.waiting, self.pairs = [], 0
        return self.root


@dataclass(frozen=True, slots=True)
class Diverse:
    """Rows that cover the others."""

    rows: NDArray[np.int64]
    """(m,) in the order in which they were chosen; fewer than asked for where all others repeat one of them."""
    distance: NDArray[np.float32]
    """(m,) cosine distance to the nearest of those chosen before; of the first 2, more than any."""
    radius: float
    """The largest cosine distance of any row to the nearest chosen one."""


@torch.no_grad()
def farthest_first(bank: Bank, count: int, first: int, progress: Progress = lambda chosen: None) -> Diverse:
    """k-centre greedy (Gonzalez 1985; the core-set of arXiv:1708.00489, Sec. 4): `count` rows, from row `first` on, each the farthest from
    those chosen before; of equally far ones the earliest. Its largest angle to the nearest chosen row is at most twice the best possible.

    count · n · d products. Between two passes over the blocks, the farthest rows of the last pass compete among themselves as long as
    none of the others can be farther: distances only shrink. So the choice is that of a pass for each row, in far fewer passes.
    """
    nearest = np.full(bank.rows, -1.0, np.float32)  # the largest cosine to a chosen row; −1: none is chosen
    rows, distance = [first], [2.0]
    waiting = bank.take(np.array([first]))
    while True:
        for start, block in bank.blocks():
            found = (block @ waiting.T).amax(1).cpu().numpy()
            part = nearest[start : start + len(block)]
            np.maximum(part, found, out=part)
        nearest[rows] = 1.0
        progress(len(rows))
        if len(rows) >= count or nearest.min() > 1 - _SAME:
            return Diverse(np.array(rows), np.array(distance, np.float32), float(1 - nearest.min()))
        order = np.argsort(nearest, kind="stable")
        pool = np.sort(order[:_POOL])
        others = float(nearest[order[_POOL]]) if len(order) > _POOL else np.inf
        features, near = bank.take(pool), torch.from_numpy(nearest[pool])
        chosen: list[int] = []
        while len(rows) < count:
            i = int(near.argmin())
            if near[i] > 1 - _SAME or (chosen and near[i] >= others):
                break
            chosen.append(i)
            rows.append(int(pool[i]))
            distance.append(float(1 - near[i]))
            near = torch.maximum(near, (features @ features[i]).cpu())
            near[chosen] = torch.inf
        waiting = features[chosen]


@dataclass(frozen=True, slots=True)
class Isolation:
    """How far each row is from its neighbours."""

    distance: NDArray[np.float32]
    """(rows,) mean cosine distance to the k nearest other rows."""
    nearest: NDArray[np.int64]
    """(rows,) the nearest other row."""
    cosine: NDArray[np.float32]
    """(rows,) cosine of the two."""


@torch.no_grad()
def isolation(bank: Bank, k: int, progress: Progress = lambda rows: None) -> Isolation:
    """The mean cosine distance of each row to its k nearest others. Every pair is compared: n² d products, in a pass over the blocks for
    each block."""
    distance, cosine, nearest = np.empty(bank.rows, np.float32), np.empty(bank.rows, np.float32), np.empty(bank.rows, np.int64)
    for first, block in bank.blocks():
        some = slice(first, first + len(block))
        found = search(block, bank, k, own=np.arange(first, first + len(block)))
        distance[some] = (1 - found.similarity.mean(1)).cpu().numpy()
        nearest[some], cosine[some] = found.index[:, 0].cpu().numpy(), found.similarity[:, 0].cpu().numpy()
        progress(first + len(block))
    return Isolation(distance, nearest, cosine)
