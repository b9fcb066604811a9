"""BYOL (arXiv:2006.07733): a network predicts, from one view, what its own moving average projects the other view to. No negatives.

What keeps it from the constant solution is the predictor, which only the trained network has, and a target that follows slowly. As in
the authors' code:

- The target network begins with weights of its own, and not as a copy: the paper (Sec. 2) starts from the finding that even a fixed random
  target teaches, and a target apart from the network gives a signal from the first step. Its seed is keyed by the run's (`target_seed`).
- Both networks are in training mode and normalise by the batch, each view by itself: views pass one after the other. Running statistics
  are each network's own, and are never averaged.
- The average moves after the optimizer, by 1 − τ(step), with τ from `ema` to 1 on half a cosine by step. At τ = 1 the target stands still.

Differences from that code: it also averages predictor and classifier, whose averages nobody reads; its linear classifier learns from the
first view alone, ours from both; its convolutions are cut normals of 0.88 times our standard deviation; its schedules are a step shorter.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from simclr import keyed
from simclr import loss as losses
from simclr.data.manifest import Manifest
from simclr.family import BYOL
from simclr.methods.average import cosine_to_one, forward_of, move
from simclr.methods.method import Method, Rows, Start, begun, by_view, examples_of, pairs_for, placed, schedule
from simclr.methods.online import neighbours, of_pairs, of_rows, with_classifier
from simclr.networks.encoders import Encoder, build_encoder, encoded
from simclr.networks.heads import MLP, linear_classifier
from simclr.networks.initial import draw, haiku_law
from simclr.optim import byol_rule, parameter_groups
from simclr.telemetry.collapse import Least
from simclr.views.draw import Crop

_MENDS = "a lower --optim.base-lr, more warm-up or another --ema may help"
_WITHOUT = "without its predictor BYOL does; leave out --no-predictor"


class Network(nn.Module):
    """{"views": (2, n, 3, H, W)} → {"p": (2, n, d) predictions, "z": (2, n, d) projections without gradient, "logits": (2, n, classes)
    class scores, where there is a classifier}. Without a predictor the predictions are the projections."""

    def __init__(self, encoder: Encoder, projector: nn.Module, predictor: nn.Module | None, classifier: nn.Module | None = None) -> None:
        super().__init__()
        self.encoder, self.projector, self.predictor, self.classifier = encoder, projector, predictor, classifier

    def forward(self, rows: Rows) -> Rows:
        h = torch.stack([encoded(self.encoder, one) for one in by_view(rows)])
        z = one_by_one(self.projector, h)
        found = {"p": z if self.predictor is None else one_by_one(self.predictor, z), "z": z.detach()}
        if self.classifier is not None:
            found["logits"] = one_by_one(self.classifier, h.detach())
        return found


class Target(nn.Module):
    """(2, n, 3, H, W) views → (2, n, d) projections by the moving averages of encoder and projector, which need no gradient. No block of
    theirs is left out (encoder.drop_path)."""

    def __init__(self, encoder: Encoder, projector: nn.Module) -> None:
        super().__init__()
        self.encoder, self.projector = encoder, projector
        self.requires_grad_(False)

    def forward(self, views: Tensor) -> Tensor:
        return one_by_one(self.projector, one_by_one(self.encoder, views))


def one_by_one(module: nn.Module, views: Tensor) -> Tensor:
    """(views, n, …) through `module`, view by view: its BatchNorms normalise each view by itself."""
    return torch.stack([module(view) for view in views])


def build_network(config: BYOL, classes: int = 0) -> Network:
    """The trained network with the initial weights of `config.seed`. `classes`: number of classes, 0 = unlabelled."""
    encoder, projector = _trunk(config, config.seed)
    classifier = linear_classifier(encoder.d_h, classes, config.seed) if classes and config.train.linear_eval else None
    return Network(encoder, projector, _head(config, config.d_out, config.seed, "predictor") if config.predictor else None, classifier)


def build_target(config: BYOL) -> Target:
    """The target network with initial weights of its own."""
    return Target(*_trunk(config, target_seed(config.seed)))


def target_seed(seed: int) -> int:
    """The seed of the target's initial weights in a run of `seed`: 63 keyed bits."""
    high, low = keyed.bits(seed, "weights", zlib.crc32(b"target"), np.zeros(1, np.int64), 0, 2)[0].tolist()
    return int(high >> 1) << 32 | int(low)


def _trunk(config: BYOL, seed: int) -> tuple[Encoder, MLP]:
    encoder = build_encoder(config.encoder, seed, config.views.size_px)
    return encoder, _head(config, encoder.d_h, seed, "projector")


def _head(config: BYOL, d_in: int, seed: int, name: str) -> MLP:
    """Linear with bias, BatchNorm, ReLU, linear without bias; initial weights as those of the authors' library."""
    drawn, ranks = partial(draw, law=haiku_law), config.encoder.norm_ranks
    return MLP(d_in, config.hidden, config.d_out, bias=(True, False), seed=seed, name=name, norm_ranks=ranks, drawn=drawn)


def byol(config: BYOL, start: Start, manifest: Manifest | None = None) -> Method:
    """BYOL on the images of `manifest`; without one there are neither labels nor online evaluation."""
    precision, images = config.train.precision, config.train.batch_size
    crops = (Crop(views=config.views),)
    classes = len(manifest.classes) if manifest is not None else 0
    network = placed(begun(lambda: build_network(config, classes), start), start, precision)
    target = placed(begun(lambda: build_target(config), start), start, precision)

    examples = examples_of(config, start, manifest) if manifest is not None else images
    total = config.total_steps(examples)
    return Method(
        crops=crops,
        inputs=partial(pairs_for, config=config, device=start.device, labelled=network.classifier is not None),
        network=network,
        state=target,
        targets=partial(projected, forward_of(target, config.train.compile)),
        loss=partial(objective, images=images),
        after=partial(follow, target, network, total=total, base=config.ema),
        report=partial(diagnosed, images=images),
        groups=parameter_groups(network, config.optim, schedule(config, examples), total, byol_rule),
        published={"encoder": network.encoder} | ({"classifier": network.classifier} if network.classifier is not None else {}),
        evaluate=neighbours(network.encoder, config, start, manifest),
        chance=4.0,  # of directions that have nothing to do with each other: cosines 0, two distances of 2
        # Measured on rendered patterns (ResNet-8, 16 px): without its predictor it falls from 0.80 to 0.17 in half an epoch, 30 steps of 64
        # images, and to 0.10 at its end; with the predictor it stays between 0.79 and 0.82.
        least=Least(spread=0.2, dimension=1.2, advice=_MENDS if config.predictor else _WITHOUT),
    )


def projected(target: Callable[[Tensor], Tensor], inputs: Rows) -> Rows:
    """The target network's projections of both views, "t" (2, n, d), and the labels among the inputs."""
    return {"t": target(inputs["views"]), **{name: x for name, x in inputs.items() if name == "labels"}}


def objective(outputs: Rows, targets: Rows, step: int, images: int) -> tuple[Tensor, Rows]:
    """This rank's share of the loss and its sums."""
    return with_classifier(losses.byol(outputs["p"], targets["t"], images), outputs, targets, images)


def follow(target: Target, network: Network, inputs: Rows, targets: Rows, step: int, total: int, base: float) -> None:
    """target ← target + (1 − τ)(network − target), with the weights that optimizer step `step` (0-based) of `total` left."""
    keep = cosine_to_one(step, total, base)
    move(target.encoder, network.encoder, keep)
    move(target.projector, network.projector, keep)


def diagnosed(outputs: Rows, targets: Rows, images: int | None = None) -> dict[str, Tensor]:
    """Measures of a step's projections z, weighted by this rank's share of `images`. The loss does not tell a collapse, since it falls in
    one; `health/spread` does."""
    z = outputs["z"].flatten(0, 1)
    return of_pairs(z, None, images) | of_rows(z, len(z) // 2, images)
