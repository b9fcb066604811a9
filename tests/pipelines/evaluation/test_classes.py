"""Test images of classes that no training image has can only be judged wrong: `evaluate` says how many they are, or refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from simclr.data import shards
from simclr.data.manifest import read_manifest
from simclr.data.sources.patterns import render
from simclr.data.sources.source import Item
from tests.support.command import Run, refused
from tests.support.sources import source_of

TRAIN = ("cat", "dog") * 6
QUICK, PROTOCOL = ("--no-baselines", "--k", "3"), ("--protocol", "knn", "--k", "3", "--resamples", "100", "--out", "out")


def prepared(out: Path, test: tuple[str | None, ...], train: tuple[str | None, ...] = TRAIN) -> Path:
    images, _ = render(np.arange(len(train) + len(test)), 0)
    labels = [*(("train", label) for label in train), *(("test", label) for label in test)]
    items = [Item(split, label, str(i), images[i]) for i, (split, label) in enumerate(labels)]
    shards.prepare(source_of(items, "pictures"), out, shards.Options(), 1, lambda done: None)
    return out


@pytest.mark.parametrize("flags", [QUICK, PROTOCOL])
def test_classes_that_training_lacks_are_counted_and_named(simclr: Run, published: Path, tmp_path: Path, flags: tuple[str, ...]) -> None:
    data = prepared(tmp_path / "data", ("cat", "fox", "elk", "owl", "bee", "fox", "dog", None))
    code, _, said = simclr("evaluate", published, "--data", data, *flags, "--device", "cpu")
    sentence = "are of classes that no training image has (bee, elk, fox and 1 more): they are judged wrong"
    assert code == 0 and f"5 of 7 labelled test images of {data} {sentence}" in said


@pytest.mark.parametrize("flags", [QUICK, PROTOCOL])
def test_a_test_split_without_any_class_of_training_is_refused(
    simclr: Run, published: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    """As where the test pictures' folder is called images."""
    data = prepared(tmp_path / "data", ("images",) * 4 + (None,))
    assert read_manifest(data).classes == ("cat", "dog", "images")
    refused(
        simclr("evaluate", published, "--data", data, *flags),
        r"4 of 4 labelled test images of .* are of classes that no training image has \(images\), so every score would be 0; "
        "prepare the data again, with --labels or --split-from",
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("test", [("cat", "dog", "dog"), (), (None, None)])
def test_nothing_is_said_where_training_has_every_class(simclr: Run, published: Path, tmp_path: Path, test: tuple[str | None, ...]) -> None:
    code, _, said = simclr("evaluate", published, "--data", prepared(tmp_path / "data", test), *QUICK)
    assert code == 0 and "no training image has" not in said
