"""The published directory is read as it was written, and pictures are prepared as in the official evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import simclr
from simclr.config import Encoder, Head, SimCLR, Views
from simclr.encoder.directory import read_classifier, read_head, write_encoder
from simclr.errors import UserError
from simclr.methods.simclr import build_model
from simclr.networks.heads import Classifier
from simclr.views.draw import centre_boxes
from simclr.views.ops import crop_resize

CONFIG = SimCLR(encoder=Encoder(depth=8, cifar_stem=True), head=Head(layers=3, d_out=16), views=Views(size_px=40))


def published(directory: Path, layers: int = 3, tap: int = 1) -> tuple[Classifier, Path]:
    """A directory with the head's first layers and a classifier that reads tap `tap`, and its model."""
    model = build_model(CONFIG)
    classifier = Classifier(model.encoder, model.head, tap, 4).eval()
    head = {name: t for name, t in model.head.state_dict().items() if int(name.split(".")[1]) < layers}
    parts = {"head": head, "classifier": dict(classifier.classifier.state_dict())}
    write_encoder(dict(model.encoder.state_dict()), CONFIG, directory, {"recipe": "none"}, **parts, tap=tap, classes=["a", "b", "c", "d"])
    return classifier, directory


@pytest.mark.parametrize(("layers", "tap"), [(3, 0), (3, 3), (1, 1)])
def test_encoder_head_and_classifier_come_back(tmp_path: Path, layers: int, tap: int) -> None:
    model, directory = published(tmp_path / "encoder", layers, tap)
    found, classes = read_classifier(directory)
    assert len({path.stat().st_mode for path in directory.iterdir()}) == 1, "the weights are not for whom the config is"
    x = torch.rand(2, 3, 40, 40)
    assert torch.equal(found(x), model(x)) and classes == ["a", "b", "c", "d"]
    head = read_head(directory)
    assert head is not None and len(head.layers) == layers and not head.training


def test_a_tap_beyond_the_head_and_an_absent_classifier_are_named(tmp_path: Path) -> None:
    model = build_model(CONFIG)
    with pytest.raises(UserError, match="tap 4 does not exist; the projection head here has 3 layers"):
        Classifier(model.encoder, model.head, 4, 2)
    write_encoder(dict(model.encoder.state_dict()), CONFIG, tmp_path / "bare", {})
    assert read_head(tmp_path / "bare") is None
    with pytest.raises(UserError, match="holds no classifier"):
        read_classifier(tmp_path / "bare")


def test_preprocessing_is_stored_and_older_directories_have_it_from_their_views(tmp_path: Path) -> None:
    _, directory = published(tmp_path / "encoder")
    stated = json.loads((directory / "config.json").read_text())
    assert stated["preprocessing"]["centre_crop"] == 0.875 and stated["preprocessing"]["resize"] == "bicubic"
    now = simclr.load_encoder(directory).preprocessing
    del stated["preprocessing"]
    (directory / "config.json").write_text(json.dumps(stated))
    assert simclr.load_encoder(directory).preprocessing == now


def test_a_picture_is_cropped_in_the_middle_and_fine_stripes_of_a_large_one_do_not_alias(tmp_path: Path) -> None:
    model = build_model(CONFIG)
    write_encoder(dict(model.encoder.state_dict()), CONFIG, tmp_path / "encoder", {})
    encoder = simclr.load_encoder(tmp_path / "encoder")
    image = torch.randint(0, 256, (1, 60, 75, 3), dtype=torch.uint8)
    box = torch.as_tensor(centre_boxes(np.array([[60, 75]])))
    assert box.tolist() == [[4, 12, 52, 52]]
    expected = crop_resize(image.permute(0, 3, 1, 2).float() / 255, box, 40, "bicubic")
    torch.testing.assert_close(encoder.prepared(image), expected, atol=1e-5, rtol=0)
    stripes = torch.zeros(1, 630, 630, 3, dtype=torch.uint8)
    stripes[:, :, ::2] = 255
    assert (encoder.prepared(stripes) - 0.5).abs().max() < 0.05


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"encoder": {"width": 100}}, "encoder.width is 100; expected 1 to 32"),
        ({"encoder": {"depth": 200, "width": 32, "sk_ratio": 1.0}}, "do not fit its config.json: stem.0.weight has shape"),
        ({"head": {"layers": 3, "d_out": 2**17}}, "do not fit its config.json: .*has shape"),
        ({"preprocessing": {"size_px": 10**7}}, "preprocessing.size_px is 10000000; expected 8 to 4096 pixels"),
        ({"preprocessing": {"centre_crop": 0.0}}, r"preprocessing.centre_crop is 0.0; expected a share in \(0, 1\]"),
        ({"preprocessing": {"std": [1, 0, 1]}}, "preprocessing.std is .*; expected positive numbers"),
        ({"classifier": {"tap": 10**9}}, "tap 1000000000 does not exist"),
        ({"classifier": {"classes": ["a"] * 1000}}, r"bias has shape \(4,\), expected \(1000,\)"),
    ],
)
def test_a_config_that_is_not_of_these_weights_takes_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], sentence: str
) -> None:
    """Whatever network it describes: shapes are compared before a module gets memory."""
    _, directory = published(tmp_path / "encoder")
    text = json.loads((directory / "config.json").read_text())
    for part, values in changed.items():
        text[part] |= values
    (directory / "config.json").write_text(json.dumps(text))
    taken, to_empty = [0], torch.nn.Module.to_empty

    def counted(module: torch.nn.Module, **where: Any) -> torch.nn.Module:
        taken.append(sum(t.nbytes for t in module.state_dict().values()))
        return to_empty(module, **where)

    monkeypatch.setattr(torch.nn.Module, "to_empty", counted)
    with pytest.raises(UserError, match=sentence):
        read_classifier(directory)
        read_head(directory)
    assert max(taken) < 1 << 20


@pytest.mark.parametrize("name", ["encoder", "head", "classifier"])
def test_a_file_of_weights_that_is_none_is_a_sentence(tmp_path: Path, name: str) -> None:
    _, directory = published(tmp_path / "encoder")
    (directory / f"{name}.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(UserError, match=f"the weights in {directory} cannot be read: .*; publish or pull it again"):
        read_classifier(directory)
