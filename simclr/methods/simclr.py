"""SimCLR = encoder f + projection head g (arXiv:2002.05709, Sec. 2.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from simclr import config as configs
from simclr.methods.queue import Memory
from simclr.networks.heads import build_head, linear_classifier
from simclr.networks.initial import unfilled
from simclr.networks.resnet import ResNet, build_encoder


class SimCLR(nn.Module):
    """Views (2n, 3, H, W) → (h, z, logits): representation (2n, d_h), projection (2n, d_z), class scores (2n, classes).
    Both views go through one pass, so BatchNorm sees them together, as in the official code.

    The classifier is the linear evaluation that goes on beside pretraining: it sees h behind a stop-gradient, so that
    nothing of a label reaches the encoder. Without classes there is none, and logits are (2n, 0).
    """

    def __init__(self, config: configs.Config, classes: int = 0) -> None:
        super().__init__()
        self.encoder: ResNet = build_encoder(config.encoder, config.seed)
        self.head = build_head(config, self.encoder.d_h)
        self.classifier = linear_classifier(self.encoder.d_h, classes, config.seed) if classes and config.train.linear_eval else None
        loss = config.loss
        self.memory = Memory(self.encoder, self.head, loss.memory, config.head.d_out, loss.memory_decay) if loss.memory else None

    def forward(self, views: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.encoder(views)
        z = self.head(h)[-1]
        seen = h.detach()
        return h, z, seen[:, :0] if self.classifier is None else self.classifier(seen)


def build_model(config: configs.Config, classes: int = 0, drawn: bool = True) -> SimCLR:
    """The model with the initial weights that `config.seed` names, on the CPU, the same on every rank and machine. `classes` of the
    data, 0 = unlabelled. Where it is not to be `drawn`, its memory holds nothing yet, for who restores a checkpoint."""
    return SimCLR(config, classes) if drawn else unfilled(lambda: SimCLR(config, classes))


def shapes_only(config: configs.Config, classes: int = 0) -> SimCLR:
    """The model on the meta device: names and shapes without memory."""
    with torch.device("meta"):
        return SimCLR(config, classes)
