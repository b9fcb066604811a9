"""Scores against hand computation, scikit-learn and the binomial distribution."""

from __future__ import annotations

import math

import numpy as np
import torch

from simclr.evaluation.metrics import (
    accuracy,
    average_precision,
    bootstrap,
    confusion,
    mean_average_precision,
    mean_per_class,
    per_class,
    wilson,
)
from tests.conftest import Within


def test_confusion_and_accuracy_of_each_class() -> None:
    y = torch.tensor([0, 0, 0, 1, 1, 3])
    predicted = torch.tensor([0, 0, 1, 1, 1, 0])
    table = confusion(predicted, y, 4)
    assert table.tolist() == [[2, 1, 0, 0], [0, 2, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    shares = per_class(table).tolist()
    assert shares[:2] == [2 / 3, 1.0] and math.isnan(shares[2]) and shares[3] == 0.0
    assert abs(mean_per_class(table) - (2 / 3 + 1 + 0) / 3) < 1e-12  # class 2 has no row and does not count


def test_confusion_and_mean_per_class_are_scikit_learns(within: Within) -> None:
    from sklearn.metrics import balanced_accuracy_score, confusion_matrix

    r = np.random.RandomState(0)
    y, predicted = r.randint(0, 7, 500), r.randint(0, 7, 500)
    table = confusion(torch.from_numpy(predicted), torch.from_numpy(y), 7)
    assert np.array_equal(table.numpy(), confusion_matrix(y, predicted))
    within("mean per class", abs(mean_per_class(table) - balanced_accuracy_score(y, predicted)), 1e-12)


def test_five_of_fewer_than_five_classes_is_all() -> None:
    assert accuracy(torch.eye(3), torch.tensor([0, 1, 0]))["top5"] == 1.0


def test_eleven_points_by_hand() -> None:
    """Ranking + − + −: precision 1 up to recall 1/2 (r = 0 … 0.5, six points), 2/3 up to recall 1 (five points)."""
    scores, relevant = torch.tensor([[4.0], [3.0], [2.0], [1.0]]), torch.tensor([[1], [0], [1], [0]])
    assert abs(average_precision(scores, relevant).item() - (6 * 1 + 5 * 2 / 3) / 11) < 1e-12
    # A difficult image above all others is neither right nor wrong.
    with_difficult = average_precision(torch.cat([torch.tensor([[9.0]]), scores]), torch.cat([torch.tensor([[-1]]), relevant]))
    assert abs(with_difficult.item() - (6 + 10 / 3) / 11) < 1e-12
    # Recall 3 of 10 reaches r = 0.3, which 3 / 10 does not in every way of writing it: ten hits at ranks 1, 2, 3, then one in two.
    hits = torch.tensor([1, 1, 1, *([0, 1] * 7)])[:, None]
    ranks = np.flatnonzero(hits[:, 0].numpy()) + 1
    by_hand = [max((i + 1) / ranks[i] for i in range(10) if i + 1 >= r) for r in range(11)]
    assert abs(average_precision(-torch.arange(17.0)[:, None], hits).item() - np.mean(by_hand)) < 1e-12


def test_mean_over_the_classes_that_can_be_found() -> None:
    scores = torch.tensor([[2.0, 1.0, 0.0], [1.0, 2.0, 0.0]])
    relevant = torch.tensor([[1, 1, 0], [0, 0, 0]])
    assert average_precision(scores, relevant)[2].isnan()
    assert abs(mean_average_precision(scores, relevant) - (1 + 0.5) / 2) < 1e-12


def test_bootstrap_of_top1_is_binomial(within: Within) -> None:
    """A resample's count of hits is binomial: the interval's ends are that distribution's quantiles."""
    from scipy.stats import binom

    correct = (torch.arange(500) < 400).double()
    low, high = bootstrap(lambda rows: correct[rows].mean().item(), 500, resamples=4000)
    within("lower end", abs(low - binom.ppf(0.025, 500, 0.8) / 500), 0.005)
    within("upper end", abs(high - binom.ppf(0.975, 500, 0.8) / 500), 0.005)
    again = bootstrap(lambda rows: correct[rows].mean().item(), 500, resamples=4000)
    assert again == (low, high)
    assert bootstrap(lambda rows: correct[rows].mean().item(), 500, resamples=200, seed=1) != again


def test_the_wilson_interval_holds_the_shares_whose_score_test_keeps_the_one_that_was_found() -> None:
    """Its ends are where |p − share| is 1.96 standard deviations of p's own binomial (Wilson 1927)."""
    for share, rows in ((0.37, 1000), (0.0, 50), (1.0, 9), (0.5, 1)):
        for end in wilson(share, rows):
            assert abs(abs(end - share) - 1.959963984540054 * (end * (1 - end) / rows) ** 0.5) < 1e-12
    assert wilson(0.0, 50)[0] == 0 and wilson(1.0, 50)[1] == 1 and wilson(0.0, 50)[1] > 0.05
