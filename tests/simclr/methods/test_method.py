"""The seam for new methods: a test-only method with two crops of different sizes and a moving-average target."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simclr import checkpoint
from simclr.config import Config
from simclr.data import loader
from simclr.data.ffcv.decode import decode
from simclr.data.loader import Batch
from simclr.gradient_cache import cached_gradient
from simclr.methods.method import Method, Rows, Start, begun, placed, schedule, views_for
from simclr.networks.encoders import build_encoder
from simclr.networks.heads import linear_classifier
from simclr.optim import parameter_groups
from simclr.train import Report, train
from simclr.views.draw import Crop, boxes_of
from tests.conftest import Within
from tests.support.ranks import Ranks
from tests.support.resize import reference
from tests.support.small import TINY

CONFIG = dataclasses.replace(TINY, train=dataclasses.replace(TINY.train, report_every_steps=5, checkpoint_every_steps=10))


class Student(nn.Module):
    """{"large": (1, n, 3, 32, 32), "small": (1, n, 3, 24, 24)} → {"p": (1, n, 16)}, from the small crop alone."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.encoder = build_encoder(config.encoder, config.seed)
        self.head = linear_classifier(self.encoder.d_h, 16, config.seed)

    def forward(self, rows: Rows) -> Rows:
        return {"p": self.head(self.encoder(rows["small"][0]))[None]}


def pair(config: Config, start: Start) -> Method:
    """The student learns, from the small crop, its own moving average's output for the large crop."""
    small = dataclasses.replace(config.views, size_px=24, area=(0.05, 0.3))
    crops = (Crop(count=1, views=config.views), Crop(count=1, views=small))
    student = placed(begun(lambda: Student(config), start), start, config.train.precision)
    average = copy.deepcopy(student).requires_grad_(False)

    def inputs(batch: Batch, some: slice) -> Rows:
        return dict(zip(("large", "small"), (x[None] for x in views_for(batch, some, crops, config, start.device)), strict=True))

    def objective(outputs: Rows, targets: Rows, step: int) -> tuple[Tensor, Rows]:
        loss = 2 - 2 * F.cosine_similarity(outputs["p"][0], targets["taught"][0]).mean()
        return loss, {"train/loss": loss, "train/seen": torch.stack([loss.new_ones(()), loss.new_full((), 2.0)])}

    def after(inputs: Rows, targets: Rows, step: int) -> None:
        torch._foreach_lerp_(list(average.parameters()), [p.detach() for p in student.parameters()], 0.1)

    return Method(
        crops=crops,
        inputs=inputs,
        network=student,
        state=average,
        targets=lambda rows: {"taught": average({"small": rows["large"]})["p"]},
        loss=objective,
        after=after,
        groups=parameter_groups(student, config.optim, schedule(config, 240), config.total_steps(240)),
        published={"encoder": student.encoder},
    )


def trained(config: Config, data: Path, folder: Path | None = None, until: int | None = None) -> list[Report]:
    start = Start(data, checkpoint=checkpoint.latest(folder, print) if folder is not None else None)
    reports = []
    for report in train(config, start, pair(config, start)):
        if folder is not None and report.due:
            checkpoint.write(folder, report.state, 2)
        reports.append(report)
        if report.step == until:
            break
    return reports


def weights(config: Config, data: Path) -> tuple[list[float], dict[str, Tensor]]:
    reports = trained(config, data)
    return [report.metrics["train/loss"] for report in reports], reports[-1].state.tensors


@pytest.mark.parametrize("data", [pytest.param("photographs", marks=pytest.mark.long), "patterns"])
def test_a_method_of_its_own_trains_alike_on_any_number_of_ranks(
    request: pytest.FixtureRequest, ranks: Ranks, within: Within, data: str
) -> None:
    """20 steps, from JPEG shards, where one decode cuts both crops, and from whole images."""
    shards: Path = request.getfixturevalue(data)
    losses, tensors = weights(CONFIG, shards)
    assert losses[-1] < losses[0] and any(name.startswith("state.encoder") for name in tensors)
    for world in (2, 4) if data == "photographs" else (2,):
        for found, theirs in ranks(world, weights, CONFIG, shards):
            within(f"loss, W = {world}", max(abs(a - b) for a, b in zip(losses, found, strict=True)), 1e-9)
            within(f"weights, W = {world}", max(float((theirs[name] - t).abs().max()) for name, t in tensors.items()), 1e-9)


def test_it_is_resumed_bitwise_and_its_sums_are_means_and_shares(photographs: Path, tmp_path: Path) -> None:
    whole = trained(CONFIG, photographs, tmp_path / "whole")
    trained(CONFIG, photographs, tmp_path / "parts", until=10)
    again = trained(CONFIG, photographs, tmp_path / "parts")
    assert [report.step for report in again] == [11, 15, 20] and whole[-1].metrics["train/loss"] == again[-1].metrics["train/loss"]
    a, b = (checkpoint.read(tmp_path / part / "step-000000020").tensors for part in ("whole", "parts"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert whole[-1].metrics["train/seen"] == 0.5


def test_its_gradient_comes_in_pieces_too(photographs: Path) -> None:
    """With BatchNorm over pieces it is another network, but the step is taken from the same inputs."""
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, micro_batch=6, steps=5))
    losses = [report.metrics["train/loss"] for report in trained(config, photographs)]
    assert losses[-1] != losses[0] and all(0 < loss < 4 for loss in losses)


@pytest.mark.parametrize("data", ["photographs", "patterns"])
def test_what_the_loader_draws_ahead_is_what_is_drawn_in_the_call(request: pytest.FixtureRequest, data: str) -> None:
    """And each list of crops begins with the first of its two probabilities."""
    views = dataclasses.replace(CONFIG.views, size_px=24, blur_p=(1.0, 0.0), solarise_p=(0.0, 1.0))
    crops = (Crop(count=1, views=CONFIG.views), Crop(count=3, views=views))
    stream = loader.batches(CONFIG, request.getfixturevalue(data), 5, 0, 1, crops=crops)
    batch = next(stream)
    late = dataclasses.replace(batch, drawn=())
    for some in (slice(0, len(batch.ids)), slice(2, 5)):
        ahead, inside = (views_for(one, some, crops, CONFIG, torch.device("cpu")) for one in (batch, late))
        assert [len(x) for x in ahead] == [some.stop - some.start, 3 * (some.stop - some.start)]
        assert all(torch.equal(a, b) for a, b in zip(ahead, inside, strict=True))
        drawn = batch.drawn[1]
        assert drawn is not None and drawn.block.shape == (3, len(batch.ids), 17)
        colours = drawn.some(some).colours
        n = some.stop - some.start
        assert colours.solarise.tolist() == [False] * n + [True] * 2 * n == (colours.blur_sigma == 0).tolist()
    stream.close()


def test_one_decode_cuts_several_lists_of_crops(photographs: Path) -> None:
    """Three small crops beside two large ones: each is the reference's resize of its own keyed box."""
    small = dataclasses.replace(CONFIG.views, size_px=24, area=(0.05, 0.3))
    crops = (Crop(views=CONFIG.views), Crop(count=3, views=small))
    stream = loader.batches(CONFIG, photographs, 11, 0, 1, crops=crops)
    batch = next(stream)
    stream.close()
    ids = batch.ids.numpy()
    boxes = boxes_of(crops, CONFIG.seed, batch.epoch, ids, np.tile([72, 96], (24, 1)))
    assert batch.epoch == 1 and [tuple(part.shape) for part in batch.images] == [(24, 2, 32, 32, 3), (24, 3, 24, 24, 3)]
    assert boxes.shape == (24, 5, 4) and len({tuple(box) for box in boxes[0]}) == 5
    for row, sample in enumerate(ids):
        image = decode((photographs.parent / f"{sample:03}.jpg").read_bytes(), 72, 96)
        assert image is not None
        for view in range(5):
            found = batch.images[int(view > 1)][row, view if view < 2 else view - 2].numpy()
            assert np.abs(found - reference(image, boxes[row, view], len(found))).max() <= 1


def test_every_hook_is_called_in_its_place_and_what_is_published_is_found(photographs: Path) -> None:
    start, called = Start(photographs), list[str]()
    made = pair(CONFIG, start)

    def note(name: str, found: Any = None) -> Any:
        return lambda *given: (called.append(name), found if name != "after" else made.after(*given))[1]

    loss = made.loss
    method = dataclasses.replace(
        made,
        before=note("before"),
        loss=lambda *given: (called.append("loss"), loss(*given))[1],
        gradients=note("gradients"),
        after=note("after"),
        report=note("report", {"train/more": torch.ones(())}),
        evaluate=note("evaluate", {"eval/score": 0.25}),
        published={"encoder": made.network.get_submodule("encoder"), "teacher": made.state, "all": made.network},
    )
    reports = list(train(dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, steps=2)), start, method))
    once = ("before", "loss", "gradients", "after", "report")
    assert called == [*once, *once, "evaluate"]
    assert reports[-1].metrics["train/more"] == 1 and reports[-1].metrics["eval/score"] == 0.25
    state, parts = reports[-1].state, method.published
    for name, module in parts.items():
        found, own = checkpoint.part(state, method.network, module, method.state), module.state_dict()
        assert found.keys() == own.keys() and all(torch.equal(t, found[key]) for key, t in own.items()), name
    with pytest.raises(ValueError, match="Linear is no part of the trained modules"):
        checkpoint.part(state, method.network, nn.Linear(1, 1), method.state)


def test_a_network_without_batchnorm_takes_pieces_and_gives_the_whole_batchs_gradient() -> None:
    torch.manual_seed(0)
    network, x = nn.Linear(3, 2).double(), torch.randn(2, 12, 3, dtype=torch.float64)

    def objective(outputs: Rows, targets: Rows) -> tuple[Tensor, Rows]:
        loss = (outputs["y"][0] @ outputs["y"][1].T).logsumexp(1).mean() + targets["t"].mean() * outputs["y"].mean()
        return loss, {"train/loss": loss}

    def inputs(some: slice) -> Rows:
        return {"x": x[:, some]}

    def forward(rows: Rows) -> Rows:
        return {"y": network(rows["x"]), "unused": network(rows["x"]) * 2}

    def targets(rows: Rows) -> Rows:
        return {"t": rows["x"].square()}

    whole, _ = objective(forward(inputs(slice(0, 12))), targets(inputs(slice(0, 12))))
    expected = torch.autograd.grad(whole, list(network.parameters()))
    _, _, loss, _ = cached_gradient(network, nn.Module(), inputs, forward, targets, objective, 12, 5)
    assert abs(float(loss - whole)) < 1e-12
    for p, g in zip(network.parameters(), expected, strict=True):
        assert p.grad is not None and float((p.grad - g).abs().max()) < 1e-12
