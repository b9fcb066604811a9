"""Linear probes: the batched solve against single ones, λ's convention, and an encoder that comes back bitwise as it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import simclr.evaluation.features
import simclr.evaluation.knn
from simclr.evaluation import lbfgs, linear
from simclr.evaluation.frozen import Unchanged, digest
from simclr.evaluation.metrics import accuracy
from simclr.methods.simclr import build_model
from simclr.recipes import recipe
from tests.conftest import Within


def features(n: int = 200, d: int = 5, classes: int = 3) -> tuple[Tensor, Tensor]:
    """Off-centre, unevenly scaled features whose classes overlap, in float64."""
    torch.manual_seed(0)
    h = torch.randn(n, d, dtype=torch.float64) * torch.tensor([1, 5, 0.2, 1, 3]) + torch.tensor([3.0, 1, 0, 2, 9])
    return h, (h[:, :classes] / torch.tensor([1, 5, 0.2]) + 1.5 * torch.randn(n, classes)).argmax(1)


def single(h: Tensor, y: Tensor, penalty: float, classes: int) -> tuple[NDArray[np.float64], float]:
    """SciPy's L-BFGS-B on the sum of the losses + λ/2 |kernel|²: weights without the classes' common bias, objective / n."""
    from scipy.optimize import minimize

    x, hot = h.numpy(), np.eye(classes)[y.numpy()]

    def objective(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        w = flat.reshape(classes, -1)
        z = x @ w[:, :-1].T + w[:, -1]
        log_p = z - np.logaddexp.reduce(z, axis=1, keepdims=True)
        residual = np.exp(log_p) - hot
        gradient = np.concatenate([residual.T @ x + penalty * w[:, :-1], residual.sum(0)[:, None]], 1)
        return (-(log_p * hot).sum() + penalty / 2 * (w[:, :-1] ** 2).sum()) / len(x), gradient.ravel() / len(x)

    options = {"maxiter": 20_000, "maxfun": 40_000, "ftol": 1e-16, "gtol": 1e-11, "maxcor": 20}
    found = minimize(objective, np.zeros(classes * (h.shape[1] + 1)), jac=True, method="L-BFGS-B", options=options)
    return common_bias_off(found.x.reshape(classes, -1)), found.fun


def common_bias_off(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.concatenate([weights[:, :-1], weights[:, -1:] - weights[:, -1].mean()], 1)


def test_every_solution_of_the_batch_is_the_single_fits(within: Within) -> None:
    h, y = features()
    fits = lbfgs.fit(h, y, linear.PENALTIES, 3, tolerance=1e-9)
    assert fits.converged.all() and fits.iterations.max() < 100 and fits.iterations[-1] < fits.iterations[0]
    for i in range(0, 45, 4):
        weights, loss = single(h, y, linear.PENALTIES[i], 3)
        mine = common_bias_off(fits.weights[i].numpy())
        within("weights", np.abs(mine - weights).max() / max(1, np.abs(weights).max()), 1e-6)
        within("objective", abs(fits.loss[i].item() - loss) / loss, 1e-12)


def test_a_problem_does_not_depend_on_the_others_nor_on_blocks(within: Within, monkeypatch: pytest.MonkeyPatch) -> None:
    h, y = features()
    fits = lbfgs.fit(h, y, [1e-3, 1.0, 1e3], 3, tolerance=1e-9)
    monkeypatch.setattr(lbfgs, "_LOGITS", 64)
    monkeypatch.setattr(lbfgs, "_STATE_BYTES", 1)
    alone = lbfgs.fit(h, y, [1e-3, 1.0, 1e3], 3, tolerance=1e-9)
    within("weights", (fits.weights - alone.weights).abs().max().item(), 1e-7)
    assert (fits.iterations - alone.iterations).abs().max() <= 1


def test_float32_reaches_the_same_minimum(within: Within) -> None:
    h, y = features()
    exact, single_precision = (lbfgs.fit(x, y, linear.PENALTIES, 3) for x in (h, h.float()))
    assert single_precision.converged.all()
    within("objective, float32", ((exact.loss - single_precision.loss) / exact.loss).abs().max().item(), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_separable_classes_under_a_weak_penalty_reach_their_minimum(dtype: torch.dtype, within: Within) -> None:
    """The objective ends at 1e-5 of where it began; in float32 a loss of 1 − p would be rounding by then."""
    torch.manual_seed(0)
    h = torch.randn(40, 6, dtype=torch.float64)
    y = h[:, :3].argmax(1)
    fits = lbfgs.fit(h.to(dtype), y, [1e-6, 1e-4], 3, tolerance=1e-4)
    assert fits.converged.all()
    for penalty, weights, loss in zip((1e-6, 1e-4), fits.weights.double(), fits.loss, strict=True):
        theirs, least = single(h, y, penalty, 3)
        within("objective", abs(loss.item() - least) / least, 1e-4)
        a, b = theirs[:, :-1].ravel(), weights[:, :-1].numpy().ravel()
        within("direction", 1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b), 1e-4)


def test_lambda_is_one_over_scikit_learns_c(within: Within) -> None:
    from sklearn.linear_model import LogisticRegression

    h, y = features()
    fits = lbfgs.fit(h, y, [0.5, 20.0], 3, tolerance=1e-9)
    for penalty, weights in zip((0.5, 20.0), fits.weights, strict=True):
        theirs = LogisticRegression(C=1 / penalty, tol=1e-10, max_iter=10_000).fit(h.numpy(), y.numpy())
        within("kernel", np.abs(weights[:, :-1].numpy() - theirs.coef_).max(), 1e-4)  # theirs stops first


def test_one_against_the_rest_leaves_out_rows_that_do_not_count(within: Within) -> None:
    """VOC's labels: every class a regression of its own, over the rows that count for it."""
    from sklearn.linear_model import LogisticRegression

    h, y = features()
    targets = torch.nn.functional.one_hot(y, 3)
    targets[::7, 1] = -1
    fits = lbfgs.fit(h, targets, [2.0, 30.0], 3, tolerance=1e-9)
    for penalty, weights in zip((2.0, 30.0), fits.weights, strict=True):
        for c in range(3):
            rows = targets[:, c] >= 0
            theirs = LogisticRegression(C=1 / penalty, tol=1e-10, max_iter=10_000).fit(h[rows].numpy(), targets[rows, c].numpy())
            within("kernel", np.abs(weights[c, :-1].numpy() - theirs.coef_[0]).max(), 1e-4)


def test_the_sweep_takes_the_penalty_that_validates_best_and_fits_all_rows_again() -> None:
    h, y = features(400)
    train, validation, test = (slice(a, b) for a, b in ((0, 200), (200, 300), (300, 400)))

    def top1(scores: Tensor, labels: Tensor) -> float:
        return accuracy(scores, labels)["top1"]

    swept = linear.swept_probe((h[train], y[train]), (h[validation], y[validation]), h[test], 3, top1, tolerance=1e-8)
    best = max(swept.validation.values())
    assert swept.penalty == max(p for p, found in swept.validation.items() if found == best)
    assert len(swept.validation) == 45 and swept.converged == 45 and swept.refit_converged
    again = lbfgs.fit(h[:300], y[:300], [swept.penalty], 3, tolerance=1e-8)
    assert torch.allclose(swept.scores, lbfgs.logits(h[test], again.weights[0]))


def test_penalties_are_the_papers() -> None:
    assert len(linear.PENALTIES) == 45 and linear.PENALTIES[0] == 1e-6 and linear.PENALTIES[-1] == 1e5
    assert np.allclose(np.diff(np.log10(linear.PENALTIES)), 0.25)


def test_correlated_features_do_not_slow_the_fit() -> None:
    """Positive features of which some hardly vary, as an encoder gives them: along the axes the standard deviations are 1 to 10^-3.5."""
    torch.manual_seed(0)
    z, turn = torch.randn(300, 8, dtype=torch.float64), torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    h = (z * 10.0 ** -torch.arange(0, 4, 0.5, dtype=torch.float64)) @ turn + 5
    y = (z @ torch.randn(8, 3, dtype=torch.float64) + 3 * torch.randn(300, 3)).argmax(1)
    fits = lbfgs.fit(h, y, linear.PENALTIES, 3)
    assert fits.converged.all() and fits.iterations.max() < 60


def test_a_class_that_no_row_shows_is_never_taken(within: Within) -> None:
    """Its free bias has no minimum: without special treatment every fit would run to the last iteration."""
    h, y = features()
    few = lbfgs.fit(h, y, [1e-3, 1.0], 3)
    more = lbfgs.fit(h, 2 * y, [1e-3, 1.0], 6)  # classes 0, 2, 4 of six
    assert more.converged.all() and (more.weights[:, 1::2, -1] == -torch.inf).all()
    within("weights", (few.weights - more.weights[:, ::2]).abs().max().item(), 1e-12)
    marks = torch.nn.functional.one_hot(y, 5)
    marks[:, 4] = 1
    fits = lbfgs.fit(h, marks, [1.0], 5)
    assert fits.converged.all() and fits.weights[0, 3:, -1].tolist() == [-torch.inf, torch.inf]
    assert lbfgs.logits(h, fits.weights[0]).argmax(1).eq(4).all()
    alone = lbfgs.fit(h, torch.zeros_like(y), [1.0], 3)
    assert alone.converged.all() and lbfgs.logits(h, alone.weights[0]).argmax(1).eq(0).all()


def test_a_fit_without_penalty_or_rows_is_refused() -> None:
    h, y = features()
    with pytest.raises(ValueError, match="more than 0"):
        lbfgs.fit(h, y, [0.0], 3)
    with pytest.raises(ValueError, match="200 features and 10 labels"):
        lbfgs.fit(h, y[:10], [1.0], 3)


def test_held_out_takes_a_share_of_every_class() -> None:
    y = torch.tensor([0] * 50 + [1] * 10 + [2] * 2 + [3])
    chosen = linear.held_out(y, 0.2)
    assert torch.bincount(y[chosen], minlength=4).tolist() == [10, 2, 1, 0]
    assert torch.equal(chosen, linear.held_out(y, 0.2)) and not torch.equal(chosen, linear.held_out(y, 0.2, seed=1))


# ── Linear evaluation by SGD ───────────────────────────────────────────────────────────────────────────────────────


def test_batch_sizes_are_the_official_readmes() -> None:
    assert linear.batch_size_for(1_281_167) == 4096 and linear.batch_size_for(50_000) == 512 and linear.batch_size_for(10) == 2


def test_sgd_is_nesterov_under_half_a_cosine_and_the_encoder_is_untouched(patterns: Path, within: Within) -> None:
    """The classifier after an epoch against the recursion written out: v ← 0.9 v + g, w ← w − lr (g + 0.9 v)."""
    from simclr.data import loader
    from simclr.views.two_views import two_views

    config = recipe("patterns_tiny")
    config = replace(config, views=replace(config.views, blur_p=(1.0, 0.1), solarise_p=(1.0, 0.2)))  # of which the probe has none
    encoder = build_model(config).encoder.train()
    before = digest(encoder)
    classifier = linear.sgd_probe(encoder, patterns, config, 10, batch_size=60, epochs=1)
    assert digest(encoder) == before and encoder.training

    encoder.eval()
    views = replace(config.views, jitter_p=0.0, grey_p=0.0, blur_p=0.0, solarise_p=0.0)
    same = replace(config, views=views, train=replace(config.train, batch_size=60, epochs=1.0))
    w, v = torch.zeros(10, encoder.d_h + 1), torch.zeros(10, encoder.d_h + 1)
    stream = loader.batches(same, patterns, 0, 0, 1)
    for step in range(5):  # 240 // 60 + 1
        batch = next(stream)
        with torch.no_grad():
            h = encoder(two_views(batch.images[0], batch.ids, batch.epoch, views, config.seed)[:60])
        h = torch.cat([h, torch.ones(60, 1)], 1)
        g = ((h @ w.T).softmax(1) - torch.nn.functional.one_hot(batch.labels, 10)).T @ h / 60
        v = 0.9 * v + g
        w = w - 0.1 * 60 / 256 * 0.5 * (1 + np.cos(np.pi * step / 5)) * (g + 0.9 * v)
    stream.close()
    within("weights", (classifier.weight - w[:, :-1]).abs().max().item(), 1e-5)
    within("biases", (classifier.bias - w[:, -1]).abs().max().item(), 1e-5)


def test_an_encoder_that_is_changed_or_set_to_training_is_noticed() -> None:
    encoder = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    with pytest.raises(AssertionError, match="changed"), Unchanged(encoder):
        encoder[1].running_mean[0] += 1e-7
    with pytest.raises(AssertionError, match="left evaluation mode"), Unchanged(encoder):
        encoder[1].train()


def test_neighbours_do_not_depend_on_the_blocks() -> None:
    torch.manual_seed(0)
    h, y, q = torch.randn(300, 8), torch.randint(0, 4, (300,)), torch.randn(50, 8)
    whole = simclr.evaluation.knn.nearest(h, y, q, 20, 0.1)
    for bank_block in (299, 64, 7):
        parts = simclr.evaluation.knn.nearest(h, y, q, 20, 0.1, block=13, bank_block=bank_block)
        assert torch.equal(whole.index, parts.index) and torch.allclose(whole.votes, parts.votes)


@pytest.mark.parametrize(("temperature", "winner"), [(0.1, 0), (1.0, 1)])
def test_neighbours_vote_by_their_cosine_over_the_temperature(within: Within, temperature: float, winner: int) -> None:
    """One of class 0 at a cosine of 1 against two of class 1 at 0.9: 1 to 2 exp(−0.1 / τ), which is 0.74 or 1.81."""
    bank = torch.tensor([[1.0, 0.0], [0.9, np.sqrt(0.19)], [0.9, -np.sqrt(0.19)], [-1.0, 0.0]], dtype=torch.float64)
    y = torch.tensor([0, 1, 1, 2])
    votes = simclr.evaluation.knn.nearest(bank, y, 7 * bank[:1], 3, temperature).votes[0]
    expected = torch.tensor([1.0, 2 * np.exp(-0.1 / temperature), 0.0])
    within("votes", float((votes - expected).abs().max()), 1e-6)
    assert simclr.evaluation.knn.knn(bank, y, bank[:1], torch.tensor([winner]), 3, temperature)["top1"] == 1


def test_the_quick_probes_decay_is_scikit_learns_over_the_rows(within: Within) -> None:
    """decay / 2 |kernel|² beside the mean loss is C = 1 / (decay n) beside the sum."""
    from sklearn.linear_model import LogisticRegression

    h, y = features()
    standard = (h - h.mean(0)) / h.std(0)
    for decay in (1.0, 0.01):
        scores, chosen = linear.quick_probe(h.float(), y, h.float(), 3, (decay,), 1000)
        theirs = LogisticRegression(C=1 / (decay * len(h)), tol=1e-10, max_iter=10_000).fit(standard.numpy(), y.numpy())
        expected = torch.from_numpy(theirs.decision_function(standard.numpy()))
        within("scores", float((scores - scores.mean(1, keepdim=True) - expected + expected.mean(1, keepdim=True)).abs().max()), 1e-2)
        assert chosen == decay
