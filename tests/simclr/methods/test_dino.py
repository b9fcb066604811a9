"""DINO: head, loss, centre and four steps are the authors', on any number of ranks; and the run that trains with it."""

from __future__ import annotations

import dataclasses
import itertools
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
from simclr.family import DINO
from simclr.gradient_cache import cached_gradient
from simclr.methods import dino as module
from simclr.methods.average import cosine_to_one
from simclr.methods.choice import shapes
from simclr.methods.dino import Network, Teacher, follow, freeze, objective, taught, teacher_temperature
from simclr.methods.method import Method, Start
from simclr.networks.heads import DINOHead
from simclr.networks.vit import vit
from simclr.optim import build_optimizer, dino_rule, parameter_groups
from simclr.sections import Local
from simclr.train import take_step, train
from tests.conftest import Within
from tests.support.paths import GOLDEN
from tests.support.ranks import Ranks
from tests.support.small import TINY, mine, resumed

FAMILY = GOLDEN / "family"
SMALL = DINO(
    encoder=TINY.encoder,
    views=TINY.views,
    local=Local(crops=2, size_px=16, area=(0.1, 0.4)),
    optim=Optim(name="adamw", base_lr=0.01, warmup_epochs=0.1, weight_decay=0.04, weight_decay_end=0.4, clip_each=3.0),
    train=dataclasses.replace(TINY.train, steps=4, checkpoint_every_steps=4),
    watch=TINY.watch,
    first_teacher_temperature=0.04,
    teacher_temperature=0.07,
    teacher_epochs=3,
    ema=0.9,
    hidden=16,
    bottleneck=8,
    d_out=24,
    frozen_epochs=0.1,
)


def golden(name: str) -> dict[str, Any]:
    with np.load(FAMILY / name) as file:
        return {key: torch.from_numpy(np.asarray(file[key])) for key in file.files if file[key].dtype.kind in "fi"}


# ── Head, loss, schedules ──────────────────────────────────────────────────────────────────────────────────────────

LAYERS = {"norm": (3, False), "free": (3, False), "bn": (3, True), "one": (1, False)}


def theirs_of(name: str, layers: int, norm: bool) -> str:
    """The authors' name of a tensor of the head."""
    if not name.startswith("layers."):
        return name
    _, index, place, leaf = name.split(".")
    step = 3 if norm else 2
    return f"mlp.{leaf}" if layers == 1 else f"mlp.{step * int(index) + int(place)}.{leaf}"


@pytest.mark.parametrize("tag", LAYERS)
def test_the_head_is_the_authors(tag: str, within: Within) -> None:
    """Output, what the last layer reads, and gradients; rows of length 1 or free, with BatchNorm and with a single layer."""
    g, (layers, norm) = golden("dino_head.npz"), LAYERS[tag]
    head = DINOHead(12, 20, 16, 8, layers, norm, tag != "free").double()
    for name, p in head.named_parameters():
        p.data.copy_(g[f"{tag}|{theirs_of(name, layers, norm)}"])
    x = g["x"].double().requires_grad_()
    z, out = head(x)
    (out * g["g"].double()).sum().backward()
    within("output", float((out.detach() - g[f"{tag}_out"]).abs().max()), 1e-12)
    if len(g[f"{tag}_bottleneck"]):
        within("bottleneck", float((z.detach() - g[f"{tag}_bottleneck"]).abs().max()), 1e-12)
    assert x.grad is not None
    within("gradient of x", float((x.grad - g[f"{tag}_grad_x"]).abs().max()), 1e-12)
    trained = {name for name, p in head.named_parameters() if p.requires_grad}
    assert ("last_layer.weight_g" in trained) == (tag == "free")
    for name, p in head.named_parameters():
        if name in trained:
            assert p.grad is not None
            within("gradient", float((p.grad - g[f"{tag}|grad|{theirs_of(name, layers, norm)}"]).abs().max()), 1e-12)


def lost(student: Tensor, teacher: Tensor, sharp: float) -> list[tuple[float, Tensor, Tensor]]:
    """(loss of this rank, its gradient to the student's scores (5, n, K), the centre) of three steps."""
    images = student.shape[2]
    holder = Teacher(Network(nn.Identity(), DINOHead(4, 24, 4, 4)))  # type: ignore[arg-type]
    holder.double()
    found = []
    for s, t in zip(student, teacher, strict=True):
        own = mine(s.flatten(0, 1), views=5).unflatten(0, (5, -1)).requires_grad_()
        their = mine(t.flatten(0, 1), views=2).unflatten(0, (2, -1))
        value = loss.dino(own, their, holder.centre, 0.1, sharp, images)
        value.backward()
        holder.recentre(their, images, 0.9)
        assert own.grad is not None
        found.append((value.item(), own.grad, holder.centre.clone()))
    return found


@pytest.mark.parametrize(("made", "world"), [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2)])
def test_loss_gradient_and_centre_of_three_calls_are_the_authors(made: int, world: int, ranks: Ranks, within: Within) -> None:
    g, temperatures = golden("dino_loss.npz"), golden("dino_loss.npz")["teacher_temperature_per_epoch"]
    student, teacher = (
        torch.stack([torch.cat([part.unflatten(0, (crops, -1)) for part in step.double()], 1) for step in g[f"w{made}_{name}"]])
        for name, crops in (("student", 5), ("teacher", 2))
    )
    for epoch in (0, 4):
        given = student, teacher, float(temperatures[epoch])
        every = ranks(world, lost, *given) if world > 1 else [lost(*given)]
        for step in range(3):
            mean = sum(found[step][0] for found in every) / world
            within("loss", abs(mean - float(g[f"w{made}_e{epoch}_loss_{step}"].mean())), 1e-12)
            gradient = torch.cat([found[step][1] for found in every], 1) / world
            expected = torch.cat([part.unflatten(0, (5, -1)) for part in g[f"w{made}_e{epoch}_grad_{step}"]], 1) / made
            within("gradient", float((gradient - expected).abs().max()), 1e-12)
            for found in every:
                within("centre", float((found[step][2] - g[f"w{made}_center_{step}"]).abs().max()), 1e-12)


def test_schedules_are_the_authors(within: Within) -> None:
    """The average's temperature epoch by epoch, its momentum step by step."""
    tables = json.loads((FAMILY / "dino_tables.json").read_text())
    table = tables["teacher_temperature"]
    config = dataclasses.replace(
        SMALL, first_teacher_temperature=table["warmup"], teacher_temperature=table["final"], teacher_epochs=table["warmup_epochs"]
    )
    for epoch, value in zip(table["epoch"], _values(table), strict=True):
        within("temperature", abs(teacher_temperature(config, epoch) - value), 1e-15)
    for table in tables["schedules"]:
        if table["name"].startswith("teacher momentum"):
            for step, value in zip(table["iteration"], table["value"], strict=True):
                within("momentum", abs(cosine_to_one(step, table["total"], table["base"]) - value), 1e-14)


def _values(table: dict[str, Any]) -> list[float]:
    (name,) = (name for name, value in table.items() if isinstance(value, list) and name != "epoch")
    return list(table[name])


def test_parameter_groups_are_the_authors() -> None:
    tables = json.loads((FAMILY / "dino_tables.json").read_text())["parameter_groups"]
    for name, (unit, norm) in {"norm_last_layer_true": (True, False), "norm_last_layer_false_with_bn_head": (False, True)}.items():
        head = DINOHead(16, 12, 10, 6, 3, norm, unit)
        for own, p in head.named_parameters():
            listed = f"head.{theirs_of(own, 3, norm)}"
            kind = next(kind for kind, names in tables[name].items() if listed in names)
            assert ("weight_decay" if dino_rule(own, p)[0] else "no_weight_decay") == kind if p.requires_grad else kind == "frozen", own


# ── Four steps of the authors' code ────────────────────────────────────────────────────────────────────────────────


def four_steps(file: str) -> list[tuple[float, Tensor, dict[str, Tensor], dict[str, Tensor]]]:
    """(loss of this rank's share, centre, states of network and average) after each."""
    g = golden(file)
    images = g["crop_0"].shape[1] * g["crop_0"].shape[2]
    encoder = vit(16, 1, 2, 4, 8, enlarged=0.1)
    network = Network(encoder, DINOHead(16, 12, 10, 6)).double()
    for name, p in network.named_parameters():
        p.data.copy_(g[f"init|{theirs(name)}"])
    teacher = Teacher(network)
    optim = Optim(name="adamw", clip_each=float(g["clip"]))
    # The authors' temperatures: 0.04, and 0.07 from the second epoch on, which are of one step here.
    assert g["teacher_temperature"].tolist() == [0.04, 0.07, 0.07, 0.07]
    config = dataclasses.replace(
        SMALL,
        optim=optim,
        train=dataclasses.replace(SMALL.train, batch_size=images),
        temperature=float(g["student_temperature"]),
        teacher_epochs=2,
        centre_ema=float(g["center_momentum"]),
    )
    groups = parameter_groups(network, optim, lambda step: float(g["lr"][step]), 4, dino_rule)
    groups = tuple(
        dataclasses.replace(group, settings={**group.settings}, schedules={**group.schedules, "weight_decay": partial(_decay, g["wd"])})
        if group.settings["weight_decay"]
        else group
        for group in groups
    )

    def after(inputs: Any, targets: Any, step: int) -> None:
        follow(teacher, network, inputs, targets, 0, 4, dataclasses.replace(config, ema=float(g["m"][step])))  # as if it were the first

    method = Method(
        crops=(),
        inputs=lambda batch, some: {name: x[:, some] for name, x in batch.rows.items()},  # type: ignore[attr-defined]
        network=network,
        state=teacher,
        targets=partial(taught, teacher),
        loss=partial(objective, teacher=teacher, config=config, per_epoch=1),
        gradients=partial(freeze, network.head.last_layer, steps=int(g["freeze_last_layer"])),
        after=after,
        groups=groups,
        published={},
    )
    optimizer, wrapped, found = build_optimizer(method.groups, optim), data_parallel(network, 25.0, False), []
    for step in range(4):
        crops = [mine(g[f"crop_{number}"][step].flatten(0, 1).double()) for number in range(5)]
        batch: Any = SimpleNamespace(rows={"views": torch.stack(crops[:2]), "local": torch.stack(crops[2:])}, ids=range(len(crops[0])))
        _, _, _, sums = take_step(method, wrapped, optimizer, config, batch, step)
        states = [{name: t.clone() for name, t in part.state_dict().items()} for part in (network, teacher)]
        found.append((float(sums["train/loss"].detach()), teacher.centre.clone(), states[0], states[1]))
    return found


def _decay(table: Tensor, step: int) -> float:
    return float(table[step])


def theirs(name: str) -> str:
    part, _, rest = name.partition(".")
    return f"backbone.{rest}" if part == "encoder" else f"head.{theirs_of(rest, 3, False)}"


@pytest.mark.parametrize(("file", "world"), [("w1", 1), ("w1", 2), ("w1", 3), ("w2", 1), ("w2", 2)])
def test_four_steps_are_the_authors(file: str, world: int, ranks: Ranks, within: Within) -> None:
    """A ViT with small crops: clip of each gradient, last layer frozen at first, centre and average behind the optimizer."""
    g = golden(f"dino_train_{file}.npz")
    every = ranks(world, four_steps, f"dino_train_{file}.npz") if world > 1 else [four_steps(f"dino_train_{file}.npz")]
    for step in range(4):
        within("loss", abs(sum(found[step][0] for found in every) / world - float(g[f"loss_{step}"].mean())), 1e-10)
        for _, centre, student, average in (found[step] for found in every):
            within("centre", float((centre - g[f"center_{step}"]).abs().max()), 1e-10)
            for whose, state in (("student", student), ("teacher", average)):
                for name, t in state.items():
                    if name != "centre" and f"{whose}_{step}|{theirs(name)}" in g:
                        within(whose, float((t - g[f"{whose}_{step}|{theirs(name)}"]).abs().max()), 1e-9)
    assert any(name.startswith("student_3|backbone") for name in g) and any(name.startswith("teacher_3|head") for name in g)


# ── Runs ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def steps(config: DINO, data: Path) -> tuple[list[dict[str, float]], list[dict[str, Tensor]]]:
    """Metrics and state after every step."""
    found = [(r.metrics, {name: t.clone() for name, t in r.state.tensors.items()}) for r in train(config, Start(data))]
    return [metrics for metrics, _ in found], [state for _, state in found]


@pytest.mark.parametrize("transformer", [False, True])
def test_any_number_of_ranks_computes_what_one_does(patterns: Path, ranks: Ranks, within: Within, transformer: bool) -> None:
    """Steps of 22 images: three and four ranks hold different numbers. A ResNet with BatchNorm in the head, or a ViT with drop path."""
    vit_of = dataclasses.replace(SMALL.encoder, vit="micro", patch_px=8, drop_path=0.2, depth=50, cifar_stem=False)
    settings = dataclasses.replace(SMALL.train, batch_size=22, steps=2 if transformer else 4)
    config = dataclasses.replace(SMALL, encoder=vit_of if transformer else SMALL.encoder, head_norm=not transformer, train=settings)
    metrics, states = steps(config, patterns)
    for world in (3,) if transformer else (2, 3, 4):
        for found, after in ranks(world, steps, config, patterns):
            for name in ("train/loss", "train/linear_loss"):
                within(name, max(abs(a[name] - b[name]) for a, b in zip(metrics, found, strict=True)), 1e-9)
            within("state", max(float((after[-1][name] - t).abs().max()) for name, t in states[-1].items()), 1e-8)


def test_stopped_and_resumed_is_bitwise_the_uninterrupted_run(patterns: Path, tmp_path: Path) -> None:
    assert resumed(SMALL, patterns, tmp_path, until=2)["state.centre"].abs().sum() > 0


def test_the_last_layer_waits_and_centre_and_average_follow(patterns: Path, within: Within) -> None:
    """At the first step the last layer stays as it is, decay too; the average moves by the weights that the optimizer left."""
    begun = module.build_network(SMALL, 10).state_dict()
    _, states = steps(SMALL, patterns)
    first, second = (state["model.head.last_layer.weight_v"] for state in states[:2])
    assert torch.equal(first, begun["head.last_layer.weight_v"].double()) and not torch.equal(first, second)
    for step, (before, now) in enumerate(itertools.pairwise(states), 1):
        keep = cosine_to_one(step, 4, 0.9)
        for name in ("encoder.stem.0.weight", "head.layers.0.0.weight", "head.last_layer.weight_v"):
            expected = keep * before[f"state.{name}"] + (1 - keep) * now[f"model.{name}"]
            within("average", float((now[f"state.{name}"] - expected).abs().max()), 1e-12)


def test_the_temperature_of_the_average_is_set_epoch_by_epoch() -> None:
    """SMALL's goes from 0.04 to 0.07 in three epochs, of two steps here."""
    teacher = Teacher(module.build_network(SMALL, 5).double())
    draw = torch.Generator().manual_seed(0)
    scores, taught = (torch.rand(count, 25, 24, generator=draw).double() for count in (4, 2))
    for step, sharp in enumerate((0.04, 0.04, 0.055, 0.055, 0.07, 0.07, 0.07)):
        found, _ = objective({"scores": scores}, {"t": taught}, step, teacher, SMALL, 2)
        assert float(found) == pytest.approx(float(loss.dino(scores, taught, teacher.centre, SMALL.temperature, sharp)), rel=1e-12)


def test_pieces_give_the_whole_batchs_gradient(within: Within) -> None:
    """With fixed statistics."""
    network = module.build_network(SMALL, 5).double().eval()
    teacher = Teacher(network)
    teacher.centre.uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(1))
    draw = torch.Generator().manual_seed(3)
    rows = {
        "views": torch.rand(2, 24, 3, 32, 32, generator=draw).double(),
        "local": torch.rand(2, 24, 3, 16, 16, generator=draw).double(),
        "labels": torch.arange(24)[None] % 5,
    }

    def objected(outputs: Any, targets: Any) -> Any:
        return objective(outputs, targets, 0, teacher, SMALL, 10)

    whole, _ = objected(network(rows), taught(teacher, rows))
    trained = [p for p in network.parameters() if p.requires_grad]
    expected = torch.autograd.grad(whole, trained)
    for pieces in (2, 3):
        network.zero_grad()
        given: Any = (network, teacher, lambda some: {name: x[:, some] for name, x in rows.items()}, network, partial(taught, teacher))
        found = cached_gradient(*given, objected, 24, pieces)
        within("loss", abs(float(found[2] - whole.detach())), 1e-12)
        for p, gradient in zip(trained, expected, strict=True):
            assert p.grad is not None
            within("gradient, relative", float((p.grad - gradient).abs().max() / gradient.abs().max().clamp_min(1e-3)), 1e-10)
    assert all(p.grad is None for p in teacher.parameters())


def test_the_network_compiles_in_one_graph() -> None:
    config = dataclasses.replace(SMALL, train=dataclasses.replace(SMALL.train, precision="float32"))
    network = module.build_network(config, 5)
    rows = {"views": torch.rand(2, 4, 3, 32, 32), "local": torch.rand(2, 4, 3, 16, 16)}
    with torch.no_grad():
        expected = network(rows)
        found = torch.compile(network, backend="eager", fullgraph=True)(rows)
    assert {name: tuple(x.shape) for name, x in expected.items()} == {"scores": (4, 4, 24), "z": (2, 4, 8), "logits": (2, 4, 5)}
    assert all(float((found[name] - x).abs().max()) < 1e-4 for name, x in expected.items())


def test_chance_level_is_that_of_scores_that_prefer_nothing() -> None:
    zero = torch.zeros(4, 6, 24).double()
    found = loss.dino(zero, torch.rand(2, 6, 24).double(), torch.zeros(24), 0.1, 0.04)
    assert shapes(SMALL).chance == pytest.approx(math.log(24)) == pytest.approx(float(found))


def test_what_does_not_fit_is_refused_in_a_sentence() -> None:
    with pytest.raises(UserError, match=r"teacher_temperature is 0"):
        dataclasses.replace(SMALL, teacher_temperature=0.0)
    with pytest.raises(UserError, match=r"patch_px 16 does not divide local.size_px 24; use --local.size-px 16 or 32"):
        encoder = dataclasses.replace(SMALL.encoder, vit="micro", patch_px=16)
        dataclasses.replace(SMALL, encoder=encoder, local=dataclasses.replace(SMALL.local, size_px=24))
    assert DINO.from_dict(SMALL.to_dict()) == SMALL
