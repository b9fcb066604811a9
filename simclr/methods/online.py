"""What a pretraining tells of its encoder while it trains, if its data has labels: the online evaluation, and a linear classifier on h
behind a stop-gradient, so that no label reaches the encoder."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from simclr.collectives import share_of_mean
from simclr.config import Config
from simclr.data.manifest import Manifest
from simclr.evaluation import representation
from simclr.evaluation.online import knn_of
from simclr.methods.method import Rows, Start, no_evaluation
from simclr.networks.encoders import Encoder


def with_classifier(loss: Tensor, outputs: Rows, targets: Rows, images: int) -> tuple[Tensor, Rows]:
    """(the objective, its sums) of a method's `loss`: with the classifier's cross entropy, where the network has class scores."""
    if "logits" not in outputs:
        return loss, {"train/loss": loss}
    classified, hits = classify(outputs["logits"].flatten(0, 1), targets["labels"][0], images)
    return loss + classified, {"train/loss": loss, "train/linear_loss": classified, "train/linear_top1": hits}


def classify(logits: Tensor, labels: Tensor, images: int | None = None) -> tuple[Tensor, Tensor]:
    """Cross entropy of the linear evaluation, logits (v·n, classes) of v views, labels (n,), and (2,) its hits and the labelled views.

    An image without a label (−1) adds nothing, and the divisor stays v·n, of v·N over all ranks where `images` says N: so the mean over
    ranks is the global batch's, however labels are spread.
    """
    logits = logits.float() if logits.dtype == torch.bfloat16 else logits
    own = len(labels)
    labels = labels.repeat(len(logits) // own)
    loss = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
    hits = torch.stack([(logits.detach().argmax(1) == labels).sum(), (labels >= 0).sum()])
    return share_of_mean(loss / len(labels), own, images), hits.to(loss.dtype)


def neighbours(encoder: Encoder, config: Config, start: Start, manifest: Manifest | None) -> Callable[[], dict[str, float]]:
    """The online evaluation of `encoder`, weighted kNN, where the data of `manifest` has labels and a test split."""
    if manifest is None or not manifest.classes or "test" not in manifest.splits:
        return no_evaluation
    return partial(knn_of, encoder, config, start.data, start.device, start.loader_threads)


def of_pairs(z: Tensor, temperature: float | None, images: int | None = None) -> dict[str, Tensor]:
    """Measures of z (2n, d), rows and then what each is paired with, as this rank's share of means over `images`; no entropy without a
    temperature."""
    found = {"train/contrastive_top1": representation.contrastive_top1(z, images), "health/alignment": representation.alignment(z)}
    if temperature is not None:
        found["train/contrastive_entropy"] = representation.contrastive_entropy(z, temperature, images)
    return {name: share_of_mean(mean, len(z) // 2, images) for name, mean in found.items()}


def of_rows(z: Tensor, own: int, images: int | None = None) -> dict[str, Tensor]:
    """Measures of rows z (·, d) of the `own` of `images` images that this rank holds, each by itself: whether they collapse."""
    found = {
        "health/uniformity": representation.uniformity(z[:4096]),
        "health/spread": representation.spread(z),
        "health/dimension": representation.effective_dimension(z),
    }
    return {name: share_of_mean(mean, own, images) for name, mean in found.items()}
