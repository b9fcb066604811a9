"""Linear classifiers on frozen features: a quick probe, and the papers' two protocols."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simclr import keyed
from simclr.config import Config
from simclr.data.manifest import read_manifest
from simclr.evaluation import lbfgs
from simclr.evaluation.cores import Cores
from simclr.evaluation.frozen import Unchanged
from simclr.evaluation.metrics import accuracy, highest, shares
from simclr.evaluation.regression import Regression, Scale, logits
from simclr.evaluation.rows import Rows, rows_of
from simclr.optim import lr_peak, warmup_cosine
from simclr.views.draw import Crop
from simclr.views.two_views import views_of

PENALTIES = tuple(float(value) for value in np.logspace(-6, 5, 45))
"""The 45 values of λ that the transfer protocol tries (arXiv:2002.05709, App. B.8)."""
Measure = Callable[[Tensor, Tensor], float]
"""(scores (m, classes), labels) → the measure to maximise: top-1, mean per class, mAP."""


# ── The quick probe ────────────────────────────────────────────────────────────────────────────────────────────────────


def linear_probe(
    train_h: Tensor | Rows,
    train_y: Tensor,
    test_h: Tensor | Rows,
    test_y: Tensor,
    decays: tuple[float, ...] = (1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5),
    iterations: int = 100,
) -> dict[str, float]:
    """Accuracy of a linear classifier on frozen features: {"top1", "top5", "decay"}. See `quick_probe`."""
    classes = max(int(train_y.max()), int(test_y.max())) + 1
    scores, decay = quick_probe(train_h, train_y, test_h, classes, decays, iterations)
    return {**accuracy(scores, test_y.to(scores.device)), "decay": decay}


@torch.no_grad()
def quick_probe(
    train_h: Tensor | Rows,
    train_y: Tensor,
    test_h: Tensor | Rows,
    classes: int,
    decays: tuple[float, ...] = (1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5),
    iterations: int = 100,
) -> tuple[Tensor, float]:
    """(scores (m, classes) of the test rows, decay) of a linear classifier that is fitted in seconds.

    Multinomial logistic regression on standardised features, fitted by full-batch L-BFGS, as the paper's transfer
    protocol does (App. B.8). The weight decay is chosen on a tenth of the training rows, then all rows are fitted. It is a quick
    `swept_probe`: six decays, which here multiply |kernel|²/2 beside the *mean* loss, a hundred iterations at most, and an early end of
    the path, which on raw pixels (3,072 wide) costs less than all fits at once.

    The features are read block by block and never copied: a row takes its label and two places beside them.
    """
    rows, tests = rows_of(train_h), rows_of(test_h)
    mean, std = rows.moments()
    scale, y = Scale(mean, std.clamp_min(1e-6)), train_y.to(rows.at)
    # A keyed tenth: every tenth row would be of a single class where classes take turns.
    held = torch.zeros(len(y), dtype=torch.bool)
    held[torch.from_numpy(keyed.permutation(0, 0, len(y))[: len(y) // 10])] = True
    weights = torch.zeros(classes, rows.d + 1, device=rows.at)
    best, decay, start, worse = -1.0, decays[0], weights, 0
    with Cores(rows.at) as cores:
        if len(decays) > 1:
            fitted, choosing = (torch.nonzero(part)[:, 0] for part in (~held, held))
            path, judges = Regression(rows.chosen(fitted), y[fitted.to(y.device)], scale, classes, cores), rows.chosen(choosing)
        # From the strongest decay down. Each fit starts at the solution before it, which is close, so it takes few iterations. Two fits
        # in a row without a gain end the path: weaker decays only overfit, and take longest.
        for candidate in sorted(decays, reverse=True) if len(decays) > 1 else ():
            weights = _fit(path, weights, candidate, iterations)
            score = shares(torch.cat([highest(z, y[choosing[at].to(y.device)]) for at, z in logits(judges, weights, scale)]))["top1"]
            if score > best:
                best, decay, start, worse = score, candidate, weights, 0
            else:
                worse += 1
            if worse == 2:
                break
        weights = _fit(Regression(rows, y, scale, classes, cores), start, decay, iterations)
    return torch.cat([z for _, z in logits(tests, weights, scale)]), decay


def _fit(regression: Regression, start: Tensor, decay: float, iterations: int) -> Tensor:
    """(classes, d + 1): the weights of the regression; `start` is where the search begins."""
    weights = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weights], lr=1.0, max_iter=iterations, history_size=10, line_search_fn="strong_wolfe", tolerance_grad=1e-5, tolerance_change=1e-7
    )

    @torch.no_grad()
    def closure() -> Tensor:
        loss, weights.grad = regression(weights.detach(), decay)
        return loss

    optimizer.step(closure)
    return weights.detach()


# ── The transfer protocol: L-BFGS, 45 penalties ───────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Swept:
    """The result of `swept_probe`."""

    scores: Tensor
    """(m, classes) logits of the test rows, of the classifier that was fitted to training and validation rows."""
    penalty: float
    """The λ that did best on the validation rows; of equals the largest."""
    validation: dict[float, float]
    """λ → the measure on the validation rows."""
    converged: int
    """How many of the penalties' fits reached the tolerance."""
    refit_converged: bool


def swept_probe(
    train: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
    test_h: Tensor,
    classes: int,
    measure: Measure,
    penalties: Sequence[float] = PENALTIES,
    tolerance: float = 1e-5,
    iterations: int = 1000,
    progress: Callable[[int, int], None] = lambda iteration, moving: None,
) -> Swept:
    """The transfer protocol (arXiv:2002.05709, App. B.8, after arXiv:1805.08974): l2-penalised logistic regression by full-batch
    L-BFGS without augmentation, λ chosen on the validation rows, then fitted again to training and validation rows.

    train and validation are (h (n, d), y), where y is as in `lbfgs.fit`. Features are not scaled, as in both papers. λ stands beside the
    sum of the losses, as Kornblith et al. have it; the SimCLR paper does not say.
    """
    fits = lbfgs.fit(*train, penalties, classes, tolerance, iterations, progress)
    found = {p: measure(lbfgs.logits(validation[0], w), validation[1]) for p, w in zip(penalties, fits.weights, strict=True)}
    penalty = max(found, key=lambda p: (found[p], p))
    h, y = torch.cat([train[0], validation[0]]), torch.cat([train[1], validation[1]])
    last = lbfgs.fit(h, y, [penalty], classes, tolerance, iterations, progress)
    scores = lbfgs.logits(test_h, last.weights[0])
    return Swept(scores, penalty, found, int(fits.converged.sum()), bool(last.converged[0]))


def held_out(y: Tensor, share: float, seed: int = 0) -> Tensor:
    """(n,) bool: a keyed `share` of the rows of every class of y (n,), rounded, and of a class of two or more rows at least one."""
    chosen = torch.zeros(len(y), dtype=torch.bool)
    order = torch.from_numpy(keyed.permutation(seed, 0, len(y)))
    labels = y.cpu()[order]
    for label in labels.unique():
        rows = order[labels == label]
        chosen[rows[: max(round(share * len(rows)), min(1, len(rows) // 2))]] = True
    return chosen.to(y.device)


# ── Linear evaluation: SGD on augmented views ────────────────────────────────────────────────────────────────────────


def batch_size_for(examples: int) -> int:
    """N of linear evaluation: the largest power of two that leaves 90 steps per epoch, from 2 to 4096. It gives the two sizes of the
    official README: 4096 on ImageNet, 512 on CIFAR-10."""
    return int(min(max(2 ** int(np.log2(max(examples // 90, 2))), 2), 4096))


def sgd_probe(
    encoder: nn.Module,
    data: Path,
    config: Config,
    classes: int,
    batch_size: int,
    epochs: float = 90,
    device: torch.device | str = "cpu",
    threads: int = 1,
    progress: Callable[[int, int, float], None] = lambda step, of, loss: None,
) -> nn.Linear:
    """Linear evaluation as the paper does it (arXiv:2002.05709, App. B.6): a classifier on the frozen encoder, trained on random
    crops with flips of the training split in `data` by SGD with Nesterov momentum 0.9, peak lr 0.1 N / 256, 90 epochs.

    As the official code has it: weights start at zero, lr falls along half a cosine without warm-up. No weight decay, as the
    paper says and the official README does on CIFAR-10; its ImageNet command has 1e-6. Crops, their order and `views` are those of
    `config`, keyed by its seed; images without a label are ignored. Returns the classifier; raises UserError if the batch is larger than
    the split. `progress` gets the step, the number of steps, and the loss.
    """
    from simclr.data import loader  # with FFCV, which probes of features do without

    views = replace(config.views, jitter_p=0.0, grey_p=0.0, blur_p=0.0, solarise_p=0.0)
    train = replace(config.train, micro_batch=None, epochs=epochs, steps=None, shard_groups=1)
    config = replace(config, views=views, train=train).of_batch(batch_size)
    total = config.total_steps(read_manifest(data).examples("train"))
    device = torch.device(device)
    width = getattr(encoder, "d_h")  # noqa: B009  (nn.Module types every attribute as a tensor or a module)
    classifier = nn.Linear(width, classes).to(device)
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=1.0, momentum=0.9, nesterov=True)
    peak = lr_peak(0.1, batch_size, "linear")
    with Unchanged(encoder), contextlib.closing(loader.on_device(loader.batches(config, data, 0, 0, 1, threads), device)) as stream:
        for step, batch in zip(range(total), stream, strict=False):
            # One view of each image. The second is drawn too, which without colours costs little beside the encoder.
            both = views_of(batch.images[0], batch.ids, batch.epoch, Crop(views=views), config.seed, device, drawn=batch.drawn[0])
            x = both[: len(batch.ids)]
            with torch.no_grad():
                h = encoder(x).float()
            labels = batch.labels.to(device)
            seen = (labels >= 0).sum().clamp_min(1)
            loss = F.cross_entropy(classifier(h), labels, ignore_index=-1, reduction="sum") / seen
            optimizer.param_groups[0]["lr"] = warmup_cosine(step, peak, 0, total)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 10 == 9 or step + 1 == total:  # the host waits for the loss here, and not in the steps between
                progress(step + 1, total, loss.item())
    return classifier.requires_grad_(False)
