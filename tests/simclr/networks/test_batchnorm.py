"""The rounding of BatchNorm over several ranks. `test_ranks` compares it with the whole batch."""

from __future__ import annotations

import pytest
import torch

from simclr.networks.batchnorm import BatchNorm, _GlobalBatchNorm
from tests.conftest import Within


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
        y, mean, var = _GlobalBatchNorm.apply(own, weight.requires_grad_(), bias.requires_grad_(), torch.zeros(8, dtype=others), 1e-5)
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
