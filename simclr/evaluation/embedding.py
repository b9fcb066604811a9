"""Features of pictures of any size and format: decoded and cut in threads, embedded in batches on the device."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simclr.data.depth import Rule
from simclr.data.encode import decoded
from simclr.data.pixels import Unreadable
from simclr.data.raster import file_bytes
from simclr.data.sources.source import Item
from simclr.precision import autocast
from simclr.views.preprocessing import Preprocessing

_AHEAD_BYTES = 256 << 20  # of encoded files in memory


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture as the encoder sees it; `reason` says why there is none."""

    item: Item
    """Without its data."""
    sha256: str
    """Of the file's bytes, or of the pixels where the source gives these; "" for a file that could not be read."""
    height: int
    width: int
    """Of the whole picture."""
    x: Tensor | None
    """(3, size, size) float32, on the host."""
    reason: str = ""
    rescaled: bool = False
    """It had more than 8 bits."""
    clipped: bool = False
    """More than 1 % of its pixels lay outside the range."""


def picture(item: Item, preprocessing: Preprocessing, rule: Rule) -> Picture:
    """Read, decode, cut and normalise one picture."""
    named, digest, done = Item(item.split, item.label, item.name, b""), "", (False, False)
    try:
        if isinstance(item.data, np.ndarray):
            digest, pixels = hashlib.sha256(item.data.tobytes()).hexdigest(), np.require(item.data, requirements="W")
        else:
            data = file_bytes(item.data, rule)
            digest = hashlib.sha256(data).hexdigest()
            found = decoded(data, rule)
            pixels, done = np.require(found.pixels, requirements="W"), (found.rescaled, found.clipped)  # torch warns of a read-only array
    except Unreadable as error:
        return Picture(named, digest, 0, 0, None, str(error))
    height, width = pixels.shape[:2]
    return Picture(named, digest, height, width, preprocessing(torch.from_numpy(pixels)[None])[0], "", *done)


class Clock:
    """How long the device computed, and how long it waited for pictures, in seconds."""

    def __init__(self) -> None:
        self.waited_s = self.computed_s = 0.0


@torch.inference_mode()
def embedded(
    encoder: Callable[[Tensor], Tensor],
    items: Iterator[Item],
    preprocessing: Preprocessing,
    rule: Rule,
    device: torch.device,
    pool: ThreadPoolExecutor,
    threads: int,
    batch_size: int,
    precision: str,
    clock: Clock,
) -> Iterator[tuple[list[Picture], NDArray[np.float32]]]:
    """(pictures, features (n, d) float32 of those that have no `reason`), about a batch at a time, in the order of `items`.

    `threads` of `pool` decode ahead, while the device computes. Photographs of different sizes share a batch, since each is cut to the
    encoder's input as soon as it is decoded: whole, 64 of them take gigabytes.
    """
    ahead = _ahead(items, lambda item: picture(item, preprocessing, rule), pool, 2 * threads + batch_size)
    while True:
        began = time.monotonic()
        batch: list[Picture] = []
        ready: list[Tensor] = []
        for found in ahead:
            batch.append(found)
            if found.x is not None:
                ready.append(found.x)
            if len(ready) == batch_size:
                break
        clock.waited_s += time.monotonic() - began
        if not batch:
            return
        began = time.monotonic()
        features = np.empty((0, 0), np.float32)
        if ready:
            x = torch.stack(ready)
            if device.type == "cuda":
                x = x.pin_memory().to(device, non_blocking=True)
            with autocast(precision, device):
                h = encoder(x.to(memory_format=torch.channels_last))
            features = h.float().cpu().numpy()
        clock.computed_s += time.monotonic() - began
        yield batch, features


def _ahead(items: Iterator[Item], work: Callable[[Item], Picture], pool: ThreadPoolExecutor, most: int) -> Iterator[Picture]:
    """work(item) of every item, in order, up to `most` of them in advance."""
    waiting: deque[tuple[Future[Picture], int]] = deque()
    held = 0
    try:
        for item in items:
            size = len(item.data) if isinstance(item.data, bytes) else 0
            while waiting and (len(waiting) >= most or held + size > _AHEAD_BYTES):
                first, freed = waiting.popleft()
                held -= freed
                yield first.result()
            waiting.append((pool.submit(work, item), size))
            held += size
        while waiting:
            yield waiting.popleft()[0].result()
    finally:
        for first, _ in waiting:
            first.cancel()
