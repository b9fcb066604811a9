"""An FFCV operation that decodes a JPEG once and writes both views' crops.

Two FFCV pipelines over one image field decode it twice, and draw their crops from numba's per-thread generator, which
no seed reaches. Here the boxes come with each batch's metadata, so they are whatever the caller drew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

import simclr.data.ffcv_import  # noqa: F401  (first: it makes the next import fast)

# isort: split
from ffcv.libffcv import imdecode
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.compiler import Compiler
from ffcv.pipeline.operation import Operation
from ffcv.pipeline.state import State
from numpy.typing import NDArray

_BITS = 11  # of a bilinear weight; two of them and a byte stay below 2^31


def decode(data: bytes, height: int, width: int) -> NDArray[np.uint8] | None:
    """Pixels (height, width, 3) of a JPEG of that size, as `Crops` decodes it; None where it is damaged."""
    pixels = np.empty((height, width, 3), np.uint8)
    status = imdecode(np.frombuffer(data, np.uint8), pixels, height, width, height, width)
    return pixels if status == 0 else None


class Crops(Operation):  # type: ignore[misc]
    """Decode once, then cut and resize `count` boxes: → (n, count, size, size, 3) uint8.

    The metadata rows carry `box` (count, 4): top, left, height, width in pixels, inside the image. Resizing is bilinear
    with half-pixel centres and no antialiasing, as the official code resizes (there bicubically). Three buffers: the crops;
    each sample's status, 0 or what the decoder said of a damaged image; and, per thread, room for a decoded image.
    """

    def __init__(self, count: int, size_px: int) -> None:
        super().__init__()
        self.count, self.size_px = count, size_px

    @property
    def scratch_bytes(self) -> int:
        """What one decoded image takes, at most."""
        return int((self.metadata["height"].astype(np.int64) * self.metadata["width"]).max()) * 3

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, tuple[AllocationQuery, ...]]:
        shape, byte = (self.count, self.size_px, self.size_px, 3), np.dtype("u1")
        state = replace(previous_state, jit_mode=True, shape=shape, dtype=byte)
        return state, (AllocationQuery(shape, byte), AllocationQuery((), np.dtype("i4")))

    def generate_code(self) -> Callable[..., Any]:
        read, each = self.memory_read, Compiler.get_iterator()
        decode_jpeg, resize = Compiler.compile(imdecode), Compiler.compile(resize_box)

        def crops(batch_indices: Any, buffers: Any, metadata: Any, storage_state: Any) -> Any:
            destination, status, scratch = buffers
            for thread in each(len(scratch)):
                first, last = thread * len(batch_indices) // len(scratch), (thread + 1) * len(batch_indices) // len(scratch)
                for row in range(first, last):
                    field = metadata[batch_indices[row]]
                    stored = read(field["data_ptr"], storage_state)
                    height, width = np.int64(field["height"]), np.int64(field["width"])
                    status[row] = 0
                    if field["mode"] == 0:
                        image = scratch[thread][: 3 * height * width].reshape(height, width, 3)
                        status[row] = decode_jpeg(stored, image, height, width, height, width, 0, 0, 1, 1, False, False)
                    else:
                        image = stored.reshape(height, width, 3)
                    if status[row] == 0:
                        for box in range(field["box"].shape[0]):
                            resize(image, field["box"][box], destination[row, box])
            return destination[: len(batch_indices)]

        crops.is_parallel = True  # type: ignore[attr-defined]
        return crops


def resize_box(image: NDArray[np.uint8], box: NDArray[np.int32], out: NDArray[np.uint8]) -> None:
    """Box (top, left, height, width) of image (H, W, 3), resized to out (s, s, 3): bilinear, half-pixel centres.

    In whole numbers, so the same on every processor. A source row is widened once and kept while output rows need it.
    """
    size, one, half = out.shape[0], 1 << _BITS, 1 << (2 * _BITS - 1)
    top, left, height, width = np.int64(box[0]), np.int64(box[1]), np.int64(box[2]), np.int64(box[3])
    near, far, right = np.empty(size, np.int32), np.empty(size, np.int32), np.empty(size, np.int32)
    for x in range(size):
        at = min(max(((2 * x + 1) * width * one + size) // (2 * size) - one // 2, 0), (width - 1) * one)  # in 1 / one pixels
        near[x], far[x] = 3 * (left + at // one), 3 * (left + min(at // one + 1, width - 1))
        right[x] = at % one
    source, target = image.reshape(image.shape[0], -1), out.reshape(size, -1)
    wide = np.empty((2, 3 * size), np.int32)  # source row r, resized to the new width, is kept in wide[r % 2]
    held = np.full(2, -1)
    for y in range(size):
        at = min(max(((2 * y + 1) * height * one + size) // (2 * size) - one // 2, 0), (height - 1) * one)
        upper, lower, down = at // one, min(at // one + 1, height - 1), at % one
        for row in (upper, lower):
            if held[row % 2] != row:
                held[row % 2] = row
                pixels, kept = source[top + row], wide[row % 2]
                for x in range(size):
                    for c in range(3):
                        kept[3 * x + c] = pixels[near[x] + c] * (one - right[x]) + pixels[far[x] + c] * right[x]
        above, below, line = wide[upper % 2], wide[lower % 2], target[y]
        for i in range(3 * size):
            line[i] = (above[i] * (one - down) + below[i] * down + half) >> (2 * _BITS)
