"""Optimizers of SimCLR's siblings against numbers of their authors' code: LARS, AdamW, schedules, clipping."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from simclr import checkpoint, optim
from simclr.config import Optim
from simclr.optim import LARS, Rule, build_optimizer, clip_gradients, half_cosine, parameter_groups, set_schedules, warmup_cosine
from tests.conftest import Within
from tests.simclr.test_ranks import resumed
from tests.support.paths import GOLDEN
from tests.support.ranks import Ranks
from tests.support.small import TINY, run

FAMILY = GOLDEN / "family"
META = torch.device("meta")
ON_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def named(params: dict[str, nn.Parameter]) -> nn.Module:
    """A module with `params` under their names, dots and all."""
    root = nn.Module()
    for name, p in params.items():
        *path, leaf = name.split(".")
        there: nn.Module = root
        for part in path:
            if not hasattr(there, part):
                there.add_module(part, nn.Module())
            there = getattr(there, part)
        there.register_parameter(leaf, p)
    return root


def table(name: str) -> Any:
    return json.loads((FAMILY / name).read_text())


# ── LARS with the rate outside its buffer ──────────────────────────────────────────────────────────────────────────

LARS_CASES = [
    ("mocov3_lars", "wd1e-06", optim.mocov3_lars_rule, 1e-6),
    ("mocov3_lars", "wd0.05", optim.mocov3_lars_rule, 0.05),
    ("byol_lars", "wd1.5e-06", optim.byol_rule, 1.5e-6),
    ("byol_lars", "wd0.05", optim.byol_rule, 0.05),
]


@pytest.mark.parametrize("cuda", [False, True], ids=["cpu", "form for gpus"])
@pytest.mark.parametrize(("file", "tag", "rule", "decay"), LARS_CASES)
def test_lars_follows_the_authors(
    within: Within, monkeypatch: pytest.MonkeyPatch, file: str, tag: str, rule: Rule, decay: float, cuda: bool
) -> None:
    """Five steps at five rates, through the config's optimizer and the authors' rule of what decays and adapts."""
    if cuda:
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    data = np.load(FAMILY / f"{file}.npz")
    keys = [key.removeprefix(f"{tag}|").removesuffix("|init") for key in data.files if key.startswith(f"{tag}|") and key.endswith("|init")]
    assert len(keys) >= 7
    for dtype, suffix, bound in ((torch.float64, "", 1e-10), (torch.float32, "_f4" if file == "mocov3_lars" else "", 1e-6)):
        params = {
            key.replace("|", ".").replace("/", "."): nn.Parameter(torch.tensor(data[f"{tag}|{key}|init"], dtype=dtype)) for key in keys
        }
        settings = Optim(weight_decay=decay, rate_in_buffer=False)
        groups = parameter_groups(named(params), settings, lambda step: float(data["lr"][step]), 5, rule)
        optimizer = build_optimizer(groups, settings)
        for step in range(5):
            for key, p in zip(keys, params.values(), strict=True):
                p.grad = torch.tensor(data[f"{tag}|{key}|grad{step}"], dtype=dtype)
            set_schedules(optimizer, groups, step)
            optimizer.step()
            for key, p in zip(keys, params.values(), strict=True):
                theirs = data[f"{tag}|{key}|after{step}{suffix}"]
                scale = max(float(np.abs(theirs).max()), 1e-3)
                within(f"{file}, {dtype}", float(np.abs(p.detach().numpy() - theirs).max()) / scale, bound)


@pytest.mark.parametrize("cuda", [False, True], ids=["cpu", "form for gpus"])
def test_nesterov_with_the_rate_outside_is_the_formula(within: Within, monkeypatch: pytest.MonkeyPatch, cuda: bool) -> None:
    """v ← m v + g, w ← w − lr (m v + g), written out for a kernel that adapts and a bias that does not."""
    if cuda:
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    random = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, dtype=torch.float64, generator=random)) for shape in ((4, 3), (4,))]
    expected, buffers = [p.detach().clone() for p in params], [torch.zeros_like(p) for p in params]
    given = [{"params": params[:1]}, {"params": params[1:], "adapt": False, "weight_decay": 0.0}]
    optimizer = LARS(given, lr=0.0, weight_decay=0.01, nesterov=True, rate_in_buffer=False)
    for lr in (0.5, 2.0, 0.1):
        for index, p in enumerate(params):
            g = torch.randn(p.shape, dtype=torch.float64, generator=random)
            p.grad = g.clone()
            if index == 0:
                g = g + 0.01 * expected[0]
                g = 1e-3 * expected[0].norm() / g.norm() * g
            buffers[index] = 0.9 * buffers[index] + g
            expected[index] = expected[index] - lr * (0.9 * buffers[index] + g)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        for p, theirs in zip(params, expected, strict=True):
            within("weights", float((p.detach() - theirs).abs().max()), 1e-13)


# ── AdamW ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_step_of_dino_is_the_authors(within: Within) -> None:
    """From their gradient before clipping to their student: each parameter's clip, groups, AdamW and its decay. The last layer is frozen in
    the first epoch, decay included."""
    data = np.load(FAMILY / "dino_adamw.npz")
    names = [key.removeprefix("init|") for key in data.files if key.startswith("init|")]
    params = {name: nn.Parameter(torch.tensor(data[f"init|{name}"], dtype=torch.float64)) for name in names}
    params["head.last_layer.weight_g"].requires_grad_(False)
    settings = Optim(name="adamw", weight_decay=float(data["wd"][0]), clip_each=float(data["clip"]))
    groups = parameter_groups(named(params), settings, lambda step: float(data["lr"][0]), 4, optim.dino_rule)
    optimizer = build_optimizer(groups, settings)
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["betas"] == (0.9, 0.999)
    for name, p in params.items():
        if not name.startswith("head.last_layer"):
            p.grad = torch.tensor(data[f"grad_0|{name}"])
    assert clip_gradients(optimizer, settings) is None
    set_schedules(optimizer, groups, 0)
    optimizer.step()
    for name, p in params.items():
        moved = float(np.abs(p.detach().numpy() - data[f"student_0|{name}"]).max())
        # Of a key's bias the gradient is 0 but for rounding, and AdamW's first step is as long as any: its sign is nobody's.
        if name.endswith("qkv.bias"):
            moved = float(np.abs(p.detach().numpy() - data[f"student_0|{name}"]).reshape(3, -1)[[0, 2]].max())
        within("student", moved, 1e-10)


def test_adamw_is_torchs(within: Within) -> None:
    """β and decay come from the config; two groups at a rate and a decay that change."""
    random = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, dtype=torch.float64, generator=random) for shape in ((4, 3, 2, 2), (4,))]
    ours, theirs = ([nn.Parameter(v.clone()) for v in values] for _ in range(2))
    settings = Optim(name="adamw", momentum=0.8, beta2=0.95, weight_decay=0.1, weight_decay_end=0.4)
    groups = parameter_groups(named({"a.weight": ours[0], "a.bias": ours[1]}), settings, lambda step: 0.1 * (step + 1), 4)
    optimizer = build_optimizer(groups, settings)
    plain = torch.optim.AdamW([{"params": [p]} for p in theirs], betas=(0.8, 0.95), eps=1e-8, fused=False, foreach=False)
    for step in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, dtype=torch.float64, generator=random)
            b.grad = a.grad.clone()
        set_schedules(optimizer, groups, step)
        for group, decay in zip(plain.param_groups, ((0.1 + 0.4 - 0.3 * np.cos(np.pi * step / 4)) / 2, 0.0), strict=True):
            group["lr"], group["weight_decay"] = 0.1 * (step + 1), decay
        optimizer.step()
        plain.step()
        for a, b in zip(ours, theirs, strict=True):
            within("weights", float((a - b).detach().abs().max()), 1e-12)


ADAMW = dataclasses.replace(
    TINY,
    optim=Optim(name="adamw", base_lr=0.02, warmup_epochs=0.1, weight_decay=0.05, weight_decay_end=0.4, clip_norm=2.0, clip_each=1.0),
    train=dataclasses.replace(TINY.train, steps=4),
)


def test_stopped_and_resumed_adamw_is_bitwise_the_uninterrupted_run(patterns: Path, tmp_path: Path) -> None:
    """Both moments and the count of steps, with decay and clipping: in float32, as it trains."""
    config = dataclasses.replace(ADAMW, train=dataclasses.replace(ADAMW.train, precision="float32", checkpoint_every_steps=2))
    whole = run(config, patterns, tmp_path / "whole")
    run(config, patterns, tmp_path / "parts", until=2)
    rest = run(config, patterns, tmp_path / "parts")
    assert sorted(rest) == [3, 4]
    assert [rest[step].metrics["train/loss"] for step in rest] == [whole[step].metrics["train/loss"] for step in rest]
    a, b = (checkpoint.read(tmp_path / part / "step-000000004").tensors for part in ("whole", "parts"))
    assert a.keys() == b.keys()
    assert {name.rsplit(".", 1)[-1] for name in a if name.startswith("optimizer.")} == {"exp_avg", "exp_avg_sq", "step"}
    assert all(torch.equal(a[name], b[name]) for name in a) and a["optimizer.classifier.weight.step"] == 4


def test_adamw_goes_on_with_another_number_of_ranks(ranks: Ranks, within: Within, patterns: Path, tmp_path: Path) -> None:
    """Two steps on three ranks, two on one: as four on one, where the norm that gradients are clipped to is the whole gradient's."""
    config = dataclasses.replace(ADAMW, train=dataclasses.replace(ADAMW.train, checkpoint_every_steps=2))
    losses, state = resumed(config, str(patterns), str(tmp_path / "whole"), 4)
    parts = ranks(3, resumed, config, str(patterns), str(tmp_path / "parts"), 2)[0][0]
    rest, weights = resumed(config, str(patterns), str(tmp_path / "parts"), 4)
    assert (len(parts), len(rest)) == (2, 2) and weights.keys() == state.keys()
    within("loss", float(np.abs(np.subtract(parts + rest, losses)).max()), 1e-9)
    within("weights, moments, statistics", max(float((weights[name] - t).abs().max()) for name, t in state.items()), 1e-9)


@pytest.mark.parametrize("name", ["sgd", "lars", "larc", "adamw"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, ON_CUDA])])
def test_a_parameter_may_have_its_first_gradient_late(name: Any, device: str) -> None:
    """SwAV's prototypes and DINO's last layer wait. Then a parameter takes the step that it would have taken first."""
    settings = Optim(name=name, momentum=0.9)
    late, alone = (nn.ParameterList([nn.Parameter(torch.full((3, 4), v, device=device)) for v in (2.0, 5.0)]) for _ in range(2))
    for params, gradients in ((late, ((1, None), (1, 3))), (alone, ((1, 3),))):
        optimizer = build_optimizer(parameter_groups(params, settings, lambda step: 0.1, 3), settings)
        for given in gradients:
            for group in optimizer.param_groups:
                group["lr"] = 0.1
            for p, value in zip(params, given, strict=True):
                p.grad = None if value is None else torch.full_like(p, value)
            optimizer.step()
    assert torch.equal(late[1], alone[1]) and not torch.equal(late[1], torch.full_like(late[1], 5.0))
    assert not torch.equal(late[0], alone[0])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, ON_CUDA])])
def test_a_restored_optimizer_takes_the_very_next_step(device: str) -> None:
    """The count of steps too, which a fused AdamW reads from the parameters' device; and a channels-last kernel keeps its layout."""

    def begun() -> tuple[nn.Module, torch.optim.Optimizer]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Conv2d(3, 4, 3).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = build_optimizer(parameter_groups(model, ADAMW.optim, lambda step: 0.1, 3), ADAMW.optim)
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        return model, optimizer

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.5).copy_(torch.arange(p.numel(), device=device).reshape(p.shape))
        clip_gradients(optimizer, ADAMW.optim)
        optimizer.step()

    one, other = begun(), begun()
    step(*one)
    step(*one)
    state = checkpoint.capture(2, {}, *one)
    state.tensors.update({name: t.detach().clone() for name, t in state.tensors.items()})
    checkpoint.restore(state, *other)
    step(*one)
    step(*other)
    for p, q in zip(one[0].parameters(), other[0].parameters(), strict=True):
        assert torch.equal(p, q) and p.stride() == q.stride()
        found = other[1].state[q]
        assert found["step"] == 3 and found["step"].device.type == device and found["exp_avg"].stride() == q.stride()


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_where_a_device_has_no_fused_kernel_the_step_is_torchs_own(name: Any) -> None:
    """torch refuses `fused` on such a device, as a TPU; the meta device stands for it."""
    groups = parameter_groups(nn.Linear(3, 2, device=META), Optim(name=name), lambda step: 0.1, 1)
    assert not build_optimizer(groups, Optim(name=name)).defaults["fused"]
    assert build_optimizer(parameter_groups(nn.Linear(3, 2), Optim(name=name), lambda step: 0.1, 1), Optim(name=name)).defaults["fused"]


# ── Schedules ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_schedules_are_those_of_the_authors(within: Within) -> None:
    """By step, and not by epoch. MoCo's authors set the rate once per epoch: ours agrees where an epoch begins, and goes on between."""
    for row in table("byol_schedule.json")["learning_rate"]:
        peak = row["base"] * row["batch"] / 256 if "batch" in row else row["peak"]
        ours = [warmup_cosine(step, peak, row["warmup_steps"], row["total_steps"]) for step in row["step"]]
        within("BYOL, their float32", float(np.abs(np.subtract(ours, row["lr"])).max()) / peak, 1e-7)
    for row in table("mocov3_schedule.json")["lr"]:
        # e = epoch + step / steps per epoch: with a million steps in an epoch those in the table are whole.
        ours = [warmup_cosine(round(1e6 * e), row["peak"], row["warmup_epochs"] * 10**6, row["epochs"] * 10**6) for e in row["epoch"]]
        within("MoCo v3", float(np.abs(np.subtract(ours, row["lr"])).max()) / row["peak"], 1e-6)
    for row in table("moco_schedule.json"):
        if row["cosine"]:
            ours = [warmup_cosine(7 * epoch, row["base_lr"], 0, 7 * row["epochs"]) for epoch in row["epoch"]]
            within("MoCo v2", float(np.abs(np.subtract(ours, row["lr"])).max()), 1e-12)
    for row in table("dino_tables.json")["schedules"]:
        if not row["warmup_epochs"]:
            ours = [half_cosine(step, row["base"], row["final"], row["total"]) for step in row["iteration"]]
            within("DINO's weight decay", float(np.abs(np.subtract(ours, row["value"])).max()), 1e-12)
    for row in table("mae_tables.json")["lr_schedules"]:
        if not row["min_lr"] and row["accumulate"] == 1:
            per = row["batches_per_epoch"]
            ours = [warmup_cosine(step, row["lr"], per * row["warmup_epochs"], per * row["epochs"]) for step in row["batch_index"]]
            within("MAE", float(np.abs(np.subtract(ours, row["value"])).max()), 1e-12)


def test_weight_decay_follows_its_schedule_step_by_step_where_there_is_any() -> None:
    settings = Optim(name="sgd", weight_decay=0.04, weight_decay_end=0.4)
    groups = parameter_groups(nn.Linear(3, 2), settings, lambda step: 0.1, 8)
    optimizer, seen = build_optimizer(groups, settings), []
    for step in (0, 1, 4, 8):
        set_schedules(optimizer, groups, step)
        seen.append([group["weight_decay"] for group in optimizer.param_groups])
    assert [decay for decay, _ in seen] == pytest.approx([0.04, 0.4 - 0.18 * (1 + np.cos(np.pi / 8)), 0.22, 0.4])
    assert [none for _, none in seen] == [0.0] * 4, "biases have none to begin with"


# ── Clipping ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("limit", ["3.0", "0.3"])
def test_each_gradient_is_clipped_as_dinos_authors_have_it(within: Within, limit: str) -> None:
    data, tag = np.load(FAMILY / "dino_clip.npz"), f"clip{limit}"
    names = [str(name) for name in data[f"{tag}|names"]]
    params = {name: nn.Parameter(torch.zeros(data[f"{tag}|{name}|before"].shape, dtype=torch.float64)) for name in names}
    params["unused.weight"] = nn.Parameter(torch.zeros(2))
    for name in names:
        params[name].grad = torch.tensor(data[f"{tag}|{name}|before"], dtype=torch.float64)
    clip_gradients(torch.optim.SGD(params.values(), 0.1), Optim(clip_each=float(limit)))
    for name in names:
        grad = params[name].grad
        assert grad is not None
        within(f"limit {limit}", float(np.abs(grad.numpy() - data[f"{tag}|{name}|after"]).max()), 1e-12)
    assert params["unused.weight"].grad is None


def test_the_whole_gradient_is_clipped_over_all_groups(within: Within) -> None:
    params = [nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": params[:1]}, {"params": params[1:]}], 0.1)
    for limit, factor in ((1.0, 1 / 5), (10.0, 1.0)):
        params[0].grad, params[1].grad = torch.tensor([3.0, 0.0]).double(), torch.tensor([0.0, 4.0]).double()
        norm = clip_gradients(optimizer, Optim(clip_norm=limit))
        assert norm is not None and norm.item() == 5
        within("gradient", float((torch.stack([p.grad for p in params]) - factor * torch.tensor([[3.0, 0], [0, 4]])).abs().max()), 1e-6)  # type: ignore[misc]
    assert clip_gradients(optimizer, Optim()) is None and params[1].grad is not None and params[1].grad[1] == 4
