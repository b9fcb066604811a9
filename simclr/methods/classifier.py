"""Training a classifier: fine-tuning a pretrained network on labels (arXiv:2002.05709, App. B.5; arXiv:2006.10029, Sec. 2), as a `Method`,
and the code that distillation shares with it.

As in the papers: crops and flips are the only augmentation, one crop per image; in training BatchNorm uses the statistics of the global
batch; the classifier begins at zero (the official command's zero_init_logits_layer), so that the first gradient does not disturb the
encoder. Test images are scored with running statistics.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simclr import checkpoint
from simclr.collectives import all_reduce_sum, share_of_mean, world_size
from simclr.config import Config, SimCLR
from simclr.data import labels, loader
from simclr.data.loader import Batch
from simclr.data.manifest import Manifest
from simclr.encoder.directory import read_encoder, read_head
from simclr.evaluation import features
from simclr.evaluation.metrics import accuracy, confusion, mean_per_class
from simclr.methods.method import Method, Rows, Start, begun, examples_of, labels_of, no_evaluation, paths_for, placed, schedule, views_for
from simclr.networks.encoders import encoded, encoder_of
from simclr.networks.heads import Classifier, build_head
from simclr.networks.initial import unfilled
from simclr.optim import parameter_groups
from simclr.precision import autocast
from simclr.stages import FineTune
from simclr.to_device import to_device
from simclr.views.draw import Crop
from simclr.views.preprocessing import Preprocessing


class Scores(nn.Module):
    """A `Classifier` on rows: {"views": (1, n, 3, H, W)} → {"scores": (1, n, classes)}. Its parts are those of `model`."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.encoder, self.head, self.classifier = model.encoder, model.head, model.classifier

    def forward(self, rows: Rows) -> Rows:
        scores: Tensor = self.classifier(self.head(encoded(self.encoder, rows)))
        return {"scores": scores[None]}


def classifier(config: FineTune, start: Start, manifest: Manifest) -> Method:
    """Train encoder, head up to the tap and classifier on the labels of the training images `start.ids`.

    Without a checkpoint in `start` it begins from scratch; with the checkpoint of step 0 that `first_state` makes of a published encoder,
    it begins with that encoder. Metrics are train/loss, train/top1, and of the test split eval/top1, eval/top5 and eval/mean_per_class.
    """
    weights = None
    if config.class_weights == "balanced" and start.device.type != "meta":
        seen = loader.labels(start.data)
        seen = seen[start.ids] if start.ids is not None else seen[seen >= 0]
        weights = torch.from_numpy(labels.balanced(seen, len(manifest.classes))).to(start.device)

    def objective(outputs: Rows, targets: Rows, step: int) -> tuple[Tensor, Rows]:
        scores, y = single(outputs["scores"]), targets["labels"][0]
        if weights is None:
            loss = share_of_mean(F.cross_entropy(scores, y), len(y), config.train.batch_size)
        else:
            loss = weighted_cross_entropy(scores, y, weights)
        return loss, {"train/loss": loss, "train/top1": hits(scores, y)}

    model = begun(lambda: build_classifier(config, len(manifest.classes), config.tap, config.linear), start)
    return classifying(config, start, manifest, model, objective, labels_of, config.linear)


def classifying(
    config: Config,
    start: Start,
    manifest: Manifest,
    model: Classifier,
    objective: Callable[[Rows, Rows, int], tuple[Tensor, Rows]],
    targets: Callable[[Rows], Rows],
    linear: bool = False,
    further: Callable[[Batch, slice], Rows] = lambda batch, some: {},
) -> Method:
    """The method that trains `model` for `objective`. Its inputs are one view of each image, the labels, and `further` rows."""
    model, device = placed(model, start, config.train.precision), start.device
    crops = (Crop(count=1, views=config.views, distorted=False),)

    def inputs(batch: Batch, some: slice) -> Rows:
        (views,) = views_for(batch, some, crops, config, device)
        rows = {"views": views[None], "labels": to_device(batch.labels[some], device)[None]}
        return rows | paths_for(batch, some, crops, config, device) | further(batch, some)

    def evaluate() -> dict[str, float]:
        found = test_scores(model, config, start)
        train_mode(model, linear)
        return found

    train_mode(model, linear)
    examples = examples_of(config, start, manifest)
    return Method(
        crops=crops,
        inputs=inputs,
        network=Scores(model),
        targets=targets,
        loss=objective,
        groups=parameter_groups(model, config.optim, schedule(config, examples), config.total_steps(examples)),
        published={"encoder": model.encoder, "head": model.head, "classifier": model.classifier},
        evaluate=evaluate if "test" in manifest.splits or start.held is not None else no_evaluation,
        chance=math.log(max(len(manifest.classes), 2)),
    )


def weighted_cross_entropy(scores: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """This rank's share of Σ w_y loss / Σ w_y over the global batch, as `F.cross_entropy(weight=…)` has it: scores (n, classes), labels y
    (n,), weights (classes,). Divided by the sum of weights, and not by N, a batch's loss does not depend on how many of its images are of
    rare classes. The mean over ranks is the global batch's, however classes are spread."""
    weights = weights.to(scores.dtype)
    total = all_reduce_sum(weights[y].sum()) / world_size()
    return F.cross_entropy(scores, y, weights, reduction="sum") / total


def single(scores: Tensor) -> Tensor:
    """Scores (1, n, classes) → (n, classes), in float32 at least."""
    return scores[0].float() if scores.dtype == torch.bfloat16 else scores[0]


def hits(scores: Tensor, labels: Tensor) -> Tensor:
    """(2,): how many rows of scores (n, classes) are highest at their label, and how many rows have a label."""
    return torch.stack([(scores.detach().argmax(1) == labels).sum(), (labels >= 0).sum()]).to(scores.dtype)


def build_classifier(config: SimCLR, classes: int, tap: int, linear: bool = False, drawn: bool = True) -> Classifier:
    """Encoder and the head's first `tap` layers with the initial weights of pretraining with `config.seed`, and a classifier of zeros; on
    the CPU, the same on every rank and machine. With `linear` only the classifier needs gradients. Without `drawn` the weights are
    uninitialised, for a checkpoint to be restored."""
    if not drawn:
        return unfilled(lambda: build_classifier(config, classes, tap, linear))
    encoder = encoder_of(config)
    model = Classifier(encoder, build_head(config, encoder.d_h) if tap else None, tap, classes, config.seed)
    nn.init.zeros_(model.classifier.weight)
    if linear:
        model.encoder.requires_grad_(False)
        model.head.requires_grad_(False)
    return model


def first_state(config: FineTune, published: Path, classes: int) -> checkpoint.State:
    """The state at step 0 of fine-tuning, with the encoder and head in the directory `published`.

    Raises UserError if its head has fewer layers than the tap.
    """
    model = Classifier(read_encoder(published).encoder, read_head(published), config.tap, classes)
    nn.init.zeros_(model.classifier.weight)
    return checkpoint.State(0, config.to_dict(), {f"model.{name}": t for name, t in model.state_dict().items()})


def train_mode(model: Classifier, linear: bool) -> None:
    """Training mode; frozen parts keep evaluation mode, so their running statistics stay too."""
    model.train()
    if linear:
        model.encoder.eval()
        model.head.eval()


def test_scores(model: Classifier, config: Config, start: Start) -> dict[str, float]:
    """{"eval/top1", "eval/top5", "eval/mean_per_class"} of the labelled images of the test split, or of those that are held back; {} where
    there are none."""
    split = "test" if start.held is None else "train"
    seen, dtype = Preprocessing.of(config.views), next(model.parameters()).dtype
    with autocast(config.train.precision, start.device):
        found = features.embed_split(
            model, start.data, split, seen, None, start.device, dtype, threads=start.loader_threads, only=start.held
        ).labelled()
    if not len(found.y):
        return {}
    table = confusion(found.h.argmax(1), found.y, found.h.shape[1])
    scores = {**accuracy(found.h, found.y), "mean_per_class": mean_per_class(table)}
    return {f"eval/{name}": value for name, value in scores.items()}
