"""MoCo in runs: on any number of ranks, resumed, in pieces, in bfloat16; whose weights move when, and where gradients go."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from simclr import checkpoint, sense
from simclr.collectives import all_gather
from simclr.config import Config, Optim, Train
from simclr.data import loader
from simclr.data.manifest import read_manifest
from simclr.encoder.weights import Weights
from simclr.errors import UserError
from simclr.family import MoCo
from simclr.gradient_cache import cached_gradient
from simclr.keyed import permutation
from simclr.methods.method import Start
from simclr.methods.moco import Shuffle, moco
from simclr.methods.queue import random_rows
from simclr.methods.simclr import build_model
from simclr.methods.warm_start import warm_start
from simclr.networks.batchnorm import share_statistics
from simclr.recipes import recipe
from simclr.shares import share
from simclr.train import train
from tests.conftest import Within
from tests.support.ranks import Ranks
from tests.support.small import TINY, mine, run

SMALL = MoCo(
    encoder=TINY.encoder,
    views=TINY.views,
    optim=Optim(name="sgd", base_lr=1.0, warmup_epochs=0, weight_decay=5e-4),
    train=replace(TINY.train, batch_size=10, steps=3, checkpoint_every_steps=3),
    watch=TINY.watch,
    temperature=0.2,
    queue=40,
    ema=0.9,
    d_out=16,
)
BOTH = replace(SMALL, symmetric=True)


def state(config: Config, data: Path) -> tuple[list[float], dict[str, Tensor]]:
    """Losses, and the state at the end."""
    reports = list(train(config, Start(data)))
    return [report.metrics["train/loss"] for report in reports], reports[-1].state.tensors


# ── Ranks, resume ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("config", [SMALL, BOTH], ids=["one way", "symmetric"])
def test_any_number_of_ranks_trains_as_one(patterns: Path, ranks: Ranks, within: Within, config: MoCo) -> None:
    """Three steps in float64: weights, momentum, averages, statistics and queue. Three and four ranks do not divide ten images."""
    losses, tensors = state(config, patterns)
    assert {name.partition(".")[0] for name in tensors} == {"model", "state", "optimizer"}
    for world in (2, 3, 4) if config is SMALL else (4,):
        for found, theirs in ranks(world, state, config, patterns):
            within(f"loss, W = {world}", max(abs(a - b) for a, b in zip(losses, found, strict=True)), 1e-10)
            assert theirs.keys() == tensors.keys()
            within(f"state, W = {world}", max(float((theirs[name] - t).abs().max()) for name, t in tensors.items()), 1e-10)


def test_stopped_and_resumed_is_bitwise_the_uninterrupted_run(patterns: Path, tmp_path: Path) -> None:
    """Weights, average, queue and the place to write in it, rate: in bfloat16, whose averages and queue are float32."""
    config = replace(BOTH, train=replace(SMALL.train, precision="bfloat16", steps=4, checkpoint_every_steps=1))
    run(config, patterns, tmp_path / "whole")
    run(config, patterns, tmp_path / "parts", until=2)
    assert sorted(run(config, patterns, tmp_path / "parts")) == [3, 4]
    a, b = (checkpoint.read(tmp_path / part / "step-000000004").tensors for part in ("whole", "parts"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert {t.dtype for name, t in a.items() if name.startswith("state.")} == {torch.float32}
    rows = a["state.rows"]
    assert float((rows.norm(dim=1) - 1).abs().max()) < 1e-6 and not torch.equal(rows, random_rows(40, 16, 0))


def test_reports_say_chance_and_what_queries_are_like(patterns: Path) -> None:
    start = Start(patterns)
    one, two = (moco(config, start) for config in (SMALL, BOTH))
    assert one.chance == math.log(41) and two.chance == 2 * math.log(41)
    (first, *_) = train(replace(BOTH, train=replace(BOTH.train, steps=1)), start)
    assert 0 < first.metrics["train/loss"] < two.chance  # untrained queries are like their keys, and like no row of the first queue
    names = {"train/contrastive_top1", "train/contrastive_entropy", "train/linear_top1", "health/spread", "health/dimension"}
    assert names <= first.metrics.keys() and 0 < first.metrics["health/spread"] <= 1


# ── Whose weights move when ────────────────────────────────────────────────────────────────────────────────────────


def a_batch(data: Path) -> loader.Batch:
    stream = loader.batches(SMALL, data, 0, 0, 1)
    batch = next(stream)
    stream.close()
    return batch


def test_the_average_moves_ahead_of_its_pass_and_equals_the_network_at_first(patterns: Path) -> None:
    """The keys of step s are made with the weights that step s − 1 left, of which they take 1 − m."""
    method = moco(SMALL, Start(patterns), read_manifest(patterns))
    network, average = method.network.get_submodule("encoder"), method.state.get_submodule("encoder")
    method.before(0)
    assert all(torch.equal(a, b) for a, b in zip(average.parameters(), network.parameters(), strict=True))
    assert average.training and not any(p.requires_grad for p in method.state.parameters())
    before = [p.clone() for p in average.parameters()]
    with torch.no_grad():
        for p in network.parameters():
            p += 1
    method.before(1)
    for was, now, p in zip(before, average.parameters(), network.parameters(), strict=True):
        assert torch.allclose(now, 0.9 * was + 0.1 * p, atol=1e-12)


@pytest.mark.parametrize("config", [SMALL, BOTH], ids=["one way", "symmetric"])
def test_gradients_reach_all_of_the_queries_network_and_nothing_of_the_keys(patterns: Path, config: MoCo) -> None:
    method, batch = moco(config, Start(patterns), read_manifest(patterns)), a_batch(patterns)
    running = {name: b.clone() for name, b in method.state.named_buffers()}
    with torch.no_grad():
        for p in method.network.parameters():  # the last scale of a residual block begins at zero, and stops the gradient there
            p += 0.5 if p.ndim == 1 else 0.0
    inputs = method.inputs(batch, slice(0, 10))
    outputs = method.network(inputs)
    targets = method.targets(inputs)  # as if the loop's no_grad were missing: parameters of the average want no gradient
    loss, _ = method.loss(outputs, targets, 0)
    loss.backward()
    assert all(p.grad is None for p in method.state.parameters()) and not targets["keys"].requires_grad
    assert all(p.grad is not None and bool(p.grad.any()) for p in method.network.parameters())
    assert outputs["z"].shape == targets["keys"].shape == (2 if config.symmetric else 1, 10, 16)
    # Statistics of the key network are its own passes': they have moved, and differ from the query network's.
    moved = {name for name, b in method.state.named_buffers() if not torch.equal(b, running[name])}
    assert moved == {name for name in running if name != "rows"}
    theirs = dict(method.network.named_buffers())
    assert config.symmetric or not any(torch.equal(theirs[name], method.state.get_buffer(name)) for name in moved)


def test_a_step_moves_weights_and_queue_once(patterns: Path) -> None:
    """Decay reaches all: BatchNorm's scales and biases too (the authors' SGD)."""
    (group,) = moco(SMALL, Start(patterns)).groups
    assert group.settings["weight_decay"] == 5e-4
    _, tensors = state(replace(SMALL, train=replace(SMALL.train, steps=1)), patterns)
    began = random_rows(40, 16, 0).double()
    assert torch.equal(tensors["state.rows"][10:], began[10:]) and not (tensors["state.rows"][:10] == began[:10]).any()


# ── The shuffle ────────────────────────────────────────────────────────────────────────────────────────────────────


def keys_of(views: Tensor, order: list[int]) -> Tensor:
    """The keys (N, d) of a batch whose images sit on the ranks in this order, brought back to their own."""
    method = moco(SMALL, Start(Path()))
    share_statistics((method.state,), 10)
    with torch.no_grad():
        keys = method.targets({"views": mine(views[:, order].transpose(0, 1)).transpose(0, 1)})["keys"][0]
    return all_gather(keys, 10)[torch.tensor(order).argsort()]


def test_with_statistics_of_all_ranks_a_key_does_not_depend_on_who_sits_where(ranks: Ranks, within: Within) -> None:
    """So there is nothing that a shuffle could prevent. With those of each rank it does depend on it."""
    views = torch.rand(2, 10, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    alone = keys_of(views, list(range(10)))
    for order in (list(range(10)), [7, 2, 9, 0, 4, 1, 8, 3, 6, 5]):
        for found in ranks(3, keys_of, views, order):
            within("keys", float((found - alone).abs().max()), 1e-10)


def centred(x: Tensor) -> Tensor:
    """As BatchNorm over this rank's rows alone: each row less their mean."""
    return x - x.mean(0)


def shuffled(x: Tensor) -> Tensor:
    shuffle = Shuffle(3, 10, torch.device("cpu"))
    shuffle.draw(5)
    return all_gather(shuffle(mine(x), centred), 10)  # type: ignore[arg-type]


def test_statistics_of_each_rank_are_of_the_images_that_the_order_puts_there(ranks: Ranks, within: Within) -> None:
    """On three ranks, which do not divide ten images."""
    x = torch.randn(10, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    order = permutation(3, 5, 10, "shuffle")
    assert sorted(order) == list(range(10)) and list(order) != list(permutation(3, 6, 10, "shuffle")) != list(permutation(3, 6, 10))
    expected = torch.empty_like(x)
    for me in range(3):
        there = order[share(10, me, 3)]
        expected[there] = centred(x[there])
    for found in ranks(3, shuffled, x):
        within("keys", float((found - expected).abs().max()), 1e-14)


# ── Pieces ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Plain(nn.Module):
    """(n, 6) → h (n, 8), without statistics of a batch."""

    d_h = 8

    def __init__(self, config: Any = None) -> None:
        super().__init__()
        self.l1 = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.l1(x).tanh()


def test_pieces_give_the_whole_batchs_gradient(within: Within) -> None:
    torch.manual_seed(0)
    with patch("simclr.methods.moco.encoder_of", Plain):
        method = moco(replace(BOTH, d_out=4), Start(Path()))
    views = torch.randn(2, 10, 6, dtype=torch.float64)
    taken: list[list[Tensor]] = []
    for pieces in (1, 4):
        method.network.zero_grad()
        gradient: Callable[..., Any] = cached_gradient
        _, targets, _, _ = gradient(
            method.network,
            method.state,
            lambda some: {"views": views[:, some]},
            method.network,
            method.targets,
            lambda outputs, targets: method.loss(outputs, targets, 0),
            10,
            pieces,
        )
        assert targets["keys"].shape == (2, 10, 4)
        taken.append([p.grad.clone() for p in method.network.parameters() if p.grad is not None])
    within("gradient", max(float((a - b).abs().max()) for a, b in zip(*taken, strict=True)), 1e-14)


# ── Settings ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_does_not_fit_is_refused_in_a_sentence(patterns: Path) -> None:
    with pytest.raises(UserError, match=r"queue 1000 is no multiple of the 256 keys of a step; use --queue 1024"):
        MoCo(queue=1000, train=Train(batch_size=256))
    with pytest.raises(UserError, match=r"queue 8448 is no multiple of the 512 keys of a step; use --queue 8192"):
        MoCo(queue=8448, train=Train(batch_size=256), symmetric=True)
    with pytest.raises(UserError, match=r"shuffle is for --encoder.batchnorm per_worker"):
        replace(SMALL, shuffle=True)
    alone = replace(SMALL, encoder=replace(TINY.encoder, batchnorm="per_worker"), shuffle=True)
    with pytest.raises(UserError, match=r"shuffle needs a whole batch at once; leave out train.micro_batch"):
        replace(alone, train=replace(SMALL.train, micro_batch=4))
    # Every image of an epoch of 240 is in a queue of 250, with itself as a negative.
    with pytest.raises(UserError, match=r"queue 250 exceeds the 240 projections of an epoch; use --queue 240 or less"):
        sense.notes(replace(SMALL, queue=250), read_manifest(patterns), 240)
    with pytest.raises(UserError, match=r"queue 500 exceeds the 480 projections"):
        sense.notes(replace(BOTH, queue=500), read_manifest(patterns), 240)
    assert not any("queue" in note for note in sense.notes(replace(SMALL, queue=240), read_manifest(patterns), 240))


def test_a_run_begins_with_the_encoder_of_another_method() -> None:
    """SimCLR's, in the network and in its average; the heads are other networks."""
    model = build_model(replace(TINY, seed=9), 10)
    classes = tuple("abcdefghij")
    weights = Weights(encoder=dict(model.encoder.state_dict()), head=dict(model.head.state_dict()), classifier={}, classes=classes)
    begun, said = warm_start(SMALL, weights, classes, "w")
    assert "head: new" in said
    for name, t in weights.encoder.items():
        assert torch.equal(begun.tensors[f"model.encoder.{name}"], t) and torch.equal(begun.tensors[f"state.encoder.{name}"], t)
    assert torch.equal(begun.tensors["model.head.0.weight"], begun.tensors["state.head.0.weight"])
    assert torch.equal(begun.tensors["state.rows"], random_rows(40, 16, 0))


def test_the_recipes_are_the_authors_settings() -> None:
    v2, notebook = recipe("imagenet_mocov2"), recipe("cifar10_moco")
    assert isinstance(v2, MoCo) and isinstance(notebook, MoCo)
    assert (v2.temperature, v2.queue, v2.ema, v2.layers, v2.d_out, v2.train.batch_size) == (0.2, 65_536, 0.999, 2, 128, 256)
    assert (notebook.temperature, notebook.queue, notebook.ema, notebook.layers, notebook.train.batch_size) == (0.1, 4096, 0.99, 1, 512)
    for config, rate, decay in ((v2, 0.03, 1e-4), (notebook, 0.06, 5e-4)):
        assert (config.optim.name, config.optim.momentum, config.optim.weight_decay) == ("sgd", 0.9, decay)
        assert moco(config, Start(Path(), torch.device("meta"))).groups[0].schedules["lr"](0) == pytest.approx(rate)
