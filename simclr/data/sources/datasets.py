"""Known datasets: one table, in which every row states every field."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """What is known of a dataset before a byte of it is read."""

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
