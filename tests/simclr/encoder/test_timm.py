"""The form of a published encoder that timm reads: names by timm's own rule, features as timm computes them where it is installed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from simclr.config import Encoder
from simclr.encoder import timm as form
from simclr.encoder.directory import PublishedEncoder
from simclr.networks.encoders import build_encoder
from simclr.recipes import recipe
from tests.conftest import Within


def an_encoder(**fields: Any) -> PublishedEncoder:
    """Statistics and scales of BatchNorm are not those of the start, where a block is its shortcut."""
    config = replace(recipe("patterns_tiny"), encoder=Encoder(**fields))
    encoder, generator = build_encoder(config.encoder), torch.Generator().manual_seed(0)
    for name, t in encoder.state_dict().items():
        if t.ndim == 1:
            t.copy_(torch.rand(t.shape, generator=generator) * 0.5 + (0.5 if name.endswith(("weight", "var")) else 0))
    return PublishedEncoder(encoder, config.to_dict()).eval()


def shapes(blocks: tuple[int, ...], width: int) -> dict[str, tuple[int, ...]]:
    """Of timm's ResNetV2 without pre-activation, from its source."""
    found: dict[str, tuple[int, ...]] = {}

    def pair(place: str, number: str, c_out: int, c_in: int, kernel: int) -> None:
        found[f"{place}conv{number}.weight"] = (c_out, c_in, kernel, kernel)
        found.update({f"{place}norm{number}.{kind}": (c_out,) for kind in ("weight", "bias", "running_mean", "running_var")})

    pair("stem.", "", 64 * width, 3, 7)
    c_in = 64 * width
    for stage, count in enumerate(blocks):
        middle = 64 * width * 2**stage
        for block in range(count):
            at = f"stages.{stage}.blocks.{block}."
            if block == 0:
                pair(f"{at}downsample.", "", 4 * middle, c_in, 1)
            pair(at, "1", middle, c_in, 1)
            pair(at, "2", middle, middle, 3)
            pair(at, "3", 4 * middle, middle, 1)
            c_in = 4 * middle
    return found


@pytest.mark.parametrize(("depth", "width", "blocks"), [(50, 2, (3, 4, 6, 3)), (101, 1, (3, 4, 23, 3)), (200, 1, (3, 24, 36, 3))])
def test_names_and_shapes_are_timms(depth: int, width: int, blocks: tuple[int, ...]) -> None:
    with torch.device("meta"):
        encoder = build_encoder(Encoder(depth=depth, width=width, cifar_stem=False))
    assert {form.name(own): tuple(t.shape) for own, t in encoder.state_dict().items()} == shapes(blocks, width)


def test_what_timm_lacks_is_said() -> None:
    for fields, words in (
        ({"depth": 18}, "a ResNet-18 with a projection"),
        ({"depth": 50, "cifar_stem": True}, "the stem for small images"),
        ({"depth": 50, "sk_ratio": 0.0625}, "selective kernels"),
        ({"depth": 50, "se_ratio": 0.25}, "squeeze-and-excitation"),
    ):
        assert form.lacks(Encoder(**{"cifar_stem": False} | fields)).startswith(words)
    assert not form.lacks(Encoder(depth=152, width=3, cifar_stem=False))


@pytest.mark.parametrize(("depth", "width"), [(50, 2), (200, 1)])
def test_timm_computes_the_same(depth: int, width: int, tmp_path: Path, within: Within) -> None:
    timm = pytest.importorskip("timm", reason="timm, of the extra `dev`, is not installed")
    ours = an_encoder(depth=depth, width=width, cifar_stem=False)
    save_file(form.weights(ours), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(ours.config | form.config(ours)))
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0).eval()
    for size in (32, 47):  # even, and odd in every stage
        x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(size))
        with torch.no_grad():
            h: Tensor = ours(x)
            within("features", float((theirs(x) - h).abs().max() / h.abs().max()), 1e-5)


@pytest.mark.parametrize("pool", ["class", "mean"])
def test_timm_has_our_vision_transformer(pool: str, tmp_path: Path, within: Within) -> None:
    timm = pytest.importorskip("timm", reason="timm, of the extra `dev`, is not installed")
    config = replace(recipe("patterns_tiny"), encoder=Encoder(vit="micro", patch_px=8, pool=pool))  # type: ignore[arg-type]
    ours = PublishedEncoder(build_encoder(config.encoder, 0, config.views.size_px), config.to_dict()).eval()
    save_file(form.weights(ours), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(ours.config | form.config(ours)))
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0).eval()
    x = torch.randn(2, 3, ours.preprocessing.size_px, ours.preprocessing.size_px, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        h: Tensor = ours(x)
        within("features", float((theirs(x) - h).abs().max() / h.abs().max()), 1e-5)
