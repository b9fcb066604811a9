"""MoCo v3 against the authors' numbers (`tests/golden/family`), and alike on any number of ranks, in pieces and resumed."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simclr import checkpoint
from simclr.collectives import data_parallel, mean_over_ranks, rank, world_size
from simclr.config import Optim, Watch
from simclr.family import MoCoV3
from simclr.gradient_cache import cached_gradient
from simclr.loss import info_nce
from simclr.methods import mocov3 as module
from simclr.methods.average import cosine_to_one
from simclr.methods.choice import shapes
from simclr.methods.method import Method, Rows, Start
from simclr.methods.mocov3 import mocov3
from simclr.networks.batchnorm import BatchNorm, share_statistics
from simclr.networks.initial import Linear
from simclr.optim import build_optimizer, lr_peak, warmup_cosine
from simclr.recipes import recipe
from simclr.shares import share
from simclr.telemetry.collapse import collapse
from simclr.train import train
from tests.conftest import Within
from tests.support.ranks import Ranks
from tests.support.small import TINY, run

GOLDEN = Path(__file__).parents[2] / "golden" / "family"
SMALL = MoCoV3(
    encoder=TINY.encoder,
    views=dataclasses.replace(TINY.views, size_px=16, blur_p=(1.0, 0.1), solarise_p=(0.0, 0.2), saturation=0.5),
    optim=Optim(base_lr=0.3, warmup_epochs=0.1, rate_in_buffer=False),
    # 25 images divide over none of 2, 3 and 4 ranks.
    train=dataclasses.replace(TINY.train, batch_size=25, steps=4, checkpoint_every_steps=2),
    watch=Watch(every_epochs=0),
    temperature=0.2,
    ema=0.9,
    hidden=24,
    d_out=8,
)


# ── The loss ───────────────────────────────────────────────────────────────────────────────────────────────────────


def symmetric(q1: Tensor, q2: Tensor, k1: Tensor, k2: Tensor, temperature: float) -> list[Tensor]:
    """(the losses of both directions, their sum, the sum's gradients of q1 and q2) of this rank's rows of (W, n, d) arrays."""
    q1, q2, k1, k2 = (x[rank()].double().requires_grad_() for x in (q1, q2, k1, k2))
    one, two = info_nce(q1, k2, temperature), info_nce(q2, k1, temperature)
    found = torch.autograd.grad(one + two, [q1, q2, k1, k2], allow_unused=True)
    assert found[2] is None and found[3] is None  # keys have no gradient
    return [one.detach(), two.detach(), (one + two).detach(), *found[:2]]


@pytest.mark.parametrize("world", [1, 2])
def test_the_loss_of_each_rank_and_its_gradients_are_the_authors(ranks: Ranks, within: Within, world: int) -> None:
    """The symmetric loss is the sum of both directions, each counted once; a rank's keys are candidates of every rank."""
    golden = np.load(GOLDEN / "mocov3_loss.npz")
    given = [torch.from_numpy(golden[f"w{world}_{name}"]) for name in ("q1", "q2", "k1", "k2")]
    for temperature in (1.0, 0.2):
        found = ranks(world, symmetric, *given, temperature) if world > 1 else [symmetric(*given, temperature)]
        for at, name in enumerate(("loss_q1k2", "loss_q2k1", "loss", "grad_q1", "grad_q2")):
            theirs = torch.from_numpy(golden[f"w{world}_T{temperature}_{name}"])
            within(f"{name}, W = {world}", float((torch.stack([one[at] for one in found]) - theirs).abs().max()), 1e-10)


def test_chance_level_is_that_of_predictions_that_prefer_no_key() -> None:
    method, n = shapes(SMALL), SMALL.train.batch_size
    q, keys = torch.zeros(2, n, 8), torch.zeros(2, n, 8)
    q[..., 0], keys[..., 1] = 3, 2
    loss, sums = method.loss({"q": q}, {"keys": keys}, 0)
    assert abs(float(loss) - method.chance) < 1e-5 and float(sums["train/loss"]) == float(loss)
    assert math.isclose(method.chance, 4 * 0.2 * math.log(n))


# ── Three steps of the authors ─────────────────────────────────────────────────────────────────────────────────────


class Dense(nn.Module):
    """The golden file's encoder: (n, 6) → (n, 8)."""

    d_h = 8

    def __init__(self) -> None:
        super().__init__()
        self.l1, self.bn = Linear(6, 8), BatchNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.l1(x)))


OURS = {
    "l1": "encoder.l1",
    "bn": "encoder.bn",
    "fc.0": "projector.layers.0.0",
    "fc.1": "projector.layers.0.1",
    "fc.3": "projector.layers.1.0",
    "fc.4": "projector.layers.1.1",
    "predictor.0": "predictor.layers.0.0",
    "predictor.1": "predictor.layers.0.1",
    "predictor.3": "predictor.layers.1.0",
}


def ours(name: str) -> str:
    """Our name of the authors' `name`, without the branch."""
    path, _, leaf = name.removeprefix("base_encoder.").removeprefix("momentum_encoder.").rpartition(".")
    return f"{OURS[path]}.{leaf}"


def golden_steps() -> list[tuple[float, dict[str, Tensor], dict[str, Tensor]]]:
    """(loss, the network's state, the average's) after each of the golden file's steps, on the ranks that there are."""
    golden = np.load(GOLDEN / "mocov3_train.npz")
    n, m = golden["x1"].shape[1], golden["m"]
    optim = Optim(weight_decay=float(golden["wd"]), momentum=0.9, rate_in_buffer=False)
    train = dataclasses.replace(SMALL.train, batch_size=n, steps=3)
    config = dataclasses.replace(SMALL, temperature=float(golden["T"]), hidden=10, d_out=4, optim=optim, train=train)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "encoder_of", lambda config: Dense())
        patch.setattr(module, "cosine_to_one", lambda step, total, base: float(m[step]))
        method = mocov3(config, Start(Path()))
        for part in (method.network, method.state):
            own = dict(part.named_parameters())
            for name in golden.files:
                if name.startswith("init|") and ours(name[5:]) in own:
                    own[ours(name[5:])].data.copy_(torch.from_numpy(golden[name]))
        share_statistics((method.network, method.state), n)
        network, optimizer = data_parallel(method.network, 25.0, False), build_optimizer(method.groups, config.optim)
        found = []
        for step in range(3):
            mine = share(n, rank(), world_size())
            rows = {"views": torch.from_numpy(np.stack([golden["x1"][step], golden["x2"][step]])).double()[:, mine]}
            method.before(step)
            optimizer.zero_grad()
            outputs = network(rows)
            with torch.no_grad():
                targets = method.targets(rows)
            loss, _ = method.loss(outputs, targets, step)
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = float(golden["lr"][step])
            optimizer.step()
            parts = [{name: x.clone() for name, x in part.state_dict().items()} for part in (method.network, method.state)]
            found.append((float(mean_over_ranks(loss)), parts[0], parts[1]))
        return found


@pytest.mark.parametrize("world", [1, 2, 3])
def test_three_steps_are_the_authors(ranks: Ranks, within: Within, world: int) -> None:
    """Losses, weights and statistics of both branches. The authors' running variance is unbiased, n / (n − 1) of ours; after k moves from 1
    by a tenth, ours is 0.9^k + (n − 1) / n · (theirs − 0.9^k)."""
    golden = np.load(GOLDEN / "mocov3_train.npz")
    n = golden["x1"].shape[1]
    for steps in ranks(world, golden_steps) if world > 1 else [golden_steps()]:
        for step, (loss, network, average) in enumerate(steps):
            within(f"loss, W = {world}", abs(loss - float(golden[f"loss_{step}"])), 1e-10)
            seen = set()
            for name in (name for name in golden.files if name.startswith(f"after_{step}|")):
                bare = name.partition("|")[2]
                found = (average if bare.startswith("momentum_encoder.") else network)[ours(bare)]
                expected = torch.from_numpy(golden[name])
                if bare.endswith("running_var"):
                    start = 0.9 ** (2 * (step + 1))
                    expected = start + (n - 1) / n * (expected - start)
                within(f"weights and statistics, W = {world}", float((found - expected).abs().max()), 1e-9)
                seen.add((bare.startswith("momentum_encoder."), ours(bare)))
            assert seen == {(False, name) for name in network} | {(True, name) for name in average}


def test_layers_are_the_authors() -> None:
    """Shapes of the projector and predictor, which norms have a scale, and what is frozen and decays."""
    golden = json.loads((GOLDEN / "mocov3_layers.json").read_text())
    for kind, name in (("resnet50", "imagenet_mocov3_resnet50"), ("vit_small", "imagenet_mocov3_vit_small")):
        method = shapes(recipe(name))
        for part in ("projector", "predictor"):
            layers = []
            for layer in method.network.get_submodule(part).modules():
                if isinstance(layer, nn.Linear):
                    layers.append(("Linear", list(layer.weight.shape), layer.bias is not None))
                elif isinstance(layer, BatchNorm):
                    affine = layer.weight is not None
                    assert affine == (layer.bias is not None) and layer.eps == 1e-5 and layer.momentum == 0.1
                    layers.append(("BatchNorm1d", len(layer.running_mean), affine))
                elif isinstance(layer, nn.ReLU):
                    layers.append(("ReLU", None, None))
            theirs = [(x["type"], x.get("weight", x.get("features")), x.get("bias", x.get("affine"))) for x in golden[kind][part]]
            assert layers == theirs, (kind, part)
    frozen = {n.removeprefix("encoder.") for n, p in method.network.named_parameters() if not p.requires_grad}
    frozen |= {n.removeprefix("encoder.") for n, _ in method.network.named_buffers() if n.endswith("pos_embed")}
    assert frozen == set(golden["vit_small"]["frozen"])
    (group,) = method.groups
    assert group.settings["weight_decay"] == 0.1 and any(p.ndim == 1 for p in group.params)
    assert recipe("imagenet_mocov3_vit_small").encoder.heads == golden["vit_small"]["heads"]


def test_schedules_are_the_authors_by_step(within: Within) -> None:
    golden = json.loads((GOLDEN / "mocov3_schedule.json").read_text())
    for row in golden["momentum"]:
        for epoch, theirs in zip(row["epoch"], row["m"], strict=True):
            within("momentum", abs(cosine_to_one(epoch, row["epochs"], row["base"]) - theirs), 1e-12)
    for row in golden["lr"]:
        peak = lr_peak(row["base_lr"], row["batch"], "linear")
        assert math.isclose(peak, row["peak"])
        for epoch, theirs in zip(row["epoch"], row["lr"], strict=True):
            within("rate, relative", abs(warmup_cosine(epoch, peak, row["warmup_epochs"], row["epochs"]) - theirs) / peak, 1e-12)


# ── The average ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_average_moves_by_step_ahead_of_its_pass_and_stays_float32_in_bfloat16(patterns: Path, within: Within) -> None:
    """At the first step it is the network; from then on it follows the weights that the step before left, by a momentum of the step. It has
    no predictor, and statistics of its own passes."""
    config = dataclasses.replace(SMALL, train=dataclasses.replace(SMALL.train, precision="bfloat16", batch_size=24))
    initial = {name: x.clone() for name, x in mocov3(config, Start(patterns)).network.state_dict().items()}
    states = {r.step: {k: x.clone() for k, x in r.state.tensors.items()} for r in train(config, Start(patterns))}
    names = [name for name in initial if name.startswith(("encoder.", "projector.")) and "running" not in name]
    assert all(torch.equal(states[1][f"state.{name}"], initial[name]) for name in names)
    assert not any(name.startswith(("state.predictor", "state.classifier")) for name in states[1])
    assert all(x.dtype == torch.float32 for name, x in states[2].items() if name.startswith("state."))
    for step in (2, 3, 4):
        keep = 1 - (1 - config.ema) * 0.5 * (1 + math.cos(math.pi * (step - 1) / config.train.steps))
        for name in names:
            before, trained = states[step - 1][f"state.{name}"], states[step - 1][f"model.{name}"]
            within("average", float((states[step][f"state.{name}"] - (keep * before + (1 - keep) * trained)).abs().max()), 1e-6)
    assert not torch.equal(states[4]["state.projector.layers.0.1.running_mean"], states[4]["model.projector.layers.0.1.running_mean"])


# ── Ranks, resuming, pieces ────────────────────────────────────────────────────────────────────────────────────────


def trained(config: MoCoV3, data: Path) -> tuple[list[float], dict[str, Tensor]]:
    reports = list(train(config, Start(data)))
    return [report.metrics["train/loss"] for report in reports], reports[-1].state.tensors


def test_any_number_of_ranks_computes_what_one_does(patterns: Path, ranks: Ranks, within: Within) -> None:
    losses, tensors = trained(SMALL, patterns)
    assert any(name.startswith("state.projector") for name in tensors)
    for world in (2, 3, 4):
        for found, theirs in ranks(world, trained, SMALL, patterns):
            within(f"loss, W = {world}", max(abs(a - b) for a, b in zip(losses, found, strict=True)), 1e-10)
            within(f"weights, W = {world}", max(float((theirs[name] - x).abs().max()) for name, x in tensors.items()), 1e-10)


def test_it_is_resumed_bitwise_with_its_average_and_momentum(patterns: Path, tmp_path: Path) -> None:
    whole = run(SMALL, patterns, tmp_path / "whole")
    run(SMALL, patterns, tmp_path / "parts", until=2)
    again = run(SMALL, patterns, tmp_path / "parts")
    assert list(again) == [3, 4] and whole[4].metrics["train/loss"] == again[4].metrics["train/loss"]
    a, b = (checkpoint.read(tmp_path / part / "step-000000004").tensors for part in ("whole", "parts"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert any(name.startswith("state.encoder") for name in a)


def evaluated(config: MoCoV3) -> Method:
    """The method with fixed statistics of BatchNorm, so that a piece is normalised as the whole is."""
    method = mocov3(config, Start(Path()))
    generator = torch.Generator().manual_seed(4)
    for part in (method.network, method.state):
        part.eval()
        for norm in (m for m in part.modules() if isinstance(m, BatchNorm)):
            norm.running_mean.uniform_(-0.1, 0.1, generator=generator)
            if norm.weight is not None:  # those that close a block begin at 0, which would hide the block
                nn.init.uniform_(norm.weight, 0.5, 1.5, generator=generator)
    return method


def test_pieces_give_the_whole_batchs_gradient(within: Within) -> None:
    method = evaluated(SMALL)
    views = torch.rand(2, 25, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    parameters = [p for p in method.network.parameters() if p.requires_grad]

    def targets(rows: Rows) -> Rows:
        with torch.no_grad():
            return method.targets(rows)

    found: dict[str, Any] = {}
    for pieces in (1, 4):
        method.network.zero_grad()
        _, taught, loss, _ = cached_gradient(
            method.network,
            method.state,
            lambda rows: {"views": views[:, rows]},
            method.network,
            targets,
            lambda outputs, targets: method.loss(outputs, targets, 0),
            25,
            pieces,
        )
        assert not taught["keys"].requires_grad
        found[str(pieces)] = [loss, *(p.grad.clone() for p in parameters if p.grad is not None)]
    method.network.zero_grad()
    rows = {"views": views}
    whole, _ = method.loss(method.network(rows), targets(rows), 0)
    plain = [whole.detach(), *torch.autograd.grad(whole, parameters)]
    for pieces, values in found.items():
        for a, b in zip(plain, values, strict=True):
            within(f"{pieces} pieces, relative", float((a - b).abs().max() / a.abs().max()), 1e-10)
    assert not any(p.requires_grad for p in method.state.parameters())


def test_the_network_compiles_in_one_graph() -> None:
    """Two passes of one encoder are one graph, with the classifier beside."""
    config = dataclasses.replace(SMALL, train=dataclasses.replace(SMALL.train, precision="float32"))
    network = module.Network(config, 5)
    x = torch.rand(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        expected = network({"views": x})
        found = torch.compile(network, backend="eager", fullgraph=True)({"views": x})
    assert found.keys() == expected.keys() == {"q", "logits"}
    assert all(float((found[name] - y).abs().max()) < 1e-5 for name, y in expected.items())


def test_collapsed_predictions_are_told_and_healthy_ones_are_not() -> None:
    method = shapes(SMALL)
    n = SMALL.train.batch_size
    noise = torch.randn(2, n, 8, generator=torch.Generator().manual_seed(7))
    for q, collapsed in ((1 + 1e-3 * noise, True), (noise, False)):
        found = {name: float(x) for name, x in method.report({"q": q}, {"keys": noise}).items()}
        assert (collapse(found, method.least) is not None) == collapsed
        assert 0 <= found["train/contrastive_top1"] <= 1
