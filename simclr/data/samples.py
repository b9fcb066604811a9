"""What shards say of their samples, looked up for each batch where it lies in the mapped shards.

Rows, labels and sizes are 48 bytes of a shard for each sample. The processes of a node map the same files, so they share these bytes in the
page cache, and none has a copy of its own: a process keeps a few numbers for each shard, and nothing for each sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simclr.data.ffcv.reader import ALLOCATION_BYTES, CAPTION, IMAGE, Layout, contradicting, contradiction, open_in_place, straying
from simclr.data.manifest import Manifest, Shard
from simclr.data.memory import PAGE, copied, mapped

_BLOCK = 1 << 16  # samples at a time, where all are looked at
Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Samples:
    """Some samples of shards, in the order in which they were asked for."""

    rows: Ids
    """(n,) their numbers among the samples of these shards."""
    ids: Ids
    """(n,) their positions in the split."""
    images: Any
    """(n,) rows (mode, width, height, data_ptr); a pointer is an offset in `Shards.region`."""
    bytes: NDArray[np.uint64]
    """(n,) lengths of what is stored."""
    labels: Ids
    """(n,) −1 = unlabelled."""
    captions: Any = None
    """(n,) rows (ptr, size), as `images`; None where the shards have none."""

    @property
    def sizes(self) -> Ids:
        """(n, 2) height and width in pixels."""
        return np.stack([self.images["height"], self.images["width"]], 1).astype(np.int64)

    def then(self, others: Samples) -> Samples:
        """These samples, and behind them `others`."""
        found: list[Any] = []
        for ours, theirs in ((getattr(self, name), getattr(others, name)) for name in self.__slots__):
            found.append(None if ours is None else np.concatenate([ours, theirs]))
        return Samples(*found)

    def __getitem__(self, some: Any) -> Samples:
        captions = None if self.captions is None else self.captions[some]
        return Samples(self.rows[some], self.ids[some], self.images[some], self.bytes[some], self.labels[some], captions)


class Shards:
    """The shards of a split, or those of some of `groups` of them, mapped back to back. Their samples are numbered from 0, group by group.

    Every row of every shard is held against the manifest once, here, and again when it is looked up: another process may have written to
    the file since. Raises Corrupt, which names shard and sample, both times.
    """

    def __init__(self, data: Path, manifest: Manifest, split: str, groups: int, held: Sequence[int], own_memory: bool) -> None:
        whole = manifest.splits[split]
        self.data, self.manifest, self.shards = data, manifest, tuple(shard for group in held for shard in whole[group::groups])
        largest, layouts, bases, short_px = [], [], [0], 0
        for shard in self.shards:
            image, _, _, layout = open_in_place(data / shard.name, shard, manifest)
            largest.append(image[np.argmax(image["height"].astype(np.int64) * image["width"])])
            short_px = max(short_px, int(np.minimum(image["height"], image["width"]).max()))
            layouts.append(layout)
            bases.append(bases[-1] + -(-shard.bytes // PAGE) * PAGE)
        self.largest = np.array(largest, IMAGE)
        """(shards,) the row of the largest image of each."""
        self.short_px = short_px
        """The longest shorter side of an image."""
        self.first = np.cumsum([0, *(shard.samples for shard in self.shards)])
        """(shards + 1,) number of the first sample of each."""
        ends = np.cumsum([sum(shard.samples for shard in whole[group::groups]) for group in held]).tolist()
        self.rows_of = {group: range(first, end) for group, first, end in zip(held, [0, *ends], ends, strict=False)}
        """Group → the numbers of its samples."""
        self.region = (copied if own_memory else mapped)([(data / s.name, s.bytes) for s in self.shards], bases)
        """(bytes,) uint8: all shards, each at a multiple of a page."""
        self._bases, self._bytes = np.array(bases[:-1]), np.array([shard.bytes for shard in self.shards], np.uint64)
        ids = np.cumsum([0, *(shard.samples for shard in whole)])[:-1]
        self._to_id = np.concatenate([ids[group::groups] for group in held]) - self.first[:-1]
        self._image_at, self._step, self._label_at, self._size_at, self._caption_at = np.array(list(map(_numbers, layouts)), np.int64).T
        self._places = {at: layout.place for at, layout in enumerate(layouts) if layout.place is not None}
        self._labelled = bool((self._label_at >= 0).all())

    def __len__(self) -> int:
        return int(self.first[-1])

    def find(self, rows: Ids) -> Samples:
        """The samples with these numbers. Raises Corrupt if one contradicts the manifest by now."""
        shard = np.searchsorted(self.first, rows, side="right") - 1
        base, own = self._bases[shard], rows - self.first[shard]
        at = base + self._step[shard] * own
        images = self._read(at + self._image_at[shard], IMAGE)
        labels = self._read(at + self._label_at[shard], "<i8") if self._labelled else self._few_labels(at, shard)
        place = own
        for which, places in self._places.items():
            place = np.where(shard == which, places[np.where(shard == which, own, 0)], place)
        size = self._read(base + self._size_at[shard] + ALLOCATION_BYTES * place, "<u8")
        bad = contradicting(images, labels, size, self._bytes[shard], self.manifest)
        captions = None
        if self.manifest.captions:
            captions = self._read(at + self._caption_at[shard], CAPTION)
            bad |= straying(captions, self._bytes[shard])
        if bad.any():
            first = int(np.flatnonzero(bad)[0])
            raise contradiction(self.data / self.shards[shard[first]].name, self.shards[shard[first]], int(own[first]))
        images["data_ptr"] += base.astype(np.uint64)
        if captions is not None:
            captions["ptr"] += base.astype(np.uint64)
        return Samples(rows, rows + self._to_id[shard], images, size, labels, captions)

    def captions(self, samples: Samples) -> tuple[str, ...]:
        """The caption of each sample; () where the shards have none."""
        if samples.captions is None:
            return ()
        places = zip(samples.captions["ptr"].tolist(), samples.captions["size"].tolist(), strict=True)
        return tuple(self.region[at : at + size].tobytes().decode(errors="replace").strip() for at, size in places)

    def all(self) -> Iterator[Samples]:
        """Every sample, some at a time."""
        for first in range(0, len(self), _BLOCK):
            yield self.find(np.arange(first, min(first + _BLOCK, len(self))))

    def where(self, row: int) -> tuple[Shard, int]:
        """The shard of a sample, and its number there."""
        shard = int(np.searchsorted(self.first, row, side="right")) - 1
        return self.shards[shard], row - int(self.first[shard])

    def _few_labels(self, at: Ids, shard: Ids) -> Ids:
        """Labels of samples, some or all of which lie in shards without any."""
        has = self._label_at[shard] >= 0
        labels = np.full(len(at), -1, np.int64)
        labels[has] = self._read((at + self._label_at[shard])[has], "<i8")
        return labels

    def _read(self, at: Ids, kind: Any) -> Any:
        """(n,) copies of what stands at bytes `at` (n,) of the region, wherever that is aligned."""
        dtype = np.dtype(kind)
        window = np.ndarray((len(self.region) - dtype.itemsize + 1,), f"V{dtype.itemsize}", self.region, strides=(1,))
        return window[at].view(dtype)


def _numbers(layout: Layout) -> tuple[int, int, int, int, int]:
    return layout.image_at, layout.step, layout.label_at, layout.size_at, layout.caption_at
