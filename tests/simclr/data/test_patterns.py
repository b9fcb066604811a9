"""The built-in dataset: pure in (seed, id), balanced, near-grey or two colours, and hard to tell apart by pixels."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from simclr.data.sources.patterns import CLASSES, patterns_source, render
from simclr.errors import UserError
from simclr.evaluation.knn import knn

IDS = np.arange(200, dtype=np.int64)


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    """Rendered alone, in another order or across the internal block, sample 7 has the same bytes."""
    images, labels = render(np.arange(1300, dtype=np.int64), seed=3)
    some = np.array([1299, 7, 511, 512, 7], np.int64)
    again, again_labels = render(some, seed=3)
    assert np.array_equal(images[some], again)
    assert np.array_equal(labels[some], again_labels)
    far, _ = render(np.array([2**40 + 7], np.int64), seed=3)
    assert not np.array_equal(images[7], far[0])


def test_the_seed_changes_every_image_and_no_label() -> None:
    (a, y), (b, z) = render(IDS, seed=0), render(IDS, seed=1)
    assert (a != b).any(axis=(1, 2, 3)).all()
    assert np.array_equal(y, z)


def test_classes_are_sorted_and_balanced_by_id() -> None:
    assert list(CLASSES) == sorted(["stripes", "checks", "dots", "rings", "zigzag", "grid", "bricks", "diamonds", "crosses", "waves"])
    _, labels = render(IDS, seed=0, size_px=8)
    assert labels.dtype == np.int64
    assert labels.tolist() == [i % 10 for i in range(200)]


@pytest.mark.parametrize("size_px", [1, 17, 511])
def test_shape_and_type_at_any_size(size_px: int) -> None:
    images, labels = render(IDS[:3], seed=0, size_px=size_px)
    assert images.shape == (3, size_px, size_px, 3) and images.dtype == np.uint8
    assert labels.shape == (3,)
    nothing, _ = render(IDS[:0], seed=0, size_px=size_px)
    assert nothing.shape == (0, size_px, size_px, 3)


@pytest.mark.parametrize("size_px", [-1, 0, 512])
def test_a_size_that_cannot_be_rendered_is_named(size_px: int) -> None:
    with pytest.raises(UserError, match=rf"patterns of {size_px} px.*expected 1 to 511 px"):
        render(IDS[:1], seed=0, size_px=size_px)


def test_brightness_and_contrast_vary_and_seldom_clip() -> None:
    images, _ = render(np.arange(1000, dtype=np.int64), seed=0)
    grey = images.mean(axis=3)
    means, stds = grey.mean(axis=(1, 2)), grey.std(axis=(1, 2))
    assert 100 < means.mean() < 155 and means.std() > 20
    assert stds.min() > 12 and stds.max() < 100 and stds.std() > 8
    assert np.isin(images, (0, 255)).mean() < 0.02


def saturation(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """(n,) mean over the image of HSV saturation, (max − min) / max."""
    top, bottom = images.max(axis=3).astype(float), images.min(axis=3).astype(float)
    result: NDArray[np.float64] = ((top - bottom) / np.maximum(top, 1)).mean(axis=(1, 2))
    return result


@pytest.mark.parametrize(("train", "test"), [(2, 0), (9, 10), (237, 113), (600, 3)])
def test_classes_are_counted_without_rendering(train: int, test: int) -> None:
    source = patterns_source("patterns", f"train={train},test={test},size=8")
    found: dict[str, Counter[str | None]] = {}
    for item in source.items():
        found.setdefault(item.split, Counter())[item.label] += 1
    splits: Any = source.understood["splits"]
    assert {name: split["classes"] for name, split in splits.items()} == found
    assert {name: split["images"] for name, split in splits.items()} == ({"train": train, "test": test} if test else {"train": train})


def test_near_grey_by_default_and_saturated_when_coloured() -> None:
    """A tint of ±6 % per channel bounds the default's saturation by 1 − 0.94 / 1.06 = 0.113, rounding aside."""
    grey, coloured = saturation(render(IDS, seed=0)[0]), saturation(render(IDS, seed=0, coloured=True)[0])
    assert grey.mean() > 0.02 and grey.max() < 0.125
    assert coloured.mean() > 0.8 and coloured.min() > 0.55


def test_coloured_keeps_the_shapes() -> None:
    """The same ids show the same pattern: pixels on one side of it are near one colour, those on the other near another."""
    grey, coloured = render(IDS, seed=0, size_px=64)[0].mean(axis=3), render(IDS, seed=0, size_px=64, coloured=True)[0]
    for g, c in zip(grey, coloured, strict=True):
        light = g > np.median(g)
        between = np.abs(c[light].mean(axis=0) - c[~light].mean(axis=0)).max()
        assert between > 40


def test_patterns_are_scaled_with_the_image() -> None:
    """Twice the size is the same picture: averaged over 2 × 2 pixels it matches the small one up to noise and edges."""
    small, large = render(IDS, seed=0, size_px=32)[0] / 255.0, render(IDS, seed=0, size_px=64)[0] / 255.0
    halved = large.reshape(200, 32, 2, 32, 2, 3).mean(axis=(2, 4))
    assert np.abs(halved - small).mean() < 0.05
    assert np.abs(halved - np.roll(small, 5, axis=2)).mean() > 0.1


def test_raw_pixels_are_above_chance_and_far_from_enough() -> None:
    """kNN (cosine, k = 20, τ = 0.1) of raw pixels: 28 % with 4,000 training images; chance is 10 %."""
    images, labels = render(np.arange(2500, dtype=np.int64), seed=0)
    x, y = torch.from_numpy(images).flatten(1).float() / 255, torch.from_numpy(labels)
    for rows in (x, x - 0.5):  # the demo's encoder sees centred pixels, so neither form may be easy
        assert 0.15 < knn(rows[:2000], y[:2000], rows[2000:], y[2000:], k=20, temperature=0.1)["top1"] < 0.45
