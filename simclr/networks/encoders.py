"""The encoder f(.) that a config describes, whichever kind of network it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from torch import Tensor

from simclr import config as configs
from simclr.errors import UserError
from simclr.family import DINO, SwAV
from simclr.networks.resnet import ResNet, resnet
from simclr.networks.timm import TimmEncoder
from simclr.networks.vit import SIZES, VisionTransformer, vit

Encoder: TypeAlias = ResNet | VisionTransformer | TimmEncoder
"""Images (n, 3, H, W) → representations h (n, d_h), with d_h in `.d_h`."""


def build_encoder(config: configs.Encoder, seed: int = 0, size_px: int = 224, small_px: int | None = None) -> Encoder:
    """The encoder that `config` describes, for images of `size_px` pixels a side, with initial weights keyed by `seed`; a network of timm's
    also for small crops of `small_px`, as the others are anyway. Raises UserError where a vision transformer's parts do not divide each
    other, and for a network that timm has not or that does not take such images."""
    c = config
    if c.vit:
        width, blocks, heads = SIZES[c.vit]
        given = {"pool": c.pool, "positions": c.positions, "frozen_patches": c.frozen_patches, "seed": seed}
        try:
            return vit(width, blocks, c.heads or heads, c.patch_px, size_px, **given)  # type: ignore[arg-type]
        except ValueError as error:
            raise UserError(f"no {c.title} is like this: {error}; change encoder.heads, encoder.patch_px or views.size_px") from None
    if c.timm:
        return TimmEncoder(c.timm, size_px, c.norm_ranks, seed, small_px)
    return resnet(c.depth, c.width, c.sk_ratio, c.se_ratio, c.cifar_stem, c.norm_ranks, seed)


def encoder_of(config: configs.Config) -> Encoder:
    """The encoder of a run of `config`, with its initial weights."""
    return build_encoder(config.encoder, config.seed, config.views.size_px, small_px(config))


def small_px(config: configs.Config) -> int | None:
    """Side of the small crops that the encoder of a run of `config` sees beside the views; None where there are none."""
    return config.local.size_px if isinstance(config, SwAV | DINO) and config.local.crops else None


def encoded(encoder: Encoder, rows: Mapping[str, Tensor]) -> Tensor:
    """Input rows → h (crops · n, d_h): of "views" (crops, n, 3, H, W), with the factors "paths" (crops, n, 2 · blocks) where a method draws
    them (`methods.method.paths_for`)."""
    views = rows["views"].flatten(0, 1)
    if "paths" in rows:
        return encoder(views, rows["paths"].flatten(0, 1))  # type: ignore[no-any-return]
    return encoder(views)  # type: ignore[no-any-return]


def depths(encoder: Encoder) -> tuple[dict[str, int], int]:
    """(the depth of each parameter by its name in `encoder`, number of depths), for rates that shrink towards the input.

    Depth 0 is what comes before the blocks: patch embedding, tokens and positions, or the stem. Block i has i + 1, and the last depth is
    for what comes behind the blocks: the last norm, and what a method puts on the encoder. Raises UserError for a network of timm's whose
    blocks timm does not order.
    """
    if isinstance(encoder, TimmEncoder):
        of_timm = encoder.depths()
        ends = ("model.norm.", "model.fc_norm.", "model.head.", "model.attn_pool.")  # timm: of the last block, or of a depth of their own
        dense = {depth: i for i, depth in enumerate(sorted({d for name, d in of_timm.items() if not name.startswith(ends)}))}
        last = len(dense)
        return {name: last if name.startswith(ends) else dense[depth] for name, depth in of_timm.items()}, last + 1
    behind: tuple[str, ...] = ()
    if isinstance(encoder, VisionTransformer):
        blocks = {f"blocks.{i}.": i + 1 for i in range(len(encoder.blocks))}
        behind = ("norm.",)
    else:
        order = [f"groups.{g}.{b}." for g, group in enumerate(encoder.groups) for b in range(len(list(group.children())))]
        blocks = {start: i + 1 for i, start in enumerate(order)}
    last = len(blocks) + 1
    found = {}
    for name, _ in encoder.named_parameters():
        block = next((depth for start, depth in blocks.items() if name.startswith(start)), 0)
        found[name] = last if name.startswith(behind) else block
    return found, last + 1
