"""Networks of timm's by their shapes alone: the sizes of crops that they take, and the depths of their parameters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from simclr.config import Encoder, Optim, Views
from simclr.errors import UserError
from simclr.family import DINO, SwAV
from simclr.methods.choice import shapes
from simclr.methods.simclr import build_model
from simclr.networks.encoders import build_encoder, depths, encoder_of
from simclr.networks.timm import looked_at
from simclr.optim import parameter_groups
from simclr.papers import TUNED
from simclr.sections import Local
from simclr.stages import FineTune
from tests.simclr.test_sense import notes
from tests.support.small import TINY, run

pytest.importorskip("timm", reason="timm, of the extras `timm` and `dev`, is not installed")
LOCAL = Local(crops=2, size_px=96, area=(0.05, 0.3))


# ── Small crops ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_a_network_of_a_fixed_size_takes_small_crops_where_timm_has_a_way(name: str) -> None:
    """And without small crops it is built as before."""
    assert looked_at(name, 224, 96).arguments == looked_at(name, 224).arguments | {"dynamic_img_size": True}
    assert looked_at("convnext_atto", 224, 96) == looked_at("convnext_atto", 224)
    config = DINO(encoder=Encoder(timm=name), local=LOCAL)
    network = shapes(config).published["encoder"]
    for side in (224, 96):
        assert len(network(torch.empty(2, 3, side, side, device="meta"))) == 2
    without = shapes(replace(config, local=replace(LOCAL, crops=0))).published["encoder"]
    with pytest.raises(AssertionError, match=r"doesn't match model \(224\)"):
        without(torch.empty(1, 3, 96, 96, device="meta"))


def test_at_the_views_size_it_computes_what_the_published_encoder_does() -> None:
    config = SwAV(encoder=Encoder(timm="vit_tiny_patch16_224"), views=Views(size_px=64), local=replace(LOCAL, size_px=32))
    network, published = encoder_of(config).eval(), build_encoder(config.encoder, seed=1, size_px=64).eval()
    published.load_state_dict(network.state_dict())
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(network(x), published(x)) and network(x[:, :, :32, :32]).shape == (2, network.d_h)


def test_a_step_of_dino_with_timms_vision_transformer(patterns: Path, tmp_path: Path) -> None:
    train, views = replace(TINY.train, steps=1, checkpoint_every_steps=1), replace(TINY.views, size_px=32)
    encoder, local = Encoder(timm="vit_tiny_patch16_224"), replace(LOCAL, size_px=16)
    config = DINO(encoder=encoder, views=views, train=train, watch=TINY.watch, local=local, d_out=16, hidden=16)
    (report,) = run(config, patterns, tmp_path).values()
    assert report.metrics["train/loss"] > 0


@pytest.mark.parametrize(
    ("name", "small", "words"),
    [
        ("beit_base_patch16_224", 96, "takes images of 224 px alone, and the small crops have 96; give --local.crops 0 or another network"),
        ("pit_ti_224", 96, "takes images of 224 px alone, and the small crops have 96"),
        ("vit_tiny_patch16_224", 90, "patches of 16 px, and local.size_px is 90; give a multiple of it"),
    ],
)
def test_small_crops_that_a_network_does_not_take_are_refused_before_anything_runs(name: str, small: int, words: str) -> None:
    for kind in (SwAV, DINO):
        config = kind(encoder=Encoder(timm=name), local=replace(LOCAL, size_px=small))
        with pytest.raises(UserError, match=words):
            notes(config)
        notes(replace(config, local=replace(config.local, crops=0)))


# ── Depths ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "blocks", "first", "behind"),
    [
        # ConvNeXt's blocks are 2 + 2 + 6 + 2; a down-sampling ahead of a stage has the depth of its first block.
        ("convnext_atto", 12, "stem", {"head.norm"}),
        ("vit_tiny_patch16_224", 12, "patch_embed", {"norm"}),
        ("swin_tiny_patch4_window7_224", 12, "patch_embed", {"norm"}),
        ("beit_base_patch16_224", 12, "patch_embed", {"fc_norm"}),
        ("vit_base_patch16_siglip_224", 12, "patch_embed", {"attn_pool", "norm"}),
        ("resnet18", 8, "conv1", set()),
    ],
)
def test_the_last_block_has_one_factor_less_than_what_is_behind_it(name: str, blocks: int, first: str, behind: set[str]) -> None:
    """No depth between the ends is empty; a factor that belongs to none of the layers would slow all of them."""
    with torch.device("meta"):
        found, count = depths(build_encoder(Encoder(timm=name)))
    assert count == blocks + 2 and found[f"model.{first}.{'proj.' * (first == 'patch_embed')}{'0.' * (first == 'stem')}weight"] == 0
    last = {parameter.removeprefix("model.").rpartition(".")[0] for parameter, depth in found.items() if depth == count - 1}
    assert {next(end for end in behind if part.startswith(end)) for part in last} == behind
    assert set(found.values()) >= set(range(count - 1))


@pytest.mark.parametrize("name", ["poolformer_s12", "pit_ti_224"])
def test_layer_decay_of_a_network_that_timm_does_not_order_is_refused_before_anything_runs(name: str) -> None:
    config = FineTune(encoder=Encoder(timm=name), optim=Optim(name="adamw", base_lr=1e-3, layer_decay=0.75))
    for look in (lambda: notes(config), lambda: parameter_groups(build_model(config, 2), config.optim, float, 1)):
        with torch.device("meta"), pytest.raises(UserError, match=f"timm does not say of {name}; leave --optim.layer-decay out"):
            look()


@pytest.mark.parametrize(("name", "said"), [("convnext_atto", True), ("vit_tiny_patch16_224", True), ("resnet18", False), ("", False)])
def test_lars_for_a_network_without_batchnorm_is_said(name: str, said: bool) -> None:
    found = [note for note in notes(FineTune(encoder=Encoder(timm=name))) if note.startswith("LARS has a ResNet's settings here")]
    assert len(found) == said and all(f"the encoder is {name}, without BatchNorm" in note and TUNED in note for note in found)
    (other,) = notes(FineTune(encoder=Encoder(timm="poolformer_s12")))
    assert "--optim.base-lr 1e-3" in other and "layer-decay" not in other
