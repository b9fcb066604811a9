"""Subsets of labels: balanced, keyed, nested; label files by id and by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from simclr import keyed
from simclr.data import labels, loader
from simclr.data.manifest import read_names
from simclr.errors import UserError

Y = np.array([0] * 100 + [1] * 250 + [2] * 3 + [-1] * 40 + [3] * 50, np.int64)


def test_each_class_gives_its_share_rounded_and_at_least_one() -> None:
    for share, counts in ((0.01, [1, 3, 1, 1]), (0.1, [10, 25, 1, 5]), (0.5, [50, 125, 2, 25]), (1.0, [100, 250, 3, 50])):
        ids = labels.subset(Y, share, seed=0)
        assert np.bincount(Y[ids]).tolist() == counts and (np.diff(ids) > 0).all()
    assert labels.subset(Y, 1.0, 0).tolist() == np.flatnonzero(Y >= 0).tolist()


def test_a_subset_is_keyed_nested_and_another_for_another_seed() -> None:
    one, ten = labels.subset(Y, 0.01, 3), labels.subset(Y, 0.1, 3)
    assert set(one) < set(ten) and labels.subset(Y, 0.1, 3).tolist() == ten.tolist() != labels.subset(Y, 0.1, 4).tolist()
    # An independent way: the smallest 64 bits of each class.
    words = keyed.bits(3, "subset", 0, np.arange(len(Y)), 0, 2).astype(object)
    bits = [int(a) << 32 | int(b) for a, b in words]
    assert ten[:10].tolist() == sorted(sorted(range(100), key=lambda i: bits[i])[:10])
    # The choice in a class does not depend on the other classes.
    fewer = np.where(Y == 1, -1, Y)
    assert labels.subset(fewer, 0.1, 3).tolist() == [i for i in ten if Y[i] != 1]


def test_a_share_or_data_that_gives_nothing_is_refused() -> None:
    for share in (0.0, -0.1, 1.1):
        with pytest.raises(UserError, match=r"the share of labels is .*; expected above 0 and at most 1"):
            labels.subset(Y, share, 0)
    with pytest.raises(UserError, match="no image of the training split has a label"):
        labels.subset(np.full(5, -1), 0.1, 0)


NAMES = [f"train/n{y:08d}/n{y:08d}_{i}.JPEG" for i, y in enumerate([1, 1, 2, 2, 3])]


def test_a_label_file_is_read_back_by_id_and_by_name(tmp_path: Path) -> None:
    y, ids = np.array([0, 0, 1, 1, 2]), np.array([1, 2, 4])
    for names in (None, NAMES):
        labels.write(tmp_path / "labels.txt", ids, names, {"share of each class": 0.5, "seed": 0})
        text = (tmp_path / "labels.txt").read_text().splitlines()
        assert text[:2] == ["# share of each class: 0.5", "# seed: 0"] and text[2] == (names[1] if names else "1")
        assert labels.read(tmp_path / "labels.txt", y, names).tolist() == [1, 2, 4]
    # As in the official lists of ImageNet: file names alone, in any order; a whole path may be among them.
    (tmp_path / "official.txt").write_text("n00000003_4.JPEG\n\nn00000001_1.JPEG\ntrain/n00000002/n00000002_2.JPEG\n")
    assert labels.read(tmp_path / "official.txt", y, NAMES).tolist() == [1, 2, 4]
    assert labels.digest(np.array([4, 1, 2])) == labels.digest(ids) != labels.digest(ids[:2])


@pytest.mark.parametrize(
    ("text", "names", "error"),
    [
        ("# nothing\n", NAMES, "lists no image"),
        ("0\n7\n", None, r"line 2: there is no sample 7; the training split has 5 images"),
        ("n00000001_1.JPEG\n", None, r"these shards have no file names; give sample ids"),
        ("n1.JPEG\n", NAMES, r"line 1: no image of the training split has the name 'n1.JPEG'; expected a file name as in the source"),
        ("same.JPEG\n", ["a/same.JPEG", "b/same.JPEG", "c", "d", "e"], "more than one image has the name"),
        ("1\n# again\n1\n", None, "line 3: '1' is listed already, in line 1"),
        ("3\n", None, "has no label; leave it out"),
        ("2\n", ["7", "6", "5", "4", "2"], r"line 1: 2 is a sample id, and the name of image 4; give sample ids alone"),
    ],
)
def test_invalid_label_files_are_refused(tmp_path: Path, text: str, names: list[str] | None, error: str) -> None:
    (tmp_path / "labels.txt").write_text(text)
    with pytest.raises(UserError, match=error):
        labels.read(tmp_path / "labels.txt", np.array([0, 0, 1, -1, 2]), names)


def test_what_a_number_means_does_not_depend_on_the_rest_of_a_list(tmp_path: Path) -> None:
    """Rows of tables are called by their numbers, so that the end of a name may be one."""
    names = ["rows/4", "rows/3", "a.jpg", "rows/1", "rows/0"]
    for text, ids in (("1\n", [1]), ("1\na.jpg\n", [1, 2]), ("rows/1\n", [3])):
        (tmp_path / "list.txt").write_text(text)
        assert labels.read_subset(tmp_path / "list.txt", 5, names).tolist() == ids


def test_a_subset_has_the_order_of_the_whole_set() -> None:
    ids = np.array([3, 5, 8, 13, 40])
    whole = keyed.permutation(7, 2, 50)
    assert keyed.shuffled(7, 2, ids).tolist() == [i for i in whole.tolist() if i in ids]


def test_the_loader_gives_the_subset_and_nothing_else(patterns: Path) -> None:
    from tests.simclr.methods.test_classifier import TUNED

    y = loader.labels(patterns)
    assert len(y) == 240 and set(y.tolist()) == set(range(10))
    ids = labels.subset(y, 0.1, 0)
    stream = loader.batches(TUNED, patterns, 0, 0, 1, ids=ids)
    seen = [next(stream) for _ in range(2 * TUNED.steps_per_epoch(len(ids)))]
    stream.close()
    for epoch in (0, 1):
        found = np.concatenate([b.ids.numpy() for b in seen if b.epoch == epoch])
        assert sorted(found) == ids.tolist() and found.tolist() == keyed.shuffled(TUNED.seed, epoch, ids).tolist()
    assert all((b.labels.numpy() == y[b.ids.numpy()]).all() for b in seen)


def test_shards_know_the_names_of_files(photographs: Path, tmp_path: Path) -> None:
    names = read_names(photographs, "train", 240)
    assert names is not None and names[:2] == ["000.jpg", "001.jpg"] and len(names) == 240
    with pytest.raises(UserError, match="has 240 names, the split 239 images"):
        read_names(photographs, "train", 239)
    assert read_names(photographs, "test", 60) is None
