"""BatchNorm over several ranks: its rounding, and ranks that hold different numbers of images. `test_ranks` has those that hold as many."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from simclr.collectives import rank, world_size
from simclr.networks.batchnorm import BatchNorm, _GlobalBatchNorm, share_statistics
from simclr.networks.norm_forms import Form, give_form
from tests.conftest import Within
from tests.support.ranks import Ranks


@pytest.mark.parametrize("offset", [0.0, 10.0])
def test_batchnorm_of_bfloat16_rounds_its_results_alone(within: Within, offset: float) -> None:
    """The form for several ranks, here on one: statistics and both terms of the gradient are float32, and bfloat16 results differ from
    float64 by half a unit in the last of their 8 bits."""
    random = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(64, 8, 7, 7, generator=random) + offset).bfloat16(), torch.randn(64, 8, 7, 7, generator=random).bfloat16()
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        others = torch.float32 if dtype == torch.bfloat16 else dtype
        own, weight, bias = x.to(dtype).clone().requires_grad_(), torch.linspace(0.5, 2, 8, dtype=others), torch.zeros(8, dtype=others)
        y, mean, var = _GlobalBatchNorm.apply(
            own, weight.requires_grad_(), bias.requires_grad_(), torch.zeros(8, dtype=others), 1e-5, False
        )
        y.backward(upstream.to(dtype))
        found.append((y, mean, var, own.grad, weight.grad, bias.grad))
    names = ("y", "mean", "variance", "gradient", "weight's gradient", "bias's gradient")
    for name, ours, exact in zip(names, *found, strict=True):
        ours, exact, bound = ours.detach(), exact.detach(), 2**-8 if ours.dtype == torch.bfloat16 else 1e-4
        off = (ours.double() - exact).abs() / exact.abs().clamp_min(exact.abs().max() / 8)
        within(f"{name}, mean {offset:.0f}", float(off.max()), bound)


@pytest.mark.parametrize("per_worker", [False, True])
def test_running_statistics_move_by_a_tenth_towards_mean_and_biased_variance(within: Within, per_worker: bool) -> None:
    """Of 1, 2, 3 and 6 the mean is 3, and the mean square of what is left 3.5; torch's own variance would be 14 / 3."""
    norm = BatchNorm(1, per_worker=per_worker).double()
    norm(torch.tensor([[1.0], [2.0], [3.0], [6.0]], dtype=torch.float64))
    within("mean", abs(norm.running_mean.item() - 0.1 * 3), 1e-12)
    within("variance", abs(norm.running_var.item() - (0.9 + 0.1 * 3.5)), 1e-12)


# ── Ranks that hold different numbers of images ────────────────────────────────────────────────────────────────────

Sides = dict[str, Tensor]
SHAPES: list[tuple[int, ...]] = [(8, 3), (8, 3, 5, 4)]
FORMS: list[Form | None] = [None, "sums", "kernels"]


def rows_of(rank: int, world: int, batch: int = 8) -> slice:
    return slice(rank * batch // world, (rank + 1) * batch // world)


def shared(shape: tuple[int, ...], form: Form | None, rows: list[slice]) -> Sides:
    """This rank's rows, one piece of them after another, through a norm with weights that tell channels apart: output, gradients and
    statistics."""
    random = torch.Generator().manual_seed(3)
    x, target = (torch.randn(shape, dtype=torch.float64, generator=random) + 7 for _ in range(2))
    layers = nn.Sequential(BatchNorm(shape[1])).double()
    norm = layers[0]
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-0.5, 2, shape[1]))
        norm.bias.copy_(torch.linspace(-1, 1, shape[1]))
        norm.running_mean.copy_(torch.linspace(6, 8, shape[1]))
    share_statistics([layers], shape[0])
    if form is not None:
        give_form(layers, form)
    pieces = [x[some].clone().requires_grad_() for some in rows]
    found = [layers(piece) for piece in pieces]
    torch.stack([(y * target[some]).sum() for y, some in zip(found, rows, strict=True)]).sum().backward()
    norm = layers[0]
    return {
        "y": torch.cat(found).detach(),
        "dx": torch.cat([piece.grad for piece in pieces if piece.grad is not None]),
        "parameters": torch.stack([norm.weight.grad, norm.bias.grad]),
        "mean": norm.running_mean,
        "var": norm.running_var,
    }


def every_share() -> list[Sides]:
    return [shared(shape, form, [rows_of(rank(), world_size())]) for shape in SHAPES for form in FORMS]


def by_definition(shape: tuple[int, ...], rows: slice = slice(None)) -> Sides:
    """The same in one process, by torch's own functions."""
    random = torch.Generator().manual_seed(3)
    x, target = ((torch.randn(shape, dtype=torch.float64, generator=random) + 7)[rows] for _ in range(2))
    own, others = x.clone().requires_grad_(), [0, *range(2, x.ndim)]
    weight, bias = (torch.linspace(low, high, shape[1]).double().requires_grad_() for low, high in ((-0.5, 2), (-1, 1)))
    y = nn.functional.batch_norm(own, None, None, weight, bias, True, 0.1, 1e-5)
    (y * target).sum().backward()
    assert own.grad is not None and weight.grad is not None and bias.grad is not None
    return {
        "y": y.detach(),
        "dx": own.grad,
        "parameters": torch.stack([weight.grad, bias.grad]),
        "mean": torch.linspace(6, 8, shape[1]).double().lerp(x.mean(others), 0.1),
        "var": torch.ones(shape[1]).double().lerp(x.var(others, correction=0), 0.1),
    }


@pytest.mark.parametrize("world", [3, 4])
def test_uneven_ranks_are_the_whole_batch(ranks: Ranks, within: Within, world: int) -> None:
    """8 images on 3 ranks: 2, 3 and 3; on 4 ranks each holds 2, and none sends its count."""
    every = ranks(world, every_share)
    for case, (shape, form) in enumerate(itertools.product(SHAPES, FORMS)):
        sides, expected = [found[case] for found in every], by_definition(shape)
        whole = {name: torch.cat([side[name] for side in sides]) for name in ("y", "dx")}
        whole |= {"parameters": torch.stack([side["parameters"] for side in sides]).sum(0)}
        for side in sides:
            for name, value in expected.items():
                within(
                    f"{form or 'BatchNorm'}, {name}",
                    float((whole | side if name in ("mean", "var") else whole)[name].sub(value).abs().max()),
                    1e-9,
                )
