"""Transfer by a linear classifier (arXiv:2002.05709, App. B.8): features of a dataset's parts in, its own metric out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from simclr import keyed
from simclr.data.tasks import HELD_OUT, PER_CLASS, Metric, Rows, Split, pictures
from simclr.encoder.directory import PublishedEncoder
from simclr.evaluation.frozen import Unchanged
from simclr.evaluation.linear import Measure, Swept, held_out, swept_probe
from simclr.evaluation.metrics import RESAMPLES, accuracy, bootstrap, confusion, mean_average_precision, mean_per_class


@dataclass(frozen=True, slots=True)
class Part:
    """Rows (n, …), features or images, and their labels: (n,) classes, or (n, classes) marks as in `lbfgs.fit`."""

    x: Tensor
    y: Tensor

    def __getitem__(self, rows: Tensor) -> Part:
        return Part(self.x[rows], self.y[rows])


@dataclass(frozen=True, slots=True)
class Parts:
    """The rows that fit a classifier, that choose its λ, and that score it."""

    train: Part
    validation: Part
    test: Part


@dataclass(frozen=True, slots=True)
class Score:
    """A dataset's own metric on its test images, with the 95 % bootstrap interval over those."""

    value: float
    low: float
    high: float
    swept: Swept


def embed_rows(
    encoder: PublishedEncoder,
    rows: Rows,
    batch_size: int,
    threads: int,
    progress: Callable[[int], None] = lambda images: None,
    limit: int | None = None,
) -> Part:
    """Features of a torchvision dataset, or of a keyed choice of `limit` of its images, every one resized and cropped as the
    transfer protocol has it, on the encoder's device."""
    order = range(len(rows)) if limit is None else sorted(keyed.permutation(0, 0, len(rows))[:limit].tolist())
    device = encoder.get_buffer("mean").device
    h, y = [], []
    with Unchanged(encoder), torch.no_grad():
        for images, labels in pictures(rows, order, encoder.preprocessing.size_px, batch_size, threads):
            h.append(encoder(encoder.prepared(images)).float())
            y.append(torch.from_numpy(labels).to(device))
            progress(len(labels))
    return Part(torch.cat(h), torch.cat(y))


def split(parts: dict[str, Part], rule: Split, seed: int = 0) -> Parts:
    """The three parts of a dataset, as `data.tasks.Task.split` states; which rows are drawn is a function of `seed`."""
    if rule == "official":
        return Parts(parts["train"], parts["validation"], parts["test"])
    if rule == "thirty_per_class":
        whole = parts["all"]
        chosen = first_of_each(whole.y, PER_CLASS, seed)
        parts = {"train": whole[chosen], "test": whole[~chosen]}
    held = held_out(parts["train"].y, HELD_OUT, seed)
    return Parts(parts["train"][~held], parts["train"][held], parts["test"])


def first_of_each(y: Tensor, count: int, seed: int) -> Tensor:
    """(n,) bool: `count` keyed rows of each class of y (n,)."""
    order = torch.from_numpy(keyed.permutation(seed, 0, len(y)))
    labels = y.cpu()[order]
    chosen = torch.zeros(len(y), dtype=torch.bool)
    for label in labels.unique():
        chosen[order[labels == label][:count]] = True
    return chosen.to(y.device)


def measure(metric: Metric) -> Measure:
    """(scores, labels) → share in [0, 1]."""
    if metric == "map11":
        return mean_average_precision
    if metric == "top1":
        return lambda scores, y: accuracy(scores, y)["top1"]
    return lambda scores, y: mean_per_class(confusion(scores.argmax(1), y, scores.shape[1]))


def linear(
    parts: Parts,
    classes: int,
    metric: Metric,
    resamples: int = RESAMPLES,
    progress: Callable[[int, int], None] = lambda iteration, moving: None,
) -> Score:
    """The protocol's linear classifier: λ is chosen by the dataset's own metric, as the score is."""
    counts = measure(metric)
    train, validation, test = ((part.x, part.y) for part in (parts.train, parts.validation, parts.test))
    swept = swept_probe(train, validation, test[0], classes, counts, progress=progress)
    scores, y = swept.scores.cpu(), test[1].cpu()
    low, high = bootstrap(lambda rows: counts(scores[rows], y[rows]), len(y), resamples)
    return Score(counts(scores, y), low, high, swept)
