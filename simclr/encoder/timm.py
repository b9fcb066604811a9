"""A published encoder as timm's own network: its names for the weights, and what it reads in config.json.

A network of timm's (`simclr.networks.timm`) has these names already, behind a prefix. Of our ResNets timm's `resnet50` is none: it pads
its max-pool on every side, the official SimCLR ('SAME') at the end of an even side. Its ResNetV2, without pre-activation and with the stem
'same', is, to the last bit of the sums: a 1 × 1 projection in every group's first block, the stride in the 3 × 3 convolution. It has
bottlenecks only, so ResNet-18 and -34 have no form there. Its vision transformer is ours, under the same names, but for the norm of a mean
of patches, which it calls fc_norm.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from simclr.config import Encoder
from simclr.encoder.directory import PublishedEncoder
from simclr.encoder.export import torchvision_name
from simclr.networks.timm import TimmEncoder, looked_at
from simclr.networks.vit import VisionTransformer

_DEPTHS = {50: "resnetv2_50", 101: "resnetv2_101", 152: "resnetv2_152", 200: "resnetv2_152"}
_BLOCKS_200 = [3, 24, 36, 3]  # timm has no network of this depth by name


def lacks(encoder: Encoder) -> str:
    """Why timm has no such network, in words; "" where it has one."""
    if encoder.vit or encoder.timm:
        return ""
    if encoder.cifar_stem:
        return "the stem for small images"
    if encoder.sk_ratio or encoder.se_ratio:
        return "selective kernels" if encoder.sk_ratio else "squeeze-and-excitation"
    return "" if encoder.depth in _DEPTHS else f"a ResNet-{encoder.depth} with a projection in its first block"


def config(published: PublishedEncoder) -> dict[str, Any]:
    """The keys of config.json with which `timm.create_model("hf-hub:ORG/NAME", pretrained=True)` builds this network. They stand beside
    ours, which have other names."""
    encoder, seen = Encoder(**published.config["encoder"]), published.preprocessing
    arguments: dict[str, Any] = {}
    named: dict[str, Any] = {"fixed_input_size": False, "pool_size": [-(-seen.size_px // 32)] * 2}
    named |= {"first_conv": "stem.conv", "classifier": "head.fc"}
    if encoder.timm:
        found = looked_at(encoder.timm, seen.size_px)
        arguments = {key: value for key, value in found.arguments.items() if key not in ("pretrained", "num_classes")}
        kept = ("fixed_input_size", "first_conv", "classifier")
        named = {key: found.pretrained_cfg[key] for key in kept if key in found.pretrained_cfg}
    elif isinstance(vit := published.encoder, VisionTransformer):
        arguments |= {"img_size": seen.size_px, "patch_size": vit.patch_px, "embed_dim": vit.d_h, "depth": len(vit.blocks)}
        arguments |= {"num_heads": vit.heads, "global_pool": "token" if vit.pool == "class" else "avg"}
        named = {"fixed_input_size": True, "pool_size": None, "first_conv": "patch_embed.proj", "classifier": "head"}
    else:
        arguments |= {"preact": False, "stem_type": "same"}
        if encoder.width != 1:
            arguments["width_factor"] = encoder.width
        if encoder.depth == 200:
            arguments["layers"] = _BLOCKS_200
    return {
        "architecture": encoder.timm or ("vit_small_patch16_224" if encoder.vit else _DEPTHS[encoder.depth]),
        "model_args": arguments,
        "num_classes": 0,
        "num_features": published.d_h,
        "global_pool": arguments.get("global_pool", "avg"),
        "pretrained_cfg": {
            "tag": "simclr",
            "custom_load": False,
            "input_size": [3, seen.size_px, seen.size_px],
            "interpolation": "bicubic" if seen.resize == "bicubic" else "bilinear",  # timm reduces by area with either
            "crop_pct": seen.centre_crop,
            "crop_mode": "center",
            "mean": list(seen.mean),
            "std": list(seen.std),
            "num_classes": 0,
            **named,
        },
    }


def weights(published: PublishedEncoder) -> dict[str, Tensor]:
    """The encoder's weights under timm's names."""
    tensors = published.encoder.state_dict()
    if isinstance(published.encoder, TimmEncoder):
        return {own: t.contiguous() for own, t in published.encoder.model.state_dict().items()}
    if isinstance(vit := published.encoder, VisionTransformer):
        norm = "fc_norm." if vit.pool == "mean" else "norm."
        return {re.sub(r"^norm\.", norm, own): t.contiguous() for own, t in tensors.items()}
    return {name(own): t.contiguous() for own, t in tensors.items()}


def name(own: str) -> str:
    """timm's name of the weight that `ResNet.state_dict()` calls `own`."""
    part, _, kind = torchvision_name(own).rpartition(".")
    if part in ("conv1", "bn1"):
        return f"stem.{'conv' if part == 'conv1' else 'norm'}.{kind}"
    group, block, layer = part.split(".", 2)
    inner = {"downsample.0": "downsample.conv", "downsample.1": "downsample.norm"}.get(layer, layer.replace("bn", "norm"))
    return f"stages.{int(group.removeprefix('layer')) - 1}.blocks.{block}.{inner}.{kind}"
