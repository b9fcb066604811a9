"""Known datasets: one table, in which every row states every field."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from simclr.data.sources.source import Item, Source
from simclr.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """Facts about a dataset that are known without reading it."""

    classes: int
    size_px: int
    """Side of its images; 0 = they differ."""
    mean: tuple[float, float, float]
    """Per channel, of pixels in [0, 1]."""
    std: tuple[float, float, float]
    splits: dict[str, int]
    """Split → images."""
    torchvision: str
    """Class in torchvision.datasets; '' = none."""


DATASETS: dict[str, Dataset] = {
    "patterns": Dataset(
        classes=10,
        size_px=32,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        splits={"train": 4_000, "test": 1_000},
        torchvision="",
    ),
    "cifar10": Dataset(
        classes=10,
        size_px=32,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        splits={"train": 50_000, "test": 10_000},
        torchvision="CIFAR10",
    ),
    "cifar100": Dataset(
        classes=100,
        size_px=32,
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        splits={"train": 50_000, "test": 10_000},
        torchvision="CIFAR100",
    ),
    "stl10": Dataset(  # without its 100,000 unlabelled images
        classes=10,
        size_px=96,
        mean=(0.4467, 0.4398, 0.4066),
        std=(0.2603, 0.2566, 0.2713),
        splits={"train": 5_000, "test": 8_000},
        torchvision="STL10",
    ),
    "svhn": Dataset(
        classes=10,
        size_px=32,
        mean=(0.4377, 0.4438, 0.4728),
        std=(0.1980, 0.2010, 0.1970),
        splits={"train": 73_257, "test": 26_032},
        torchvision="SVHN",
    ),
    "food101": Dataset(
        classes=101,
        size_px=0,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        splits={"train": 75_750, "test": 25_250},
        torchvision="Food101",
    ),
    "imagenet": Dataset(
        classes=1_000,
        size_px=0,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        splits={"train": 1_281_167, "val": 50_000},
        torchvision="ImageNet",
    ),
}


def torchvision_source(spec: str, name: str) -> Source:
    import torchvision.datasets as library

    classes = {n: c for n, c in vars(library).items() if isinstance(c, type)}
    if name not in classes:
        near = difflib.get_close_matches(name, classes, n=3, cutoff=0.3)
        raise UserError(f"torchvision has no dataset {name!r}; nearest: {', '.join(near)}")
    signature = inspect.signature(classes[name]).parameters

    def open_split(split: str) -> Any:
        arguments: dict[str, Any] = {}
        if "root" in signature:
            root = Path("~/.cache/simclr/datasets").expanduser() / name
            root.mkdir(parents=True, exist_ok=True)
            arguments["root"] = str(root)
        if "download" in signature:
            arguments["download"] = True
        if "train" in signature:
            arguments["train"] = split == "train"
        elif "split" in signature:
            arguments["split"] = split if name != "ImageNet" or split == "train" else "val"
        try:
            return classes[name](**arguments)
        except Exception as error:
            raise UserError(
                f"torchvision could not give {name} ({split}): {(str(error).splitlines() or [type(error).__name__])[0]}; "
                "without a network, download it elsewhere and give the folder or archive as --source"
            ) from None

    splits = ("train", "test") if {"train", "split"} & set(signature) else ("train",)
    opened = {split: open_split(split) for split in splits}

    def items() -> Iterator[Item]:
        for split, dataset in opened.items():
            names = getattr(dataset, "classes", None)
            for index in range(len(dataset)):
                image, label = dataset[index]
                if not isinstance(label, int | np.integer) or not hasattr(image, "convert"):
                    raise UserError(f"torchvision's {name} is no dataset of images with a class each; use another")
                title = names[label] if names and label >= 0 else str(label)
                title = "/".join(title) if isinstance(title, tuple) else str(title)
                yield Item(split, title if label >= 0 else None, f"{split}/{index}", np.asarray(image.convert("RGB")))

    return Source(spec, sum(len(d) for d in opened.values()), items)
