"""BYOL against the authors' numbers, on any number of ranks, and what has cost others weeks."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from simclr import loss
from simclr.collectives import data_parallel
from simclr.config import Optim
from simclr.family import BYOL
from simclr.gradient_cache import cached_gradient
from simclr.methods.average import cosine_to_one
from simclr.methods.byol import Network, Target, build_network, build_target, follow, objective, projected
from simclr.methods.choice import shapes
from simclr.methods.method import Method, Rows, Start
from simclr.networks.batchnorm import BatchNorm, share_statistics
from simclr.networks.heads import MLP
from simclr.optim import build_optimizer, byol_rule, parameter_groups, warmup_cosine
from simclr.telemetry.collapse import collapse
from simclr.train import take_step, train
from tests.conftest import Within
from tests.support.paths import GOLDEN
from tests.support.ranks import Ranks
from tests.support.small import TINY, mine, resumed

FAMILY = GOLDEN / "family"
SMALL = BYOL(
    encoder=TINY.encoder,
    views=dataclasses.replace(TINY.views, blur_p=0.0),
    optim=Optim(base_lr=1.0, warmup_epochs=0.1, rate_in_buffer=False),
    train=dataclasses.replace(TINY.train, steps=4, checkpoint_every_steps=4),
    watch=TINY.watch,
    ema=0.9,
    hidden=32,
    d_out=16,
)


def golden(name: str) -> dict[str, Any]:
    with np.load(FAMILY / name) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


# ── The loss ───────────────────────────────────────────────────────────────────────────────────────────────────────


def lost(p: Tensor, t: Tensor) -> tuple[float, Tensor]:
    """The loss of this rank's images, and the gradient of its predictions (2, n, d)."""
    own = mine(p.flatten(0, 1), views=2).unflatten(0, (2, -1)).requires_grad_()
    theirs = mine(t.flatten(0, 1), views=2).unflatten(0, (2, -1)).requires_grad_()
    found = loss.byol(own, theirs, p.shape[1])
    found.backward()
    assert own.grad is not None and theirs.grad is None  # no gradient reaches the target
    return found.item(), own.grad


@pytest.mark.parametrize("world", [1, 2, 3])
def test_loss_and_gradient_are_the_authors(world: int, ranks: Ranks, within: Within) -> None:
    """Both directions, each once. On several ranks the mean over them, as DDP takes it."""
    g = golden("byol_loss.npz")
    p, t = (torch.stack([g[f"{name}1"], g[f"{name}2"]]).double() for name in ("pred", "proj"))
    found = ranks(world, lost, p, t) if world > 1 else [lost(p, t)]
    within("loss", abs(sum(value for value, _ in found) / world - float(g["loss"])), 1e-12)
    gradient = torch.cat([part for _, part in found], 1) / world
    within("gradient", float((gradient - torch.stack([g["grad_pred1"], g["grad_pred2"]])).abs().max()), 1e-12)


def test_short_rows_are_divided_by_the_floor(within: Within) -> None:
    g = golden("byol_loss.npz")
    for x, y, expected in zip(g["floor_x"], g["floor_y"], g["floor_loss"], strict=True):
        zero = torch.zeros_like(x)
        found = loss.byol(torch.stack([x, zero])[:, None], torch.stack([zero, y])[:, None])  # the other direction's rows are zero
        within("loss", abs(float(found - expected)), 1e-12)


def test_schedules_are_the_authors(within: Within) -> None:
    """τ by step and not by epoch; their learning rates are float32."""
    tables = json.loads((FAMILY / "byol_schedule.json").read_text())
    for table in tables["target_ema"]:
        for step, tau in zip(table["step"], table["tau"], strict=True):
            within("tau", abs(cosine_to_one(step, table["total_steps"], table["base"]) - tau), 1e-14)
    for table in tables["learning_rate"]:
        peak = table["base"] * table["batch"] / 256
        for step, rate in zip(table["step"], table["lr"], strict=True):
            found = warmup_cosine(step, peak, table["warmup_steps"], table["total_steps"])
            within("learning rate", abs(found - rate) / peak, 2e-7)


# ── Three updates of the authors' code ─────────────────────────────────────────────────────────────────────────────

THEIRS = {
    "encoder.0.weight": "res_tiny/initial_conv|w",
    "encoder.1.weight": "res_tiny/initial_batchnorm|scale",
    "encoder.1.bias": "res_tiny/initial_batchnorm|offset",
    **{
        f"{head}.layers.{ours}": f"{head}/{theirs}"
        for head in ("projector", "predictor")
        for ours, theirs in (
            ("0.0.weight", "linear|w"),
            ("0.0.bias", "linear|b"),
            ("0.1.weight", "batch_norm|scale"),
            ("0.1.bias", "batch_norm|offset"),
            ("1.0.weight", "linear_1|w"),
        )
    },
}
NORMS = {"encoder.1": "res_tiny/initial_batchnorm", **{f"{head}.layers.0.1": f"{head}/batch_norm" for head in ("projector", "predictor")}}


def set_weights(network: nn.Module, g: dict[str, Tensor], prefix: str) -> None:
    for name, p in network.named_parameters():
        given = g[f"{prefix}|{THEIRS[name]}"]
        p.data.copy_(given.T if p.ndim == 2 else given.flatten())


def tiny(g: dict[str, Tensor], config: BYOL) -> Method:
    def trunk() -> tuple[Any, MLP]:
        return nn.Sequential(nn.Linear(6, 8, bias=False), BatchNorm(8), nn.ReLU()), MLP(8, 10, 4, bias=(True, False))

    network, target = Network(*trunk(), MLP(4, 12, 4, bias=(True, False))).double(), Target(*trunk()).double()
    set_weights(network, g, "init_online")
    set_weights(target, g, "init_target")
    return Method(
        crops=(),
        inputs=lambda batch, some: {"views": batch.views[:, some]},  # type: ignore[attr-defined]
        network=network,
        state=target,
        targets=partial(projected, target),
        loss=partial(objective, images=8),
        after=partial(follow, target, network, total=20, base=config.ema),
        groups=parameter_groups(network, config.optim, lambda step: warmup_cosine(step, 2.0, 2, 20), 20, byol_rule),
        published={},
    )


def three_updates() -> list[tuple[float, dict[str, Tensor], dict[str, Tensor]]]:
    """Loss of this rank's share, and states of both networks, after each."""
    g = golden("byol_train.npz")
    optim = Optim(base_lr=64.0, weight_decay=0.01, rate_in_buffer=False)
    config = dataclasses.replace(SMALL, optim=optim, train=dataclasses.replace(SMALL.train, batch_size=8))
    method = tiny(g, config)
    share_statistics((method.network, method.state), 8)
    optimizer = build_optimizer(method.groups, config.optim)
    network = data_parallel(method.network, 25.0, False)
    found = []
    for step in range(3):
        views = torch.stack([mine(g[f"view{view}"][step].double()) for view in (1, 2)])
        batch: Any = SimpleNamespace(views=views, ids=range(views.shape[1]))
        _, _, _, sums = take_step(method, network, optimizer, config, batch, step)
        states = [{name: t.clone() for name, t in part.state_dict().items()} for part in (method.network, method.state)]
        found.append((float(sums["train/loss"].detach()), states[0], states[1]))
    return found


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_three_updates_are_the_authors(world: int, ranks: Ranks, within: Within) -> None:
    """Also on several ranks, whose statistics are shared. Their running statistics are Haiku's: they begin at 0, and those that are read
    are divided by 1 − 0.9^t; our variance begins at 1, so 0.9^t of it is left after t passes, two in a step."""
    g = golden("byol_train.npz")
    every = ranks(world, three_updates) if world > 1 else [three_updates()]
    for step in range(3):
        within("loss", abs(sum(found[step][0] for found in every) / world - float(g[f"repr_loss_{step}"])), 1e-10)
        for found in every:
            for whose, state in zip(("online", "target"), found[step][1:], strict=True):
                for name in (name for name in THEIRS if name in state):
                    theirs = g[f"{whose}_{step}|{THEIRS[name]}"]
                    theirs = theirs.T if state[name].ndim == 2 else theirs.flatten()
                    within(f"{whose} weights", float((state[name] - theirs).abs().max()), 1e-10)
                left = 0.9 ** (2 * (step + 1))
                for name in (name for name in NORMS if f"{name}.running_var" in state):
                    mean, var = (g[f"{whose}_bn_{step}|{NORMS[name]}/~/{what}_ema|hidden"].flatten() for what in ("mean", "var"))
                    within(f"{whose} running mean", float((state[f"{name}.running_mean"] - mean).abs().max()), 1e-10)
                    within(f"{whose} running variance", float((state[f"{name}.running_var"] - left - var).abs().max()), 1e-10)
                assert any(name.startswith("predictor.") for name in state) == (whose == "online")


def test_the_heads_are_the_authors() -> None:
    heads = json.loads((FAMILY / "byol_layers.json").read_text())["heads"]
    network = build_network(BYOL(encoder=TINY.encoder))
    for name, width in (("projector", network.encoder.d_h), ("predictor", 256)):
        head: nn.Module = getattr(network, name)
        linear = [layer for layer in head.modules() if isinstance(layer, nn.Linear)]
        dense = [layer for layer in heads[name] if layer["layer"] == "dense"]
        expected = [[width, dense[0]["shape"][1], dense[0]["bias"]], [*dense[1]["shape"], dense[1]["bias"]]]
        assert [[layer.in_features, layer.out_features, layer.bias is not None] for layer in linear] == expected
        (norm,) = (layer for layer in head.modules() if isinstance(layer, BatchNorm))
        (theirs,) = (layer for layer in heads[name] if layer["layer"] == "batch norm")
        assert norm.weight is not None and norm.bias is not None and len(norm.weight) == theirs["features"]
        assert (norm.eps, 1 - norm.momentum) == (theirs["eps"], theirs["decay"])
        for layer in linear:  # a normal of 1 / √fan-in, cut at two of them
            unit = layer.weight.detach() * layer.in_features**0.5
            assert abs(float(unit.std()) - 0.8796) < 0.01 and float(unit.abs().max()) <= 2


def test_the_optimizer_spares_what_the_authors_spare() -> None:
    theirs = json.loads((FAMILY / "byol_layers.json").read_text())["tiny_model_parameters"]
    network = tiny(golden("byol_train.npz"), SMALL).network
    for name, p in network.named_parameters():
        expected = theirs[THEIRS[name].replace("|", "/")]["decayed_and_adapted"]
        assert byol_rule(name, p) == (expected, expected), name


# ── Runs ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def steps(config: BYOL, data: Path) -> tuple[list[dict[str, float]], list[dict[str, Tensor]]]:
    """Metrics and state after every step."""
    found = [(r.metrics, {name: t.clone() for name, t in r.state.tensors.items()}) for r in train(config, Start(data))]
    return [metrics for metrics, _ in found], [state for _, state in found]


UNEVEN = dataclasses.replace(SMALL, train=dataclasses.replace(SMALL.train, batch_size=22))


def test_any_number_of_ranks_computes_what_one_does(patterns: Path, ranks: Ranks, within: Within) -> None:
    """Four steps of 22 images: three and four ranks hold different numbers."""
    metrics, states = steps(UNEVEN, patterns)
    for world in (2, 3, 4):
        for theirs, found in ranks(world, steps, UNEVEN, patterns):
            for name in ("train/loss", "train/linear_loss"):
                within(name, max(abs(a[name] - b[name]) for a, b in zip(metrics, theirs, strict=True)), 1e-10)
            for name in ("health/spread", "health/dimension"):
                assert name in theirs[-1]
            within("state", max(float((found[-1][name] - t).abs().max()) for name, t in states[-1].items()), 1e-10)


def test_the_target_follows_behind_the_optimizer_by_step(patterns: Path, within: Within) -> None:
    """From the first step on, by τ of that step of four, towards the weights that the optimizer left. Without the predictor; running
    statistics are the target's own."""
    _, states = steps(SMALL, patterns)
    begin = {f"state.{name}": t.double() for name, t in build_target(SMALL).state_dict().items()}
    for step, (before, now) in enumerate(zip([begin, *states[:-1]], states, strict=True)):
        tau = 1 - 0.1 * (1 + np.cos(np.pi * step / 4)) / 2
        for name in (name for name, _ in build_target(SMALL).named_parameters()):
            expected = tau * before[f"state.{name}"] + (1 - tau) * now[f"model.{name}"]
            within("target", float((now[f"state.{name}"] - expected).abs().max()), 1e-12)
    kept = {name.removeprefix("state.") for name in states[-1] if name.startswith("state.")}
    assert kept == set(build_target(SMALL).state_dict()) and not any(name.startswith("predictor") for name in kept)
    # After a step a running mean is a tenth of that of two batches: of the target's own passes, and no average of the network's.
    name = "encoder.stem.1.running_mean"
    assert states[0][f"state.{name}"].abs().min() > 0 and not torch.allclose(states[0][f"state.{name}"], 0.1 * states[0][f"model.{name}"])


def test_the_target_begins_with_weights_of_its_own_keyed_by_the_seed() -> None:
    network, target, again = build_network(SMALL).state_dict(), build_target(SMALL).state_dict(), build_target(SMALL).state_dict()
    drawn = [name for name, t in target.items() if t.ndim > 1]
    assert len(drawn) > 5 and not any(torch.equal(target[name], network[name]) for name in drawn)
    assert all(torch.equal(again[name], t) for name, t in target.items())
    other = build_target(dataclasses.replace(SMALL, seed=1)).state_dict()
    assert not any(torch.equal(target[name], other[name]) for name in drawn)


def test_stopped_and_resumed_is_bitwise_the_uninterrupted_run(patterns: Path, tmp_path: Path) -> None:
    """Weights, target, statistics, momentum and both schedules."""
    assert any(name.startswith("state.projector.") for name in resumed(SMALL, patterns, tmp_path, until=2))


def test_in_bfloat16_the_target_is_float32(patterns: Path) -> None:
    """Its smallest moves would be lost in 8 bits."""
    settings = dataclasses.replace(SMALL.train, precision="bfloat16", steps=2)
    metrics, states = steps(dataclasses.replace(SMALL, ema=0.9999, train=settings), patterns)
    assert all(t.dtype == torch.float32 for name, t in states[-1].items() if name.startswith("state."))
    assert 0 < metrics[-1]["train/loss"] < 8
    a, b = (state["state.projector.layers.1.0.weight"] for state in states)
    moved = (a != b).float().mean()
    assert moved > 0.5


def test_pieces_give_the_whole_batchs_gradient_where_statistics_are_fixed(within: Within) -> None:
    network, target = build_network(SMALL, 3).double().eval(), build_target(SMALL).double().eval()
    x = torch.rand(2, 6, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[0, 1, 2, -1, 1, 0]])

    def inputs(some: slice) -> Rows:
        return {"views": x[:, some], "labels": labels[:, some]}

    def objected(outputs: Rows, targets: Rows) -> tuple[Tensor, Rows]:
        return objective(outputs, targets, 0, 6)

    def taught(rows: Rows) -> Rows:
        with torch.no_grad():
            return projected(target, rows)

    whole, _ = objected(network(inputs(slice(0, 6))), taught(inputs(slice(0, 6))))
    whole.backward()
    expected = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    _, _, found, _ = cached_gradient(network, target, inputs, network, taught, objected, 6, 3)
    within("loss", abs(float(found - whole.detach())), 1e-12)
    for name, p in network.named_parameters():
        assert p.grad is not None
        within("gradient", float((p.grad - expected[name]).abs().max()), 1e-12)
    assert all(p.grad is None for p in target.parameters())


# ── Collapse ───────────────────────────────────────────────────────────────────────────────────────────────────────


def told(predictor: bool, seed: int, data: Path) -> list[str | None]:
    """What is said of the reports of an epoch without a predictor, and of two with one; the first report is the beginning."""
    settings = dataclasses.replace(SMALL.train, steps=20, precision="float32", linear_eval=False, checkpoint_every_steps=20)
    optim = dataclasses.replace(SMALL.optim, base_lr=48.0, warmup_epochs=0)
    config = dataclasses.replace(SMALL, seed=seed, predictor=predictor, optim=optim, train=settings)
    found = []
    for report in train(config, Start(data)):
        found.append(collapse(report.metrics, shapes(config).least))
        if not predictor and report.step == 10:
            break
    return found[1:]


def test_without_a_predictor_a_collapse_is_told_within_an_epoch(patterns: Path) -> None:
    """Ten steps. The loss tells nothing: it falls."""
    said = told(False, 0, patterns)[-1]
    assert said is not None and "point nearly the same way" in said


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_with_a_predictor_none_is_told(patterns: Path, seed: int) -> None:
    assert told(True, seed, patterns) == [None] * 19
