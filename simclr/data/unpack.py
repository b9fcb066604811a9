"""Pieces of a TIFF, unpacked to as many bytes as their pixels have, and never more: libraries unpack all that a piece holds."""

from __future__ import annotations

import functools
import lzma
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MORE_BYTES = 256 << 10  # behind a piece's pixels; some programs write their last strip in full
_MOST_LZMA_BYTES = 256 << 20  # of a dictionary; `xz -9` has 64 MiB


def inflated(stored: bytes, /, *, out: int) -> bytes:
    """The first `out` bytes of a deflated piece, or fewer where it has no more. Raises ValueError or zlib.error for one that is damaged,
    ends early, or goes on far beyond them."""
    unpacker = zlib.decompressobj()
    got = unpacker.decompress(stored, out)
    if not unpacker.eof:
        _require_end(unpacker, unpacker.decompress(unpacker.unconsumed_tail, _MORE_BYTES), out)
    return got


def unlzma(stored: bytes, /, *, out: int) -> bytes:
    """The same of LZMA. Raises LZMAError as well for a dictionary that would fill the memory."""
    unpacker = lzma.LZMADecompressor(memlimit=_MOST_LZMA_BYTES)
    got = unpacker.decompress(stored, out)
    if not unpacker.eof:
        _require_end(unpacker, b"" if unpacker.needs_input else unpacker.decompress(b"", _MORE_BYTES), out)
    return got


def _require_end(unpacker: Any, more: bytes, wanted: int) -> None:
    """Behind the bytes that are wanted there is the checksum, and in a last strip there may be rows that no picture shows."""
    if not unpacker.eof:
        raise ValueError(
            f"a piece of it unpacks to more than the {wanted:,} bytes that it should hold"
            if len(more) == _MORE_BYTES
            else "a piece of it ends early"
        )


def unpacked_bits(stored: bytes, /, *, out: int) -> NDArray[np.uint8]:
    """At most the first `out` bytes of runs of bytes (PackBits): fewer where they end before."""
    pixels = np.empty(out, np.uint8)
    return pixels[: _runs()(np.frombuffer(stored, np.uint8), pixels)]


@functools.cache
def _runs() -> Any:
    """Compiled by the first picture that needs it, in half a second."""
    import numba

    @numba.njit(nogil=True)
    def runs(stored: NDArray[np.uint8], pixels: NDArray[np.uint8]) -> int:
        """Fill `pixels` from `stored`; the number of bytes that were written."""
        at, done = 0, 0
        while at + 1 < len(stored) and done < len(pixels):
            head = int(stored[at])
            at += 1
            if head < 128:  # the next head + 1 bytes as they are
                for _ in range(min(head + 1, len(stored) - at, len(pixels) - done)):
                    pixels[done] = stored[at]
                    at, done = at + 1, done + 1
            elif head > 128:  # the next byte, 257 − head times
                for _ in range(min(257 - head, len(pixels) - done)):
                    pixels[done] = stored[at]
                    done += 1
                at += 1
        return done

    return runs
