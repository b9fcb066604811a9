"""Which network the flags of fine-tuning and distilling make of the given one."""

from __future__ import annotations

from dataclasses import replace

from pipelines.tracking.card import network
from pipelines.train.classifiers import Shape
from simclr.config import Encoder, SimCLR

RESNET = Encoder(depth=50, width=2, sk_ratio=0.0625, batchnorm=8)
VIT = Encoder(vit="small", heads=12, patch_px=8, positions="sin_cos", frozen_patches=True)


def test_flags_change_the_network_or_its_kind() -> None:
    assert Shape().of(RESNET) == RESNET and Shape(depth=18).of(RESNET).width == 2
    assert Shape().of(VIT) == VIT.trained  # what comes after pretraining trains all of it
    assert not VIT.trained.frozen_patches and VIT.trained.positions == "learned"
    assert Shape(depth=18).of(VIT) == Encoder(depth=18)
    assert Shape(depth=18, cifar_stem=True).of(VIT) == Encoder(depth=18, cifar_stem=True)
    other = Shape(vit="tiny").of(VIT)
    assert (other.vit, other.heads, other.patch_px) == ("tiny", None, 8)  # 12 heads were the small one's
    assert Shape(vit="tiny").of(RESNET).vit == "tiny"
    for encoder in (VIT.trained, Encoder(depth=18), Encoder(depth=18, cifar_stem=True)):
        assert Shape.like(encoder).of(encoder) == encoder


def test_drop_path_and_pool_alone_are_no_other_network() -> None:
    assert not Shape().other_weights and not Shape(drop_path=0.1).other_weights and Shape(vit="tiny").other_weights
    assert not Shape(pool="mean").other_weights and Shape.free(VIT) == Shape(pool="class", drop_path=0.0) and Shape.free(RESNET) == Shape()
    regular = replace(VIT, drop_path=0.2)  # a run without drop path is repeated without it, whatever the given encoder's was
    assert Shape.free(VIT).of(regular).drop_path == 0 and Shape.free(regular).of(VIT).drop_path == 0.2


def test_a_card_names_the_network() -> None:
    shown = [network(SimCLR(encoder=encoder).to_dict()["encoder"]) for encoder in (RESNET, VIT)]
    assert shown == ["ResNet-50, 2× width, selective kernels", "ViT-S/8, its class token"]
