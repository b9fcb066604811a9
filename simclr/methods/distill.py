"""Distillation, v2's third stage (arXiv:2006.10029, Sec. 2): a student learns a fine-tuned teacher's probabilities on images
without labels. The student may be as large as the teacher (self-distillation) or smaller.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from simclr.data import loader
from simclr.data.manifest import read_manifest
from simclr.encoder.directory import read_classifier, read_text
from simclr.errors import UserError
from simclr.methods.classifier import build_classifier, train_classifier
from simclr.precision import autocast, weights_dtype
from simclr.stages import Distill
from simclr.to_device import to_device
from simclr.train import Report, Start


def distillation_loss(scores: Tensor, teacher: Tensor, labels: Tensor, temperature: float, alpha: float = 1.0) -> Tensor:
    """Eq. 3 over the number of rows: −(1 − α) Σ log P(y | x) over the labelled rows, − α Σ Σ_y P_T(y | x; τ) log P(y | x; τ) over all.

    scores, teacher: (n, classes) of student and teacher; labels (n,), −1 = without. P(y | x; τ) is the softmax of scores / τ; the
    first term has no τ. With α = 1 it is Eq. 2. There is no factor τ² that would keep gradients alike at every τ: the equations
    have none. The divisor is n for both terms, so the mean over ranks is the global batch's, however labels are spread.
    """
    soft = -(F.softmax(teacher / temperature, 1) * F.log_softmax(scores / temperature, 1)).sum() / len(scores)
    if alpha == 1:
        return soft
    hard = F.cross_entropy(scores, labels, ignore_index=-1, reduction="sum") / len(scores)
    return (1 - alpha) * hard + alpha * soft


def distill(config: Distill, start: Start, teacher: Path, ids: NDArray[np.int64] | None = None) -> Iterator[Report]:
    """Train a student on the whole training split under the classifier published in `teacher`, which sees the same crops.

    The student begins at random, without a projection head, as `config.seed` draws it; the paper's text does not say how it
    begins. `ids` are the images whose labels Eq. 3 may see (alpha < 1). Reports and errors as `finetune`'s; train/top1 is measured
    against the labels that the data has, which the loss does not see.
    """
    manifest = read_manifest(start.data)
    classes = require_teacher(teacher, manifest.classes)
    model = read_classifier(teacher)[0].to(start.device, weights_dtype(config.train.precision))
    model = model.to(memory_format=torch.channels_last).requires_grad_(False)
    known = torch.zeros(manifest.examples("train"), dtype=torch.bool)
    if ids is not None:
        known[torch.from_numpy(ids)] = True

    def objective(views: Tensor, scores: Tensor, batch: loader.Batch) -> Tensor:
        with torch.no_grad(), autocast(config.train.precision, start.device):
            taught = model(views)
        labels = to_device(torch.where(known[batch.ids], batch.labels, -1), scores.device)
        return distillation_loss(scores, taught.to(scores.dtype), labels, config.temperature, config.alpha)

    yield from train_classifier(config, start, build_classifier(config, len(classes), 0, drawn=start.checkpoint is None), objective)


def require_teacher(directory: Path, classes: tuple[str, ...]) -> tuple[str, ...]:
    """The classes that the teacher published in `directory` tells apart. Raises UserError where there is no classifier, or the
    data, labelled, has other `classes`."""
    stated = read_text(directory).get("classifier")
    if stated is None:
        raise UserError(f"{directory} holds no classifier to learn from; `simclr finetune` makes one")
    names = tuple(stated["classes"])
    if classes and names != classes:
        raise UserError(f"the teacher tells {_few(names)} apart, the data has {_few(classes)}; give the data that it was fine-tuned on")
    return names


def _few(names: tuple[str, ...]) -> str:
    return f"{len(names)} classes ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
