"""Spaces of sweeps against the paper's settings, the checks of a space, and the operations that the spaces add to the config."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from simclr import keyed, loss
from simclr.config import Head, Loss, SimCLR, Views
from simclr.errors import UserError
from simclr.methods.simclr import build_model
from simclr.networks.heads import ProjectionHead
from simclr.optim import lr_peak
from simclr.recipes import RECIPES, recipe
from simclr.views import ablations, draw, two_views
from tests.conftest import Within
from tests.support.ranks import Ranks
from tune import resolve, spaces
from tune.spaces import Axis, Between, Peak, Space, Times

IDS = np.arange(6)


@pytest.mark.parametrize("name", sorted(spaces.SPACES))
def test_every_space_fits_every_recipe(name: str) -> None:
    """Of SimCLR: the spaces are its papers'."""
    for given in RECIPES:
        config = recipe(given)
        if not isinstance(config, SimCLR):
            continue
        space = resolve.restricted(spaces.space(name), config, {})
        chosen = resolve.samples(space, 4, 0) if name == "search" else resolve.combinations(space)
        assert chosen
        for combination in chosen:
            found = resolve.point(space, config, combination, 3)
            assert found.seed == found.config.seed == config.seed + 3
            assert all(resolve.value_of(found.config, path) == value for path, value in found.values.items())


def test_spaces_have_the_papers_values() -> None:
    sizes = {name: len(resolve.combinations(space)) for name, space in spaces.SPACES.items() if name != "search"}
    assert sizes["augmentation-pairs"] == 7 + 7 * 6 and sizes["losses"] == 5 and sizes["normalisation-temperature"] == 6
    assert sizes["temperature-lr"] == 4 * 2 * 3 * 3 and sizes["projection-head"] == 1 + 2 * 7 and sizes["smoke"] == 8
    only = {"views.operations": ["crop", "colour", "blur", "noise"]}
    assert len(resolve.combinations(resolve.restricted(spaces.space("augmentation-pairs"), SimCLR(), only))) == 4 + 4 * 3


def test_both_scaling_rules_agree_at_the_recipes_batch() -> None:
    """App. B.1: 0.3 · N / 256 and 0.075 · √N are the same 4.8 at N = 4096; at 8192, 9.6 and 6.788."""
    config = recipe("imagenet_resnet50")
    space = spaces.space("temperature-lr")
    found = {}
    for rule, n in itertools.product(("linear", "sqrt"), (Times(1), Times(2))):
        chosen = {"loss.temperature": 0.1, "optim.scaling": rule, "optim.base_lr": Peak(1), "train.batch_size": n}
        c = resolve.point(space, config, chosen, 0).config
        found[rule, c.train.batch_size] = (c.optim.base_lr, lr_peak(c.optim.base_lr, c.train.batch_size, c.optim.scaling))
    assert found["linear", 4096] == (0.3, pytest.approx(4.8)) and found["sqrt", 4096] == (0.075, pytest.approx(4.8))
    assert found["linear", 8192][1] == pytest.approx(9.6) and found["sqrt", 8192][1] == pytest.approx(0.075 * math.sqrt(8192))


def test_samples_are_the_same_for_a_seed_and_inside_their_bounds() -> None:
    space = spaces.space("search")
    first, again, other = (resolve.samples(space, 20, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert all(0.05 <= c["loss.temperature"] <= 1 and 0.25 <= c["optim.base_lr"].factor <= 4 for c in first)
    grid = resolve.samples(spaces.space("smoke"), 5, 0)
    assert len({str(c) for c in grid}) == 5


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("optim.base_lt", 1.0, "no field 'optim.base_lt'; nearest: optim.base_lr"),
        ("loss.name", "nt_xnt", "loss.name = 'nt_xnt' does not fit; expected one of nt_xent"),
        ("train.batch_size", 12.5, "train.batch_size = 12.5 does not fit; expected int"),
        ("train.linear_eval", 1, "expected bool"),
        ("optim.base_lr", float("nan"), "expected float"),
        ("views.area", (0.1,), "does not fit"),
        ("views.operations", ("crop", "zoom"), "does not fit"),
        ("loss.temperature", -1.0, "loss.temperature is -1"),
    ],
)
def test_a_value_that_the_config_does_not_take_is_named(path: str, value: object, sentence: str) -> None:
    space = Space(name="mine", repeats="", why="", axes=(Axis(paths=(path,), values=(value,), label=""),))
    with pytest.raises(UserError, match=sentence):
        resolve.point(space, SimCLR(), {path: value}, 0)


def test_what_a_space_does_not_have_is_refused() -> None:
    with pytest.raises(UserError, match="unknown space 'temperatur-lr'; nearest: temperature-lr"):
        spaces.space("temperatur-lr")
    with pytest.raises(UserError, match=r"does not vary head.layers; --only takes loss.temperature"):
        resolve.restricted(spaces.space("smoke"), SimCLR(), {"head.layers": [1]})
    with pytest.raises(UserError, match=r"smoke has no loss.temperature 7.0; it has 0.1, 0.2, 0.5, 1.0"):
        resolve.restricted(spaces.space("smoke"), SimCLR(), {"loss.temperature": [7.0]})
    with pytest.raises(UserError, match="no grid covers"):
        resolve.combinations(Space(name="m", repeats="", why="", axes=(Axis(paths=("seed",), values=Between(0, 1), label=""),)))


# ── The spaces' operations ─────────────────────────────────────────────────────────────────────────────────────────


def test_products_without_normalisation_equal_algorithm_1(within: Within, ranks: Ranks) -> None:
    """Table 5's lower half by a naive double loop."""
    z = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    total = 0.0
    for i in range(8):
        logits = [float(z[i] @ z[k]) / 10 for k in range(8) if k != i]
        total += math.log(sum(map(math.exp, logits))) - float(z[i] @ z[(i + 4) % 8]) / 10
    within("loss", abs(float(loss.nt_xent_dot(z, 10.0)) - total / 8), 1e-12)
    unit = F.normalize(z, dim=1)
    within("of unit rows: nt_xent", abs(float(loss.nt_xent_dot(unit, 0.5) - loss.nt_xent(z, 0.5))), 1e-12)
    with pytest.raises(ValueError, match=r"shape \(3, 5\); expected \(2n, d\)"):
        loss.nt_xent_dot(z[:3], 10.0)


def test_no_head_gives_h_itself() -> None:
    h = torch.randn(4, 6)
    assert len(ProjectionHead(6, layers=0)(h)) == 1 and ProjectionHead(6, layers=0)(h)[-1] is h
    linear = ProjectionHead(6, layers=1, d_out=3)
    assert [type(m).__name__ for m in linear.layers[0]] == ["Linear", "BatchNorm"] and linear(h)[-1].shape == (4, 3)
    config = dataclasses.replace(recipe("patterns_tiny"), head=Head(layers=0))
    assert not list(build_model(config, 10).head.parameters())


def test_one_branch_stays_the_crop_and_the_other_goes_through_the_operations() -> None:
    images = torch.as_tensor(keyed.bits(0, "patterns", 0, IDS, 0, 20 * 24 * 3).reshape(6, 20, 24, 3) % 256).to(torch.uint8)
    ids = torch.as_tensor(IDS)
    plain = Views(size_px=20, operations=())  # below 20 px the blur of App. A has one tap
    same = two_views.raw_views(images, ids, 1, plain, 0)
    assert torch.equal(same[:6], same[6:])
    for operation in ("crop", "cutout", "colour", "sobel", "noise", "blur", "rotate"):
        chain = dataclasses.replace(plain, operations=(operation,))
        x = two_views.raw_views(images, ids, 1, chain, 0)
        assert x.shape == same.shape and torch.equal(x[:6], same[:6]) and not torch.equal(x[6:], same[6:]), operation
        assert float(x.min()) >= 0 and float(x.max()) <= 1
        assert torch.equal(x, two_views.raw_views(images, ids, 1, chain, 0)) and (
            operation == "sobel" or not torch.equal(x, two_views.raw_views(images, ids, 2, chain, 0))
        )
        some = two_views.raw_views(images[2:4], ids[2:4], 1, chain, 0)  # keyed by the sample, whatever the batch
        assert torch.allclose(some[2:], x[8:10], atol=1e-6), operation


def test_crops_from_the_decoder_are_shared_and_the_fast_path_steps_aside() -> None:
    plain = Views(size_px=8, operations=("rotate",))
    boxes = draw.crop_boxes(plain, 0, 0, IDS, np.full((6, 2), 40))
    assert (boxes[:, 0] == boxes[:, 1]).all()
    assert (boxes[:, 0] == draw.crop_boxes(Views(size_px=8), 0, 0, IDS, np.full((6, 2), 40))[:, 0]).all()
    crops = torch.randint(0, 256, (6, 1, 8, 8, 3), dtype=torch.uint8).expand(-1, 2, -1, -1, -1)
    x = two_views.two_views(crops, torch.as_tensor(IDS), 0, plain, 0)
    turned = [[torch.equal(torch.rot90(x[i], k, (1, 2)), x[6 + i]) for k in (1, 2, 3)] for i in range(6)]
    assert all(sum(t) == 1 for t in turned)


def test_operations_are_what_they_are_called() -> None:
    x = torch.zeros(1, 3, 8, 8)
    x[..., 4:] = 0.5
    edge = ablations.sobel(x)
    # Sobel ÷ 4 of a step of 0.5 is 0.5 on both sides of it, 0 elsewhere.
    assert torch.allclose(edge[0, 0, 3], torch.tensor([0, 0, 0, 0.5, 0.5, 0, 0, 0]), atol=1e-3)
    hole = ablations.cutout(torch.ones(1, 3, 8, 8), np.array([[0.0, 0.99]]))
    assert (hole[0, :, :4, 4:] == 0.5).all() and float((hole == 1).float().mean()) == 0.75
    grey = torch.full((200, 3, 8, 8), 0.5)
    u = keyed.uniform(0, "operation", 0, np.arange(200), 0, 2 + 192)
    u[:, 0] = 1.0
    deviation = (ablations.noise(grey, u) - grey).std()
    assert abs(float(deviation) - 0.1) < 0.002


def test_the_new_fields_are_checked() -> None:
    with pytest.raises(UserError, match="semi_hard is for the other losses"):
        Loss(name="nt_xent_dot", semi_hard=True)
    with pytest.raises(UserError, match=r"views.operations has zoom; expected some of crop"):
        Views(operations=("zoom",))  # type: ignore[arg-type]
    config = dataclasses.replace(SimCLR(), views=Views(operations=("crop", "colour")))
    assert SimCLR.from_dict(config.to_dict()) == config and config.flat()["views.operations"] == "crop colour"
