"""Pairs from time: which frames follow each other, a keyed neighbour of each, and an order that keeps frames of a video apart.

After SimCLR-TT (Schneider et al., "Contrastive Learning Through Time", SVRHM 2021, openreview HTCRs8taN8): the positive pair are two frames
that are close in time. Negatives are all other images of the batch, frames of the same video too; `apart` is our own remedy for that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simclr import keyed
from simclr.data.manifest import Manifest
from simclr.errors import UserError

Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Videos:
    """The videos of a split."""

    firsts: Ids
    """(videos,) id of the first frame of each, ascending."""
    examples: int
    """Frames of all."""

    def of(self, ids: Ids) -> Ids:
        """(n,) the number of the video of each frame."""
        return np.searchsorted(self.firsts, ids, side="right") - 1

    @property
    def lengths(self) -> Ids:
        """(videos,) frames of each."""
        return np.diff(self.firsts, append=self.examples)


def videos_of(manifest: Manifest, where: object = "the shards") -> Videos:
    """The videos of the training split. Raises UserError, naming `where`, if its images are no frames of videos."""
    firsts: Sequence[int] = manifest.videos.get("train", ())
    if not firsts:
        raise UserError(
            f"{where} hold no videos, and time.neighbours pairs frames of one; prepare folders of frames with --videos, or leave out "
            "--time.neighbours and --time.one-per-video"
        )
    return Videos(np.array(firsts, np.int64), manifest.examples("train"))


def neighbours(videos: Videos, seed: int, epoch: int, ids: Ids, most: int, only: Ids | None = None) -> Ids:
    """(n,) for each frame i of `ids` (n,) another frame j of its video with 0 < |i − j| ≤ `most`, uniform among these; i itself where there
    is none. A pure function of (seed, epoch, i). `only`, ascending, are the frames that may be taken; those of `ids` are among them.

    At an end of its video a frame has fewer neighbours, each as likely as the others (a bias of 2^-32 of their number aside).
    """
    video = videos.of(ids)
    low = np.maximum(videos.firsts[video], ids - most)
    high = np.minimum(np.append(videos.firsts, videos.examples)[video + 1] - 1, ids + most)
    own = ids
    if only is not None:  # from here on, places in `only`
        low, high = np.searchsorted(only, low), np.searchsorted(only, high, side="right") - 1
        own = np.searchsorted(only, ids)
    u = keyed.uniform(seed, "neighbour", epoch, ids, 0, 1)[:, 0]
    there = low + (u * (high - low)).astype(np.int64)
    there += (there >= own) & (high > low)  # it is left out, and those behind it move up
    found: Ids = there if only is None else only[there]
    return found


def apart(videos: Videos, seed: int, epoch: int, ids: int | Ids, batch_size: int) -> Callable[[Ids], Ids]:
    """A function as of `keyed.order`: positions (n,) → ids, in an order whose batches hold as few frames of each video as can be.

    Of L frames of a video that an epoch of S whole batches sees, a batch holds ⌊L / S⌋ or ⌈L / S⌉: at most one where L ≤ S. The frames
    that an epoch leaves out, fewer than a batch, are drawn from all. Videos, frames of a video and batches are each in a keyed random
    order; the frames are dealt out to the batches like cards, video by video. It sorts, at every size.
    """
    all_ids = np.arange(ids, dtype=np.int64) if isinstance(ids, int) else ids
    batches = len(all_ids) // batch_size
    taken = keyed.shuffled(seed, epoch, all_ids, "videos")[: batches * batch_size]
    number = videos.of(taken)
    rank = np.argsort(keyed.bits(seed, "videos", epoch, np.arange(len(videos.firsts)), 1, 1)[:, 0], kind="stable").argsort()
    pack = taken[np.argsort(rank[number], kind="stable")]
    dealt = pack.reshape(batch_size, batches).T  # the p-th card goes to batch p mod S
    turns = np.argsort(keyed.bits(seed, "videos", epoch, np.arange(batches), 2, 1)[:, 0], kind="stable")
    return dealt[turns].ravel().__getitem__


def false_negatives(videos: Videos, batch_size: int) -> float:
    """How many other frames of its own video a frame has in its batch, in the mean over a random order: exactly
    (N − 1) / (M − 1) · Σ L (L − 1) / M, for videos of L frames, M in all, and batches of N."""
    lengths, frames = videos.lengths.astype(float), videos.examples
    return float((batch_size - 1) / max(frames - 1, 1) * (lengths * (lengths - 1)).sum() / frames)
