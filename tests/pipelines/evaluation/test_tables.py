"""`simclr evaluate --features`: the scores of features from disk are those of the same rows in memory; what cannot be judged is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from simclr.evaluation.knn import knn
from simclr.evaluation.linear import linear_probe
from tests.support.command import Run, refused
from tests.support.features import write

CLASSES = ("ant", "bee", "cow")


def rows(n: int, seed: int = 0) -> tuple[Any, list[int]]:
    """Features (n, 6) of three overlapping classes, and their classes' numbers."""
    draw = np.random.default_rng(seed)
    y = draw.integers(0, 3, n)
    h = draw.normal(size=(n, 6)) + 1.2 * np.eye(6)[y]
    return h.astype(np.float32), y.tolist()


def table(folder: Path, n: int, splits: list[str] | None = None, seed: int = 0, **named: Any) -> Path:
    h, y = rows(n, seed)
    return write(folder, h, [f"{i}.png" for i in range(n)], labels=[CLASSES[c] for c in y], splits=splits, **named)


def expected(train: tuple[Any, Any], test: tuple[Any, Any], k: int = 200) -> str:
    """The row of the table, from the rows in memory."""
    given = *(torch.as_tensor(part) for part in train), *(torch.as_tensor(part) for part in test)
    return f"{100 * knn(*given, k, 0.1)['top1']:>6.1f} {100 * linear_probe(*given)['top1']:>6.1f}"


def test_one_place_is_cut_by_its_splits_and_two_are_a_split_each(simclr: Run, tmp_path: Path) -> None:
    splits = (["train"] * 3 + ["test"]) * 100
    h, y = rows(400)
    at = np.array(splits) == "train"
    row = expected((h[at], np.array(y)[at]), (h[~at], np.array(y)[~at]))
    one = table(tmp_path / "one", 400, splits, parts=3)
    code, out, said = simclr("evaluate", "--features", one, "--device", "cpu")
    assert code == 0 and f"encoder abababababab {row}" in out and "300 training and 100 test rows" in said
    names = [f"{i}.png" for i in range(400)]
    for place, some in (("a", at), ("b", ~at)):
        numbers = np.flatnonzero(some)
        write(tmp_path / place, h[some], [names[i] for i in numbers], labels=[CLASSES[y[i]] for i in numbers])
    code, out, _ = simclr("evaluate", "--features", tmp_path / "a", tmp_path / "b", "--device", "cpu")
    assert code == 0 and f"encoder abababababab {row}" in out


def test_without_a_test_split_a_tenth_is_held_back_and_protocols_take_the_rows(simclr: Run, tmp_path: Path) -> None:
    place = table(tmp_path / "train", 300)
    code, _, said = simclr("evaluate", "--features", place, "--device", "cpu")
    assert code == 0 and "270 training and 30 test rows" in said
    words = ("--protocol", "knn", "probe", "lbfgs", "--resamples", "100", "--device", "cpu", "--out", tmp_path / "out")
    assert simclr("evaluate", "--features", place, *words)[0] == 0
    found = {name: json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in ("knn", "probe", "lbfgs")}
    assert all(result["settings"]["train"] == 270 and result["settings"]["test"] == 30 for result in found.values())
    assert all(result["top1"] > 0.4 and list(result["per_class"]) == list(CLASSES) for result in found.values())


def test_rows_without_a_label_are_left_out_and_classes_of_the_test_rows_alone_are_named(simclr: Run, tmp_path: Path) -> None:
    h, y = rows(200)
    labels = [None if i % 5 == 0 else CLASSES[c] for i, c in enumerate(y)]
    splits = ["train"] * 150 + ["test"] * 50
    train = np.array([i for i in range(150) if labels[i]])
    test = np.array([i for i in range(150, 200) if labels[i]])
    labels[151] = "dodo"
    place = write(tmp_path / "some", h, list(map(str, range(200))), labels=labels, splits=splits)
    code, out, said = simclr("evaluate", "--features", place, "--k", "5", "--device", "cpu")
    strange = np.array([3 if i == 151 else y[i] for i in test])
    row = expected((h[train], np.array(y)[train]), (h[test], strange), 5)
    assert code == 0 and row in out and "1 of 40 labelled test rows are of classes that no training row has (dodo): they are judged" in said


def test_what_is_no_pair_of_one_encoders_splits_is_refused(simclr: Run, tmp_path: Path) -> None:
    train, test = table(tmp_path / "train", 60), table(tmp_path / "test", 20, seed=1)
    other = table(tmp_path / "other", 20, encoder="cd" * 32)
    both, alone = table(tmp_path / "both", 40, ["train", "test"] * 20), table(tmp_path / "alone", 9, ["test"] * 9)
    h, _ = rows(20)
    dodos = write(tmp_path / "dodos", h, list(map(str, range(20))), labels=["dodo"] * 20)
    bare = write(tmp_path / "bare", h, list(map(str, range(20))))
    for words, sentence in (
        ((train, other), "of encoder abababababab and .* of cdcdcdcdcdcd.*embed both with one encoder"),
        ((both, test), "20 of test and 20 of train, and was given as the training split alone; give one place"),
        ((alone,), "rows of the test split alone; give the training rows, too: --features TRAIN TEST"),
        ((train, dodos), "20 of 20 labelled test rows are of classes that no training row has .dodo., so every score would be 0"),
        ((train, test, test), "--features has 3 places; expected TRAIN, or TRAIN TEST"),
        ((train, "--protocol", "sgd"), "--features have no pictures"),
        ((train, "--data", "shards"), "--features have no pictures"),
        ((bare, "--protocol", "knn"), "have no labels, and every protocol needs them; leave out --protocol"),
        ((tmp_path / "nowhere",), "there are no features at"),
    ):
        refused(simclr("evaluate", "--features", *words), sentence)
    refused(simclr("evaluate", "runs/one", "--features", train), "--features are an encoder's already; leave out runs/one")
    refused(simclr("evaluate"), "what is to be evaluated.*--features TRAIN")
    code, out, _ = simclr("evaluate", "--features", bare, "--device", "cpu")
    assert code == 0 and "no labels" in out and "RankMe" in out


@pytest.mark.parametrize("limit", [30])
def test_a_limit_takes_the_same_rows_as_evaluation_of_an_encoder(simclr: Run, tmp_path: Path, limit: int) -> None:
    from simclr import keyed

    splits = ["train"] * 100 + ["test"] * 100
    h, y = rows(200)
    place = table(tmp_path / "one", 200, splits)
    code, out, said = simclr("evaluate", "--features", place, "--limit", str(limit), "--k", "5", "--device", "cpu")
    chosen = np.sort(keyed.permutation(0, 0, 100)[:limit])
    labels = np.array(y)
    row = expected((h[chosen], labels[chosen]), (h[100 + chosen], labels[100 + chosen]), 5)
    assert code == 0 and row in out and "30 training and 30 test rows" in said
