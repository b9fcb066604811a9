"""The order of an epoch without the order written down: a bijection, uniform, and the sort's where ranges are small."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest

from simclr import keyed

SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 10, 15, 16, 17, 97, 127, 128, 129, 1000, 1023, 1024, 1025, 4093, 65_535, 65_536, 65_537)
LARGE = (2**20 + 1, 10**8, 10**9, 2**40 - 87, 10**12 + 1)


def z_of(counts: np.ndarray) -> float:
    """How many standard deviations Pearson's χ² of `counts`, of equal expectations, lies above its mean; the deviation of a χ² of k
    degrees of freedom is √(2k)."""
    freedom = counts.size - 1
    expected = counts.sum() / counts.size
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
@pytest.mark.parametrize("size", SIZES)
def test_every_id_has_one_position(size: int, seed: int) -> None:
    places = np.arange(size)
    found = keyed.entries(seed, 5, places, size)
    assert np.array_equal(np.sort(found), places)
    assert np.array_equal(keyed.positions_of(seed, 5, found, size), places)


@pytest.mark.parametrize("size", LARGE)
def test_positions_are_asked_for_in_any_portion_and_found_again(size: int) -> None:
    places = np.random.default_rng(size).integers(0, size, 3000)
    places[:2] = 0, size - 1
    found = keyed.entries(3, 2, places, size)
    assert found.dtype == np.int64 and found.min() >= 0 and found.max() < size
    assert np.array_equal(np.concatenate([keyed.entries(3, 2, part, size) for part in np.split(places, [1, 64, 65])]), found)
    assert np.array_equal(keyed.positions_of(3, 2, found, size), places)
    for other in ((4, 2), (3, 3)):
        assert (keyed.entries(*other, places, size) == found).mean() < 0.01


def test_an_order_is_this_one_for_ever() -> None:
    """The network written out once more, in Python's whole numbers."""
    seed, epoch, size = 9, 4, 1_000_003
    a, b = 1001, 1000  # ⌈√size⌉, ⌈size / a⌉

    def once(x: int) -> int:
        halves = [x // b, x % b]
        for number in range(8):
            mine, other = number % 2, 1 - number % 2
            counter = tuple(np.array([v], np.uint64) for v in (halves[other], 0, epoch, (number + 1) << 16))
            words = [int(word[0]) for word in keyed.philox(counter, (seed, 0))]
            halves[mine] = (halves[mine] + (words[0] * 2**32 + words[1]) % (a, b)[mine]) % (a, b)[mine]
        return halves[0] * b + halves[1]

    for place in (0, 1, 17, size - 1):
        found = once(place)
        while found >= size:
            found = once(found)
        assert keyed.entries(seed, epoch, np.array([place]), size).tolist() == [found]


@pytest.mark.parametrize("size", [100_003, 10**9])
def test_where_a_position_leads_is_uniform(size: int) -> None:
    """χ² of position × id, of the steps between neighbours, and of where one position leads in many epochs. A deviation of 5 is one of
    some million; with two rounds in place of eight several are above 15."""
    places = np.arange(60_000) if size > 100_003 else np.arange(size)
    cells = 24
    found = keyed.entries(1, 0, places, size)
    if size > 100_003:  # in a whole order each id comes once, so its ids are no independent draws
        assert z_of(np.bincount(found * cells // size, minlength=cells)) < 5
    table = np.zeros((cells, cells))
    np.add.at(table, (np.arange(len(places)) * cells // len(places), found * cells // size), 1)
    assert z_of(table) < 5
    for apart in (1, 2, 1000):
        steps = (found[apart:] - found[:-apart]) % size
        assert z_of(np.bincount(steps * 64 // size, minlength=64)) < 5
        pairs = np.zeros((cells, cells))
        np.add.at(pairs, (found[:-apart] * cells // size, found[apart:] * cells // size), 1)
        assert z_of(pairs) < 5
    one = np.concatenate([keyed.entries(seed, epoch, np.array([size // 2]), size) for seed in range(20) for epoch in range(40)])
    assert z_of(np.bincount(one * 16 // size, minlength=16)) < 5


def test_all_orders_of_four_come_equally_often() -> None:
    orders = [tuple(keyed.entries(seed, 0, np.arange(4), 4).tolist()) for seed in range(600)]
    _, counts = np.unique(np.array(orders) @ [64, 16, 4, 1], return_counts=True)
    assert len(counts) == math.factorial(4) and z_of(counts) < 5


def test_a_batch_of_a_huge_range_takes_the_memory_of_the_batch() -> None:
    tracemalloc.start()
    try:
        keyed.order(1, 0, 10**12, "by size")(np.arange(4096))
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()


def test_small_ranges_and_data_of_before_are_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyed, "SORTED_UP_TO", 100)
    some = np.arange(0, 300, 3)
    places = np.arange(100)
    for rule in ("sort", "by size"):
        assert np.array_equal(keyed.order(7, 1, 100, rule)(places), keyed.permutation(7, 1, 100))
        assert np.array_equal(keyed.order(7, 1, some, rule)(places), keyed.shuffled(7, 1, some))
    places = np.arange(101)
    assert np.array_equal(keyed.order(7, 1, 101, "sort")(places), keyed.permutation(7, 1, 101))
    assert np.array_equal(keyed.order(7, 1, 101, "by size")(places), keyed.entries(7, 1, places, 101))
    some = np.arange(0, 303, 3)
    assert np.array_equal(keyed.order(7, 1, some, "sort")(places), keyed.shuffled(7, 1, some))
    assert np.array_equal(keyed.order(7, 1, some, "by size")(places), some[keyed.entries(7, 1, places, 101)])
