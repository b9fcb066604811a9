"""Exact neighbours and curation over blocks, against the plain way over all rows at once, and whatever the blocks are."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from simclr.evaluation import curation, search
from simclr.evaluation.search import Bank


def bank_of(h: NDArray[np.float32], rows: int) -> Bank:
    unit = torch.nn.functional.normalize(torch.from_numpy(h), dim=1)

    def blocks() -> Iterator[tuple[int, Tensor]]:
        for first in range(0, len(unit), rows):
            yield first, unit[first : first + rows]

    return Bank(len(h), blocks, lambda some: unit[some])


def cosines(h: NDArray[np.float32]) -> NDArray[np.float64]:
    unit = h.astype(np.float64) / np.linalg.norm(h.astype(np.float64), axis=1, keepdims=True)
    return unit @ unit.T


@pytest.fixture(scope="module")
def h() -> NDArray[np.float32]:
    """300 rows in 40 clouds, some of them copies."""
    draw = np.random.default_rng(0)
    centres = draw.standard_normal((40, 12))
    found = (centres[draw.integers(0, 40, 300)] + 0.2 * draw.standard_normal((300, 12))).astype(np.float32)
    found[[17, 230, 299]] = found[4]
    return found


@pytest.mark.parametrize("rows", [7, 64, 300])
def test_neighbours_are_those_of_a_full_sort(h: NDArray[np.float32], rows: int) -> None:
    found = search.search(torch.nn.functional.normalize(torch.from_numpy(h[:50]), dim=1), bank_of(h, rows), 9)
    table = cosines(h)[:50]
    best = np.sort(table, 1)[:, ::-1][:, :9]
    assert np.abs(found.similarity.numpy() - best).max() < 1e-6
    assert np.abs(np.take_along_axis(table, found.index.numpy(), 1) - best).max() < 1e-6  # the rows that it names have these cosines
    assert all(len(set(row)) == 9 for row in found.index.tolist())
    assert sorted(found.index[4, :4].tolist()) == [4, 17, 230, 299]


@pytest.mark.parametrize("rows", [16, 700, 3000])
def test_of_more_equal_rows_than_are_asked_for_the_first_are_found(rows: int) -> None:
    h = np.ones((3000, 4), np.float32)
    h[::3] = [1, 0, 0, 0]
    found = search.search(torch.full((2, 4), 0.5), bank_of(h, rows), 9)
    assert found.index.tolist() == [[row for row in range(15) if row % 3][:9]] * 2


@pytest.mark.parametrize("rows", [7, 64, 300])
def test_a_row_is_not_its_own_neighbour(h: NDArray[np.float32], rows: int) -> None:
    """A copy of it is. k is at most the rows that remain."""
    unit = torch.nn.functional.normalize(torch.from_numpy(h), dim=1)
    found = search.search(unit[[4, 17]], bank_of(h, rows), 3, own=np.array([4, 17]))
    assert [sorted(row) for row in found.index.tolist()] == [[17, 230, 299], [4, 230, 299]]
    assert search.search(unit[:1], bank_of(h[:5], rows), 99, own=np.array([0])).index.shape == (1, 4)
    assert search.search(unit[:1], bank_of(h[:5], rows), 99).index.shape == (1, 5)


def components(near: NDArray[np.bool_]) -> list[int]:
    """The first row of each row's component, by walking."""
    root = [-1] * len(near)
    for i in range(len(near)):
        if root[i] < 0:
            root[i], todo = i, [i]
            while todo:
                for j in np.flatnonzero(near[todo.pop()]).tolist():
                    if root[j] < 0:
                        root[j] = i
                        todo.append(j)
    return root


@pytest.mark.parametrize("above", [0.85, 0.93, 0.97, 0.9999])
@pytest.mark.parametrize("rows", [7, 300])
def test_groups_are_the_connected_components(h: NDArray[np.float32], rows: int, above: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where pairs are joined many times on the way, and rows compared a few at a time."""
    monkeypatch.setattr(curation, "_PAIRS", 20)
    monkeypatch.setattr(curation, "_AT_ONCE", 5)
    wanted = components(cosines(h) >= above)
    assert curation.groups(bank_of(h, rows), above).tolist() == wanted
    assert 1 < len(set(wanted)) < 300


@pytest.mark.parametrize("pool", [1, 6, 1024])
@pytest.mark.parametrize("rows", [7, 300])
def test_the_farthest_is_chosen_each_time(h: NDArray[np.float32], rows: int, pool: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one pass for each row would, however many compete between two passes."""
    monkeypatch.setattr(curation, "_POOL", pool)
    found = curation.farthest_first(bank_of(h, rows), 25, first=11)
    far = 1 - cosines(h)
    chosen = [11]
    for _ in range(24):
        chosen.append(int(far[:, chosen].min(1).argmax()))
    assert found.rows.tolist() == chosen
    steps = [far[chosen[n], chosen[:n]].min() for n in range(1, 25)]
    assert np.abs(found.distance[1:] - steps).max() < 1e-6 and (np.diff(found.distance) <= 1e-6).all()
    assert found.radius == pytest.approx(far[:, chosen].min(1).max(), abs=1e-6)


def test_copies_are_not_chosen(h: NDArray[np.float32]) -> None:
    found = curation.farthest_first(bank_of(h, 64), 300, first=0)
    assert len(found.rows) == 297 and len({*found.rows.tolist()} & {4, 17, 230, 299}) == 1 and found.radius < 1e-6


@pytest.mark.parametrize("rows", [7, 300])
def test_isolation_is_the_mean_over_the_others(h: NDArray[np.float32], rows: int) -> None:
    found = curation.isolation(bank_of(h, rows), 5)
    table = cosines(h)
    np.fill_diagonal(table, -np.inf)
    best = np.sort(table, 1)[:, ::-1][:, :5]
    assert np.abs(found.distance - (1 - best.mean(1))).max() < 1e-6
    assert np.abs(table[np.arange(300), found.nearest] - best[:, 0]).max() < 1e-6
