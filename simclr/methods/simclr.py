"""SimCLR = encoder f + projection head g, trained by contrasting two views (arXiv:2002.05709, Sec. 2.1), as a `Method`.

It includes the losses that the paper compares NT-Xent with, v2's queue of further negatives, and the linear evaluation during
pretraining: a classifier on h behind a stop-gradient, so that no label reaches the encoder.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from simclr import config as configs
from simclr.collectives import all_gather
from simclr.config import Loss
from simclr.data.manifest import Manifest
from simclr.loss import margin_triplet, nt_logistic, nt_xent, nt_xent_dot
from simclr.methods.average import forward_of
from simclr.methods.method import (
    Method,
    Rows,
    Start,
    begun,
    examples_of,
    labels_of,
    no_rows,
    nothing_after,
    pairs_for,
    placed,
    schedule,
)
from simclr.methods.online import neighbours, of_pairs, of_rows, with_classifier
from simclr.methods.queue import Queue
from simclr.networks.encoders import encoded, encoder_of
from simclr.networks.heads import build_head, linear_classifier
from simclr.networks.initial import unfilled
from simclr.optim import parameter_groups
from simclr.views.draw import Crop


class Network(nn.Module):
    """{"views": (2, n, 3, H, W)} → {"z": (2, n, d_z) projections, "logits": (2, n, classes) class scores, where there are classes}.
    Both views go through one pass, so BatchNorm sees them together, as in the official code.
    """

    def __init__(self, config: configs.SimCLR, classes: int = 0) -> None:
        super().__init__()
        self.encoder = encoder_of(config)
        self.head = build_head(config, self.encoder.d_h)
        self.classifier = linear_classifier(self.encoder.d_h, classes, config.seed) if classes and config.train.linear_eval else None

    def forward(self, rows: Rows) -> Rows:
        h = encoded(self.encoder, rows)
        found = {"z": self.head(h)[-1]}
        if self.classifier is not None:
            found["logits"] = self.classifier(h.detach())
        return {name: x.unflatten(0, (len(rows["views"]), -1)) for name, x in found.items()}


def build_model(config: configs.SimCLR, classes: int = 0, drawn: bool = True) -> Network:
    """The model with the initial weights of `config.seed`, on the CPU, the same on every rank and machine. `classes`: number of classes,
    0 = unlabelled. Without `drawn` the weights are uninitialised, for a checkpoint to be restored."""
    return Network(config, classes) if drawn else unfilled(lambda: Network(config, classes))


def simclr(config: configs.SimCLR, start: Start, manifest: Manifest | None = None) -> Method:
    """SimCLR on the images of `manifest`; without one there are neither labels nor online evaluation."""
    precision, loss = config.train.precision, config.loss
    crops, images = (Crop(views=config.views, neighbours=config.time.neighbours),), config.train.batch_size
    rows = 2 * images
    classes = len(manifest.classes) if manifest is not None else 0
    model = placed(begun(lambda: Network(config, classes), start), start, precision)
    queue: Queue | None = None
    if loss.memory:
        rows_of = torch.zeros(loss.memory, config.head.d_out, device=start.device)
        queue = placed(Queue(model.encoder, model.head, rows_of), start, precision)
        embed = forward_of(queue.encoder, config.train.compile)

    def objective(outputs: Rows, targets: Rows, step: int) -> tuple[Tensor, Rows]:
        contrasted = contrast(outputs["z"].flatten(0, 1), loss, queue.negatives(step, rows) if queue is not None else None, images)
        return with_classifier(contrasted, outputs, targets, images)

    def enqueue(inputs: Rows, targets: Rows, step: int) -> None:
        # The paper says neither which views are stored nor when the average moves: here both views of a batch, behind its update.
        assert queue is not None
        queue.follow(model.encoder, model.head, loss.memory_decay)
        z = queue.head(embed(inputs["views"].flatten(0, 1)))[-1]
        queue.enqueue(all_gather(normalize(z.to(queue.rows.dtype), dim=1), images), step)

    examples = examples_of(config, start, manifest) if manifest is not None else config.train.batch_size
    parts: dict[str, nn.Module] = {"encoder": model.encoder, "head": model.head}
    return Method(
        crops=crops,
        inputs=partial(pairs_for, config=config, device=start.device, labelled=model.classifier is not None),
        network=model,
        state=queue if queue is not None else nn.Module(),
        targets=labels_of if model.classifier is not None else no_rows,
        loss=objective,
        after=enqueue if queue is not None else nothing_after,
        report=partial(diagnosed, temperature=loss.temperature, images=images),
        groups=parameter_groups(model, config.optim, schedule(config, examples), config.total_steps(examples)),
        published=parts | ({"classifier": model.classifier} if model.classifier is not None else {}),
        evaluate=neighbours(model.encoder, config, start, manifest),
        chance=math.log(rows - 1 + loss.memory) if loss.name.startswith("nt_xent") else 0.0,
    )


def contrast(z: Tensor, loss: Loss, negatives: Tensor | None = None, images: int | None = None) -> Tensor:
    """The configured loss of this rank's projections z (2n, d), with further negatives (m, d), of so many `images` over all ranks."""
    if loss.name == "nt_logistic":
        return nt_logistic(z, loss.temperature, loss.semi_hard, images)
    if loss.name == "margin_triplet":
        return margin_triplet(z, loss.margin, loss.semi_hard, images)
    if loss.name == "nt_xent_dot":
        return nt_xent_dot(z, loss.temperature, images)
    return nt_xent(z, loss.temperature, negatives, images)


def diagnosed(outputs: Rows, targets: Rows, temperature: float, images: int | None = None) -> dict[str, Tensor]:
    """The measures of `evaluation.representation` on a step's projections, weighted by this rank's share of `images`."""
    z = outputs["z"].detach().flatten(0, 1)
    return of_pairs(z, temperature, images) | of_rows(z, len(z) // 2, images)
