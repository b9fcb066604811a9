"""Configs and recipes: valid from birth, unchanged by JSON, and derived numbers that others could compute."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from simclr.config import Encoder, Head, Loss, Optim, SimCLR, Train, Views, Watch
from simclr.errors import UserError
from simclr.family import pretraining
from simclr.methods.choice import shapes
from simclr.recipes import RECIPES, recipe


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_survives_json(name: str) -> None:
    config = recipe(name)
    assert pretraining(json.loads(json.dumps(config.to_dict()))) == config
    assert config.flat()["train.batch_size"] == config.train.batch_size


@pytest.mark.parametrize(
    ("name", "millions"),
    [("imagenet_resnet50", 24), ("imagenet_resnet50_2x", 94), ("imagenet_resnet50_4x", 375), ("imagenet_resnet152_3x_sk", 795)],
)
def test_encoders_have_the_published_sizes(name: str, millions: int) -> None:
    """Millions of parameters: Table 6 of arXiv:2002.05709 and Table 1 of arXiv:2006.10029."""
    assert round(sum(p.numel() for p in shapes(recipe(name)).published["encoder"].parameters()) / 1e6) == millions


def test_steps_are_those_of_the_official_code() -> None:
    """ImageNet, N = 4096: 1,281,167 · 100 // 4096 + 1 steps, 10 epochs of warm-up."""
    config = recipe("imagenet_resnet50")
    assert config.total_steps(1_281_167) == 31_279
    assert config.warmup_steps(1_281_167) == 3_127
    assert config.steps_per_epoch(1_281_167) == 312
    assert config.images_per_rank(32) == 128
    assert recipe("cifar10_resnet18").total_steps(50_000) == 97_657


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: Encoder(width=0), "encoder.width is 0"),
        (lambda: Encoder(width=100), "encoder.width is 100; expected 1 to 32"),
        (lambda: Head(layers=10**9), "head.layers is 1000000000; expected .* at most 32"),
        (lambda: Head(d_out=2**40), "head.d_out is 1099511627776; expected 1 to 131,072"),
        (lambda: Views(size_px=4), "views.size_px is 4; expected 8 to 4096 pixels"),
        (lambda: Views(size_px=10**7), "views.size_px is 10000000; expected 8 to 4096 pixels"),
        (lambda: Views(area=(0.5, 0.2)), "views.area is 0.5 0.2"),
        (lambda: Views(flip_p=1.5), r"views.flip_p is 1.5; expected a probability in \[0, 1\]"),
        (lambda: Views(std=(1.0, 0.0, 1.0)), "views.std"),
        (lambda: Loss(temperature=0.0), "loss.temperature is 0.0; expected a positive number"),
        (lambda: Optim(base_lr=-1.0), "optim.base_lr is -1.0"),
        (lambda: Optim(momentum=1.0), r"optim.momentum is 1.0; expected \[0, 1\)"),
        (lambda: Train(batch_size=1), "train.batch_size is 1; contrasting needs at least 2 images"),
        (lambda: Train(epochs=0.0), "train.epochs is 0"),
        (lambda: Train(steps=0), "train.steps is 0"),
        (lambda: Watch(k=0), "watch.k is 0"),
        (lambda: SimCLR(seed=-1), "seed is -1"),
    ],
)
def test_a_bad_value_is_refused_at_birth(build: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        build()


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SimCLR().seed = 1  # type: ignore[misc]


def test_every_worker_has_an_image() -> None:
    config = SimCLR(train=Train(batch_size=500))
    assert config.images_per_rank(8) == 63 and config.images_of(7, 8) == slice(437, 500)
    with pytest.raises(
        UserError, match="batch_size 500 has no image for each of 501 workers; use --workers 500 or fewer, or a larger batch"
    ):
        config.images_per_rank(501)
    with pytest.raises(UserError, match="shard_groups 3 does not divide batch_size 500, of which each group gives as much; use a divisor"):
        dataclasses.replace(config, train=Train(batch_size=500, shard_groups=3)).groups_of(0, 3)


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown field optim.base_lrr; nearest: optim.base_lr"):
        SimCLR.from_dict({"optim": {"base_lrr": 1.0}})
    with pytest.raises(UserError, match=r"unknown recipe 'cifar_resnet18'; nearest: cifar10_resnet18"):
        recipe("cifar_resnet18")
