"""MoCo v3 (arXiv:2104.02057) as a `Method`: a prediction from one view finds, among the keys of the whole batch, the key that a moving
average of the network makes of the other view. There is no queue.

As in the official code: views pass one after the other, so BatchNorm has statistics of each view, and its running ones move twice a step;
the average moves ahead of its pass, with the weights that the step before left, by a momentum that goes to 1 on a cosine of steps; it has
no predictor; both directions are added. Of the average only parameters follow, BatchNorm's scale and shift included; its running statistics
are of its own passes in training mode. Different here: the running variance is the biased one, and a ResNet has SimCLR's initial weights.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

from simclr.data.manifest import Manifest
from simclr.family import MoCoV3
from simclr.loss import info_nce
from simclr.methods.average import average_of, cosine_to_one, forward_of, move
from simclr.methods.method import (
    Method,
    Rows,
    Start,
    begun,
    by_view,
    examples_of,
    pairs_for,
    placed,
    schedule,
)
from simclr.methods.online import neighbours, of_pairs, of_rows, with_classifier
from simclr.networks.encoders import encoded, encoder_of
from simclr.networks.heads import MLP, linear_classifier
from simclr.optim import everything, mocov3_lars_rule, parameter_groups
from simclr.views.draw import Crop


class Network(nn.Module):
    """{"views": (2, n, 3, H, W)} → {"q": (2, n, d) predictions, "logits": (2, n, classes) class scores, where there are classes}."""

    def __init__(self, config: MoCoV3, classes: int = 0) -> None:
        super().__init__()
        c, ranks = config, config.encoder.norm_ranks
        self.encoder = encoder_of(c)
        d_h = self.encoder.d_h
        self.projector = MLP(d_h, c.hidden, c.d_out, c.layers, last_norm=True, seed=c.seed, name="projector", norm_ranks=ranks)
        # Always two layers; ViT's ends with a BatchNorm, ResNet's does not.
        self.predictor = MLP(c.d_out, c.hidden, c.d_out, 2, last_norm=c.predictor_norm, seed=c.seed, name="predictor", norm_ranks=ranks)
        self.classifier = linear_classifier(d_h, classes, c.seed) if classes and c.train.linear_eval else None

    def forward(self, rows: Rows) -> Rows:
        h = [encoded(self.encoder, one) for one in by_view(rows)]
        found = {"q": torch.stack([self.predictor(self.projector(one)) for one in h])}
        if self.classifier is not None:
            found["logits"] = torch.stack([self.classifier(one.detach()) for one in h])
        return found


def mocov3(config: MoCoV3, start: Start, manifest: Manifest | None = None) -> Method:
    """MoCo v3 on the images of `manifest`; without one there are neither labels nor online evaluation."""
    precision, tau = config.train.precision, config.temperature
    crops, images = (Crop(views=config.views),), config.train.batch_size
    classes = len(manifest.classes) if manifest is not None else 0
    model = placed(begun(lambda: Network(config, classes), start), start, precision)
    average = nn.ModuleDict({"encoder": average_of(model.encoder), "projector": average_of(model.projector)})
    embed = forward_of(nn.Sequential(average["encoder"], average["projector"]), config.train.compile)
    examples = examples_of(config, start, manifest) if manifest is not None else images
    total = config.total_steps(examples)

    def before(step: int) -> None:
        keep = cosine_to_one(step, total, config.ema)
        move(average["encoder"], model.encoder, keep)
        move(average["projector"], model.projector, keep)

    def targets(rows: Rows) -> Rows:
        """{"keys": (2, n, d) keys of both views}, and labels. The average leaves no block out (encoder.drop_path)."""
        keys = torch.stack([embed(view) for view in rows["views"]])
        return {"keys": keys} if model.classifier is None else {"keys": keys, "labels": rows["labels"]}

    def objective(outputs: Rows, targets: Rows, step: int) -> tuple[Tensor, Rows]:
        (q1, q2), (k1, k2) = outputs["q"], targets["keys"]
        return with_classifier(info_nce(q1, k2, tau, images) + info_nce(q2, k1, tau, images), outputs, targets, images)

    rule = mocov3_lars_rule if config.optim.name == "lars" else everything
    return Method(
        crops=crops,
        inputs=partial(pairs_for, config=config, device=start.device, labelled=model.classifier is not None),
        network=model,
        state=average,
        before=before,
        targets=targets,
        loss=objective,
        report=partial(diagnosed, temperature=tau, images=images),
        groups=parameter_groups(model, config.optim, schedule(config, examples), total, rule),
        published={"encoder": model.encoder} | ({"classifier": model.classifier} if model.classifier is not None else {}),
        evaluate=neighbours(model.encoder, config, start, manifest),
        chance=2 * 2 * tau * math.log(images),
    )


def diagnosed(outputs: Rows, targets: Rows, temperature: float, images: int) -> dict[str, Tensor]:
    """SimCLR's measures: of pairs, between the predictions from the first view and the keys of the second; of collapse, of the
    predictions."""
    q, keys = outputs["q"].detach(), targets["keys"].to(outputs["q"].dtype)
    return of_pairs(torch.cat([q[0], keys[1]]), temperature, images) | of_rows(q.flatten(0, 1), q.shape[1], images)
