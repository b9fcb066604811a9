"""SwAV (arXiv:2006.09882): each large view predicts to which prototypes the other view, and every small crop of the image, belong.

An assignment of all ranks' views to the prototypes in equal shares (`loss.sinkhorn`) makes the targets, from the network's own scores. As
in the authors' code:

- A step begins with the prototypes at length 1. They are not brought back to it behind the optimizer, and in the first `frozen_steps` they
  have no gradient: the optimizer leaves them alone, momentum and decay too.
- The network runs once for each size of crops, so its BatchNorms see those of a size together; the head runs once over all of them.
- The queue has projections of earlier steps, of each large view by itself. It fills from `queue_epochs` on and is used once it is full, as
  further samples of the assignment: they get codes that nobody reads.

Differences from that code: the queue is one of all ranks, there each rank has its own, which makes the same assignments; the warm-up is
from 0, and the step behind its last has the peak.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simclr import loss as losses
from simclr.collectives import all_gather, rank, world_size
from simclr.data.manifest import Manifest
from simclr.family import SwAV
from simclr.methods.method import (
    Method,
    Rows,
    Start,
    begun,
    by_size,
    crops_for,
    crops_of,
    examples_of,
    labels_of,
    no_rows,
    nothing_after,
    placed,
    schedule,
)
from simclr.methods.online import neighbours, of_pairs, of_rows, with_classifier
from simclr.networks.encoders import Encoder, encoded, encoder_of
from simclr.networks.heads import MLP, linear_classifier
from simclr.networks.initial import Linear, draw_uniform
from simclr.optim import everything, parameter_groups, simclr_rule
from simclr.shares import share


class Network(nn.Module):
    """{"views": (2, n, 3, H, W), "local": (L, n, 3, h, w)} → {"scores": (2 + L, n, K) cosines with the prototypes, "z": (2, n, d) unit
    projections of the views, without gradient, "logits": (2, n, classes) class scores, where there is a classifier}."""

    def __init__(self, encoder: Encoder, head: nn.Module, prototypes: nn.Linear, classifier: nn.Module | None = None) -> None:
        super().__init__()
        self.encoder, self.head, self.prototypes, self.classifier = encoder, head, prototypes, classifier

    def forward(self, rows: Rows) -> Rows:
        h = torch.cat([encoded(self.encoder, one) for one in by_size(rows)])
        z = F.normalize(self.head(h), dim=1)
        n = rows["views"].shape[1]
        found = {"scores": self.prototypes(z), "z": z[: 2 * n].detach()}
        if self.classifier is not None:
            found["logits"] = self.classifier(h[: 2 * n].detach())
        return {name: x.unflatten(0, (-1, n)) for name, x in found.items()}


class Queue(nn.Module):
    """Unit projections of earlier steps, (2, size, d), the same on every rank, and those of this step's views until its end. The order of
    rows says nothing; a step's N take the place of the oldest."""

    rows: Tensor

    def __init__(self, rows: Tensor, first: int, images: int) -> None:
        super().__init__()
        self.register_buffer("rows", rows)
        self.first, self.images = first, images
        self.coming: Tensor | None = None

    def used(self, step: int) -> int:
        """How many rows are used at `step`: none before there are as many as the queue holds."""
        size = self.rows.shape[1]
        return size if (step - self.first) * self.images >= size else 0

    def own(self, step: int) -> Tensor:
        """(2, m, d), this rank's share of the rows that are used."""
        return self.rows[:, share(self.used(step), rank(), world_size())]

    def enqueue(self, inputs: Rows, targets: Rows, step: int) -> None:
        """Store the projections `coming` (2, n, d) of `step`."""
        assert self.coming is not None
        if step >= self.first:
            z = all_gather(self.coming.transpose(0, 1).to(self.rows.dtype).contiguous(), self.images).transpose(0, 1)
            at = (step - self.first) * self.images % self.rows.shape[1]
            self.rows[:, at : at + self.images] = z
        self.coming = None


def build_network(config: SwAV, classes: int = 0) -> Network:
    """The network with the initial weights of `config.seed`: torch's in distribution for head and prototypes. `classes`: number of classes,
    0 = unlabelled."""
    encoder = encoder_of(config)
    head = MLP(
        encoder.d_h, config.hidden, config.d_out, bias=(True, True), seed=config.seed, name="head", norm_ranks=config.encoder.norm_ranks
    )
    prototypes = Linear(config.d_out, config.prototypes, bias=False)
    draw_uniform(prototypes, config.seed, "prototypes")
    classifier = linear_classifier(encoder.d_h, classes, config.seed) if classes and config.train.linear_eval else None
    return Network(encoder, head, prototypes, classifier)


def swav(config: SwAV, start: Start, manifest: Manifest | None = None) -> Method:
    """SwAV on the images of `manifest`; without one there are neither labels nor online evaluation."""
    precision, images, crops = config.train.precision, config.train.batch_size, crops_of(config.views, config.local)
    classes = len(manifest.classes) if manifest is not None else 0
    network = placed(begun(lambda: build_network(config, classes), start), start, precision)
    examples = examples_of(config, start, manifest) if manifest is not None else images
    queue: Queue | None = None
    if config.queue:
        first = round(config.queue_epochs * config.steps_per_epoch(examples))
        rows = torch.zeros(2, config.queue, config.d_out, device=start.device)
        queue = placed(Queue(rows, first, images), start, precision)
    rule = everything if config.optim.name != "lars" else simclr_rule  # the authors' LARC adapts and decays everything
    labelled = network.classifier is not None
    return Method(
        crops=crops,
        inputs=partial(crops_for, crops=crops, config=config, device=start.device, labelled=labelled),
        network=network,
        state=queue if queue is not None else nn.Module(),
        before=partial(of_length_1, network.prototypes),
        targets=labels_of if labelled else no_rows,
        loss=partial(objective, network=network, queue=queue, config=config, images=images),
        gradients=partial(freeze, network.prototypes, steps=config.frozen_steps),
        after=queue.enqueue if queue is not None else nothing_after,
        report=partial(diagnosed, images=images),
        groups=parameter_groups(network, config.optim, schedule(config, examples), config.total_steps(examples), rule),
        published={"encoder": network.encoder} | ({"classifier": network.classifier} if network.classifier is not None else {}),
        evaluate=neighbours(network.encoder, config, start, manifest),
        chance=math.log(config.prototypes),
    )


@torch.no_grad()
def of_length_1(prototypes: nn.Linear, step: int) -> None:
    """Bring the prototypes to length 1."""
    prototypes.weight.copy_(F.normalize(prototypes.weight, dim=1))


def freeze(prototypes: nn.Linear, step: int, steps: int) -> None:
    """Drop the prototypes' gradient in the first `steps`."""
    if step < steps:
        prototypes.weight.grad = None


def objective(
    outputs: Rows, targets: Rows, step: int, network: Network, queue: Queue | None, config: SwAV, images: int
) -> tuple[Tensor, Rows]:
    """This rank's share of the loss and its sums; the views' projections are then the queue's to store."""
    scores = outputs["scores"]
    views, samples = scores[:2].detach(), images
    if queue is not None:
        with torch.no_grad():
            earlier = F.linear(queue.own(step), network.prototypes.weight).to(views.dtype)
        views, samples = torch.cat([earlier, views], 1), images + queue.used(step)
        queue.coming = outputs["z"].detach()
    codes = torch.stack([losses.sinkhorn(view, config.epsilon, config.iterations, samples) for view in views])
    found = losses.swav(scores, codes[:, -scores.shape[1] :], config.temperature, images)
    return with_classifier(found, outputs, targets, images)


def diagnosed(outputs: Rows, targets: Rows, images: int) -> dict[str, Tensor]:
    """SimCLR's measures, of the projections of both views."""
    z = outputs["z"].flatten(0, 1)
    return of_pairs(z, None, images) | of_rows(z, len(z) // 2, images)
