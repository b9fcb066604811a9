"""Features of pictures of any size and format: decoded and cut ahead (`decoding`), embedded in batches on the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simclr.data.sources.source import Item
from simclr.evaluation.decoding import Decoders, Picture, ahead
from simclr.precision import autocast


class Clock:
    """How long the device computed, and how long it waited for pictures, in seconds."""

    def __init__(self) -> None:
        self.waited_s = self.computed_s = 0.0


@torch.inference_mode()
def embedded(
    encoder: Callable[[Tensor], Tensor],
    items: Iterator[Item],
    decoders: Decoders,
    device: torch.device,
    batch_size: int,
    precision: str,
    clock: Clock,
) -> Iterator[tuple[list[Picture], NDArray[np.float32]]]:
    """(pictures without their `x`, features (n, d) float32 of those that have no `reason`), about a batch at a time, in `items`' order.

    `decoders` decode ahead, while the device computes. Photographs of different sizes share a batch, since each is cut to the encoder's
    input as soon as it is decoded: whole, 64 of them take gigabytes.
    """
    coming = ahead(items, decoders)
    room: Tensor | None = None
    while True:
        began = time.monotonic()
        batch: list[Picture] = []
        ready = 0
        for found in coming:
            batch.append(replace(found, x=None))
            if found.x is not None:
                if room is None:  # a GPU copies from pinned memory without another copy in between
                    room = torch.empty((batch_size, *found.x.shape), pin_memory=device.type == "cuda")
                room[ready].copy_(found.x)
                ready += 1
            if ready == batch_size:
                break
        clock.waited_s += time.monotonic() - began
        if not batch:
            return
        began = time.monotonic()
        features = np.empty((0, 0), np.float32)
        if room is not None and ready:
            x = room[:ready].to(device, non_blocking=True)
            with autocast(precision, device):
                h = encoder(x.to(memory_format=torch.channels_last))
            features = h.float().cpu().numpy()
        clock.computed_s += time.monotonic() - began
        yield batch, features
