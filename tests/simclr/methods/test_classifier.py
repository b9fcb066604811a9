"""Training a classifier: its first state, frozen parts, ranks, resuming, views."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines.train import classifiers
from simclr import checkpoint
from simclr.config import Watch
from simclr.data import labels, loader
from simclr.data.manifest import read_manifest
from simclr.encoder.directory import read_classifier
from simclr.errors import UserError
from simclr.evaluation import features
from simclr.methods.classifier import build_classifier, first_state, weighted_cross_entropy
from simclr.methods.simclr import build_model
from simclr.stages import FineTune
from simclr.train import Report, Start, train
from simclr.views.draw import Crop
from simclr.views.preprocessing import Preprocessing
from simclr.views.two_views import crop_and_flip, two_views
from tests.conftest import Within
from tests.support.ranks import Ranks
from tests.support.small import TINY, TUNED, mine


def subset(data: Path) -> np.ndarray:
    return labels.subset(loader.labels(data), 0.1, 0)


def begun(config: FineTune, published: Path, folder: Path) -> Path:
    """The checkpoint that a fine-tuning begins with."""
    return checkpoint.write(folder, first_state(config, published, 10), 2)


def run(config: FineTune, data: Path, folder: Path, until: int | None = None) -> list[Report]:
    reports = []
    for report in train(config, Start(data, checkpoint=checkpoint.latest(folder, print), ids=subset(data))):
        if report.due:
            checkpoint.write(folder, report.state, 2)
        reports.append(report)
        if report.step == until:
            break
    return reports


def steps(config: FineTune, data: Path, at: Path) -> tuple[list[float], dict[str, Tensor], dict[str, float]]:
    """Losses, and state and metrics at the end."""
    reports = list(train(config, Start(data, checkpoint=at, ids=subset(data))))
    return [r.metrics["train/loss"] for r in reports], reports[-1].state.tensors, reports[-1].metrics


def test_one_view_is_the_first_of_two_without_colour(patterns: Path, photographs: Path, within: Within) -> None:
    whole = dataclasses.replace(TINY.views, solarise_p=1.0)
    views = dataclasses.replace(whole, jitter_p=0.0, grey_p=0.0, blur_p=0.0, solarise_p=0.0)
    for data in (patterns, photographs):
        config = dataclasses.replace(TINY, views=views)
        stream = loader.batches(config, data, 3, 0, 1)
        batch = next(stream)
        both = two_views(batch.images[0], batch.ids, batch.epoch, views, config.seed)
        one = crop_and_flip(batch.images[0], batch.ids, batch.epoch, whole, config.seed)
        within("pixels", float((one - both[: len(one)]).abs().max()), 1e-6)
        stream.close()
        single = loader.batches(config, data, 3, 0, 1, crops=(Crop(count=1, views=views, distorted=False),))
        alone = next(single)
        assert torch.equal(crop_and_flip(alone.images[0], alone.ids, alone.epoch, views, config.seed), one)
        single.close()


def test_it_begins_with_the_published_network_and_the_chance_level_loss(patterns: Path, published: Path, tmp_path: Path) -> None:
    at = begun(TUNED, published, tmp_path)
    state = checkpoint.read(at)
    model = build_classifier(TUNED, 10, TUNED.tap)
    checkpoint.restore(state, model, torch.optim.SGD(model.parameters(), lr=0.1))
    source = build_model(dataclasses.replace(TINY, head=TUNED.head, seed=5))
    x = torch.rand(3, 3, 32, 32)
    assert torch.equal(model.eval().head(model.encoder(x)), source.eval().head(source.encoder(x))[1])  # the head's first layer
    losses, _, metrics = steps(dataclasses.replace(TUNED, train=dataclasses.replace(TUNED.train, steps=12)), patterns, at)
    assert losses[0] == pytest.approx(np.log(10), abs=1e-12)  # a classifier of zeros
    assert losses[-1] < 2 and metrics["eval/top1"] > 0.1 and metrics["eval/top5"] >= metrics["eval/top1"]
    with pytest.raises(UserError, match="tap is 4; the projection head has 3 layers"):
        dataclasses.replace(TUNED, tap=4)


def test_two_ranks_compute_what_one_does(patterns: Path, published: Path, tmp_path: Path, ranks: Ranks, within: Within) -> None:
    at = begun(TUNED, published, tmp_path)
    losses, tensors, metrics = steps(TUNED, patterns, at)
    for found, theirs, scores in ranks(2, steps, TUNED, patterns, at):
        within("loss", max(abs(a - b) for a, b in zip(losses, found, strict=True)), 1e-9)
        within("weights", max(float((theirs[name] - tensors[name]).abs().max()) for name in tensors), 1e-9)
        assert scores["eval/top1"] == metrics["eval/top1"] and scores["train/top1"] == metrics["train/top1"]


def test_stopped_and_resumed_is_bitwise_the_uninterrupted_run(patterns: Path, published: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(TUNED, train=dataclasses.replace(TUNED.train, precision="float32", checkpoint_every_steps=1))
    for part in ("whole", "parts"):
        begun(config, published, tmp_path / part)
    run(config, patterns, tmp_path / "whole")
    run(config, patterns, tmp_path / "parts", until=1)
    assert [r.step for r in run(config, patterns, tmp_path / "parts")] == [2, 3, 4]
    a, b = (checkpoint.read(tmp_path / part / "step-000000004").tensors for part in ("whole", "parts"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ── Rare classes ───────────────────────────────────────────────────────────────────────────────────────────────────


def weighted(scores: Tensor, y: Tensor, weights: Tensor) -> tuple[float, Tensor]:
    """The loss of this rank's rows, and the gradient with respect to them."""
    scores = mine(scores).clone().requires_grad_()
    loss = weighted_cross_entropy(scores, mine(y), weights)
    loss.backward()
    assert scores.grad is not None
    return loss.item(), scores.grad


@pytest.mark.parametrize("world", [1, 2, 4])
def test_weighted_loss_and_gradient_are_torchs_over_the_whole_batch(world: int, ranks: Ranks, within: Within) -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.tensor([0, 0, 0, 0, 0, 0, 1, 2])  # the first ranks see no rare class
    weights = torch.from_numpy(labels.balanced(y.numpy(), 4))
    assert weights.tolist() == [8 / (3 * 6), 8 / 3, 8 / 3, 0]  # nobody has the fourth class
    scores = torch.randn(8, 4, generator=generator, dtype=torch.float64).requires_grad_()
    expected = torch.nn.functional.cross_entropy(scores, y, weights)
    expected.backward()
    found = ranks(world, weighted, scores.detach(), y, weights) if world > 1 else [weighted(scores.detach(), y, weights)]
    within("loss", abs(sum(loss for loss, _ in found) / world - expected.item()), 1e-15)
    assert scores.grad is not None
    within("gradient", float((torch.cat([grad for _, grad in found]) / world - scores.grad).abs().max()), 1e-15)


def unbalanced(data: Path) -> np.ndarray:
    """Ten images of class 0, one or two of each other class."""
    y = loader.labels(data)
    return np.sort(np.concatenate([np.flatnonzero(y == c)[: 10 if c == 0 else 1 + c % 2] for c in range(10)]))


def tuned(config: FineTune, data: Path, at: Path) -> tuple[list[float], dict[str, Tensor]]:
    reports = list(train(config, Start(data, checkpoint=at, ids=unbalanced(data))))
    return [r.metrics["train/loss"] for r in reports], reports[-1].state.tensors


def test_balanced_classes_are_trained_alike_on_any_number_of_ranks(
    patterns: Path, published: Path, tmp_path: Path, ranks: Ranks, within: Within
) -> None:
    config = dataclasses.replace(TUNED, class_weights="balanced", train=dataclasses.replace(TUNED.train, batch_size=12))
    at = begun(config, published, tmp_path)
    losses, tensors = tuned(config, patterns, at)
    assert losses[0] == pytest.approx(np.log(10), abs=1e-12)
    for world in (2, 4):
        for found, theirs in ranks(world, tuned, config, patterns, at):
            within("loss", max(abs(a - b) for a, b in zip(losses, found, strict=True)), 1e-9)
            within("weights", max(float((theirs[name] - tensors[name]).abs().max()) for name in tensors), 1e-9)
    plain, _ = tuned(dataclasses.replace(config, class_weights="none"), patterns, at)
    assert abs(plain[-1] - losses[-1]) > 1e-3
    # The first step by hand: a classifier of zeros gives every class 1/10, so the bias moves by w (1/10 − [y = c]).
    stream = loader.batches(config, patterns, 0, 0, 1, ids=unbalanced(patterns))
    y = next(stream).labels
    stream.close()
    weights = torch.from_numpy(labels.balanced(loader.labels(patterns)[unbalanced(patterns)], 10))[y]
    gradient = (weights[:, None] * (0.1 - torch.nn.functional.one_hot(y, 10))).sum(0) / weights.sum()
    first = next(iter(train(config, Start(patterns, checkpoint=at, ids=unbalanced(patterns)))))
    moved = first.state.tensors["model.classifier.bias"] - checkpoint.read(at).tensors["model.classifier.bias"].double()
    within("first step", float((moved + first.metrics["train/lr"] * gradient).abs().max()), 1e-8)


def test_each_class_counts_alike_in_the_mean_per_class(patterns: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from simclr.methods import classifier

    y = torch.tensor([0] * 8 + [1] * 2 + [-1])
    right = torch.tensor([0] * 8 + [0, 1] + [2])  # all of the first class, half of the second
    found = features.Features(torch.nn.functional.one_hot(right, 10).float(), y, torch.arange(11))
    monkeypatch.setattr(classifier.features, "embed_split", lambda *given, **named: found)
    scores = classifier.test_scores(build_classifier(TUNED, 10, 1), TUNED, Start(patterns))
    assert scores["eval/top1"] == pytest.approx(0.9) and scores["eval/mean_per_class"] == pytest.approx(0.75)


def test_linear_leaves_the_network_bitwise_as_it_was(patterns: Path, published: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(TUNED, linear=True, watch=Watch(every_epochs=1))  # also after an evaluation, which ends evaluation mode
    at = begun(config, published, tmp_path)
    _, tensors, _ = steps(config, patterns, at)
    before = checkpoint.read(at).tensors
    changed = {name for name in before if not torch.equal(before[name].double(), tensors[name].double())}
    assert changed == {"model.classifier.weight", "model.classifier.bias"}
    assert {name.split(".")[1] for name in tensors if name.startswith("optimizer.")} == {"classifier"}


def test_the_published_classifier_gives_the_same_scores(patterns: Path, published: Path, tmp_path: Path) -> None:
    from pipelines.runs.directory import load_run, open_run
    from pipelines.train import classifiers

    config = dataclasses.replace(TUNED, train=dataclasses.replace(TUNED.train, precision="float32"))
    job = open_run(tmp_path / "run", "finetune-test", config, patterns, stage="finetune")
    job.save()
    begun(config, published, job.checkpoints)
    for report in run(config, patterns, job.checkpoints):
        job.append({"step": report.step, **report.metrics})
    job = load_run(job.path)
    assert job.config == config and job.stage == "finetune"
    classifiers.publish(job, tuple("0123456789"), config.tap, {"labels": 20})
    model, names = read_classifier(job.encoder)
    assert names == list("0123456789") and model.tap == 1
    from simclr.methods.classifier import test_scores

    again = test_scores(model, config, Start(patterns))
    assert again["eval/top1"] == report.metrics["eval/top1"] == classifiers.scores_of(job)["top1"]
    assert "mean per class" in classifiers.told(job, "run") and again["eval/mean_per_class"] == classifiers.scores_of(job)["mean_per_class"]
    with pytest.raises(UserError, match="was made by `simclr finetune`, this is `simclr pretrain`"):
        open_run(job.path, "x", TINY, patterns)


# ── Without a test split ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def untested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 240 patterns without a test split."""
    from simclr.data import shards
    from simclr.data.sources.open import open_source

    out = tmp_path_factory.mktemp("untested") / "shards"
    source = open_source("patterns:train=240,test=60")
    shards.prepare(source, out, shards.Options(), 2, lambda done: None)
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["splits"]["test"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    return out


def seen_of(data: Path, share: float, file: Path | None = None) -> classifiers.Labels:
    return classifiers.choose_labels(data, data, read_manifest(data), share, file, 0)


def test_images_to_score_on_are_those_that_are_not_seen(untested: Path) -> None:
    every = loader.labels(untested)
    tenth, held, said = classifiers.hold_back(seen_of(untested, 0.1), 0.1, 0, 10_000)
    assert np.array_equal(tenth.ids, labels.subset(every, 0.1, 0))  # as before: the rest was not seen anyway
    assert np.array_equal(np.union1d(tenth.ids, held), np.arange(240)) and not np.intersect1d(tenth.ids, held).size
    assert said == f"no test split: scored on {len(held)} labelled images whose labels training does not see"
    whole, held, said = classifiers.hold_back(seen_of(untested, 1.0), 0.1, 0, 10_000)
    assert np.array_equal(np.union1d(whole.ids, held), np.arange(240)) and not np.intersect1d(whole.ids, held).size
    assert np.array_equal(whole.y, every[whole.ids]) and whole.chosen["held back"] == len(held)
    for label in range(10):
        of_class = np.count_nonzero(every == label)
        assert np.count_nonzero(every[held] == label) == max(int(0.1 * of_class + 0.5), 1)
    assert "held back (--hold-back 0 trains on all)" in said
    again = classifiers.hold_back(seen_of(untested, 1.0), 0.1, 0, 10_000)
    assert np.array_equal(again[1], held)
    few, some, said = classifiers.hold_back(seen_of(untested, 0.1), 0.1, 0, 30)
    assert len(some) == 30 and np.isin(some, np.setdiff1d(np.arange(240), few.ids)).all() and "scored on 30 labelled" in said
    all_seen, none, said = classifiers.hold_back(seen_of(untested, 1.0), 0.0, 0, 10_000)
    assert len(all_seen.ids) == 240 and not len(none) and said == "no test split: nothing is held back to score on"
    with pytest.raises(UserError, match="--hold-back is 1; expected a share"):
        classifiers.hold_back(seen_of(untested, 1.0), 1.0, 0, 10_000)


def test_the_last_image_of_a_class_is_not_held_back(untested: Path, tmp_path: Path) -> None:
    every = loader.labels(untested)
    one, others = np.flatnonzero(every == 3)[:1], np.flatnonzero(every != 3)
    (tmp_path / "labels.txt").write_text("\n".join(map(str, np.sort(np.concatenate([one, others])))))
    seen, held, _ = classifiers.hold_back(seen_of(untested, 1.0, tmp_path / "labels.txt"), 0.5, 0, 10_000)
    assert one[0] in seen.ids and set(every[seen.ids]) == set(range(10))
    assert np.isin(np.flatnonzero(every == 3)[1:], held).all()  # those that the file does not list


def held_scores(config: FineTune, data: Path, at: Path, held: np.ndarray) -> dict[str, float]:
    start = Start(data, checkpoint=at, ids=np.setdiff1d(np.arange(240), held), held=held)
    return list(train(config, start))[-1].metrics


def test_the_classifier_is_scored_on_what_is_held_back(
    untested: Path, patterns: Path, published: Path, tmp_path: Path, ranks: Ranks
) -> None:
    """The same network on the same images by the loop, on one rank and on two, and by hand; without any there is no score."""
    at = begun(TUNED, published, tmp_path)
    _, held, _ = classifiers.hold_back(seen_of(untested, 1.0), 0.1, 0, 10_000)
    metrics = held_scores(TUNED, untested, at, held)
    assert {"eval/top1", "eval/top5", "eval/mean_per_class"} <= metrics.keys() and 0 < metrics["eval/top1"] <= 1
    hits = metrics["eval/top1"] * len(held)
    assert hits == pytest.approx(round(hits))
    for found in ranks(2, held_scores, TUNED, untested, at, held):
        assert found["eval/top1"] == metrics["eval/top1"]
    model = build_classifier(TUNED, 10, TUNED.tap)
    whole = features.embed_split(model, untested, "train", Preprocessing.of(TUNED.views))
    some = features.embed_split(model, untested, "train", Preprocessing.of(TUNED.views), only=held)
    assert some.ids.tolist() == held.tolist() and torch.equal(some.h, whole.h[torch.from_numpy(held)])
    assert not any(name.startswith("eval/") for name in steps(TUNED, untested, at)[2])


def test_the_result_says_what_it_was_scored_on(untested: Path, tmp_path: Path) -> None:
    from pipelines.runs.directory import open_run

    job = open_run(tmp_path / "run", "finetune-test", TUNED, untested, stage="finetune")
    job = dataclasses.replace(job, notes=("the warm-up is short", "no test split: scored on 24 labelled images"))
    job.save()
    assert classifiers.told(job, "run") == "run: no labelled test split to score it on"
    job.append({"step": 4, "eval/top1": 0.5})
    assert classifiers.told(job, "run") == "run: top1 50.0 % (no test split: scored on 24 labelled images)"
