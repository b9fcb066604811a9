"""Runs whose BatchNorm covers groups of workers: their numbers, their checkpoints and their evaluation."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pipelines.train import ray_train, retry
from simclr import checkpoint, sense
from simclr.collectives import rank
from simclr.config import Config, Encoder, SimCLR, Train
from simclr.errors import UserError
from simclr.evaluation.online import knn_of
from simclr.methods.classifier import build_classifier
from simclr.methods.simclr import build_model
from simclr.networks.batchnorm import BatchNorm
from simclr.stages import FineTune
from simclr.train import Start, train
from tests.conftest import Within
from tests.simclr.test_sense import IMAGENET, PHOTOS
from tests.support.ranks import Ranks
from tests.support.small import TINY

STEPS = 4


def over(batchnorm: str | int) -> Config:
    plan = replace(TINY.train, steps=STEPS, checkpoint_every_steps=STEPS // 2)
    return replace(TINY, train=plan, encoder=replace(TINY.encoder, batchnorm=batchnorm))


def trained(config: Config, data: str, folder: str) -> tuple[list[float], dict[str, float], dict[str, Tensor]]:
    """Losses, the last metrics and the last state of a run, which goes on from the checkpoint in `folder`, or writes one half-way."""
    found, losses, metrics, state = checkpoint.latest(Path(folder), print) if Path(folder).exists() else None, [], {}, {}
    if dist.is_initialized():
        dist.barrier()  # nobody writes before everybody has looked
    for report in train(config, Start(Path(data), checkpoint=found)):
        losses.append(report.metrics["train/loss"])
        if report.due and not found and report.step < STEPS and rank() == 0:
            checkpoint.write(Path(folder), report.state, 1)
        metrics, state = report.metrics, {name: t.clone() for name, t in report.state.tensors.items()}
    return losses, metrics, state


def in_two_groups(norm: BatchNorm, x: Tensor) -> Tensor:
    """By definition, in one process: rows are two views of images, whose halves are the groups. The first moves the statistics."""
    if not norm.training:
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
    halves = x.unflatten(0, (2, 2, -1)).transpose(0, 1).flatten(1, 2)
    y = torch.stack([F.batch_norm(half, None, None, norm.weight, norm.bias, True, 0.0, norm.eps) for half in halves])
    others = [0, *range(2, x.ndim)]
    norm.move(halves[0].detach().mean(others), halves[0].detach().var(others, correction=0))
    return y.unflatten(1, (2, -1)).transpose(0, 1).flatten(0, 2)


def test_a_run_in_groups_of_two_is_that_of_their_images_and_goes_on_from_a_checkpoint(
    ranks: Ranks, within: Within, patterns: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses, weights and statistics of four steps on 4 ranks, against one process that normalises the halves of a batch by themselves.
    The run from the checkpoint of step 2 has the first group's statistics for all ranks. (DDP forms its buckets anew after a step, so on 4
    ranks the first gradient of a resumed run is summed in another order, with any BatchNorm.)"""
    config = over(2)
    losses, metrics, state = ranks(4, trained, config, str(patterns), str(tmp_path / "groups"))[0]
    rest, again, weights = ranks(4, trained, config, str(patterns), str(tmp_path / "groups"))[0]
    within("loss, resumed", max(abs(a - b) for a, b in zip(rest, losses[2:], strict=True)), 1e-12)
    assert weights.keys() == state.keys()
    within("weights, resumed", max(float((weights[name] - t).abs().max()) for name, t in state.items()), 1e-12)
    within("evaluation, resumed", abs(again["health/rankme"] - metrics["health/rankme"]), 1e-6)

    monkeypatch.setattr(BatchNorm, "forward", in_two_groups)
    expected, scores, reference = trained(config, str(patterns), str(tmp_path / "one"))
    within("loss", max(abs(a - b) for a, b in zip(losses, expected, strict=True)), 1e-9)
    within("weights, momentum, statistics", max(float((state[name] - t).abs().max()) for name, t in reference.items()), 1e-9)
    within("evaluation", abs(metrics["health/rankme"] - scores["health/rankme"]), 1e-6)


def test_a_group_of_all_ranks_is_global(ranks: Ranks, patterns: Path, tmp_path: Path) -> None:
    (losses, _, state), (others, _, weights) = (
        ranks(2, trained, over(batchnorm), str(patterns), str(tmp_path / str(batchnorm)))[0] for batchnorm in ("global", 2)
    )
    assert others == losses and all(torch.equal(weights[name], t) for name, t in state.items())


def test_ranks_evaluate_the_network_that_the_checkpoint_has(ranks: Ranks, within: Within, patterns: Path, tmp_path: Path) -> None:
    """Ranks embed a share of the images each, and without statistics in common they once did so by as many networks."""
    config = over("per_worker")
    found = ranks(2, trained, config, str(patterns), str(tmp_path / "run"))
    _, metrics, state = found[0]
    model = build_model(config, 10).double()
    model.load_state_dict({name.removeprefix("model."): t for name, t in state.items() if name.startswith("model.")})
    alone = knn_of(model.encoder.train(), config, patterns, torch.device("cpu"), 1)
    within("effective rank of the features", abs(alone["health/rankme"] - metrics["health/rankme"]), 1e-6)


@pytest.mark.parametrize(("batchnorm", "ranks"), [("global", None), ("per_worker", 1), (8, 8)])
def test_encoder_and_head_of_every_method_follow_the_field(batchnorm: str | int, ranks: int | None) -> None:
    config = over(batchnorm)
    for model in (build_model(config), build_classifier(config, 10, tap=1)):
        assert {norm.ranks for norm in model.modules() if isinstance(norm, BatchNorm)} == {ranks}


# ── The field ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("batchnorm", ["global", "per_worker", 2, 8])
def test_a_config_of_the_field_is_read_as_it_was_written(batchnorm: str | int) -> None:
    config = SimCLR(encoder=Encoder(batchnorm=batchnorm))  # type: ignore[arg-type]
    assert SimCLR.from_dict(config.to_dict()) == config and config.flat()["encoder.batchnorm"] == batchnorm


@pytest.mark.parametrize("batchnorm", [0, 1, -8, 8.0, True, "8", "two", None])
def test_what_is_no_group_is_refused(batchnorm: object) -> None:
    with pytest.raises(UserError, match=r"encoder\.batchnorm"):
        SimCLR.from_dict({"encoder": {"batchnorm": batchnorm}})


@pytest.mark.parametrize(
    ("batchnorm", "over"),
    [
        ("global", [1, 2, 5, 8, 12]),
        ("per_worker", [1, 1, 1, 1, 1]),
        (4, [1, 2, None, 4, 4]),
        (8, [1, 2, 5, 8, None]),
        (16, [1, 2, 5, 8, 12]),
    ],
)
def test_groups_divide_the_workers_or_hold_them_all(batchnorm: str | int, over: list[int | None]) -> None:
    config = SimCLR(encoder=Encoder(batchnorm=batchnorm))  # type: ignore[arg-type]
    for workers, expected in zip((1, 2, 5, 8, 12), over, strict=True):
        if expected is not None:
            assert sense.statistics_over(config, workers) == expected
            continue
        sentence = f"encoder.batchnorm {batchnorm} wants groups of {batchnorm} workers, and there are {workers}; use --workers "
        with pytest.raises(UserError, match=re.escape(sentence) + ("4 or 8" if batchnorm == 4 else "8 or 16")):
            sense.statistics_over(config, workers)
    assert sense.statistics_over(FineTune(encoder=config.encoder, linear=True), 5) == 5  # frozen statistics


def test_numbers_of_workers_are_those_that_are_whole_groups() -> None:
    config = SimCLR(encoder=Encoder(batchnorm=4), train=Train(batch_size=96))
    assert ray_train.Resources(workers=16, min_workers=4).counts(config) == [4, 8, 12, 16]
    with pytest.raises(UserError, match="groups of 4 workers, and there are 6; use --workers 4 or 8"):
        ray_train.Resources(workers=6).counts(config)
    tpu = ray_train.Resources(workers=16, device="tpu", topology="4x4", accelerator_type="TPU-V5LITEPOD")
    with pytest.raises(UserError, match=r"encoder\.batchnorm is 4; on TPUs expected global or per_worker"):
        tpu.counts(config)
    assert tpu.counts(replace(config, encoder=Encoder(batchnorm=16))) == [16]
    said = retry.less_memory("pretrain", config, 4)
    assert said.startswith(
        "the same command with --workers 8 goes on with this run, with other numbers: BatchNorm then normalises over 48 images"
    )


@pytest.mark.parametrize(
    ("config", "workers", "images"),
    [
        (SimCLR(train=Train(batch_size=64)), (4, 8), ""),
        (SimCLR(train=Train(batch_size=64), encoder=Encoder(batchnorm=4)), (8,), ""),
        (SimCLR(train=Train(batch_size=64), encoder=Encoder(batchnorm=4)), (4, 8), "32 to 64"),
        (SimCLR(train=Train(batch_size=64), encoder=Encoder(batchnorm="per_worker")), (1, 4), "16 to 64"),
        (SimCLR(train=Train(batch_size=64, micro_batch=8)), (2, 4), "16 to 32"),
        (SimCLR(train=Train(batch_size=64, micro_batch=8), encoder=Encoder(batchnorm=2)), (2, 4), ""),
    ],
)
def test_it_is_said_where_numbers_depend_on_the_workers(config: Config, workers: tuple[int, ...], images: str) -> None:
    said = f"BatchNorm normalises over {images} images at a time, by the number of workers, and so the weights depend on it"
    found = [note for note in sense.notes(config, PHOTOS, IMAGENET, workers) if "by the number of workers" in note]
    assert found == ([said] if images else [])
