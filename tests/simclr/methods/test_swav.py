"""SwAV: assignments, loss, queue and seven steps are the authors', on any number of ranks; and the run that trains with it."""

from __future__ import annotations

import dataclasses
import json
import math
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
from simclr.errors import UserError
from simclr.family import SwAV
from simclr.gradient_cache import cached_gradient
from simclr.methods import swav as module
from simclr.methods.choice import shapes
from simclr.methods.method import Method, Start
from simclr.methods.swav import Network, Queue, freeze, objective, of_length_1
from simclr.networks.batchnorm import BatchNorm, share_statistics
from simclr.networks.heads import MLP
from simclr.optim import build_optimizer, everything, parameter_groups, warmup_cosine
from simclr.sections import Local
from simclr.train import take_step, train
from tests.conftest import Within
from tests.support.paths import GOLDEN
from tests.support.ranks import Ranks
from tests.support.small import TINY, mine, resumed

FAMILY = GOLDEN / "family"
SMALL = SwAV(
    encoder=TINY.encoder,
    views=TINY.views,
    local=Local(crops=2, size_px=16, area=(0.1, 0.4)),
    optim=Optim(name="larc", base_lr=1.0, warmup_epochs=0.1, last_lr=0.001),
    train=dataclasses.replace(TINY.train, steps=5, checkpoint_every_steps=5),
    watch=TINY.watch,
    prototypes=12,
    hidden=16,
    d_out=8,
    frozen_steps=1,
    queue=48,
    queue_epochs=0.1,
)


def golden(name: str) -> dict[str, Any]:
    with np.load(FAMILY / name) as file:
        return {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}


# ── Assignment and loss ────────────────────────────────────────────────────────────────────────────────────────────


def assigned(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    return loss.sinkhorn(mine(scores), epsilon, iterations, len(scores))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_assignments_are_the_authors(world: int, ranks: Ranks, within: Within) -> None:
    """Of all ranks' samples together, 8 or 16, over three ranks too; in float64 and float32."""
    g = golden("swav_sinkhorn.npz")
    for name, theirs in g.items():
        if "_q_" not in name or not name.startswith(("n8_w1", "n16_w1")):
            continue
        tag, kind, epsilon, iterations = name.replace("_q_", "|").replace("_eps", "|").replace("_it", "|").split("|")
        scores = g[f"{tag}_scores"][0].to(theirs.dtype)
        given = scores, float(epsilon), int(iterations)
        found = torch.cat(ranks(world, assigned, *given) if world > 1 else [assigned(*given)])
        within(f"codes, {kind}", float((found - theirs[0]).abs().max()), 1e-12 if kind == "f8" else 1e-6)


def lost(z: Tensor, prototypes: Tensor, images: int) -> tuple[float, Tensor, Tensor]:
    """Loss of this rank, and its gradients to raw embeddings (5, n, d) and prototypes (K, d)."""
    own = mine(z.flatten(0, 1), views=5).unflatten(0, (5, -1)).requires_grad_()
    w = prototypes.clone().requires_grad_()
    scores = torch.nn.functional.normalize(own, dim=2) @ w.T
    codes = torch.stack([loss.sinkhorn(view, 0.05, 3, images) for view in scores[:2].detach()])
    found = loss.swav(scores, codes, 0.1, images)
    found.backward()
    assert own.grad is not None and w.grad is not None
    return found.item(), own.grad, w.grad


@pytest.mark.parametrize("world", [1, 2, 3])
def test_loss_and_gradients_are_the_authors(world: int, ranks: Ranks, within: Within) -> None:
    """Those of one process with all images, and on two ranks those of each rank's own loss."""
    g = golden("swav_loss.npz")
    prototypes, z = g["w1_prototypes_normalised"], g["w1_z"][0].double().unflatten(0, (5, -1))
    given = z, prototypes, z.shape[1]
    found = ranks(world, lost, *given) if world > 1 else [lost(*given)]
    within("loss", abs(sum(value for value, _, _ in found) / world - float(g["w1_loss"])), 1e-12)
    gradient = torch.cat([part for _, part, _ in found], 1) / world
    within("gradient of z", float((gradient.flatten(0, 1) - g["w1_grad_z"][0]).abs().max()), 1e-12)
    within("gradient of prototypes", float((sum(part for *_, part in found) / world - g["w1_grad_w"][0]).abs().max()), 1e-12)
    if world == 2:  # theirs are of other images
        z = torch.cat([part.double().unflatten(0, (5, -1)) for part in g["w2_z"]], 1)
        for number, (value, dz, dw) in enumerate(ranks(2, lost, z, g["w2_prototypes_normalised"], z.shape[1])):
            within("loss of a rank", abs(value - float(g["w2_loss"][number])), 1e-12)
            within("gradient of a rank", float((dz.flatten(0, 1) - g["w2_grad_z"][number]).abs().max()), 1e-12)
            within("prototypes of a rank", float((dw - g["w2_grad_w"][number]).abs().max()), 1e-12)


# ── Optimizer and schedule ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("cuda", [False, True], ids=["cpu", "form for gpus"])
@pytest.mark.parametrize("decay", ["1e-06", "0.05"])
def test_larc_is_the_authors(within: Within, monkeypatch: pytest.MonkeyPatch, decay: str, cuda: bool) -> None:
    """Four steps; prototypes without a gradient at two of them, and a bias that begins at zero."""
    if cuda:
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    g, tag = golden("swav_larc.npz"), f"wd{decay}"
    names = [key.split("|")[1] for key in g if key.startswith(f"{tag}|") and key.endswith("|init")]
    params = {name: nn.Parameter(g[f"{tag}|{name}|init"].double()) for name in names}
    holder = nn.Module()
    for name, p in params.items():
        holder.register_parameter(name, p)
    optim = Optim(name="larc", weight_decay=float(decay))
    optimizer = build_optimizer(parameter_groups(holder, optim, lambda step: 0.0, 4, everything), optim)
    assert len(params) >= 6
    for step in range(4):
        for name, p in params.items():
            gradient = g.get(f"{tag}|{name}|grad{step}")
            p.grad = gradient.double() if gradient is not None else None
        optimizer.param_groups[0]["lr"] = float(g["lr"][step])
        optimizer.step()
        for name, p in params.items():
            within("weights", float((p.detach() - g[f"{tag}|{name}|after{step}"]).abs().max()), 1e-12)


def test_the_cosine_ends_where_the_authors_end_it(within: Within) -> None:
    """Behind the warm-up, which is theirs but for its first value and its last step."""
    for table in json.loads((FAMILY / "swav_schedule.json").read_text()):
        warmup = round(table["warmup_epochs"] * table["steps_per_epoch"])
        for step, rate in zip(table["iteration"], table["lr"], strict=True):
            if step >= warmup:
                found = warmup_cosine(step, table["base_lr"], warmup, table["total"], table["final_lr"])
                within("rate", abs(found - rate) / table["base_lr"], 1e-12)


# ── Seven steps of the authors' code ───────────────────────────────────────────────────────────────────────────────

THEIRS = {"head.layers.0.0": "projection_head.0", "head.layers.0.1": "projection_head.1", "head.layers.1.0": "projection_head.3"}
THEIRS |= {"encoder.conv": "conv", "encoder.bn": "bn", "prototypes": "prototypes"}


class _Tiny(nn.Module):
    """A convolution, BatchNorm if any, ReLU, the mean over places."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 6, 3, padding=1, bias=False), BatchNorm(6) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.bn(self.conv(x)).relu().mean((2, 3))
        return h


def theirs(name: str) -> str:
    part, _, leaf = name.rpartition(".")
    return f"{THEIRS[part]}.{leaf}"


def seven_steps(file: str) -> list[tuple[float, dict[str, Tensor], Tensor]]:
    """(loss of this rank's share, state of the network, rows of the queue) after each."""
    g = golden(file)
    norm, images = "init|bn.weight" in g, g["crop_0"].shape[1] * g["crop_0"].shape[2]
    head = MLP(6, 8, 5, bias=(True, True))
    if not norm:
        head.layers[0][1] = nn.Identity()  # type: ignore[index]
    network = Network(_Tiny(norm), head, nn.Linear(5, 12, bias=False)).double()  # type: ignore[arg-type]
    for name, p in network.named_parameters():
        p.data.copy_(g[f"init|{theirs(name)}"])
    optim = Optim(name="larc", weight_decay=float(g["wd"]), momentum=float(g["momentum"]))
    settings = dataclasses.replace(SMALL.train, batch_size=images)
    config = dataclasses.replace(SMALL, optim=optim, train=settings, queue=3 * images)
    queue = Queue(torch.zeros(2, 3 * images, 5, dtype=torch.float64), int(g["queue_starts_at"]), images)
    method = Method(
        crops=(),
        inputs=lambda batch, some: {name: x[:, some] for name, x in batch.rows.items()},  # type: ignore[attr-defined]
        network=network,
        state=queue,
        before=partial(of_length_1, network.prototypes),
        loss=partial(objective, network=network, queue=queue, config=config, images=images),
        gradients=partial(freeze, network.prototypes, steps=int(g["freeze_prototypes_iterations"])),
        after=queue.enqueue,
        groups=parameter_groups(network, optim, lambda step: float(g["lr"][step]), 7, everything),
        published={},
    )
    share_statistics((network,), images)
    optimizer, wrapped, found = build_optimizer(method.groups, optim), data_parallel(network, 25.0, False), []
    for step in range(7):
        crops = [mine(g[f"crop_{number}"][step].flatten(0, 1).double()) for number in range(5)]
        batch: Any = SimpleNamespace(rows={"views": torch.stack(crops[:2]), "local": torch.stack(crops[2:])}, ids=range(len(crops[0])))
        _, _, _, sums = take_step(method, wrapped, optimizer, config, batch, step)
        state = {name: t.clone() for name, t in network.state_dict().items()}
        found.append((float(sums["train/loss"].detach()), state, queue.rows.clone()))
    return found


@pytest.mark.parametrize(("file", "world"), [("w1", 1), ("w1", 2), ("w1", 3), ("w2", 1), ("w2", 2)])
def test_seven_steps_are_the_authors(file: str, world: int, ranks: Ranks, within: Within) -> None:
    """With BatchNorm on one rank, without on two: prototypes that wait, a queue that fills and is used. On other numbers of ranks too."""
    g = golden(f"swav_train_{file}.npz")
    every = ranks(world, seven_steps, f"swav_train_{file}.npz") if world > 1 else [seven_steps(f"swav_train_{file}.npz")]
    for step in range(7):
        mean = sum(found[step][0] for found in every) / world
        within("loss", abs(mean - float(g[f"loss_{step}"].mean())), 1e-11)
        if file == "w2" and world == 2:
            within("loss of a rank", max(abs(found[step][0] - float(g[f"loss_{step}"][r])) for r, found in enumerate(every)), 1e-11)
        for _, state, rows in (found[step] for found in every):
            for name, t in state.items():
                if f"after_{step}|{theirs(name)}" in g and not name.endswith("running_var"):
                    within("weights", float((t - g[f"after_{step}|{theirs(name)}"]).abs().max()), 1e-10)
            if step >= int(g["queue_starts_at"]):
                # Theirs, newest block first on each rank; the order says nothing, so blocks of steps are compared.
                stored = g[f"queue_{step}"].unflatten(2, (3, -1)).permute(1, 2, 0, 3, 4).flatten(2, 3)  # (2, blocks, images, d)
                images = stored.shape[2]
                first = step - int(g["queue_starts_at"])
                for age in range(3):
                    at = (first - age) % 3 * images
                    block = rows[:, at : at + images]
                    within("queue", float((block - stored[:, age]).abs().max()), 1e-10)


# ── Runs ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def steps(config: SwAV, data: Path) -> tuple[list[dict[str, float]], list[dict[str, Tensor]]]:
    """Metrics and state after every step."""
    found = [(r.metrics, {name: t.clone() for name, t in r.state.tensors.items()}) for r in train(config, Start(data))]
    return [metrics for metrics, _ in found], [state for _, state in found]


def test_any_number_of_ranks_computes_what_one_does(patterns: Path, ranks: Ranks, within: Within) -> None:
    """Five steps of 22 images, whose queue of 44 is used in the last two: three and four ranks hold different numbers."""
    config = dataclasses.replace(SMALL, queue=44, train=dataclasses.replace(SMALL.train, batch_size=22))
    metrics, states = steps(config, patterns)
    assert [float(state["state.rows"].abs().sum(2).min()) > 0 for state in states] == [False, False, True, True, True]
    for world in (2, 3, 4):
        for found, after in ranks(world, steps, config, patterns):
            for name in ("train/loss", "train/linear_loss"):
                within(name, max(abs(a[name] - b[name]) for a, b in zip(metrics, found, strict=True)), 1e-10)
            within("state", max(float((after[-1][name] - t).abs().max()) for name, t in states[-1].items()), 1e-9)


def test_stopped_and_resumed_is_bitwise_the_uninterrupted_run(patterns: Path, tmp_path: Path) -> None:
    """Weights, momentum, and a queue that is just full."""
    assert resumed(SMALL, patterns, tmp_path, until=3)["state.rows"].abs().sum() > 0


def test_prototypes_wait_and_then_learn(patterns: Path, within: Within) -> None:
    """At the first step they are brought to length 1 and no more; behind the second they are of other lengths."""
    begun = module.build_network(SMALL).prototypes.weight.detach().double()
    _, states = steps(SMALL, patterns)
    first, second = (states[step]["model.prototypes.weight"] for step in (0, 1))
    within("frozen", float((first - torch.nn.functional.normalize(begun, dim=1)).abs().max()), 1e-15)
    assert float((second.norm(dim=1) - 1).abs().max()) > 1e-6


def test_pieces_give_the_whole_batchs_gradient(within: Within) -> None:
    """With fixed statistics."""
    config = dataclasses.replace(SMALL, queue=0)
    network = module.build_network(config, 5).double().eval()
    draw = torch.Generator().manual_seed(3)
    rows = {
        "views": torch.rand(2, 24, 3, 32, 32, generator=draw).double(),
        "local": torch.rand(2, 24, 3, 16, 16, generator=draw).double(),
        "labels": torch.arange(24)[None] % 5,
    }

    def loss_of(outputs: Any, targets: Any) -> Any:
        return objective(outputs, targets, 0, network, None, config, 24)

    whole, _ = loss_of(network(rows), rows)
    expected = torch.autograd.grad(whole, list(network.parameters()))
    for pieces in (2, 3):
        network.zero_grad()
        found = cached_gradient(
            network,
            nn.Module(),
            lambda some: {name: x[:, some] for name, x in rows.items()},
            network,
            lambda given: {"labels": given["labels"]},
            loss_of,
            24,
            pieces,
        )
        within("loss", abs(float(found[2] - whole.detach())), 1e-12)
        for p, g in zip(network.parameters(), expected, strict=True):
            assert p.grad is not None
            within("gradient", float((p.grad - g).abs().max()), 1e-12)


def test_the_network_runs_once_for_each_size_and_compiles_in_one_graph() -> None:
    network = module.build_network(dataclasses.replace(SMALL, train=dataclasses.replace(SMALL.train, precision="float32")), 5)
    shapes_seen: list[tuple[int, ...]] = []
    hook = network.encoder.register_forward_pre_hook(lambda _, given: shapes_seen.append(tuple(given[0].shape)))
    rows = {"views": torch.rand(2, 4, 3, 32, 32), "local": torch.rand(2, 4, 3, 16, 16)}
    with torch.no_grad():
        expected = network(rows)
    hook.remove()
    assert shapes_seen == [(8, 3, 32, 32), (8, 3, 16, 16)]
    assert {name: tuple(x.shape) for name, x in expected.items()} == {"scores": (4, 4, 12), "z": (2, 4, 8), "logits": (2, 4, 5)}
    with torch.no_grad():
        found = torch.compile(network, backend="eager", fullgraph=True)(rows)
    assert all(float((found[name] - x).abs().max()) < 1e-5 for name, x in expected.items())


def test_chance_level_is_that_of_scores_that_prefer_no_prototype() -> None:
    codes = loss.sinkhorn(torch.rand(6, 12).double(), 0.05, 3, 6)
    found = loss.swav(torch.zeros(4, 6, 12).double(), torch.stack([codes, codes]), 0.1)
    assert shapes(SMALL).chance == pytest.approx(math.log(12)) == pytest.approx(float(found))


def test_what_does_not_fit_is_refused_in_a_sentence() -> None:
    with pytest.raises(UserError, match=r"queue 50 is no multiple of the batch of 24; use --queue 48"):
        dataclasses.replace(SMALL, queue=50)
    with pytest.raises(UserError, match=r"patch_px 8 does not divide local.size_px 12; use --local.size-px 8 or 16"):
        vit = dataclasses.replace(SMALL.encoder, vit="micro", patch_px=8)
        dataclasses.replace(SMALL, encoder=vit, local=dataclasses.replace(SMALL.local, size_px=12))
    with pytest.raises(UserError, match="expected at least 0"):
        dataclasses.replace(SMALL, epsilon=0.001)
    assert SMALL.of_batch(20).queue == 40 and SwAV.from_dict(SMALL.to_dict()) == SMALL
