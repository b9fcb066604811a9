"""An FFCV operation that decodes a JPEG once and writes both views' crops.

Two FFCV pipelines over one image field decode it twice, and draw their crops from numba's per-thread generator, which
no seed reaches. Here the boxes come with each batch's metadata, so they are whatever the caller drew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from ffcv.libffcv import imdecode
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.compiler import Compiler
from ffcv.pipeline.operation import Operation
from ffcv.pipeline.state import State
from numpy.typing import NDArray

_BITS = 11  # of a bilinear weight; two of them and a byte stay below 2^31


class Crops(Operation):  # type: ignore[misc]
    """Decode once, then cut and resize `count` boxes: → (n, count, size, size, 3) uint8.

    The metadata rows carry `box` (count, 4): top, left, height, width in pixels, inside the image. Resizing is bilinear
    with half-pixel centres and no antialiasing, as the official code resizes (there bicubically). The second buffer takes
    each sample's status: 0, or what the decoder said of a damaged image.
    """

    def __init__(self, count: int, size_px: int) -> None:
        super().__init__()
        self.count, self.size_px = count, size_px

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, tuple[AllocationQuery, ...]]:
        shape = (self.count, self.size_px, self.size_px, 3)
        pixels = int(self.metadata["height"].astype(np.int64).max()) * int(self.metadata["width"].astype(np.int64).max())
        byte = np.dtype("u1")
        state = replace(previous_state, jit_mode=True, shape=shape, dtype=byte)
        return state, (AllocationQuery(shape, byte), AllocationQuery((1,), np.dtype("i4")), AllocationQuery((pixels * 3,), byte))

    def generate_code(self) -> Callable[..., Any]:
        read, count = self.memory_read, self.count
        each = Compiler.get_iterator()
        decode_jpeg, resize = Compiler.compile(imdecode), Compiler.compile(resize_box)

        def crops(batch_indices: Any, buffers: Any, metadata: Any, storage_state: Any) -> Any:
            destination, status, scratch = buffers
            for row in each(len(batch_indices)):
                field = metadata[batch_indices[row]]
                stored = read(field["data_ptr"], storage_state)
                height, width = np.uint32(field["height"]), np.uint32(field["width"])
                status[row, 0] = 0
                if field["mode"] == 0:
                    image = scratch[row][: 3 * height * width].reshape(height, width, 3)
                    status[row, 0] = decode_jpeg(stored, image, height, width, height, width, 0, 0, 1, 1, False, False)
                else:
                    image = stored.reshape(height, width, 3)
                if status[row, 0] == 0:
                    for box in range(count):
                        resize(image, field["box"][box], destination[row, box])
            return destination[: len(batch_indices)]

        crops.is_parallel = True  # type: ignore[attr-defined]
        return crops


def resize_box(image: NDArray[np.uint8], box: NDArray[np.int32], out: NDArray[np.uint8]) -> None:
    """Box (top, left, height, width) of image (H, W, 3), resized to out (s, s, 3): bilinear, half-pixel centres, fixed point."""
    size = out.shape[0]
    top, left, height, width = box[0], box[1], box[2], box[3]
    one = 1 << _BITS
    x0 = np.empty(size, np.int64)
    x1 = np.empty(size, np.int64)
    weight = np.empty(size, np.int64)
    for x in range(size):
        at = min(max((x + 0.5) * width / size - 0.5, 0.0), width - 1.0)
        first = int(at)
        x0[x], x1[x] = left + first, left + min(first + 1, width - 1)
        weight[x] = int((at - first) * one + 0.5)
    for y in range(size):
        at = min(max((y + 0.5) * height / size - 0.5, 0.0), height - 1.0)
        first = int(at)
        upper, lower = image[top + first], image[top + min(first + 1, height - 1)]
        down = int((at - first) * one + 0.5)
        row = out[y]
        for x in range(size):
            right = weight[x]
            for c in range(3):
                above = upper[x0[x], c] * (one - right) + upper[x1[x], c] * right
                below = lower[x0[x], c] * (one - right) + lower[x1[x], c] * right
                row[x, c] = (above * (one - down) + below * down + (1 << (2 * _BITS - 1))) >> (2 * _BITS)
