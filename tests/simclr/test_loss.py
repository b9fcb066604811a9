"""NT-Xent in one process: the naive double loop, constants, the official values. Ranks: tests/simclr/test_ranks.py."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from simclr.evaluation import representation
from simclr.loss import margin_triplet, nt_logistic, nt_xent
from simclr.telemetry.collapse import Least, collapse
from tests.conftest import Within
from tests.support.paths import GOLDEN


def naive(z: Tensor, temperature: float) -> Tensor:
    """Algorithm 1 as printed: a double loop over the 2N views."""
    rows = len(z)
    total = z.new_zeros(())
    for i in range(rows):
        j = (i + rows // 2) % rows
        s = [torch.dot(z[i], z[k]) / (z[i].norm() * z[k].norm()) / temperature for k in range(rows)]
        total = total - torch.log(torch.exp(s[j]) / torch.stack([torch.exp(s[k]) for k in range(rows) if k != i]).sum())
    return total / rows


def worst(ours: Tensor, theirs: Tensor | np.ndarray) -> float:
    """Largest difference, relative to the largest entry."""
    theirs = torch.as_tensor(theirs, dtype=torch.float64)
    return float((ours.detach().double() - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
def test_equals_the_naive_double_loop(within: Within, temperature: float) -> None:
    z = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    ours, theirs = nt_xent(z, temperature), naive(z, temperature)
    (g,), (g_naive,) = torch.autograd.grad(ours, z), torch.autograd.grad(theirs, z)
    within("loss", (ours - theirs).abs().item(), 1e-10)
    within("gradient", (g - g_naive).abs().max().item(), 1e-10)


def test_constant_embeddings_give_ln_2n_minus_1(within: Within) -> None:
    for n in (2, 16, 300):
        value = nt_xent(torch.ones(2 * n, 8, dtype=torch.float64), 0.1).item()
        within("loss", abs(value - math.log(2 * n - 1)), 1e-10)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
def test_equals_the_official_loss_and_gradient(within: Within, dtype: torch.dtype, bound: float) -> None:
    data = np.load(GOLDEN / "nt_xent.npz")
    checked = 0
    for case in range(int(data["cases"])):
        if not data[f"{case}_normalize"]:
            continue  # an ablation of the paper's Table 5
        z = torch.tensor(data[f"{case}_z"], dtype=dtype, requires_grad=True)
        temperature = float(data[f"{case}_temperature"])
        loss = 2 * nt_xent(z, temperature)  # the official value is loss_a + loss_b
        (grad,) = torch.autograd.grad(loss, z)
        within(f"loss, {dtype}", worst(loss, data[f"{case}_loss"]), bound)
        within(f"gradient, {dtype}", worst(grad, data[f"{case}_grad"]), bound)
        within("contrastive top-1", abs(float(representation.contrastive_top1(z)) - data[f"{case}_contrastive_top1"]), 1e-6)
        within("entropy", abs(float(representation.contrastive_entropy(z, temperature)) - data[f"{case}_contrastive_entropy"]), 1e-4)
        checked += 1
    assert checked >= 4


# ── The paper's other losses (Table 2) ─────────────────────────────────────────────────────────────────────────────


def other_losses() -> list[tuple[str, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]]:
    """Name, ours, and the same from the table as a double loop. Cosines are taken of rows of any length."""

    def looped(z: Tensor, terms: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        u = z / z.norm(dim=1, keepdim=True)
        total = z.new_zeros(())
        for i in range(len(z)):
            j = (i + len(z) // 2) % len(z)
            total = total + terms(u[i] @ u[j], torch.stack([u[i] @ u[k] for k in range(len(z)) if k not in (i, j)]))
        return total / len(z)

    def log_sigmoid(x: Tensor) -> Tensor:
        return -torch.log(1 + torch.exp(-x))

    def nearest(s: Tensor, negatives: Tensor, margin: float) -> Tensor:
        fits = negatives[(negatives < s) & (negatives > s - margin)]
        return fits.sort().values[-1:]  # none, or the closest

    t, m = 0.3, 0.4
    return [
        ("logistic", lambda z: nt_logistic(z, t), lambda z: looped(z, lambda s, n: -log_sigmoid(s / t) - log_sigmoid(-n / t).mean())),
        (
            "logistic, semi-hard",
            lambda z: nt_logistic(z, t, semi_hard=True),
            lambda z: looped(z, lambda s, n: -log_sigmoid(s / t) - log_sigmoid(-nearest(s, n, math.inf) / t).sum()),
        ),
        ("triplet", lambda z: margin_triplet(z, m), lambda z: looped(z, lambda s, n: (n - s + m).clamp_min(0).mean())),
        (
            "triplet, semi-hard",
            lambda z: margin_triplet(z, m, semi_hard=True),
            lambda z: looped(z, lambda s, n: (nearest(s, n, m) - s + m).clamp_min(0).sum()),
        ),
    ]


@pytest.mark.parametrize("index", range(4))
def test_the_papers_other_losses(within: Within, index: int) -> None:
    """Value against the table's row as a double loop; gradient against central differences."""
    name, ours, table = other_losses()[index]
    # Positives close enough that semi-hard negatives exist for some anchors and not for others.
    generator = torch.Generator().manual_seed(4)
    first = torch.randn(7, 4, dtype=torch.float64, generator=generator)
    z = torch.cat([first, first + 0.6 * torch.randn(7, 4, dtype=torch.float64, generator=generator)]).requires_grad_()
    loss = ours(z)
    (grad,) = torch.autograd.grad(loss, z)
    within(f"loss, {name}", (loss - table(z)).abs().item(), 1e-12)
    step, flat = 1e-6, z.detach().flatten()
    differences = []
    for i in range(len(flat)):
        e = torch.zeros_like(flat)
        e[i] = step
        differences.append((ours((flat + e).view_as(z)) - ours((flat - e).view_as(z))) / (2 * step))
    within(f"gradient, {name}", (grad.flatten() - torch.stack(differences)).abs().max().item(), 1e-8)
    assert grad.abs().max() > 1e-3


def test_gradients_are_those_of_table_2(within: Within) -> None:
    """With respect to one normalised anchor u, its positive v⁺ and one negative v⁻, as the table prints them (for −loss)."""
    generator = torch.Generator().manual_seed(5)
    u, positive, negative = F.normalize(torch.randn(3, 6, dtype=torch.float64, generator=generator), dim=1).unbind()
    t, m = 0.5, 2.1  # every triplet lies within this margin
    sigma = torch.sigmoid
    rows = {
        "logistic": (
            lambda u: F.logsigmoid(u @ positive / t) + F.logsigmoid(-u @ negative / t),
            sigma(-u @ positive / t) / t * positive - sigma(u @ negative / t) / t * negative,
        ),
        "triplet": (lambda u: -F.relu(u @ negative - u @ positive + m), positive - negative),
    }
    for name, (objective, printed) in rows.items():
        anchor = u.clone().requires_grad_()
        within(name, (torch.autograd.grad(objective(anchor), anchor)[0] - printed).abs().max().item(), 1e-12)
    # The four rows below have one negative each per anchor but for its twin, so the losses reduce to those rows.
    z = torch.stack([u, negative, positive, negative]).requires_grad_()
    loss = nt_logistic(z, t)
    terms = [(0, 2, (1, 3)), (1, 3, (0, 2)), (2, 0, (1, 3)), (3, 1, (0, 2))]
    by_hand = -sum(F.logsigmoid(z[i] @ z[j] / t) + sum(F.logsigmoid(-z[i] @ z[k] / t) for k in ks) / 2 for i, j, ks in terms) / 4
    within("loss of four rows", abs(float(loss.detach() - by_hand.detach())), 1e-12)


def test_odd_rows_are_refused() -> None:
    for loss in (nt_xent, nt_logistic, margin_triplet):
        with pytest.raises(ValueError, match=r"shape \(3, 8\); expected \(2n, d\)"):
            loss(torch.ones(3, 8), 0.1)


def test_diagnostics_on_known_matrices() -> None:
    eye = torch.eye(8)
    assert float(representation.alignment(torch.cat([eye, eye]))) == 0
    assert abs(float(representation.alignment(torch.cat([eye, -eye]))) - 4) < 1e-6
    assert abs(float(representation.uniformity(eye)) + 4) < 1e-5  # ‖x − y‖² = 2 for every pair: ln e^(−4)
    assert abs(float(representation.uniformity(torch.ones(6, 3)))) < 1e-5
    assert abs(float(representation.rankme(eye)) - 8) < 1e-3
    assert abs(float(representation.rankme(torch.ones(8, 8))) - 1) < 1e-3


def test_effective_dimension_and_spread_on_known_matrices() -> None:
    """± the axes of 3 dimensions, of lengths 1, 1 and 2: λ is proportional to 1, 1, 4, so the ratio is 36 / 18."""
    axes = torch.diag(torch.tensor([1.0, 1.0, 2.0]))
    assert abs(float(representation.effective_dimension(torch.cat([axes, -axes]))) - 2) < 1e-6
    line = torch.linspace(-1, 1, 5)[:, None] * torch.tensor([1.0, 2, 3, 4, 5, 6])
    assert abs(float(representation.effective_dimension(line)) - 1) < 1e-5
    assert float(representation.effective_dimension(torch.ones(6, 3))) == 0
    # Unit rows ± the axes: each dimension is 1, −1, 0, 0, 0, 0, of standard deviation √(1/3) = 1 / √d.
    assert abs(float(representation.spread(torch.cat([axes, -axes]))) - 1) < 1e-6
    assert float(representation.spread(torch.ones(6, 3))) < 1e-6


@pytest.mark.parametrize(
    ("z", "sentence"),
    [
        (torch.ones(64, 16), "point nearly the same way"),
        (torch.randn(64, 1, generator=torch.Generator().manual_seed(0)) * torch.ones(16), "lie nearly on a line"),
        (torch.randn(64, 16, generator=torch.Generator().manual_seed(0)), None),
    ],
)
def test_a_collapsed_projection_is_named(z: torch.Tensor, sentence: str | None) -> None:
    metrics = {"health/spread": float(representation.spread(z)), "health/dimension": float(representation.effective_dimension(z))}
    said = collapse(metrics, Least())
    assert (said is None) if sentence is None else (said is not None and sentence in said)
