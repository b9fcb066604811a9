"""Evaluation, `embed` and a registered model see the same pixels of an image, whatever its size and its shards."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import simclr
from pipelines.commands import embed
from pipelines.evaluation import quick
from pipelines.tracking.pyfunc import EncoderModel
from simclr.config import Encoder, SimCLR, Views
from simclr.data import shards
from simclr.data.ffcv.decode import decode
from simclr.data.sources.source import Item
from simclr.encoder.directory import write_encoder
from simclr.evaluation.features import embed_split
from simclr.networks.encoders import build_encoder
from simclr.views.preprocessing import Preprocessing
from tests.conftest import Within
from tests.support.sources import source_of

# For each size of the encoder: its own, somewhat larger, and a crop of more than twice the size.
SIZES = {32: [(32, 32), (40, 48), (150, 110)], 64: [(64, 64), (80, 96), (250, 330)], 224: [(224, 224), (250, 330), (620, 560)]}


def pixels(seed: int, height: int, width: int) -> np.ndarray:
    """A smooth picture with noise, (height, width, 3)."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    return (np.asarray(coarse) + random.integers(-20, 21, (height, width, 3))).clip(0, 255).astype(np.uint8)


def as_jpeg(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def prepared(out: Path, images: list[Any], kind: Any) -> Path:
    items = [Item(split, None, f"{i}.jpg", image) for split in ("train", "test") for i, image in enumerate(images)]
    shards.prepare(source_of(items, "pictures"), out, shards.Options(kind=kind, max_side_px=800), 1, lambda count: None)
    return out


def published(out: Path, size_px: int, preprocessing: Preprocessing | None = None) -> simclr.encoder.directory.PublishedEncoder:
    views = Views(size_px=size_px, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    config = SimCLR(encoder=Encoder(depth=18, cifar_stem=size_px == 32), views=views)
    write_encoder(dict(build_encoder(config.encoder, 0).state_dict()), config, out, {}, preprocessing=preprocessing)
    return simclr.load_encoder(out)


def evaluated(directory: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The features that `simclr evaluate` scores."""
    seen = []

    def scores(train: Any, test: Any, *_: object) -> dict[str, float]:
        torch.testing.assert_close(train.h, test.h)  # both splits hold the same images
        seen.append(test.h)
        return {"rankme": 1.0}

    monkeypatch.setattr(quick, "_scores", scores)
    quick.run(directory, data, quick.Settings(k=None, baselines=False, limit=None, device="cpu"))
    return seen[0]


def apart(a: Tensor, b: Tensor) -> float:
    """The largest distance of features, relative to their norm."""
    return ((a - b).norm(dim=1) / b.norm(dim=1)).max().item()


@pytest.mark.parametrize("size_px", SIZES)
def test_evaluate_embed_and_pyfunc_see_the_same_pixels_of_photographs(
    size_px: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, within: Within
) -> None:
    files = [as_jpeg(pixels(i, *size)) for i, size in enumerate(SIZES[size_px])]
    data, encoder = prepared(tmp_path / "shards", files, "jpeg"), published(tmp_path / "encoder", size_px)
    h = evaluated(tmp_path / "encoder", data, monkeypatch)
    torch.testing.assert_close(h, embed_split(encoder.encoder, data, "test", Preprocessing.of(Views(**encoder.config["views"]))).h)
    # The loader rounds a crop to whole numbers after its resize, at most twice. Its decoder is FFCV's, with the fast DCT: pixels by
    # Pillow, with the exact one, would be a level or two off, which moves these features by up to 1.3 % of their norm.
    decoded = [decode(file, *size)[None] for file, size in zip(files, SIZES[size_px], strict=True)]  # type: ignore[index]
    served = EncoderModel(tmp_path / "encoder")
    within("pyfunc", apart(torch.cat([torch.from_numpy(served.predict(image)) for image in decoded]), h), 4e-3)
    for i, file in enumerate(files):
        (tmp_path / f"{i}.jpg").write_bytes(file)
    embed.main(embed.Args(tmp_path / "encoder", tuple(str(tmp_path / f"{i}.jpg") for i in range(len(files))), tmp_path / "features.npz"))
    within("embed", apart(torch.from_numpy(np.load(tmp_path / "features.npz")["features"]), h), 4e-3)


@pytest.mark.parametrize(("size_px", "size"), [(px, size) for px, sizes in SIZES.items() for size in sizes])
def test_evaluate_embed_and_pyfunc_see_the_same_pixels_of_raw_shards(
    size_px: int, size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, within: Within
) -> None:
    images = [pixels(i, *size) for i in range(2)]
    published(tmp_path / "encoder", size_px)
    h = evaluated(tmp_path / "encoder", prepared(tmp_path / "shards", images, "raw"), monkeypatch)
    np.save(tmp_path / "images.npy", np.stack(images))
    embed.main(embed.Args(tmp_path / "encoder", (str(tmp_path / "images.npy"),), tmp_path / "features.npz"))
    # The images go through the encoder one by one and together, which changes the order of sums.
    within("embed", apart(torch.from_numpy(np.load(tmp_path / "features.npz")["features"]), h), 1e-5)
    within("pyfunc", apart(torch.from_numpy(EncoderModel(tmp_path / "encoder").predict(np.stack(images))), h), 1e-5)


def test_evaluation_follows_what_a_published_encoder_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, within: Within) -> None:
    """An encoder of before may state another crop than its views would give today."""
    image = pixels(0, 40, 48)
    stated = replace(Preprocessing.of(Views(size_px=32)), centre_crop=0.5, resize="bilinear")
    encoder = published(tmp_path / "encoder", 32, stated)
    h = evaluated(tmp_path / "encoder", prepared(tmp_path / "shards", [as_jpeg(image)], "jpeg"), monkeypatch)
    within("features", apart(encoder.embed(decode(as_jpeg(image), 40, 48)[None]), h), 4e-3)  # type: ignore[index]
    assert apart(published(tmp_path / "whole", 32).embed(image[None]), h) > 0.01


@pytest.mark.parametrize("size_px", SIZES)
def test_an_onnx_graph_gives_the_features_of_evaluation(
    size_px: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, within: Within
) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from simclr.encoder import export

    size = SIZES[size_px][1]
    images = [pixels(i, *size) for i in range(3)]
    encoder = published(tmp_path / "encoder", size_px)
    h = evaluated(tmp_path / "encoder", prepared(tmp_path / "shards", images, "raw"), monkeypatch)
    export.onnx(encoder, tmp_path / "encoder.onnx")
    session = runtime.InferenceSession(str(tmp_path / "encoder.onnx"), providers=["CPUExecutionProvider"])
    within("features", apart(torch.from_numpy(session.run(None, {"images": np.stack(images)})[0]), h), export.BOUND)
