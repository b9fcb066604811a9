"""Features of the images of a split, from an encoder in evaluation mode, on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from simclr.collectives import all_gather, rank, world_size
from simclr.evaluation.cores import Cores
from simclr.evaluation.frozen import Frozen
from simclr.evaluation.rows import matrix
from simclr.views.preprocessing import Preprocessing

if TYPE_CHECKING:
    from simclr.data.loader import Batch

_PIECE = 32


@dataclass(frozen=True, slots=True)
class Features:
    """Features of a split in sample order: h (n, d) float32, labels y (n,) int64 (−1 = unlabelled), sample ids (n,)."""

    h: Tensor
    y: Tensor
    ids: Tensor

    def __getitem__(self, rows: Tensor) -> Features:
        """The features of some rows, by index (k,) or mask (n,)."""
        return Features(self.h[rows], self.y[rows], self.ids[rows])

    def labelled(self) -> Features:
        """Without the rows that have no label."""
        return self if bool((self.y >= 0).all()) else self[self.y >= 0]


@torch.no_grad()
def embed(
    encoder: Callable[[Tensor], Tensor],
    batches: Iterator[Batch],
    preprocessing: Preprocessing,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int], None] | None = None,
) -> Features:
    """Features of every image in `batches` (as `loader.in_order` gives them), seen through `preprocessing`.

    With a process group each rank embeds its own batches and every rank gets all rows, in the order of ranks. The encoder
    is used in the mode it is in: put it in evaluation mode first.
    """
    h, y, ids = [], [], []
    for batch in batches:
        x = preprocessing(batch.images[0].to(device))  # waits for the copy: the loader reuses the memory
        x = x.to(dtype, memory_format=torch.channels_last)
        h.append(encoder(x).float())
        y.append(batch.labels)
        ids.append(batch.ids)
        if progress is not None:
            progress(len(batch.ids))
    empty = torch.zeros(0, dtype=torch.int64)
    every = torch.cat(h) if h else torch.zeros(0, 1, device=device)
    return Features(_gather_rows(every), _gather_rows(torch.cat([empty, *y]).to(device)), _gather_rows(torch.cat([empty, *ids]).to(device)))


@torch.no_grad()
def embed_each(
    encoders: Sequence[Callable[[Tensor], Tensor]],
    batches: Iterator[Batch],
    count: int,
    preprocessing: Preprocessing,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> list[Features]:
    """Features of the `count` images in `batches` under each encoder: an image is decoded once. They lie on the host (`rows.matrix`)."""
    kept: list[Tensor] = []
    y, ids = torch.empty(count, dtype=torch.int64), torch.empty(count, dtype=torch.int64)
    done, device = 0, torch.device(device)
    with Cores(device) as cores:
        for batch in batches:
            x = preprocessing(batch.images[0].to(device)).to(memory_format=torch.channels_last)
            # A few images at a time, whose activations stay in a core's cache.
            pieces = x.split(_PIECE) if device.type == "cpu" else (x,)
            found = cores.map(_encoded, [(encoder, piece) for encoder in encoders for piece in pieces])
            embedded = [torch.cat(found[i : i + len(pieces)]) for i in range(0, len(found), len(pieces))]
            kept = kept or [matrix(count, h.shape[1]) for h in embedded]
            at = slice(done, done + len(batch.ids))
            y[at], ids[at] = batch.labels, batch.ids
            for whole, h in zip(kept, embedded, strict=True):
                whole[at] = h
            done = at.stop
            if progress is not None:
                progress(len(batch.ids))
    assert done == count, f"{done} images of {count}"
    return [Features(h, y, ids) for h in kept]


def _encoded(given: tuple[Callable[[Tensor], Tensor], Tensor]) -> Tensor:
    """(n, d) float32 of some images."""
    with torch.no_grad():  # the mode is a thread's own
        return given[0](given[1]).float()


def _gather_rows(x: Tensor) -> Tensor:
    """Rows of all ranks, in rank order. Ranks may hold different numbers of rows."""
    if world_size() == 1:
        return x
    # A rank without rows does not know the width of the others' rows.
    counts, width = (v.tolist() for v in all_gather(torch.tensor([[len(x), x[:1].numel()]], device=x.device)).unbind(1))
    padded = x.new_zeros((max(counts), *([max(width)] if x.ndim == 2 else [])))
    padded[: len(x), ...] = x if len(x) else 0
    return torch.cat([part[:c] for part, c in zip(all_gather(padded).chunk(world_size()), counts, strict=True)])


def pixels(x: Tensor) -> Tensor:
    """The representation that needs no learning: images (n, 3, H, W) as rows (n, 3 H W)."""
    return x.flatten(1)


def embed_split(
    encoder: nn.Module,
    data: Path,
    split: str,
    preprocessing: Preprocessing,
    limit: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch_size: int = 256,
    threads: int = 1,
    progress: Callable[[int], None] | None = None,
    groups: int = 1,
    only: NDArray[np.int64] | None = None,
) -> Features:
    """Features of `split` of the shards in `data` (at most `limit` images, or those with the ids `only`), shared among the ranks;
    each reads the training images of its own shard group."""
    from simclr.data import loader  # with FFCV, which features that lie on a disk do without

    rows = loader.in_order(data, split, preprocessing, batch_size, limit, threads, rank(), world_size(), groups, only)
    with Frozen(encoder) as frozen:
        return embed(frozen, loader.on_device(rows, torch.device(device)), preprocessing, device, dtype, progress)
