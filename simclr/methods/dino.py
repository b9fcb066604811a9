"""DINO (arXiv:2104.14294): a network learns, from every crop, the softmax that a moving average of itself gives for another large view.

Two things keep it from the constant solution: the average's softmax is sharper than the network's, and its scores are centred on their
mean. As in the authors' code:

- The centre moves by the average's scores of all ranks, behind the loss, which uses the one before.
- The average moves behind the optimizer, parameter by parameter, by m(step), which goes from `ema` to 1 by half a cosine. It has the large
  views alone, in training mode, and leaves no block out (encoder.drop_path); running statistics of its BatchNorms are its own.
- The network runs once for each size of crops, the head once over all of them. Its last layer has rows of length 1, and in the first
  `frozen_epochs` no gradient: the optimizer leaves it alone, decay too.
- The temperature of the average is set epoch by epoch, everything else step by step.

Differences from that code: the position embeddings of small crops are resized by size, there by a scale that is enlarged by 0.1; rates and
decay are those of a schedule whose warm-up reaches its peak behind its last step; running variances are the biased ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from simclr import loss as losses
from simclr.collectives import all_reduce_sum
from simclr.data.manifest import Manifest
from simclr.family import DINO
from simclr.methods.average import average_of, cosine_to_one, forward_of, move
from simclr.methods.method import Method, Rows, Start, begun, by_size, crops_for, crops_of, examples_of, placed, schedule
from simclr.methods.online import neighbours, of_pairs, of_rows, with_classifier
from simclr.networks.encoders import Encoder, encoded, encoder_of
from simclr.networks.heads import DINOHead, linear_classifier
from simclr.optim import dino_rule, parameter_groups


class Network(nn.Module):
    """{"views": (2, n, 3, H, W), "local": (L, n, 3, h, w)} → {"scores": (2 + L, n, K), "z": (2, n, d) what the head's last layer reads of
    the views, without gradient, "logits": (2, n, classes) class scores, where there is a classifier}."""

    def __init__(self, encoder: Encoder, head: DINOHead, classifier: nn.Module | None = None) -> None:
        super().__init__()
        self.encoder, self.head, self.classifier = encoder, head, classifier

    def forward(self, rows: Rows) -> Rows:
        h = torch.cat([encoded(self.encoder, one) for one in by_size(rows)])
        n = rows["views"].shape[1]
        z, scores = self.head(h)
        found = {"scores": scores, "z": z[: 2 * n].detach()}
        if self.classifier is not None:
            found["logits"] = self.classifier(h[: 2 * n].detach())
        return {name: x.unflatten(0, (-1, n)) for name, x in found.items()}


class Teacher(nn.Module):
    """(2, n, 3, H, W) views → (2, n, K) scores of the moving averages of encoder and head; and the centre of all scores so far, (K,)."""

    centre: Tensor

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.encoder, self.head = average_of(network.encoder), average_of(network.head)
        self.register_buffer("centre", torch.zeros_like(self.head.last_layer.weight_v[:, 0]))

    def forward(self, views: Tensor) -> Tensor:
        _, scores = self.head(self.encoder(views.flatten(0, 1)))
        found: Tensor = scores.unflatten(0, views.shape[:2])
        return found

    def follow(self, network: Network, keep: float) -> None:
        """Move the averages towards `network`; they keep this share of themselves."""
        move(self.encoder, network.encoder, keep)
        move(self.head, network.head, keep)

    def recentre(self, scores: Tensor, images: int, keep: float) -> None:
        """Move the centre, which keeps this share of itself, towards the mean of all ranks' `scores` (2, n, K) of so many `images`."""
        mean = all_reduce_sum(scores.to(self.centre.dtype).sum((0, 1))) / (len(scores) * images)
        self.centre.lerp_(mean, 1 - keep)


def build_network(config: DINO, classes: int = 0) -> Network:
    """The network with the initial weights of `config.seed`. `classes`: number of classes, 0 = unlabelled."""
    encoder, c = encoder_of(config), config
    head = DINOHead(encoder.d_h, c.d_out, c.hidden, c.bottleneck, c.layers, c.head_norm, c.unit_rows, c.encoder.norm_ranks, c.seed)
    classifier = linear_classifier(encoder.d_h, classes, c.seed) if classes and c.train.linear_eval else None
    return Network(encoder, head, classifier)


def dino(config: DINO, start: Start, manifest: Manifest | None = None) -> Method:
    """DINO on the images of `manifest`; without one there are neither labels nor online evaluation."""
    precision, images, crops = config.train.precision, config.train.batch_size, crops_of(config.views, config.local)
    classes = len(manifest.classes) if manifest is not None else 0
    network = placed(begun(lambda: build_network(config, classes), start), start, precision)
    teacher = placed(Teacher(network), start, precision)
    examples = examples_of(config, start, manifest) if manifest is not None else images
    total, per_epoch = config.total_steps(examples), config.steps_per_epoch(examples)
    return Method(
        crops=crops,
        inputs=partial(crops_for, crops=crops, config=config, device=start.device, labelled=network.classifier is not None),
        network=network,
        state=teacher,
        targets=partial(taught, forward_of(teacher, config.train.compile)),
        loss=partial(objective, teacher=teacher, config=config, per_epoch=per_epoch),
        gradients=partial(freeze, network.head.last_layer, steps=round(config.frozen_epochs * per_epoch)),
        after=partial(follow, teacher, network, total=total, config=config),
        report=partial(diagnosed, images=images),
        groups=parameter_groups(network, config.optim, schedule(config, examples), total, dino_rule),
        published={"encoder": network.encoder} | ({"classifier": network.classifier} if network.classifier is not None else {}),
        evaluate=neighbours(network.encoder, config, start, manifest),
        chance=math.log(config.d_out),
    )


def taught(teacher: Callable[[Tensor], Tensor], inputs: Rows) -> Rows:
    """The average's scores of both large views, "t" (2, n, K), and the labels among the inputs."""
    return {"t": teacher(inputs["views"]), **{name: x for name, x in inputs.items() if name == "labels"}}


def teacher_temperature(config: DINO, epoch: int) -> float:
    """In a line from the first to the last value over the epochs of its warm-up, both ends included; then the last."""
    first, last, epochs = config.first_teacher_temperature, config.teacher_temperature, config.teacher_epochs
    return first + (last - first) * epoch / max(epochs - 1, 1) if epoch < epochs else last


def objective(outputs: Rows, targets: Rows, step: int, teacher: Teacher, config: DINO, per_epoch: int) -> tuple[Tensor, Rows]:
    """This rank's share of the loss and its sums."""
    sharp = teacher_temperature(config, step // per_epoch)
    images = config.train.batch_size
    found = losses.dino(outputs["scores"], targets["t"], teacher.centre, config.temperature, sharp, images)
    return with_classifier(found, outputs, targets, images)


def freeze(layer: nn.Module, step: int, steps: int) -> None:
    """Drop the gradients of `layer` in the first `steps`."""
    if step < steps:
        for p in layer.parameters():
            p.grad = None


def follow(teacher: Teacher, network: Network, inputs: Rows, targets: Rows, step: int, total: int, config: DINO) -> None:
    """Move the centre by this step's scores, and the averages with the weights that optimizer step `step` (0-based) of `total` left."""
    teacher.recentre(targets["t"], config.train.batch_size, config.centre_ema)
    teacher.follow(network, cosine_to_one(step, total, config.ema))


def diagnosed(outputs: Rows, targets: Rows, images: int) -> dict[str, Tensor]:
    """SimCLR's measures, of what the head's last layer reads of both views. In a collapse their spread falls, and the loss stays at ln K or
    goes to 0."""
    z = outputs["z"].flatten(0, 1)
    return of_pairs(z, None, images) | of_rows(z, len(z) // 2, images)
