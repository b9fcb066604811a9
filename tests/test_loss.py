"""NT-Xent in one process: the naive double loop, constants, the official values. Ranks: tests/test_ranks.py."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from simclr import diagnostics
from simclr.loss import nt_xent

GOLDEN = Path(__file__).parent / "golden"


def naive(z: Tensor, temperature: float) -> Tensor:
    """Algorithm 1 as printed: a double loop over the 2N views."""
    rows = len(z)
    total = z.new_zeros(())
    for i in range(rows):
        j = (i + rows // 2) % rows
        s = [torch.dot(z[i], z[k]) / (z[i].norm() * z[k].norm()) / temperature for k in range(rows)]
        total = total - torch.log(torch.exp(s[j]) / torch.stack([torch.exp(s[k]) for k in range(rows) if k != i]).sum())
    return total / rows


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
def test_equals_the_naive_double_loop(temperature: float) -> None:
    z = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    ours, theirs = nt_xent(z, temperature), naive(z, temperature)
    (g,), (g_naive,) = torch.autograd.grad(ours, z), torch.autograd.grad(theirs, z)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    torch.testing.assert_close(g, g_naive, rtol=0, atol=1e-10)


def test_constant_embeddings_give_ln_2n_minus_1() -> None:
    for n in (2, 16, 300):
        value = nt_xent(torch.ones(2 * n, 8, dtype=torch.float64), 0.1).item()
        assert abs(value - math.log(2 * n - 1)) < 1e-10


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-6)])
def test_equals_the_official_loss_and_gradient(dtype: torch.dtype, tolerance: float) -> None:
    data = np.load(GOLDEN / "nt_xent.npz")
    checked = 0
    for case in range(int(data["cases"])):
        if not data[f"{case}_normalize"]:
            continue  # an ablation of the paper's Table 5
        z = torch.tensor(data[f"{case}_z"], dtype=dtype, requires_grad=True)
        temperature = float(data[f"{case}_temperature"])
        loss = 2 * nt_xent(z, temperature)  # the official value is loss_a + loss_b
        (grad,) = torch.autograd.grad(loss, z)
        assert abs(loss.item() - data[f"{case}_loss"]) < tolerance * max(1.0, float(data[f"{case}_loss"]))
        np.testing.assert_allclose(grad.numpy(), data[f"{case}_grad"], rtol=0, atol=tolerance)
        assert abs(float(diagnostics.contrastive_top1(z)) - data[f"{case}_contrastive_top1"]) < 1e-6
        assert abs(float(diagnostics.contrastive_entropy(z, temperature)) - data[f"{case}_contrastive_entropy"]) < 1e-4
        checked += 1
    assert checked >= 4


def test_odd_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(3, 8\); expected \(2n, d\)"):
        nt_xent(torch.ones(3, 8), 0.1)


def test_diagnostics_on_known_matrices() -> None:
    eye = torch.eye(8)
    assert float(diagnostics.alignment(torch.cat([eye, eye]))) == 0
    assert abs(float(diagnostics.alignment(torch.cat([eye, -eye]))) - 4) < 1e-6
    assert abs(float(diagnostics.uniformity(eye)) + 4) < 1e-5  # ‖x − y‖² = 2 for every pair: ln e^(−4)
    assert abs(float(diagnostics.uniformity(torch.ones(6, 3)))) < 1e-5
    assert abs(float(diagnostics.rankme(eye)) - 8) < 1e-3
    assert abs(float(diagnostics.rankme(torch.ones(8, 8))) - 1) < 1e-3
