"""The encoder f(.) that a config describes, whichever kind of network it is."""

from __future__ import annotations

from typing import TypeAlias

from simclr import config as configs
from simclr.networks.resnet import ResNet, resnet
from simclr.networks.timm import TimmEncoder

Encoder: TypeAlias = ResNet | TimmEncoder
"""Images (n, 3, H, W) → representations h (n, d_h), with d_h in `.d_h`."""


def build_encoder(config: configs.Encoder, seed: int = 0, size_px: int = 224) -> Encoder:
    """The encoder that `config` describes, for images of `size_px` pixels a side, with initial weights keyed by `seed`."""
    c = config
    if c.timm:
        return TimmEncoder(c.timm, size_px, c.norm_ranks, seed)
    return resnet(c.depth, c.width, c.sk_ratio, c.se_ratio, c.cifar_stem, c.norm_ranks, seed)


def encoder_of(config: configs.Config) -> Encoder:
    """The encoder of a run of `config`, with its initial weights."""
    return build_encoder(config.encoder, config.seed, config.views.size_px)
