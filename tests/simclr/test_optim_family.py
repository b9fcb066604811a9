"""Optimizers of SimCLR's siblings against numbers of their authors' code: LARS, AdamW, groups, schedules, clipping."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from simclr import checkpoint, optim
from simclr.config import Encoder, Optim
from simclr.methods.classifier import build_classifier
from simclr.methods.method import Start
from simclr.methods.simclr import build_model
from simclr.networks.vit import vit
from simclr.optim import LARS, Rule, build_optimizer, clip_gradients, half_cosine, parameter_groups, set_schedules, warmup_cosine
from simclr.recipes import RECIPES, recipe
from simclr.train import train
from tests.conftest import Within
from tests.simclr.test_ranks import resumed
from tests.support.paths import GOLDEN
from tests.support.ranks import Ranks
from tests.support.small import TINY, TUNED, run

FAMILY = GOLDEN / "family"
META = torch.device("meta")


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


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_where_a_device_has_no_fused_kernel_the_step_is_torchs_own(name: Any) -> None:
    """torch refuses `fused` on such a device, as a TPU; the meta device stands for it."""
    groups = parameter_groups(nn.Linear(3, 2, device=META), Optim(name=name), lambda step: 0.1, 1)
    assert not build_optimizer(groups, Optim(name=name)).defaults["fused"]
    assert build_optimizer(parameter_groups(nn.Linear(3, 2), Optim(name=name), lambda step: 0.1, 1), Optim(name=name)).defaults["fused"]


# ── Groups ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def kernels(module: nn.Module) -> set[str]:
    """Names of the weights that dense layers and convolutions own, by the modules' types."""
    return {
        f"{name}.weight"
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear | nn.Conv1d | nn.Conv2d) and part.weight.ndim > 1
    }


def timm_networks() -> Iterator[tuple[str, nn.Module, set[str]]]:
    """(name, network, its tensors of several dimensions that are no kernels)."""
    timm = pytest.importorskip("timm", reason="timm, of the extra `dev`, is not installed")
    table = "attn.relative_position_bias_table"
    with META:
        for name, others in (
            ("resnet50", ()),
            ("convnext_tiny", ()),
            ("vit_small_patch16_224", ("cls_token", "pos_embed")),
            ("swin_tiny_patch4_window7_224", (table,)),
        ):
            yield name, timm.create_model(name, num_classes=0), set(others)


def test_a_kernel_is_told_by_name_and_shape_in_each_encoder_of_timms() -> None:
    """`ndim > 1` would decay tokens, positions and Swin's tables."""
    for name, network, others in timm_networks():
        params = dict(network.named_parameters())
        assert {n for n, p in params.items() if optim.is_kernel(n, p)} == kernels(network) != set(), name
        wide = {n for n, p in params.items() if p.ndim > 1} - kernels(network)
        assert {next((o for o in others if n.endswith(o)), n) for n in wide} == others, name


@pytest.mark.parametrize("positions", ["learned", "sin_cos"])
def test_tokens_and_positions_of_a_vision_transformer_do_not_decay(positions: Any) -> None:
    with META:
        network = nn.ModuleDict({"encoder": vit(32, 2, 4, 4, 16, positions=positions), "classifier": nn.Linear(32, 3)})
    groups = parameter_groups(network, Optim(weight_decay=0.1), lambda step: 0.1, 1)
    where = {p: group.settings for group in groups for p in group.params}
    found = {name: (where[p]["weight_decay"] > 0, where[p]["adapt"]) for name, p in network.named_parameters() if p in where}
    assert {name for name, (decays, _) in found.items() if decays} == kernels(network)
    assert {name for name, (_, adapts) in found.items() if adapts} == kernels(network) - {"classifier.weight"}
    learned = {"encoder.cls_token", "encoder.pos_embed"} if positions == "learned" else {"encoder.cls_token"}
    assert learned <= found.keys() and "encoder.blocks.0.attn.qkv.weight" in found
    theirs = {name for name, p in network.named_parameters() if p in where and optim.dino_rule(name, p)[0]}
    assert theirs == kernels(network) | learned, "DINO and MAE let them decay"


def test_other_shapes_of_scales_are_no_kernels() -> None:
    """ConvNeXt's γ, weight normalisation's lengths, BatchNorm's (1, C) of other frameworks, Swin's tables."""
    for name, shape, kernel in (
        ("gamma", (1, 96, 1, 1), False),
        ("stages.0.blocks.0.gamma", (96,), False),
        ("head.last_layer.weight_g", (12, 1), False),
        ("head.last_layer.weight_v", (12, 6), True),
        ("head.parametrizations.weight.original0", (12, 1), False),
        ("head.parametrizations.weight.original1", (12, 6), True),
        ("projector.batch_norm.weight", (1, 10), False),
        ("attn.relative_position_bias_table", (169, 3), False),
        ("position_embedding.weight", (77, 64), False),
        ("mask_token", (1, 1, 32), False),
        ("attn.in_proj_weight", (96, 32), True),
        ("mlp_tokens.fc1.weight", (96, 32), True),
        ("logit_scale", (), False),
    ):
        assert optim.is_kernel(name, nn.Parameter(torch.empty(shape, device=META))) is kernel, name


def test_every_recipe_and_kind_of_resnet_has_the_groups_of_before() -> None:
    """App. B.6, by dimensions alone: what ran before this rule runs on as it was."""
    configs = [c for name in RECIPES if isinstance(c := recipe(name), type(TINY)) and not (c.encoder.vit or c.encoder.timm)]
    configs += [
        dataclasses.replace(TINY, encoder=Encoder(depth=18, sk_ratio=0.0625, se_ratio=0.25), head=dataclasses.replace(TINY.head, layers=3))
    ]
    assert len(configs) >= 5
    for config in configs:
        with META:
            model = build_model(config, 10)
        params = dict(model.named_parameters())
        for name, p in params.items():
            assert optim.simclr_rule(name, p) == (p.ndim > 1, p.ndim > 1 and not name.startswith("classifier.")), name


def test_the_groups_of_the_authors() -> None:
    """BYOL's by name, DINO's and MAE's by dimension and ".bias", MoCo's everything."""
    for name, row in table("byol_layers.json")["tiny_model_parameters"].items():
        p = nn.Parameter(torch.empty(row["shape"], device=META))
        assert optim.byol_rule(name.replace("/", "."), p) == (row["decayed_and_adapted"],) * 2, name
    shapes = {"cls_token": (1, 1, 4), "mask_token": (1, 1, 4), "backbone.cls_token": (1, 1, 4), "backbone.pos_embed": (1, 5, 4)}
    tables = {"MAE": table("mae_tables.json")["pretraining_groups"], **table("dino_tables.json")["parameter_groups"]}
    for title, groups in tables.items():
        norms = {"head.mlp.1.weight", "head.mlp.4.weight"} if "bn_head" in title else set()
        for name in (*groups["weight_decay"], *groups["no_weight_decay"]):
            vector = name.endswith(".bias") or "norm" in name or name in norms
            p = nn.Parameter(torch.empty(shapes.get(name, (4,) if vector else (4, 4)), device=META))
            assert optim.dino_rule(name, p)[0] is (name in groups["weight_decay"]), (title, name)
    assert optim.everything("encoder.norm.bias", nn.Parameter(torch.empty(4))) == (True, True)


# ── Layer decay ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_layer_decay_and_decay_are_those_of_maes_fine_tuning(within: Within) -> None:
    given = table("mae_tables.json")["finetuning_layer_decay"]
    encoder = vit(32, given["depth"], 4, 4, 16, pool="mean")
    model = nn.ModuleDict({"encoder": encoder, "classifier": nn.Linear(32, 3)})
    settings = Optim(name="adamw", weight_decay=given["weight_decay"], layer_decay=given["layer_decay"])
    groups = parameter_groups(model, settings, lambda step: 0.5 + step, 10)
    assert groups[0].schedules["lr"](1) == 1.5, "reports say the rate of the first group: the whole one"
    where = {p: group for group in groups for p in group.params}
    # Theirs norms the mean of the patches by `fc_norm`, and has no other norm behind the blocks.
    names = {name: name.removeprefix("encoder.") for name, _ in model.named_parameters()}
    names |= {f"encoder.norm.{part}": f"fc_norm.{part}" for part in ("weight", "bias")}
    names |= {f"classifier.{part}": f"head.{part}" for part in ("weight", "bias")}
    assert sorted(names.values()) == sorted(given["parameters"])
    for name, p in model.named_parameters():
        theirs = given["parameters"][names[name]]
        within("rate", abs(where[p].schedules["lr"](1) / 1.5 - theirs["lr_scale"]), 1e-15)
        assert where[p].settings["weight_decay"] == theirs["weight_decay"], name


def test_fine_tuning_has_layer_decay_and_reports_the_whole_rate(patterns: Path) -> None:
    """On a ResNet too: its stem is slowest, the classifier has the rate that the report says."""
    config = dataclasses.replace(TUNED, optim=dataclasses.replace(TUNED.optim, name="adamw", layer_decay=0.5, base_lr=0.001))
    with META:
        model = build_classifier(config, 10, config.tap)
    groups = parameter_groups(model, config.optim, lambda step: 1.0, 4)
    rates = {name: next(g.schedules["lr"](0) for g in groups if any(p is q for q in g.params)) for name, p in model.named_parameters()}
    assert rates["classifier.weight"] == 1 and rates["encoder.stem.0.weight"] == min(rates.values()) == 0.5**4
    assert all(rate == 1 for name, rate in rates.items() if not name.startswith("encoder."))
    first = next(train(config, Start(patterns, ids=np.arange(40))))
    assert first.metrics["train/lr"] == pytest.approx(0.001 * 10**0.5)


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
