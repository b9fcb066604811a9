"""An FFCV operation that decodes a JPEG once and writes all crops of it, of whatever sizes.

Two FFCV pipelines over one image field decode it twice, and draw their crops from numba's per-thread generator, which
no seed reaches. Here the caller draws the boxes, which come with each batch's metadata.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

import simclr.data.ffcv.imports  # noqa: F401  (first: it makes the next import fast)

# isort: split
from ffcv.libffcv import imdecode
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.compiler import Compiler
from ffcv.pipeline.operation import Operation
from ffcv.pipeline.state import State
from numpy.typing import NDArray

from simclr.data.ffcv.resize import resize_box
from simclr.data.limits import MOST_SCANS, scans_in
from simclr.data.pixels import MOST_PIXELS
from simclr.errors import UserError

_TOO_MANY_SCANS = -2  # a status beside the decoder's own


def _generate_take(context: Any, counter: Any) -> Any:
    """counter (1,) int64 → its number, which an atomic add raises by one for the next caller in any thread."""

    def generate(target: Any, builder: Any, signature: Any, values: Any) -> Any:
        place = target.make_array(signature.args[0])(target, builder, values[0]).data
        return builder.atomic_rmw("add", place, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(counter), generate


_take: Any = intrinsic(_generate_take)


@numba.njit(nogil=True)
def passes(stored: NDArray[np.uint8]) -> int:
    """How often the decoder of a JPEG would pass over its pixels: `limits.scans_in`, but for what a picture holds behind its end, which
    counts too, and never more than one more than is allowed. Only the headers are read of a JPEG that is neither progressive nor has a
    scan for each colour."""
    at, colours, several, end = 2, 0, False, len(stored) - 10
    while at < end:
        if stored[at] != 0xFF or stored[at + 1] == 0xFF or stored[at + 1] == 0:
            at += 1
            continue
        kind = stored[at + 1]
        if kind == 0xDA:
            several = several or stored[at + 4] != colours
            break
        if kind == 0xD9:
            return 1
        at += 2
        if kind == 0x01 or 0xD0 <= kind <= 0xD7:
            continue
        if 0xC0 <= kind <= 0xCF and kind != 0xC4 and kind != 0xC8 and kind != 0xCC:
            several, colours = kind == 0xC2 or kind == 0xC6 or kind == 0xCA or kind == 0xCE, stored[at + 7]
        at += int(stored[at]) << 8 | int(stored[at + 1])  # at least 2, or the decoder stops here
    scans = 0
    while several and at < len(stored) - 1 and scans <= MOST_SCANS:
        scans += stored[at] == 0xFF and stored[at + 1] == 0xDA
        at += 1
    return scans if several else 1


def decode(data: bytes, height: int, width: int) -> NDArray[np.uint8] | None:
    """Pixels (height, width, 3) of a JPEG of that size, as `Crops` decodes it; None where it is damaged, or has too many scans."""
    # Not `passes`, whose compilation takes half a second; what lies behind the picture's end counts here, too.
    if scans_in(data) > 1 and data.count(b"\xff\xda") > MOST_SCANS:
        return None
    pixels = np.empty((height, width, 3), np.uint8)
    status = imdecode(np.frombuffer(data, np.uint8), pixels, height, width, height, width)
    return pixels if status == 0 else None


class Crops(Operation):  # type: ignore[misc]
    """Decode once, then cut and resize boxes: for each (count, size) of `shapes` → (n, count, size, size, 3) uint8.

    The metadata rows carry `box` (all counts, 4): top, left, height, width in pixels, inside the image, in the order of `shapes`.
    The buffers: the crops, a tuple of arrays; each sample's status, 0 or the decoder's code for a damaged image; per thread, room for a
    decoded image; and the kind of resize, its number in `resize.KINDS`, so that one compiled function serves all kinds.
    """

    def __init__(self, shapes: tuple[tuple[int, int], ...]) -> None:
        super().__init__()
        self.shapes = shapes

    @property
    def scratch_bytes(self) -> int:
        """Bytes of the largest decoded image. Raises UserError where each thread would need more than a picture may take."""
        pixels = int((self.metadata["height"].astype(np.int64) * self.metadata["width"]).max())
        if pixels > 2 * MOST_PIXELS:
            raise UserError(
                f"an image of the shards has {pixels:,} pixels; expected at most {2 * MOST_PIXELS:,}; prepare the data again, with "
                f"--max-side-px {math.isqrt(2 * MOST_PIXELS)} or less"
            )
        return 3 * pixels

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, tuple[AllocationQuery, ...]]:
        byte = np.dtype("u1")
        crops = [(count, size, size, 3) for count, size in self.shapes]
        state = replace(previous_state, jit_mode=True, shape=crops[0], dtype=byte)
        return state, (*(AllocationQuery(shape, byte) for shape in crops), AllocationQuery((), np.dtype("i4")))

    def generate_code(self) -> Callable[..., Any]:
        read, each = self.memory_read, Compiler.get_iterator()
        decode_jpeg, resize, take = Compiler.compile(imdecode), resize_box, _take

        def crops(batch_indices: Any, buffers: Any, metadata: Any, storage_state: Any) -> Any:
            destinations, status, scratch, kind = buffers
            taken = np.zeros(1, np.int64)
            for thread in each(len(scratch)):
                # A thread takes the next image when it has finished one. Equal shares would wait for the thread with the largest images.
                row = take(taken)
                while row < len(batch_indices):
                    field = metadata[batch_indices[row]]
                    stored = read(field["data_ptr"], storage_state)
                    height, width = np.int64(field["height"]), np.int64(field["width"])
                    status[row] = 0
                    if field["mode"] == 0:
                        image = scratch[thread][: 3 * height * width].reshape(height, width, 3)
                        if passes(stored) > MOST_SCANS:
                            status[row] = _TOO_MANY_SCANS
                            row = take(taken)
                            continue
                        status[row] = decode_jpeg(stored, image, height, width, height, width, 0, 0, 1, 1, False, False)
                    else:
                        image = stored.reshape(height, width, 3)
                    if status[row] == 0:
                        box = 0
                        for destination in destinations:
                            for view in range(destination.shape[1]):
                                resize(image, field["box"][box], destination[row, view], kind)
                                box += 1
                    row = take(taken)
            return destinations

        crops.is_parallel = True  # type: ignore[attr-defined]
        return crops


def read_bytes(address: Any, storage: Any) -> Any:
    """The bytes at `address`. FFCV's operations call it. `storage` is (mapped bytes, sorted pointers, their lengths).

    A search of our own: numba's `searchsorted` registers its comparison again for each signature, in the midst of a compile."""
    first, last = 0, len(storage[1]) - 1
    while first < last:
        middle = (first + last) // 2
        if storage[1][middle] < address:
            first = middle + 1
        else:
            last = middle
    return storage[0][address : address + storage[2][first]]
