"""MoCo v1 and v2 (arXiv:1911.05722, 2003.04297) as a `Method`: a query of one view finds, among the keys of thousands of earlier images,
the key that a moving average of the network makes of the other view.

As in the official code, the average moves ahead of its pass, with the weights that the step before left; its parameters follow, BatchNorm's
scale and shift included, while its running statistics are of its own passes in training mode; each view has a pass of its own; the queue
begins with random unit rows, all of which count from the first step on; and all parameters decay. Here BatchNorm's statistics are all
ranks' unless `encoder.batchnorm` says otherwise, the running variance is the biased one, and encoders have SimCLR's initial weights.

With statistics of all ranks a key does not depend on which rank its image is on, so there is nothing that a shuffle could hide: it is
offered (`shuffle`) for statistics of each worker alone, as the paper has them. The notebook's BatchNorm over splits of one GPU's batch is
not: `encoder.batchnorm per_worker` on so many workers is its like.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from simclr import keyed
from simclr.collectives import all_gather, rank, world_size
from simclr.data.manifest import Manifest
from simclr.family import MoCo
from simclr.loss import info_nce_queue
from simclr.methods.average import forward_of
from simclr.methods.method import Method, Rows, Start, begun, by_view, examples_of, pairs_for, placed, schedule
from simclr.methods.online import neighbours, of_pairs, of_rows, with_classifier
from simclr.methods.queue import Queue, random_rows
from simclr.networks.encoders import encoded, encoder_of
from simclr.networks.heads import linear_classifier
from simclr.networks.initial import Linear, draw_uniform
from simclr.optim import everything, parameter_groups, simclr_rule
from simclr.shares import share
from simclr.telemetry.collapse import Least
from simclr.to_device import to_device
from simclr.views.draw import Crop


class Network(nn.Module):
    """{"views": (2, n, 3, H, W)} → {"z": (v, n, d) queries of the first v views, 1 or, if `symmetric`, 2; "logits": (v, n, classes) class
    scores, where there are classes}."""

    def __init__(self, config: MoCo, classes: int = 0) -> None:
        super().__init__()
        self.encoder = encoder_of(config)
        self.head = build_head(config, self.encoder.d_h)
        self.classifier = linear_classifier(self.encoder.d_h, classes, config.seed) if classes and config.train.linear_eval else None
        self.queries = 2 if config.symmetric else 1

    def forward(self, rows: Rows) -> Rows:
        h = [encoded(self.encoder, one) for one in by_view(rows)[: self.queries]]
        found = {"z": torch.stack([self.head(one) for one in h])}
        if self.classifier is not None:
            found["logits"] = torch.stack([self.classifier(one.detach()) for one in h])
        return found


def build_head(config: MoCo, d_h: int) -> nn.Sequential:
    """h (n, d_h) → (n, d_out): one linear layer (v1), or two with a ReLU between them (v2), with biases and without BatchNorm. Initial
    weights and biases are torch's in distribution, uniform within ±1 / √fan-in, keyed by `config.seed`."""
    hidden = [Linear(d_h, d_h), nn.ReLU(inplace=True)] if config.layers == 2 else []
    head = nn.Sequential(*hidden, Linear(d_h, config.d_out))
    draw_uniform(head, config.seed, "head")
    return head


class Shuffle:
    """The exchange of images between ranks ahead of the key network (arXiv:1911.05722, Sec. 3.3), in one order of the N images for each
    step, a function of (seed, step). Every rank receives all N images' views, N · 3 · H · W numbers, and then all keys."""

    def __init__(self, seed: int, images: int, device: torch.device) -> None:
        self.seed, self.images, self.device = seed, images, device
        self.order = torch.arange(images)

    def draw(self, step: int) -> None:
        """Take the order of `step`."""
        self.order = torch.from_numpy(keyed.permutation(self.seed, step, self.images, "shuffle"))

    def __call__(self, view: Tensor, embed: Callable[[Tensor], Tensor]) -> Tensor:
        """What `embed` makes of this rank's images of `view` (n, …), each on the rank where the order puts it."""
        order, own = to_device(self.order, self.device), share(self.images, rank(), world_size())
        there = all_gather(view, self.images)[order[own]]
        there = there.contiguous(memory_format=torch.channels_last) if view.ndim == 4 else there
        return all_gather(embed(there), self.images)[order.argsort()[own]]


def moco(config: MoCo, start: Start, manifest: Manifest | None = None) -> Method:
    """MoCo on the images of `manifest`; without one there are neither labels nor online evaluation."""
    device, precision, tau = start.device, config.train.precision, config.temperature
    crops, images = (Crop(views=config.views),), config.train.batch_size
    classes = len(manifest.classes) if manifest is not None else 0
    model = placed(begun(lambda: Network(config, classes), start), start, precision)
    k, d = config.queue, config.d_out
    rows = random_rows(k, d, config.seed) if start.begins else torch.empty(k, d, device=start.device)
    queue = placed(Queue(model.encoder, model.head, rows), start, precision)
    embed = forward_of(nn.Sequential(queue.encoder, queue.head), config.train.compile)
    shuffle = Shuffle(config.seed, images, device) if config.shuffle else None

    def before(step: int) -> None:
        queue.follow(model.encoder, model.head, config.ema)
        if shuffle is not None:
            shuffle.draw(step)

    def targets(rows: Rows) -> Rows:
        """{"keys": (v, n, d) unit keys: of the second view or, if symmetric, of both}, and labels."""
        views = rows["views"] if config.symmetric else rows["views"][1:]
        keys = torch.stack([embed(view) if shuffle is None else shuffle(view, embed) for view in views])
        found = {"keys": normalize(keys.to(queue.rows.dtype), dim=-1)}
        return found if model.classifier is None else {**found, "labels": rows["labels"]}

    def objective(outputs: Rows, targets: Rows, step: int) -> tuple[Tensor, Rows]:
        # The key of a query is the other view's. Both directions use the queue as it was before this step, and are added, as in the
        # authors' notebook.
        pairs = zip(outputs["z"], targets["keys"].flip(0), strict=True)
        contrasted = torch.stack([info_nce_queue(q, k, queue.rows, tau, images) for q, k in pairs]).sum()
        return with_classifier(contrasted, outputs, targets, images)

    def enqueue(inputs: Rows, targets: Rows, step: int) -> None:
        """All ranks' keys, in the order of the batch: of one view, then of the other."""
        keys = all_gather(targets["keys"].transpose(0, 1).contiguous(), images)
        queue.enqueue(keys.transpose(0, 1).flatten(0, 1), step)

    examples = examples_of(config, start, manifest) if manifest is not None else images
    # The authors decay everything, with SGD. LARS would hardly move a shift or bias that is near 0.
    rule = simclr_rule if config.optim.name == "lars" else everything
    return Method(
        crops=crops,
        inputs=partial(pairs_for, config=config, device=start.device, labelled=model.classifier is not None),
        network=model,
        state=queue,
        before=before,
        targets=targets,
        loss=objective,
        after=enqueue,
        report=partial(diagnosed, temperature=tau, images=images),
        groups=parameter_groups(model, config.optim, schedule(config, examples), config.total_steps(examples), rule),
        published={"encoder": model.encoder} | ({"classifier": model.classifier} if model.classifier is not None else {}),
        evaluate=neighbours(model.encoder, config, start, manifest),
        chance=model.queries * math.log(config.queue + 1),
        # Without BatchNorm in the head, queries begin near each other: measured on rendered patterns, the spread at 0.09 in the first
        # epoch, later at 0.14 and more, and the dimension at 1.2.
        least=Least(spread=0.05, dimension=1.1),
    )


def diagnosed(outputs: Rows, targets: Rows, temperature: float, images: int) -> dict[str, Tensor]:
    """SimCLR's measures: of pairs, between a query of the first view and the batch's keys of the second; of collapse, of the queries."""
    z, keys = outputs["z"].detach(), targets["keys"]
    pairs = torch.cat([z[0].to(keys.dtype), keys[-1]])
    return of_pairs(pairs, temperature, images) | of_rows(z.flatten(0, 1), z.shape[1], images)
