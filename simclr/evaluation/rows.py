"""Rows of a matrix of features, read block by block, so that no choice of them copies the matrix."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from simclr.data.limits import memory_bytes

_NEAR = 1 << 18  # numbers of a block that stay in a core's cache between two products
_FAR = 1 << 24  # numbers of a block on a GPU, whose launches are dear


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of h (N, d) float32, which may lie in memory, in a mapped file or on a GPU; blocks are computed with on `device`."""

    h: Tensor
    index: Tensor | None = None
    """(n,) int64, ascending, beside h: which rows; None = all."""
    device: torch.device | None = None
    """None = where h lies."""

    def __len__(self) -> int:
        return len(self.h if self.index is None else self.index)

    @property
    def at(self) -> torch.device:
        """Where blocks are computed with."""
        return self.device or self.h.device

    @property
    def d(self) -> int:
        return self.h.shape[1]

    def chosen(self, index: Tensor) -> Rows:
        """Some of these rows, by number (k,), ascending."""
        index = index.to(self.h.device)
        return Rows(self.h, index if self.index is None else self.index[index], self.device)

    def between(self, first: int, last: int) -> Rows:
        """A run of these rows."""
        if self.index is None:
            return Rows(self.h[first:last], None, self.device)
        return Rows(self.h, self.index[first:last], self.device)

    def blocks(self, rows: int) -> Iterator[tuple[slice, Tensor]]:
        """Every row once, in order: (which of these rows, their features (≤ rows, d)). The features may be views of h: do not write."""
        for first in range(0, len(self), rows):
            at = slice(first, min(first + rows, len(self)))
            yield at, (self.h[at] if self.index is None else self.h.index_select(0, self.index[at])).to(self.at).float()

    def rows_at_once(self, classes: int) -> int:
        """Rows of a block for products with (classes, d) weights: few, so that both products find them in the cache, and many against
        the classes, whose gradient is read and written with every block."""
        most = (_FAR if self.at.type == "cuda" else _NEAR) // max(self.d, 1)
        return max(most, 4 * classes, 64)

    def moments(self) -> tuple[Tensor, Tensor]:
        """(mean (d,), standard deviation (d,) with n − 1), on `at`. The sums are float64, in two passes."""
        total = torch.zeros(self.d, dtype=torch.float64, device=self.at)
        for _, x in self.blocks(self.rows_at_once(1)):
            total += x.sum(0, dtype=torch.float64)
        mean = (total / len(self)).float()
        total.zero_()
        for _, x in self.blocks(self.rows_at_once(1)):
            total += (x - mean).square_().sum(0, dtype=torch.float64)
        return mean, (total / (len(self) - 1)).sqrt().float()


def matrix(n: int, d: int) -> Tensor:
    """(n, d) float32 to be filled, in the host's memory or, where it would be more than a quarter of the machine's, in a mapped file
    without a name in the temporary folder, which the system may write out."""
    wanted = n * d * 4
    if wanted <= memory_bytes() // 4:
        return torch.empty(n, d)
    with tempfile.TemporaryFile() as file:
        os.posix_fallocate(file.fileno(), 0, wanted)  # a full disk is an error now, and not a signal later
        return torch.from_numpy(np.memmap(file, np.float32, "r+", shape=(n, d)))


def placed(h: Tensor, device: torch.device) -> Rows:
    """The rows of h on `device`; a GPU without room for them gets block after block."""
    room = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 0
    return Rows(h.to(device)) if h.numel() * 4 <= room else Rows(h, None, device)


def rows_of(h: Tensor | Rows) -> Rows:
    """All rows of a matrix, or what is rows already."""
    return h if isinstance(h, Rows) else Rows(h)
