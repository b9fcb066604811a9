"""Keyed randomness: uniform numbers as pure functions of (seed, stream, epoch, sample id, view).

With a sequential generator, an image's views depend on all earlier draws: on the number of workers, threads and prefetched batches, and
on the step of a resume. Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) is a keyed bijection of a counter
instead, so every draw has an address and no history.

Initial weights have neither epoch nor sample: `simclr.networks.initial` uses a parameter's name and a block of its elements instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Stream = Literal[
    "order", "crop", "colour", "weights", "patterns", "subset", "operation", "path", "shuffle", "mask", "neighbour", "videos", "captions"
]
_STREAMS: dict[Stream, int] = {name: number for number, name in enumerate(get_args(Stream))}
Rule = Literal["sort", "by size"]
"""How ids are put in order: by a sort at every size, or by a sort up to `SORTED_UP_TO` ids and by `entries` above."""
Ids = NDArray[np.int64]
SORTED_UP_TO = 1 << 20
"""The largest range that a new dataset's order sorts. A sort takes up to a microsecond and 104 to 136 bytes an id, in every rank and at
every epoch: here 0.13 GiB and a second, at 1e8 images 10 GiB and a minute. `entries` takes milliseconds a batch at any size."""
_ROUNDS = 8
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)


def philox(counter: tuple[NDArray[np.uint64], ...], key: tuple[int, int]) -> tuple[NDArray[np.uint64], ...]:
    """Philox4x32-10: four 32-bit words (in uint64 arrays of one shape) for each 128-bit counter under a 64-bit key."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c2 = p1 >> _32, p0 >> _32  # new arrays, so the next lines may write into them
        for half, other, k in ((c0, c1, k0), (c2, c3, k1)):
            half ^= other
            half ^= np.uint64(k)
        p0 &= _LOW
        p1 &= _LOW
        c1, c3 = p1, p0
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return c0, c1, c2, c3


def bits(seed: int, stream: Stream, epoch: int, ids: NDArray[np.int64], view: int, count: int) -> NDArray[np.uint64]:
    """(len(ids), count) words of 32 random bits. A longer draw begins with the shorter one.

    The counter is (sample id: 64 bits, epoch: 32 bits, stream, view and block: 8 + 8 + 16 bits); the key is the seed.
    """
    blocks = -(-count // 4)
    assert blocks <= 1 << 16 and 0 <= view < 256 and 0 <= epoch < 1 << 32
    sample = np.asarray(ids, dtype=np.int64).astype(np.uint64)[:, None]
    block = np.arange(blocks, dtype=np.uint64)[None, :] | np.uint64(_STREAMS[stream] << 24 | view << 16)
    shape = (sample.shape[0], blocks)
    counter = (sample & _LOW, sample >> _32, np.full((1, 1), epoch, np.uint64), block)
    words = philox(tuple(np.broadcast_to(c, shape) for c in counter), (seed & 0xFFFFFFFF, seed >> 32))
    return np.stack(words, axis=-1).reshape(shape[0], 4 * blocks)[:, :count]


def uniform(seed: int, stream: Stream, epoch: int, ids: NDArray[np.int64], view: int, count: int) -> NDArray[np.float64]:
    """(len(ids), count) numbers in [0, 1), multiples of 2^-32."""
    numbers: NDArray[np.float64] = bits(seed, stream, epoch, ids, view, count) * np.float64(2.0**-32)
    return numbers


def shuffled(seed: int, epoch: int, ids: Ids, stream: Stream = "order") -> Ids:
    """`ids` (distinct, ascending) in a random order: sorted by 64 keyed bits each, ties (of probability n^2 / 2^65) by id. A subset has
    the order of the whole set without the other ids."""
    words = bits(seed, stream, epoch, ids, 0, 2)
    return ids[np.argsort(words[:, 0] << _32 | words[:, 1], kind="stable")]


def permutation(seed: int, epoch: int, size: int, stream: Stream = "order") -> Ids:
    """A random order of range(size), by a sort."""
    return shuffled(seed, epoch, np.arange(size, dtype=np.int64), stream)


# ── An order that is never written down ────────────────────────────────────────────────────────────────────────────


def order(seed: int, epoch: int, ids: int | Ids, rule: Rule) -> Callable[[Ids], Ids]:
    """A function: positions (n,) → ids at these positions of the epoch's random order of `ids`: distinct and ascending, or a number for
    all of range(ids).

    Sorted, a subset has the order of the whole set without the other ids. By `entries` it has an order of its own: that of its places.
    """
    size = ids if isinstance(ids, int) else len(ids)
    if rule == "sort" or size <= SORTED_UP_TO:
        whole = permutation(seed, epoch, size) if isinstance(ids, int) else shuffled(seed, epoch, ids)
        return whole.__getitem__
    if isinstance(ids, int):
        return lambda positions: entries(seed, epoch, positions, size)
    return lambda positions: ids[entries(seed, epoch, positions, size)]


def entries(seed: int, epoch: int, positions: Ids, size: int) -> Ids:
    """(n,) ids at `positions` (n,) of a random order of range(size), in time and memory of the positions alone.

    The order is a generalised Feistel network of eight rounds over a · b numbers, a = ⌈√size⌉ and b = ⌈size / a⌉, whose rounds add Philox
    bits modulo a and b in turn. What leaves the range goes through again until it is back in it, which keeps this a bijection (Black and
    Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002). Since a · b < size + a, a position takes fewer than 1 + 2 / √size
    passes in the mean: 1.002 at 2^20.
    """
    return _walked(seed, epoch, positions, size, range(_ROUNDS), 1)


def positions_of(seed: int, epoch: int, ids: Ids, size: int) -> Ids:
    """(n,) positions at which `entries` has `ids` (n,)."""
    return _walked(seed, epoch, ids, size, range(_ROUNDS)[::-1], -1)


def _walked(seed: int, epoch: int, places: Ids, size: int, rounds: range, sign: int) -> Ids:
    assert size > 0 and (not len(places) or (places.min() >= 0 and places.max() < size)), "a place outside the range"
    a = math.isqrt(size - 1) + 1
    b = -(-size // a)
    found = np.array(places, np.int64)
    outside = np.arange(len(found))
    while len(outside):
        halves = [found[outside] // b, found[outside] % b]
        for number in rounds:
            mine, other = number % 2, 1 - number % 2
            # The sort's bits have view 0, each round has another.
            words = bits(seed, "order", epoch, halves[other], number + 1, 2)
            modulus = (a, b)[mine]
            halves[mine] = (halves[mine] + sign * ((words[:, 0] << _32 | words[:, 1]) % np.uint64(modulus)).astype(np.int64)) % modulus
        found[outside] = halves[0] * b + halves[1]
        outside = outside[found[outside] >= size]
    return found
