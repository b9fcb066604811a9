"""The loop in one process: resuming is bitwise, reports are complete, a caller may stop, and the schedule is the config's."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from simclr import checkpoint, keyed
from simclr.config import Config
from simclr.errors import UserError
from simclr.methods.simclr import build_model
from simclr.networks import initial
from simclr.optim import lr_peak, warmup_cosine
from simclr.train import Start, train
from simclr.views import draw
from tests.support.small import TINY, run


def config(**train: Any) -> Config:
    """Twelve steps of 24 in float32; an epoch has ten."""
    return dataclasses.replace(TINY, train=dataclasses.replace(TINY.train, precision="float32", steps=12, **train))


@pytest.mark.parametrize("name", ["lars", "sgd"])
@pytest.mark.parametrize("stop", [1, 7, 10, 11])
def test_stopped_and_resumed_is_bitwise_the_uninterrupted_run(patterns: Path, tmp_path: Path, name: Any, stop: int) -> None:
    """At the first step, in mid-epoch, at an epoch's end and one before the last: weights, momentum, statistics and losses."""
    settings = config(checkpoint_every_steps=1)
    settings = dataclasses.replace(settings, optim=dataclasses.replace(settings.optim, name=name))
    whole = run(settings, patterns, tmp_path / "whole")
    run(settings, patterns, tmp_path / "parts", until=stop)
    rest = run(settings, patterns, tmp_path / "parts")
    assert sorted(rest) == list(range(stop + 1, 13))
    for step, report in rest.items():
        assert report.metrics["train/loss"] == whole[step].metrics["train/loss"]
    a, b = (checkpoint.read(tmp_path / part / "step-000000012").tensors for part in ("whole", "parts"))
    assert a.keys() == b.keys() and any(key.startswith("optimizer.") for key in a)
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_from_its_stored_beginning_a_run_is_bitwise_the_fresh_one(patterns: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And it draws no initial weights: the whole model comes from the checkpoint, although uninitialised tensors hold NaN."""
    settings = config(checkpoint_every_steps=12)
    run(settings, patterns, tmp_path / "fresh")
    tensors = {f"model.{name}": t for name, t in build_model(settings, 10).state_dict().items()}
    checkpoint.write(tmp_path / "stored", checkpoint.State(0, settings.to_dict(), tensors), 1)
    monkeypatch.setattr(initial, "deviates", None)
    torch.use_deterministic_algorithms(True)
    try:
        assert not all(t.isfinite().all() for t in build_model(settings, 10, drawn=False).state_dict().values())
        stored = run(settings, patterns, tmp_path / "stored")
    finally:
        torch.use_deterministic_algorithms(False)
    assert sorted(stored) == list(range(1, 13))
    a, b = (checkpoint.read(tmp_path / part / "step-000000012").tensors for part in ("fresh", "stored"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def train_in_a_process(settings: Config, patterns: Path, folder: Path, told: Any) -> None:
    """Train and write checkpoints until the process is killed; `told` gets each step and its loss."""
    torch.set_num_threads(1)
    told.send(("began", 0.0))
    found = checkpoint.latest(folder, print) if folder.exists() else None
    for report in train(settings, Start(patterns, checkpoint=found)):
        told.send((report.step, report.metrics["train/loss"]))
        if report.due:
            checkpoint.write(folder, report.state, settings.train.keep_checkpoints)


def test_killed_at_any_moment_and_resumed_is_bitwise_the_uninterrupted_run(patterns: Path, tmp_path: Path) -> None:
    """SIGKILL after 0, 2, 3, 5 and 2 steps of a process, while it computes or writes: weights, momentum, statistics, losses."""
    settings = config(checkpoint_every_steps=2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    whole = run(settings, patterns, tmp_path / "whole")
    torch.set_num_threads(threads)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.simclr.test_checkpoint", "tests.simclr.test_train"])
    losses: dict[int, float] = {}
    for steps, wait_s in ((0, 0.0), (2, 0.0), (3, 0.02), (5, 0.001), (2, 0.005), (None, 0.0)):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=train_in_a_process, args=(settings, patterns, tmp_path / "parts", theirs))
        process.start()
        theirs.close()
        assert ours.poll(60) and ours.recv()[0] == "began"
        with contextlib.suppress(EOFError):
            seen = 0
            while seen != steps:
                step, loss = ours.recv()
                assert losses.setdefault(step, loss) == loss  # a repeated step is the same step
                seen += 1
        if steps is not None:
            time.sleep(wait_s)
            process.kill()
        process.join(60)
        assert process.exitcode == (0 if steps is None else -signal.SIGKILL)
    assert losses == {step: report.metrics["train/loss"] for step, report in whole.items()} and len(losses) == 12
    a, b = (checkpoint.read(tmp_path / part / "step-000000012").tensors for part in ("whole", "parts"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_the_linear_evaluation_learns_and_no_gradient_of_it_reaches_the_encoder(patterns: Path, tmp_path: Path) -> None:
    from simclr.methods.online import classify

    settings = config(checkpoint_every_steps=12)
    model = build_model(settings, classes=10)
    found = model({"views": torch.rand(2, 4, 3, 32, 32)})
    loss, _ = classify(found["logits"].flatten(0, 1), torch.arange(4))
    loss.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert reached == {"classifier.weight", "classifier.bias"}
    # The same, seen from the result: the encoder and head of a run with it are bitwise those of a run without.
    without = dataclasses.replace(settings, train=dataclasses.replace(settings.train, linear_eval=False))
    metrics = {part: run(c, patterns, tmp_path / part)[12].metrics for part, c in (("with", settings), ("without", without))}
    a, b = (checkpoint.read(tmp_path / part / "step-000000012").tensors for part in ("with", "without"))
    assert all(key.split(".")[1] == "classifier" for key in a.keys() - b.keys()) and len(a.keys() - b.keys()) == 4
    assert all(torch.equal(a[key], b[key]) for key in b)
    assert metrics["with"]["train/loss"] == metrics["without"]["train/loss"] and "train/linear_top1" not in metrics["without"]
    assert 0 < metrics["with"]["train/linear_loss"] < 2.31 and 0 <= metrics["with"]["train/linear_top1"] <= 1


def test_an_image_without_a_label_adds_nothing_to_the_linear_evaluation() -> None:
    from simclr.methods.online import classify

    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 3.0], [5.0, 0.0]], requires_grad=True)  # view 0 of two images, view 1
    loss, hits = classify(logits, torch.tensor([0, -1]))
    expected = -(torch.log_softmax(logits[0], 0)[0] + torch.log_softmax(logits[2], 0)[0]) / 4
    assert torch.allclose(loss, expected) and hits.tolist() == [1, 2]
    (grad,) = torch.autograd.grad(loss, logits)
    assert grad[1].abs().max() == grad[3].abs().max() == 0 and grad[0].abs().max() > 0
    loss, hits = classify(logits, torch.tensor([-1, -1]))
    assert loss == 0 and hits.tolist() == [0, 0]


def test_reports_are_due_when_the_config_says(patterns: Path, tmp_path: Path) -> None:
    settings = config(report_every_steps=5, checkpoint_every_steps=8)
    settings = dataclasses.replace(settings, watch=dataclasses.replace(settings.watch, every_epochs=0.6))  # six steps
    reports = run(settings, patterns, tmp_path)
    assert list(reports) == [1, 5, 6, 8, 10, 12]  # the first, every fifth, every evaluation, every checkpoint, the last
    assert [s for s, r in reports.items() if r.due] == [8, 12]
    assert [s for s, r in reports.items() if "eval/knn_top1" in r.metrics] == [6, 12]
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path)] == ["step-000000008", "step-000000012"]
    last = reports[12].metrics
    assert {"train/loss", "train/lr", "train/contrastive_top1", "health/alignment"} <= set(last)
    assert last["speed/images_per_s"] > 0 and 0 <= last["speed/data_wait_pct"] <= 100
    assert last["epoch"] == 1.2 and 0 < last["eval/knn_top1"] <= 1 and 1 <= last["health/rankme"] <= 64


def test_learning_rate_is_the_schedules(patterns: Path, tmp_path: Path) -> None:
    settings = config()
    peak = lr_peak(settings.optim.base_lr, 24, settings.optim.scaling)
    assert settings.warmup_steps(240) == 1 and settings.total_steps(240) == 12
    for step, report in run(settings, patterns, tmp_path).items():
        assert report.metrics["train/lr"] == warmup_cosine(step - 1, peak, 1, 12)


def test_a_caller_that_stops_leaves_no_thread(patterns: Path) -> None:
    before = threading.active_count()
    for report in train(config(), Start(patterns)):
        assert report.step == 1
        break
    assert threading.active_count() <= before


def test_the_seed_is_in_everything(patterns: Path, tmp_path: Path) -> None:
    """Two runs of one seed are alike to the bit. Of another seed weights, order, crops and colours differ, each by itself."""
    runs = []
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        reports = run(dataclasses.replace(config(), seed=seed), patterns, tmp_path / name, until=2)
        losses = [report.metrics["train/loss"] for report in reports.values()]
        runs.append((losses, {name: t.clone() for name, t in reports[2].state.tensors.items()}))
    (losses, tensors), again, other = runs
    assert len(losses) == 2 and losses == again[0] and all(a != b for a, b in zip(losses, other[0], strict=True))
    assert tensors.keys() == again[1].keys() == other[1].keys() and all(torch.equal(t, again[1][name]) for name, t in tensors.items())

    models = [build_model(dataclasses.replace(config(), seed=seed), 10) for seed in (0, 1)]
    drawn = [(p, q) for p, q in zip(*(model.parameters() for model in models), strict=True) if p.ndim > 1]
    assert len(drawn) > 5 and not any(torch.equal(p, q) for p, q in drawn)
    ids, sizes = np.arange(64), np.full((64, 2), 32)
    for draws in (
        lambda seed: keyed.permutation(seed, 0, 64),
        lambda seed: draw.crop_boxes(TINY.views, seed, 0, ids, sizes),
        lambda seed: draw.draw_colours(TINY.views, seed, 0, ids).factors,
        lambda seed: draw.draw_colours(TINY.views, seed, 0, ids).flip,
    ):
        assert np.array_equal(draws(0), draws(0)) and not np.array_equal(draws(0), draws(1))


def test_a_start_that_does_not_fit_is_refused_before_the_first_step(patterns: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"batch_size 241 is larger than the training split \(240 images\)"):
        next(train(config(batch_size=241), Start(patterns)))
    run(config(checkpoint_every_steps=1), patterns, tmp_path, until=1)
    wider = dataclasses.replace(config(), head=dataclasses.replace(TINY.head, d_out=8))
    with pytest.raises(UserError, match=r"step 1 does not fit this config: .*head.* has shape \(16, 64\), expected \(8, 64\)"):
        next(train(wider, Start(patterns, checkpoint=checkpoint.latest(tmp_path, print))))
