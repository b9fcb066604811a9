"""What decays, what LARS adapts and how fast each layer learns, for every encoder and by the rules of the authors."""

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

from simclr import optim
from simclr.config import Encoder, Optim
from simclr.methods.classifier import build_classifier
from simclr.methods.method import Start
from simclr.methods.simclr import build_model
from simclr.networks.vit import vit
from simclr.optim import parameter_groups
from simclr.recipes import RECIPES, recipe
from simclr.train import train
from tests.conftest import Within
from tests.support.paths import GOLDEN
from tests.support.small import TINY, TUNED

FAMILY = GOLDEN / "family"
META = torch.device("meta")


def table(name: str) -> Any:
    return json.loads((FAMILY / name).read_text())


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
