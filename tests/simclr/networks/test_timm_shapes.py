"""Networks of timm's by their shapes alone: the sizes of crops that they take, and the depths of their parameters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from simclr.config import Encoder, Views
from simclr.errors import UserError
from simclr.family import DINO, SwAV
from simclr.methods.choice import shapes
from simclr.networks.encoders import build_encoder, encoder_of
from simclr.networks.timm import looked_at
from simclr.sections import Local
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
