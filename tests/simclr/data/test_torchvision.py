"""torchvision's datasets as sources: STL10 with its unlabelled images, and splits that are called otherwise than train and test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image

from pipelines.commands.prepare import told
from simclr.data import shards
from simclr.data.sources import torchvision as ours
from simclr.data.sources.source import Part
from simclr.data.sources.torchvision import DATASETS, torchvision_source
from simclr.errors import UserError

CLASSES = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / ".cache/simclr/datasets"


def test_stl10_trains_on_its_unlabelled_images_too(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files in the published binary format: images by columns, labels from 1; 4 labelled, 6 unlabelled, 3 test images."""
    binary = home / "STL10/stl10_binary"
    binary.mkdir(parents=True)
    draw = np.random.default_rng(0).integers
    pixels = {name: draw(0, 256, (n, 96, 96, 3), np.uint8) for name, n in (("train", 4), ("unlabeled", 6), ("test", 3))}
    for name, images in pixels.items():
        images.transpose(0, 3, 2, 1).tofile(binary / f"{name}_X.bin")  # (n, 3, columns, rows)
    np.array([10, 1, 2, 2], np.uint8).tofile(binary / "train_y.bin")
    np.array([3, 10, 1], np.uint8).tofile(binary / "test_y.bin")
    (binary / "class_names.txt").write_text("\n".join(CLASSES))
    monkeypatch.setattr(torchvision.datasets.STL10, "_check_integrity", lambda self: True)
    source = torchvision_source("stl10", "STL10")
    items = list(source.items())
    assert source.total == 13 and source.understood["splits_by"] == "torchvision's own: train+unlabeled = train, test = test"
    splits: Any = source.understood["splits"]
    assert splits["train"]["classes"] == {"airplane": 1, "bird": 2, "truck": 1}
    assert (splits["train"]["images"], splits["train"]["labelled"], splits["test"]["images"]) == (10, 4, 3)
    assert splits["train"]["examples"][0] == ["train/0", "truck"] and splits["train"]["examples"][-1] == ["train/8", None]
    train, test = ["truck", "airplane", "bird", "bird", *[None] * 6], ["car", "truck", "airplane"]
    assert [(item.split, item.label) for item in items] == [*(("train", label) for label in train), *(("test", label) for label in test)]
    assert [item.name for item in items] == [*(f"train/{i}" for i in range(10)), *(f"test/{i}" for i in range(3))]
    expected = np.concatenate([pixels["train"], pixels["unlabeled"], pixels["test"]])
    assert all(np.array_equal(item.data, image) for item, image in zip(items, expected, strict=True))
    assert [item.name for item in source.read(Part("test", ("test/1", "test/2")))] == ["test/1", "test/2"]
    assert [item.name for item in source.sample(3)] == ["train/0", "train/4", "train/8"]
    assert DATASETS["stl10"].splits == {"train": 5_000 + 100_000, "test": 8_000}


def complaint(name: str, arguments: dict[str, object]) -> str:
    try:
        getattr(torchvision.datasets, name)(**arguments)
    except (RuntimeError, OSError, ImportError, ValueError) as error:  # no TypeError: torchvision has all the arguments
        return str(error)
    raise AssertionError(f"{name} needs no download")


def test_splits_are_called_as_torchvision_calls_them(home: Path) -> None:
    """What torchvision itself accepts, found out without a download: an unknown split is its first complaint."""
    plain = ("EMNIST", "QMNIST", "CIFAR10", "SVHN", "GTSRB", "Food101", "DTD", "Flowers102", "FGVCAircraft", "Country211")
    assert "Unknown value 'test'" in complaint("Imagenette", {"root": str(home), "split": "test"})
    for name in (*ours._SPLITS, *plain):
        for split in ("train", "test"):
            arguments = ours._arguments(getattr(torchvision.datasets, name), name, split)
            arguments |= {"download": False} if "download" in arguments else {}
            assert "Unknown value" not in complaint(name, arguments), (name, split)
    for name, split in ours._LEFT_OUT.items():
        assert "Unknown value" not in complaint(name, {"root": str(home), "split": split})


def test_what_is_no_image_with_a_class_is_refused_at_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.new("L", (3, 2))
    samples = {"Video": (image, image, 3), "Tensor": image, "Text": (image, "a caption"), "Array": (np.zeros(3), 1)}

    def fake(sample: object) -> type:
        class Fake:
            def __init__(self, root: str) -> None: ...

            def __len__(self) -> int:
                return 2

            def __getitem__(self, index: int) -> object:
                return sample

        return Fake

    for name, sample in samples.items():
        monkeypatch.setattr(torchvision.datasets, name, fake(sample), raising=False)
        with pytest.raises(UserError, match=f"torchvision's {name} is no dataset of images with a class each"):
            torchvision_source("", name)
    monkeypatch.setattr(torchvision.datasets, "Good", fake((image, np.int64(4))), raising=False)
    items = list(torchvision_source("", "Good").items())
    assert [(item.split, item.label, np.asarray(item.data).shape) for item in items] == [("train", "4", (2, 3, 3))] * 2


class Fake:
    """Eight pictures of three classes, two of which are called alike, as ImageNet's cranes."""

    classes = (("crane",), ("crane",), ("cat", "house cat"))
    numbers = (0, 1, 2, 2, 1, 0, 0, 2)

    def __init__(self, root: str, split: str = "train") -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> object:
        pixels = np.full((8, 8, 3), 9 * index + (self.split == "test"), np.uint8)
        return Image.fromarray(pixels), self.numbers[index]


def prepared_twice(name: str, out: Path) -> tuple[str, dict[str, Any]]:
    """What is told of the source, and what the manifest understood; the second call finds the shards."""
    source = torchvision_source(f"torchvision:{name}", name)
    manifest = shards.prepare(source, out, shards.Options(), 1, lambda done: None)
    assert shards.prepare(torchvision_source(f"torchvision:{name}", name), out, shards.Options(), 1, lambda done: None) == manifest
    assert told(source).startswith(f"torchvision:{name}: {source.total} images")
    return told(source), manifest.understood


def test_a_dataset_is_told_and_prepared_and_found_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its labels are known without decoding, in whatever field, and where only the images have them."""
    monkeypatch.setattr(torchvision.datasets, "Fake", Fake, raising=False)
    counts = {"cat/house cat": 3, "crane (0)": 3, "crane (1)": 2}
    wrong = np.zeros(8, int) + 1
    pairs = [(f"{i}.png", number) for i, number in enumerate(Fake.numbers)]
    for index, (field, values) in enumerate(
        {"targets": torch.tensor(Fake.numbers), "_labels": list(Fake.numbers), "_samples": pairs, "labels": wrong, "y": [[1], 2]}.items()
    ):
        with monkeypatch.context() as patched:
            patched.setattr(Fake, field, values, raising=False)
            text, understood = prepared_twice("Fake", home / str(index))
        known = index < 3
        assert understood["counted"] is known and ("crane (1) (2)" in text) is known
        for split in ("train", "test"):  # where only the images have them, they are counted as they are read
            assert understood["splits"][split]["classes"] == counts and understood["splits"][split]["labelled"] == 8
    monkeypatch.setitem(ours._LEFT_OUT, "Fake", "val")
    assert "left out: 1 split called val" in told(torchvision_source("", "Fake"))


def test_torchvisions_own_fake_data(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets.FakeData.__init__, "__defaults__", (12, (3, 16, 16), 3, None, None, 0))
    text, understood = prepared_twice("FakeData", home / "out")
    assert (
        "train  ?" in text and understood["splits"]["train"]["images"] == 12 and set(understood["splits"]["train"]["classes"]) == set("012")
    )
    monkeypatch.delattr(Fake, "classes")
    monkeypatch.setattr(torchvision.datasets, "Fake", Fake, raising=False)
    assert prepared_twice("Fake", home / "bare") == ("torchvision:Fake: 16 images", {})  # nothing is known before all is read
