"""Metrics of a classifier's scores against labels. Tensors in, numbers out."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

RESAMPLES = 1000


def accuracy(scores: Tensor, y: Tensor) -> dict[str, float]:
    """Shares of the rows of scores (m, classes) whose label y (m,) is the highest, or among the five highest: {"top1", "top5"}."""
    return shares(highest(scores, y))


def highest(scores: Tensor, y: Tensor) -> Tensor:
    """(m, ≤ 5) bool: whether the label of a row is its highest score, its second highest, …"""
    return scores.topk(min(5, scores.shape[1]), dim=1).indices.eq(y[:, None])


def shares(ranked: Tensor) -> dict[str, float]:
    """`accuracy` from what `highest` says, of one block of rows or of several one behind the other."""
    return {"top1": ranked[:, 0].float().mean().item(), "top5": ranked.any(1).float().mean().item()}


def confusion(predicted: Tensor, y: Tensor, classes: int) -> Tensor:
    """(classes, classes) int64: how many rows of class i (row) were taken for class j (column). predicted and y are (m,)."""
    return torch.bincount(y * classes + predicted, minlength=classes * classes).view(classes, classes)


def per_class(table: Tensor) -> Tensor:
    """(classes,) float64 shares that were right, of a confusion table; NaN for a class that no row has."""
    return table.diagonal().double() / table.sum(1)


def mean_per_class(table: Tensor) -> float:
    """Mean of the classes' accuracies, over the classes that have rows: each class counts alike, however rare."""
    return per_class(table).nanmean().item()


def average_precision(scores: Tensor, relevant: Tensor) -> Tensor:
    """(classes,) float64, 11-point interpolated average precision of each class: the mean over recalls r = 0, 0.1, …, 1 of the
    best precision at a recall of at least r (Everingham et al. 2010, Sec. 4.2; the measure of VOC 2007, replaced in 2010).

    scores (m, classes); relevant (m, classes) is 1 where the image shows the class, 0 where not, and −1 where the row is left
    out (VOC's difficult objects). A class that no image shows is NaN. Equal scores rank in the order of the rows.
    """
    order = scores.argsort(dim=0, descending=True, stable=True)
    ranked = relevant.gather(0, order)
    hits, shown = (ranked == 1).cumsum(0), (ranked >= 0).cumsum(0)
    recall = hits.double() / hits[-1]
    precision = hits.double() / shown.clamp_min(1)
    # Compared in whole numbers: a recall of 3 of 10 must reach r = 0.3, and neither quotient is exact.
    points = [torch.where(10 * hits >= r * hits[-1], precision, 0.0).amax(0) for r in range(11)]
    return torch.stack(points).mean(0) + 0 * recall[-1]


def mean_average_precision(scores: Tensor, relevant: Tensor) -> float:
    """11-point mAP: the mean of `average_precision` over the classes that some image shows."""
    return average_precision(scores, relevant).nanmean().item()


def wilson(share: float, rows: int, confidence: float = 0.95) -> tuple[float, float]:
    """The score interval of a share of `rows` test images that are right (Wilson 1927, J. Am. Stat. Assoc. 22, p. 209).

    Like `bootstrap`'s it is over test sets, not over training runs; it needs the count alone, and stays within [0, 1].
    """
    z2 = NormalDist().inv_cdf((1 + confidence) / 2) ** 2
    centre = share + z2 / (2 * rows)
    half = math.sqrt(z2 * (share * (1 - share) + z2 / (4 * rows)) / rows)
    return max((centre - half) / (1 + z2 / rows), 0.0), min((centre + half) / (1 + z2 / rows), 1.0)


def bootstrap(
    measure: Callable[[Tensor], float], rows: int, resamples: int = RESAMPLES, seed: int = 0, confidence: float = 0.95
) -> tuple[float, float]:
    """The percentile bootstrap interval of a measure of `rows` test images (Efron and Tibshirani 1993, Sec. 13.3).

    `measure` gets the indices (rows,) of a resample, drawn with replacement; the `resamples` draws are a function of `seed`
    alone. It is the interval over test sets, with fixed encoder and classifier, not over training runs.
    """
    generator = np.random.Generator(np.random.Philox(key=seed))
    values = [measure(torch.from_numpy(generator.integers(0, rows, rows))) for _ in range(resamples)]
    low, high = np.nanquantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
