"""The quick table: one decode for all its encoders, and the numbers that each would have alone."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import simclr
from pipelines.commands.report import gather
from pipelines.evaluation import quick, spread
from pipelines.evaluation.inputs import held_back
from pipelines.parts.run import Where
from pipelines.runs.directory import open_run
from pipelines.runs.scores import WHOLE, limited_to
from simclr.data import loader
from simclr.data.manifest import read_manifest
from simclr.encoder.directory import config_of, read_text
from simclr.errors import UserError
from simclr.evaluation.features import Features, embed, pixels
from simclr.evaluation.knn import knn
from simclr.evaluation.linear import linear_probe
from simclr.evaluation.metrics import wilson
from simclr.methods.simclr import build_model
from simclr.recipes import recipe


def test_each_split_is_decoded_once_and_each_encoder_has_its_own_scores(
    patterns: Path, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: Counter[str] = Counter()
    in_order = loader.in_order

    def counted(data: Path, split: str, *others: Any, **named: Any) -> Any:
        read[split] += 1
        return in_order(data, split, *others, **named)

    monkeypatch.setattr(loader, "in_order", counted)
    rows = quick.run(published, patterns, quick.Settings(device="cpu"))
    assert read == {"train": 1, "test": 1}
    encoder, config = simclr.load_encoder(published), config_of(read_text(published))
    encoders = {"raw pixels": pixels, "untrained encoder": build_model(config).encoder.eval(), "trained encoder": encoder.encoder}
    assert [row["name"] for row in rows] == list(encoders)
    for row, (name, module) in zip(rows, encoders.items(), strict=True):
        train, test = (embed(module, in_order(patterns, s, encoder.preprocessing, 256), encoder.preprocessing) for s in ("train", "test"))
        voted = knn(train.h, train.y, test.h, test.y, config.watch.k, config.watch.temperature)["top1"]
        probed = linear_probe(train.h, train.y, test.h, test.y)["top1"]
        assert (row["knn_top1"], row["probe_top1"]) == (pytest.approx(voted, abs=1 / 60), pytest.approx(probed, abs=1 / 60)), name


def test_workers_give_the_table_of_one_process(patterns: Path, published: Path, tmp_path: Path, shared_ray: None) -> None:
    directory = tmp_path / "encoder"
    shutil.copytree(published, directory)
    alone = quick.run(directory, patterns, quick.Settings(device="cpu", limit=50))
    together = quick.run(directory, patterns, quick.Settings(device="cpu", limit=50, where=Where(workers=2)))
    assert [row["name"] for row in together] == [row["name"] for row in alone]
    for row, one in zip(together, alone, strict=True):
        assert row == {key: value if key == "name" else pytest.approx(value, abs=1e-5) for key, value in one.items()}
    assert {path.name for path in directory.iterdir()} == {path.name for path in published.iterdir()}


def test_parts_of_a_split_are_its_images_in_order(patterns: Path, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every picture is decoded once for all encoders, by whichever part has it."""
    read: Counter[tuple[str, int, int]] = Counter()
    in_order = loader.in_order

    def counted(data: Path, split: str, seen: Any, batch: int, limit: Any, threads: int, rank: int = 0, world: int = 1) -> Any:
        read[split, rank, world] += 1
        return in_order(data, split, seen, batch, limit, threads, rank, world)

    monkeypatch.setattr(loader, "in_order", counted)
    monkeypatch.setattr(spread, "_IMAGES", 70)
    asked = {"limit": None, "baselines": True, "device": "cpu"}
    done: list[int] = []
    manifest = read_manifest(patterns)
    found = spread.features(published, str(tmp_path), str(patterns), manifest, {"train": 240, "test": 60}, asked, Where(), done.append)
    assert read == {("train", part, 3): 1 for part in range(3)} | {("test", 0, 1): 1} and sum(done) == 300
    encoder = simclr.load_encoder(published)
    for split, each in found.items():
        whole = embed(encoder.encoder, in_order(patterns, split, encoder.preprocessing, 256), encoder.preprocessing)
        assert len(each) == 3 and torch.equal(each[-1].y, whole.y) and torch.equal(each[-1].ids, whole.ids)
        torch.testing.assert_close(each[-1].h, whole.h, rtol=1e-5, atol=1e-6)
    other = replace(manifest, splits=manifest.splits | {"test": ()})
    with pytest.raises(UserError, match="are other shards than the driver's; use s3:// or one disk"):
        spread.features(published, str(tmp_path), str(patterns), other, {"train": 240}, asked, Where(), done.append)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("threads", [1, 2])
def test_features_of_several_encoders_in_one_pass_are_bitwise_those_of_each(patterns: Path, published: Path, threads: int) -> None:
    from simclr.evaluation.features import embed_each

    encoder = simclr.load_encoder(published)
    seen, count = encoder.preprocessing, read_manifest(patterns).examples("train")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    raw, own = embed_each([pixels, encoder.encoder], loader.in_order(patterns, "train", seen, 100), count, seen)
    assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    for module, found in ((pixels, raw), (encoder.encoder, own)):
        alone = embed(module, loader.in_order(patterns, "train", seen, 100), seen)
        assert torch.equal(found.h, alone.h) and torch.equal(found.y, alone.y) and torch.equal(found.ids, alone.ids)
        assert not found.h.requires_grad


def test_the_rest_of_a_held_back_tenth_moves_up_in_place() -> None:
    h = torch.randn(9000, 3)
    train = Features(h.clone(), torch.arange(9000), torch.arange(9000))
    rest, test = held_back(train)
    assert len(test.y) == 900 and len(rest.y) == 8100 and rest.h.data_ptr() == train.h.data_ptr()
    assert sorted([*rest.y.tolist(), *test.y.tolist()]) == list(range(9000))
    assert torch.equal(rest.h, h[rest.y]) and torch.equal(test.h, h[test.y]) and torch.equal(rest.ids, rest.y)


def test_a_limited_evaluation_leaves_the_whole_one_and_says_what_it_is_of(
    patterns: Path, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`evaluate --limit 50` replaced the scores of all images without a word, and a lucky subset could win."""
    run = open_run(tmp_path / "run", "patterns_tiny", recipe("patterns_tiny"), patterns)
    run.save()
    shutil.copytree(published, run.encoder)
    some = quick.Settings(device="cpu", baselines=False, limit=50)
    quick.run(run.path, None, some)
    assert quick.scores_of(run.path)[1].limit == "at most 50 training and 50 test images" and run.evaluation() is None
    assert gather(run).measured.endswith(", of at most 50 training and 50 test images") and (run.path / "pictures.npz").is_file()
    quick.run(run.path, None, quick.Settings(device="cpu", baselines=False))
    whole, pictures = run.evaluation_file().read_bytes(), (run.path / "pictures.npz").read_bytes()
    capsys.readouterr()
    quick.run(run.path, None, some)
    assert "evaluation.json keeps the scores of all images; these, of at most 50" in capsys.readouterr().err
    assert run.evaluation_file().read_bytes() == whole and (run.path / "pictures.npz").read_bytes() == pictures
    rows, measured = quick.scores_of(run.path)
    assert measured.whole and measured.images["knn_top1"] == 60 and measured.split == "the test split"
    assert measured.intervals["knn_top1"] == wilson(rows[-1]["knn_top1"], 60) and "rankme" not in measured.intervals
    assert (measured.shards_sha256, measured.manifest_sha256) == (read_manifest(patterns).shards_sha256, run.data_digest)
    page = gather(run)
    assert page.measured.startswith("60 images of the test split of ") and "on 50 images" in page.facts["also"]
    assert limited_to(read_manifest(patterns), 240, None) == WHOLE  # a limit that leaves no image out


def test_the_same_images_prepared_elsewhere_are_the_same_data(patterns: Path) -> None:
    one = read_manifest(patterns)
    elsewhere = replace(one, source="/another/folder", identity="x", times="later", versions={"ffcv": "9"})
    assert elsewhere.shards_sha256 == one.shards_sha256
    others = (replace(one, classes=one.classes[::-1]), replace(one, splits={"train": one.splits["train"]}))
    assert len({one.shards_sha256, *(other.shards_sha256 for other in others)}) == 3
