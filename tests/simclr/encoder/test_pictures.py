"""An encoder takes what people have: arrays, tensors, pictures of Pillow, files; and gives the features that `simclr embed` writes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import simclr
from pipelines.commands import embed
from simclr.config import Encoder, SimCLR, Views
from simclr.data.options import Options
from simclr.encoder.directory import PublishedEncoder, write_encoder
from simclr.errors import UserError
from simclr.networks.encoders import build_encoder
from tests.conftest import Within

PIXELS = np.random.default_rng(0).integers(0, 256, (9, 50, 70, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = SimCLR(encoder=Encoder(depth=8, cifar_stem=True), views=Views(size_px=32))
    write_encoder(dict(build_encoder(config.encoder).state_dict()), config, tmp_path_factory.mktemp("pictures") / "encoder", {})
    return next(tmp_path_factory.getbasetemp().glob("pictures*/encoder"))


@pytest.fixture(scope="module")
def encoder(directory: Path) -> PublishedEncoder:
    return simclr.load_encoder(directory, device="cpu")


def saved(image: Image.Image, kind: str, **how: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def test_one_picture_in_all_its_forms(encoder: PublishedEncoder, tmp_path: Path) -> None:
    one = PIXELS[0]
    h, file = encoder.embed(one[None]), saved(Image.fromarray(one), "PNG")
    (tmp_path / "one.png").write_bytes(file)
    assert h.shape == (1, 64) and h.dtype == torch.float32
    forms = [one, torch.from_numpy(one), Image.fromarray(one), file, bytearray(file), tmp_path / "one.png", str(tmp_path / "one.png")]
    for form in forms:
        assert torch.equal(encoder.embed(form), h), type(form)
    assert torch.equal(encoder.embed(forms), h.expand(len(forms), -1))  # several kinds in a list
    assert torch.equal(encoder.embed(form for form in forms[:2]), h.expand(2, -1))
    assert torch.equal(encoder.embed_files([tmp_path / "one.png"]), h)
    assert encoder.embed([]).shape == encoder.embed(PIXELS[:0]).shape == (0, 64)


def test_batches_bound_what_the_encoder_sees_and_change_nothing(
    encoder: PublishedEncoder, within: Within, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, seen = encoder.embed(PIXELS), []
    forward = PublishedEncoder.forward

    def counted(self: PublishedEncoder, x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return forward(self, x)

    monkeypatch.setattr(PublishedEncoder, "forward", counted)
    monkeypatch.setattr("simclr.encoder.directory._TOGETHER", 2 * 50 * 70)  # two pictures are cut at a time
    within("in batches", float((encoder.embed(PIXELS, batch_size=4) - whole).abs().max()), 1e-6)
    within("one by one", float((encoder.embed(list(PIXELS), batch_size=4) - whole).abs().max()), 1e-6)
    assert seen == [4, 4, 1] * 2
    sizes = [PIXELS[0], PIXELS[1][:40], PIXELS[2][:, :33]]
    apart = torch.cat([encoder.embed(one) for one in sizes])
    within("of several sizes", float((encoder.embed(sizes) - apart).abs().max()), 1e-6)


def test_files_give_the_features_that_embed_writes(encoder: PublishedEncoder, directory: Path, tmp_path: Path, within: Within) -> None:
    """Turned by EXIF, transparent, of CMYK, grey, of a palette, of 16 bits: to the bit. A JPEG as a shard holds it is decoded by the
    loader's decoder there, and by Pillow's here, a level or two apart."""
    whole = Image.fromarray(PIXELS[0]).resize((90, 64), Image.Resampling.BICUBIC)
    turned = Image.Exif()
    turned[0x0112] = 6
    clear = whole.convert("RGBA")
    clear.putalpha(Image.fromarray(PIXELS[1, ..., 0]).resize((90, 64)))
    deep = np.random.default_rng(1).integers(0, 4096, (40, 50)).astype(np.uint16)
    files = {
        "turned.jpg": saved(whole, "JPEG", exif=turned),
        "clear.png": saved(clear, "PNG"),
        "cmyk.jpg": saved(whole.convert("CMYK"), "JPEG"),
        "grey.png": saved(whole.convert("L"), "PNG"),
        "palette.gif": saved(whole, "GIF"),
        "deep.png": saved(Image.fromarray(deep), "PNG"),
        "plain.jpg": saved(whole, "JPEG", quality=90),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    embed.main(embed.Args(directory, tuple(str(tmp_path / name) for name in files), tmp_path / "features.npz"))
    with np.load(tmp_path / "features.npz") as written:
        theirs = torch.from_numpy(written["features"])
    ours = encoder.embed_files([tmp_path / name for name in files])
    within("files", float((ours - theirs)[:-1].abs().max()), 1e-6)
    within("a photograph", float((ours - theirs)[-1].norm() / theirs[-1].norm()), 2e-2)
    opened = [Image.open(tmp_path / name) for name in files]
    assert torch.equal(encoder.embed(opened), ours)
    # Of 12 bits, as `embed` finds from the pictures; another range is another picture.
    assert not torch.equal(encoder.embed_files([tmp_path / "deep.png"], options=Options(value_range=(0, 1000))), ours[5:6])


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (PIXELS / 255, r"got float64 of shape \(9, 50, 70, 3\); expected uint8 .*; of images from 0 to 1 multiply by 255"),
        (torch.from_numpy(PIXELS).permute(0, 3, 1, 2), r"put the channels last, permute\(0, 2, 3, 1\)"),
        (PIXELS[0].transpose(2, 0, 1), r"put the channels last, transpose\(1, 2, 0\)"),
        (PIXELS[0, ..., 0], r"got uint8 of shape \(50, 70\)"),
        ([PIXELS[0], PIXELS[0] / 255], r"picture 2 of 2: got float64 of shape \(50, 70, 3\)"),
        ([PIXELS[0], b"GIF89a"], r"picture 2 of 2 is no image that can be read \(.*\); leave it out"),
        (["missing.jpg"], r"missing.jpg is no image that can be read \(the file cannot be read: No such file"),
        ([PIXELS[0], 7], r"picture 2 of 2: got int; expected an array, a picture of Pillow, the bytes of a file or its path"),
        (7, r"got int in the place of pictures"),
    ],
)
def test_what_is_no_picture_is_told_in_a_sentence_without_its_pixels(encoder: PublishedEncoder, given: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as told:
        encoder.embed(given)
    assert len(str(told.value)) < 250


def test_a_device_that_is_not_there(directory: Path) -> None:
    for name in ("cuda:99", "gpu"):
        with pytest.raises(UserError, match=f"device '{name}' is not there; expected \"cpu\""):
            simclr.load_encoder(directory, device=name)
    assert simclr.load_encoder(directory, device="auto").embed(PIXELS[:1]).device.type == "cpu"  # wherever it was computed
