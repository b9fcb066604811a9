"""The order of datasets that are too large to sort, here above 100 images, and of those that were prepared before."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from simclr import checkpoint, keyed
from simclr.config import Views
from simclr.data import loader
from simclr.data.manifest import Manifest, read_manifest, write_manifest
from simclr.errors import UserError
from simclr.views.preprocessing import Preprocessing
from tests.simclr.test_train import config
from tests.support.small import run

IMAGES, SEEN = 240, Preprocessing.of(Views(size_px=16))


@pytest.fixture
def large(patterns: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """240 patterns to train, more than are sorted."""
    monkeypatch.setattr(keyed, "SORTED_UP_TO", 100)
    return of_schema(0, patterns, tmp_path / "large")


def of_schema(schema: int, patterns: Path, out: Path) -> Path:
    """`patterns` with a manifest as it would be written anew (0), or of a stated schema."""
    out.mkdir()
    for shard in patterns.glob("*.beton"):
        (out / shard.name).symlink_to(shard)
    write_manifest(out, replace(read_manifest(patterns), schema=schema))
    return out


def taken(data: Path, first: int, steps: int, rank: int = 0, world: int = 1, ids: np.ndarray | None = None) -> list[list[int]]:
    stream = loader.batches(config(), data, first, rank, world, ids=ids)
    found = [batch.ids.tolist() for batch in itertools.islice(stream, steps)]
    stream.close()
    return found


def test_a_manifest_that_is_written_anew_has_the_schema_that_its_order_needs(patterns: Path, large: Path, tmp_path: Path) -> None:
    assert json.loads((patterns / "manifest.json").read_text())["schema"] == 1 and read_manifest(patterns).order == "sort"
    assert json.loads((large / "manifest.json").read_text())["schema"] == 2 and read_manifest(large).order == "by size"
    old = read_manifest(of_schema(1, patterns, tmp_path / "old"))
    assert old.order == "sort" and json.loads(replace(old, source="moved").to_json())["schema"] == 1  # what is copied stays as it was
    text = old.to_json()
    assert next(iter(json.loads(text))) == "schema" and Manifest.from_json(text).to_json() == text
    for schema, said in ((0, "0"), (3, "3"), ("2", "'2'"), (None, "None"), ([], r"\[\]")):
        with pytest.raises(UserError, match=f"the manifest has shard schema {said}, this version reads 1 to 2; prepare the data again"):
            Manifest.from_json(json.dumps(json.loads(text) | {"schema": schema}))


def test_a_large_epoch_has_each_image_once_in_the_order_of_entries(large: Path) -> None:
    for epoch in (0, 1):
        found = list(itertools.chain(*taken(large, 10 * epoch, 10)))
        assert found == keyed.entries(config().seed, epoch, np.arange(IMAGES), IMAGES).tolist()
        assert sorted(found) == list(range(IMAGES)) != found


def test_a_large_epoch_is_the_same_after_a_resume_and_on_other_ranks(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = taken(large, 0, 12)
    monkeypatch.setattr(loader, "_LOOKED_UP", 72)  # three steps of one rank, twelve of four
    assert taken(large, 7, 5) == whole[7:]
    ranks = [taken(large, 7, 5, rank, 4) for rank in range(4)]
    assert [list(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)] == whole[7:]


def test_training_on_a_large_dataset_resumes_bitwise(large: Path, tmp_path: Path) -> None:
    settings = config(checkpoint_every_steps=1)
    run(settings, large, tmp_path / "whole")
    run(settings, large, tmp_path / "parts", until=7)
    run(settings, large, tmp_path / "parts")
    a, b = (checkpoint.read(tmp_path / part / "step-000000012").tensors for part in ("whole", "parts"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_data_of_before_keeps_its_order_at_every_size(patterns: Path, large: Path, tmp_path: Path) -> None:
    old = of_schema(1, patterns, tmp_path / "old")
    expected = keyed.permutation(config().seed, 0, IMAGES).tolist()
    assert list(itertools.chain(*taken(old, 0, 10))) == expected != list(itertools.chain(*taken(large, 0, 10)))
    some = np.concatenate([b.ids for b in loader.in_order(old, "train", SEEN, 64, limit=10)])
    assert some.tolist() == np.sort(keyed.permutation(0, 0, IMAGES)[:10]).tolist()


def test_a_small_subset_of_large_data_is_sorted_and_a_large_one_is_not(large: Path) -> None:
    few, many = np.arange(0, IMAGES, 3), np.arange(IMAGES - 10)
    seed = config().seed
    assert list(itertools.chain(*taken(large, 0, 3, ids=few))) == keyed.shuffled(seed, 0, few)[:72].tolist()
    assert list(itertools.chain(*taken(large, 0, 9, ids=many))) == keyed.entries(seed, 0, np.arange(216), len(many)).tolist()


def test_a_draw_from_large_data_takes_as_many_positions_as_it_gives(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyed, "permutation", None)
    found = np.concatenate([batch.ids for batch in loader.in_order(large, "train", SEEN, 64, limit=50)])
    assert found.tolist() == np.sort(keyed.entries(0, 0, np.arange(50), IMAGES)).tolist()
