"""Transfer by fine-tuning the whole network (arXiv:2002.05709, App. B.8): pictures of a dataset's parts in, its own metric out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simclr import keyed
from simclr.data.tasks import Rows, Task, pictures
from simclr.encoder.directory import PublishedEncoder, config_of
from simclr.evaluation.metrics import RESAMPLES, bootstrap
from simclr.evaluation.transfer_linear import Part, Parts, measure, split
from simclr.networks.batchnorm import BatchNorm
from simclr.networks.heads import Classifier
from simclr.optim import warmup_cosine
from simclr.views.draw import CENTRE_CROP
from simclr.views.ops import normalise
from simclr.views.two_views import crop_and_flip

RATES = tuple(float(rate) for rate in np.logspace(-4, -1, 7))
"""Learning rates that are tried (App. B.8)."""
DECAYS = (0.0, *(float(decay) for decay in np.logspace(-6, -3, 7)))
"""Weight decays that are tried; each is divided by the learning rate it stands beside (App. B.8)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuning:
    """Length, batch and grid of the search; the paper's figures, from memory of its appendix."""

    steps: int = 20_000
    """Optimizer steps of each trial and of the last training."""
    batch_size: int = 256
    """Images per step, at most the number of training images."""
    rates: tuple[float, ...] = RATES
    decays: tuple[float, ...] = DECAYS
    threads: int = 1
    """Threads that decode."""


@dataclass(frozen=True, slots=True)
class Tuned:
    """A dataset's own metric on its test images after fine-tuning, with the 95 % bootstrap interval over those."""

    value: float
    low: float
    high: float
    lr: float
    weight_decay: float
    validation: float
    """The metric on the validation images of the trial that was chosen."""
    counts: dict[str, int]
    """Images of each part."""


def fine_tuned(
    encoder: PublishedEncoder,
    rows: dict[str, Rows],
    task: Task,
    tuning: Tuning,
    resamples: int = RESAMPLES,
    limit: int | None = None,
    progress: Callable[[int, int], None] = lambda step, of: None,
) -> Tuned:
    """Fine-tune a copy of `encoder` with every rate and decay on the training images, keep the pair that is best on the validation
    images by the dataset's own metric, train anew on both with it, and score the test images.

    SGD with Nesterov momentum 0.9 under half a cosine; random crops and flips; statistics of BatchNorm move by min(10 / s, 0.1) a
    step, where s is the steps of an epoch. Test images: the shorter side at 8/7 of the encoder's size, the middle square.
    `progress` gets the steps done and all steps. Runs on the encoder's device.
    """
    device = encoder.get_buffer("mean").device
    parts = split({part: _labels(found, limit, tuning.threads, device) for part, found in rows.items()}, task.split)
    # If a dataset has no such part, its images come from another one.
    sources = {part: rows[next(there for there in ("all", part, "train") if there in rows)] for part in ("train", "validation", "test")}
    counts, pairs = measure(task.metric), [(lr, decay) for lr in tuning.rates for decay in tuning.decays]
    total, done = (len(pairs) + 1) * tuning.steps, 0
    training = _Pictures([(sources["train"], parts.train)], encoder, tuning.threads)
    validation = _Pictures([(sources["validation"], parts.validation)], encoder, tuning.threads)
    found: dict[tuple[float, float], float] = {}
    for pair in pairs:
        network = _train(encoder, training, task.classes, tuning, pair, lambda step: progress(done + step, total))  # noqa: B023
        found[pair] = counts(_scores(network, validation), validation.y)
        done += tuning.steps
    best = max(pairs, key=lambda pair: found[pair])
    both = _Pictures([(sources["train"], parts.train), (sources["validation"], parts.validation)], encoder, tuning.threads)
    network = _train(encoder, both, task.classes, tuning, best, lambda step: progress(done + step, total))
    test = _Pictures([(sources["test"], parts.test)], encoder, tuning.threads)
    scores, y = _scores(network, test).cpu(), test.y.cpu()
    low, high = bootstrap(lambda chosen: counts(scores[chosen], y[chosen]), len(y), resamples)
    return Tuned(counts(scores, y), low, high, *best, found[best], _counts(parts))


class _Pictures:
    """Images of one or more datasets, read anew in every epoch: they need not fit in memory, and each time are cropped anew."""

    def __init__(self, sources: list[tuple[Rows, Part]], encoder: PublishedEncoder, threads: int) -> None:
        self.sources, self.threads = sources, threads
        self.y = torch.cat([part.y for _, part in sources])
        self.size = encoder.preprocessing.size_px
        self.side = round(self.size / CENTRE_CROP)
        seen = config_of(encoder.config).views
        self.views = seen if encoder.preprocessing.mean == seen.mean else type(seen)(size_px=self.size)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[object, object]:
        for rows, part in self.sources:
            if index < len(part.x):
                return rows[int(part.x[index])]
            index -= len(part.x)
        raise IndexError(index)

    def batches(self, order: list[int], batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(images (n, side, side, 3) uint8, their labels) of the rows in `order`."""
        for images, labels in pictures(self, order, self.side, batch_size, self.threads):  # type: ignore[arg-type]
            yield torch.from_numpy(images), torch.from_numpy(labels)


def _train(
    encoder: PublishedEncoder, data: _Pictures, classes: int, tuning: Tuning, pair: tuple[float, float], progress: Callable[[int], None]
) -> Classifier:
    lr, decay = pair
    device = encoder.get_buffer("mean").device
    network = Classifier(copy.deepcopy(encoder.encoder), None, 0, classes).to(device)
    nn.init.zeros_(network.classifier.weight)
    batch_size = min(tuning.batch_size, len(data))
    per_epoch = len(data) // batch_size
    for module in network.modules():
        if isinstance(module, BatchNorm):
            module.momentum = min(10 / per_epoch, 0.1)
    optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=decay / lr)
    epochs = -(-tuning.steps // per_epoch)
    order = [int(i) for epoch in range(epochs) for i in keyed.permutation(0, epoch, len(data))[: per_epoch * batch_size]]
    order = order[: tuning.steps * batch_size]
    network.train()
    for step, (images, labels) in enumerate(data.batches(order, batch_size)):
        ids = torch.tensor(order[step * batch_size : (step + 1) * batch_size])
        x = crop_and_flip(images, ids, step // per_epoch, data.views, 0, device)
        optimizer.param_groups[0]["lr"] = warmup_cosine(step, lr, 0, tuning.steps)
        optimizer.zero_grad()
        _loss(network(x), labels.to(device)).backward()
        optimizer.step()
        progress(step + 1)
    return network.eval()


def _loss(scores: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy over classes y (n,), or a logistic loss per class for marks y (n, classes); a mark of −1 does not count."""
    if y.ndim == 1:
        return F.cross_entropy(scores, y)
    counts = (y >= 0).float()
    return F.binary_cross_entropy_with_logits(scores, (y == 1).float(), counts, reduction="sum") / len(y)


@torch.no_grad()
def _scores(network: Classifier, data: _Pictures) -> Tensor:
    device = network.classifier.weight.device
    before = (data.side - data.size) // 2
    found = []
    for images, _ in data.batches(list(range(len(data))), 256):
        middle = images[:, before : before + data.size, before : before + data.size].to(device)
        found.append(network(normalise(middle.permute(0, 3, 1, 2).float() / 255, data.views)))
    return torch.cat(found)


def _labels(rows: Rows, limit: int | None, threads: int, device: torch.device) -> Part:
    """Indices of a dataset's rows, or of a keyed choice of `limit`, and their labels, which are read with the pictures."""
    order = range(len(rows)) if limit is None else sorted(keyed.permutation(0, 0, len(rows))[:limit].tolist())
    labels = [torch.from_numpy(y) for _, y in pictures(rows, order, 8, 256, threads)]
    return Part(torch.tensor(order, device=device), torch.cat(labels).to(device))


def _counts(parts: Parts) -> dict[str, int]:
    return {part: len(getattr(parts, part).y) for part in ("train", "validation", "test")}
