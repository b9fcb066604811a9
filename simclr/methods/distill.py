"""Distillation, v2's third stage (arXiv:2006.10029, Sec. 2): a student learns a fine-tuned teacher's probabilities on images
without labels. The student may be as large as the teacher (self-distillation) or smaller.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from simclr.collectives import share_of_mean
from simclr.data.loader import Batch
from simclr.data.manifest import Manifest
from simclr.encoder.directory import read_classifier, read_text
from simclr.errors import UserError
from simclr.methods.average import forward_of
from simclr.methods.classifier import build_classifier, classifying, hits, single
from simclr.methods.method import Method, Rows, Start, begun, placed
from simclr.stages import Distill
from simclr.to_device import to_device


def distillation_loss(scores: Tensor, teacher: Tensor, labels: Tensor, temperature: float, alpha: float = 1.0) -> Tensor:
    """Eq. 3 over the number of rows: −(1 − α) Σ log P(y | x) over the labelled rows, − α Σ Σ_y P_T(y | x; τ) log P(y | x; τ) over all.

    scores, teacher: (n, classes) of student and teacher; labels (n,), −1 = unlabelled. P(y | x; τ) is the softmax of scores / τ; the
    first term has no τ. With α = 1 it is Eq. 2. There is no factor τ², which would keep gradients alike at every τ: the equations have
    none. The divisor is n for both terms, so the mean over ranks is the global batch's, however labels are spread.
    """
    soft = -(F.softmax(teacher / temperature, 1) * F.log_softmax(scores / temperature, 1)).sum() / len(scores)
    if alpha == 1:
        return soft
    hard = F.cross_entropy(scores, labels, ignore_index=-1, reduction="sum") / len(scores)
    return (1 - alpha) * hard + alpha * soft


def distill(config: Distill, start: Start, manifest: Manifest) -> Method:
    """Train a student on the whole training split under the classifier published in `start.teacher`, which sees the same crops.

    The student begins at random, without a projection head, keyed by `config.seed`; the paper's text does not say how it begins.
    `start.labelled` are the images whose labels Eq. 3 may use (alpha < 1). Metrics are those of fine-tuning; train/top1 is measured
    against the labels of the data, which the loss does not use.
    """
    assert start.teacher is not None, "distillation needs a teacher"
    classes = require_teacher(start.teacher, manifest.classes)
    teach = _teacher(config, start)
    known = torch.zeros(manifest.examples("train"), dtype=torch.bool)
    if start.labelled is not None:
        known[torch.from_numpy(start.labelled)] = True

    def seen(batch: Batch, some: slice) -> Rows:
        return {"seen": to_device(torch.where(known[batch.ids[some]], batch.labels[some], -1), start.device)[None]}

    def targets(rows: Rows) -> Rows:
        return {"labels": rows["labels"], "seen": rows["seen"], "taught": teach(rows["views"][0])[None]}

    def objective(outputs: Rows, targets: Rows, step: int) -> tuple[Tensor, Rows]:
        scores = single(outputs["scores"])
        taught = targets["taught"][0].to(scores.dtype)
        loss = distillation_loss(scores, taught, targets["seen"][0], config.temperature, config.alpha)
        loss = share_of_mean(loss, len(scores), config.train.batch_size)
        return loss, {"train/loss": loss, "train/top1": hits(scores, targets["labels"][0])}

    model = begun(lambda: build_classifier(config, len(classes), 0), start)
    return classifying(config, start, manifest, model, objective, targets, further=seen)


def _teacher(config: Distill, start: Start) -> Callable[[Tensor], Tensor]:
    """Views (n, 3, H, W) → the teacher's class scores. On the meta device its weights are not read."""
    assert start.teacher is not None
    if start.device.type == "meta":
        return lambda views: views
    teacher = placed(read_classifier(start.teacher)[0], start, config.train.precision).requires_grad_(False)
    return forward_of(teacher, config.train.compile)


def require_teacher(directory: Path, classes: tuple[str, ...]) -> tuple[str, ...]:
    """The classes that the teacher published in `directory` tells apart. Raises UserError if there is no classifier, or the data is
    labelled and has other `classes`."""
    stated = read_text(directory).get("classifier")
    if stated is None:
        raise UserError(f"{directory} holds no classifier to learn from; `simclr finetune` makes one")
    names = tuple(stated["classes"])
    if classes and names != classes:
        raise UserError(f"the teacher tells {_few(names)} apart, the data has {_few(classes)}; give the data that it was fine-tuned on")
    return names


def _few(names: tuple[str, ...]) -> str:
    return f"{len(names)} classes ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
