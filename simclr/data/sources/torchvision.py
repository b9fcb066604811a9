"""Known datasets: one table, in which every row states every field."""

from __future__ import annotations

import difflib
import inspect
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from simclr.data.pixels import name_formats_for_libraries
from simclr.data.sources.reading import Split, Understood
from simclr.data.sources.source import Item, Part, Source, divided
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
    "stl10": Dataset(  # 5,000 of the training images have labels
        classes=10,
        size_px=96,
        mean=(0.4467, 0.4398, 0.4066),
        std=(0.2603, 0.2566, 0.2713),
        splits={"train": 105_000, "test": 8_000},
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


# Splits that are called otherwise than train and test; CLEVR's test has no classes. EMNIST's split says which of its sets it is; it has
# `train` besides.
_SPLITS = {
    "CLEVRClassification": ("train", "val"),
    "Imagenette": ("train", "val"),
    "ImageNet": ("train", "val"),
    "OxfordIIITPet": ("trainval", "test"),
    "Places365": ("train-standard", "val"),
    "STL10": ("train+unlabeled", "test"),  # the published protocol trains on all 105,000
}
_EMNIST = "balanced"
_LEFT_OUT = {
    **dict.fromkeys(("DTD", "Flowers102", "PCAM", "RenderedSST2"), "val"),
    "Country211": "valid",
    "FGVCAircraft": "val",
    "SVHN": "extra",
}
"""Splits with classes that are not read; it is said."""
_EXAMPLES = 5


def torchvision_source(spec: str, name: str) -> Source:
    """The images of a class of torchvision.datasets, downloaded where there is a network: its training split, and its test split where it
    has one. STL10 trains on its 100,000 unlabelled images as well. Raises UserError for an unknown class, one without images of a class
    each, or one that cannot be had."""
    import torchvision.datasets as library

    name_formats_for_libraries()
    classes = {n: c for n, c in vars(library).items() if isinstance(c, type)}
    if name not in classes:
        near = difflib.get_close_matches(name, classes, n=3, cutoff=0.3)
        raise UserError(f"torchvision has no dataset {name!r}; nearest: {', '.join(near)}")
    signature = inspect.signature(classes[name]).parameters
    splits = ("train", "test") if {"train", "split"} & set(signature) else ("train",)
    opened = {split: _opened(classes[name], name, split) for split in splits}
    opened = {split: dataset for split, dataset in opened.items() if len(dataset)}
    titles = {split: _titles(dataset) for split, dataset in opened.items()}
    known = {split: _numbers(dataset, name) for split, dataset in opened.items()}

    def title(split: str, label: int) -> str | None:
        return None if label < 0 else titles[split][label] if titles[split] else str(label)

    def read(part: Part) -> Iterator[Item]:
        for path in part.names:
            image, label = _image(opened[part.name], int(path.rpartition("/")[2]), name)
            yield Item(part.name, title(part.name, label), path, np.asarray(image.convert("RGB")))

    found: dict[str, Split] = {}
    for split, numbers in known.items():
        of = Counter({title(split, number): count for number, count in Counter(numbers or ()).items()})
        some = range(0, len(numbers or ()), max(len(numbers or ()) // _EXAMPLES, 1))[:_EXAMPLES]
        examples = tuple((f"{split}/{index}", title(split, numbers[index])) for index in some) if numbers else ()
        found[split] = Split(of if numbers else Counter(dict.fromkeys(titles[split], 0)), examples)
    called = {split: str(_arguments(classes[name], name, split).get("split", split)) for split in opened}
    understood = Understood(
        splits=found,
        how_split="torchvision's own: " + ", ".join(f"{word} = {split}" for split, word in called.items()),
        how_labelled="torchvision's own",
        notes=(),
        counted=all(known.values()),
        ignored=Counter({f"split called {_LEFT_OUT[name]}": 1} if name in _LEFT_OUT else {}),
    )
    certain = all(numbers or titles[split] for split, numbers in known.items())
    return Source(
        spec=spec,
        parts=[part for split in opened for part in divided(split, [f"{split}/{index}" for index in range(len(opened[split]))])],
        read=read,
        total=sum(len(dataset) for dataset in opened.values()),
        understood=understood.to_dict() if certain else {},  # else the classes are known only when all is read
    )


def _titles(dataset: Any) -> list[str]:
    """The names of the classes, in the order of their numbers; [] = they have none. Two of ImageNet's are called crane."""
    names = getattr(dataset, "classes", None) or [str(number) for number in range(getattr(dataset, "num_classes", 0))]
    titles = ["/".join(map(str, title)) if isinstance(title, tuple) else str(title) for title in names]
    times = Counter(titles)
    return [title if times[title] == 1 else f"{title} ({number})" for number, title in enumerate(titles)]


def _numbers(dataset: Any, name: str) -> list[int] | None:
    """The number of each image's class, where the dataset has them without decoding; None = only its images have. The first and the last
    image must agree."""
    ends = {index: _image(dataset, index, name)[1] for index in (0, len(dataset) - 1)}
    for attribute in ("targets", "labels", "_labels", "y", "samples", "_samples", "_flat_character_images"):
        values = getattr(dataset, attribute, None)
        if isinstance(values, list) and values and isinstance(values[0], tuple) and len(values[0]) == 2:
            values = [value[1] for value in values]  # path, class
        try:
            numbers = np.asarray(values)
        except (ValueError, TypeError, RuntimeError):  # of several lengths, or on another device
            continue
        if numbers.shape == (len(dataset),) and numbers.dtype.kind in "iu" and all(numbers[i] == label for i, label in ends.items()):
            return [int(number) for number in numbers]
    return None


def _arguments(kind: type, name: str, split: str) -> dict[str, Any]:
    signature = inspect.signature(kind).parameters
    arguments: dict[str, Any] = {}
    if "root" in signature:
        arguments["root"] = str(Path("~/.cache/simclr/datasets").expanduser() / name)
    if "download" in signature or name in ("EMNIST", "QMNIST"):  # these two hand it on
        arguments["download"] = True
    if "train" in signature or name == "EMNIST":
        arguments["train"] = split == "train"
    if name == "EMNIST":
        arguments["split"] = _EMNIST
    elif "split" in signature:
        arguments["split"] = _SPLITS.get(name, ("train", "test"))[split == "test"]
    return arguments


def _opened(kind: type, name: str, split: str) -> Any:
    arguments = _arguments(kind, name, split)
    if "root" in arguments:
        Path(arguments["root"]).mkdir(parents=True, exist_ok=True)
    try:
        return kind(**arguments)
    except Exception as error:
        raise UserError(
            f"torchvision could not give {name} ({split}): {(str(error).splitlines() or [type(error).__name__])[0]}; "
            "without a network, download it elsewhere and give the folder or archive as --source"
        ) from None


def _image(dataset: Any, index: int, name: str) -> tuple[Any, int]:
    """An image and the number of its class; −1 = unlabelled."""
    sample = dataset[index]
    image, label = sample if isinstance(sample, tuple) and len(sample) == 2 else (None, None)
    if not isinstance(label, int | np.integer) or not hasattr(image, "convert"):
        raise UserError(f"torchvision's {name} is no dataset of images with a class each; use another")
    return image, int(label)
