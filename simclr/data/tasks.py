"""The twelve datasets of the transfer protocol (arXiv:2002.05709, App. B.8): one table, and their images as torchvision reads them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from simclr import files
from simclr.data.pixels import Unreadable, name_formats_for_libraries, opened, reading
from simclr.errors import UserError

Metric = Literal["top1", "mean_per_class", "map11"]
Split = Literal["official", "held_out", "thirty_per_class"]
VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog", "horse"),
    *("motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
HELD_OUT = 0.2
"""Share of every class that is held out to choose λ if the dataset has no validation split. The paper does not state its share."""
PER_CLASS = 30
"""Training images of each class of Caltech-101, drawn at random; the rest is the test set (App. B.8)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """Table 8 of arXiv:2002.05709, in per cent: ResNet-50 (4×), pretrained on ImageNet by SimCLR or with its labels.

    Written down without the paper at hand: look a figure up before you quote it."""

    linear: float
    linear_supervised: float
    fine_tuned: float
    fine_tuned_supervised: float
    fine_tuned_random: float
    """Fine-tuned from random weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One dataset: how it is read, split and scored."""

    title: str
    classes: int
    metric: Metric
    """The metric that its authors report: top-1, the mean of the classes' accuracies, or 11-point mAP."""
    split: Split
    """official: validation images are the authors' own. held_out: `HELD_OUT` of the training images, class by class.
    thirty_per_class: there is no split; `PER_CLASS` images of each class train, of which `HELD_OUT` validate."""
    torchvision: str
    """Class in torchvision.datasets; '' = none, it is read as an ImageFolder of train/ and test/."""
    folder: str
    """The folder, under the root, that this class reads."""
    published: Published


def _published(linear: float, supervised: float, tuned: float, tuned_supervised: float, random: float) -> Published:
    return Published(
        linear=linear, linear_supervised=supervised, fine_tuned=tuned, fine_tuned_supervised=tuned_supervised, fine_tuned_random=random
    )


TASKS: dict[str, Task] = {
    "food101": Task(
        title="Food-101",
        classes=101,
        metric="top1",
        split="held_out",
        torchvision="Food101",
        folder="food-101",
        published=_published(76.9, 75.2, 89.4, 88.7, 88.3),
    ),
    "cifar10": Task(
        title="CIFAR-10",
        classes=10,
        metric="top1",
        split="held_out",
        torchvision="CIFAR10",
        folder="cifar-10-batches-py",
        published=_published(95.3, 95.7, 98.6, 98.3, 96.0),
    ),
    "cifar100": Task(
        title="CIFAR-100",
        classes=100,
        metric="top1",
        split="held_out",
        torchvision="CIFAR100",
        folder="cifar-100-python",
        published=_published(80.2, 81.2, 89.0, 88.7, 81.9),
    ),
    "birdsnap": Task(
        title="Birdsnap",
        classes=500,
        metric="top1",
        split="held_out",
        torchvision="",
        folder="birdsnap",
        published=_published(48.4, 56.4, 78.2, 77.8, 77.0),
    ),
    "sun397": Task(  # the first of its ten partitions, which torchvision does not read
        title="SUN397",
        classes=397,
        metric="top1",
        split="held_out",
        torchvision="SUN397",
        folder="SUN397",
        published=_published(65.9, 64.9, 68.1, 67.0, 53.7),
    ),
    "cars": Task(
        title="Stanford Cars",
        classes=196,
        metric="top1",
        split="held_out",
        torchvision="StanfordCars",
        folder="stanford_cars",
        published=_published(60.0, 68.8, 92.1, 91.4, 91.3),
    ),
    "aircraft": Task(
        title="FGVC Aircraft",
        classes=100,
        metric="mean_per_class",
        split="official",
        torchvision="FGVCAircraft",
        folder="fgvc-aircraft-2013b",
        published=_published(61.2, 63.8, 87.0, 88.0, 84.8),
    ),
    "voc2007": Task(
        title="VOC 2007",
        classes=20,
        metric="map11",
        split="official",
        torchvision="VOCDetection",
        folder="VOCdevkit/VOC2007",
        published=_published(84.2, 83.8, 86.6, 86.5, 69.4),
    ),
    "dtd": Task(  # the first of its ten partitions, torchvision's default
        title="DTD",
        classes=47,
        metric="top1",
        split="official",
        torchvision="DTD",
        folder="dtd",
        published=_published(78.9, 78.7, 77.8, 78.8, 64.1),
    ),
    "pets": Task(
        title="Oxford Pets",
        classes=37,
        metric="mean_per_class",
        split="held_out",
        torchvision="OxfordIIITPet",
        folder="oxford-iiit-pet",
        published=_published(89.2, 92.3, 92.1, 93.2, 82.7),
    ),
    "caltech101": Task(  # with its background class, which torchvision's reader drops: the paper's 102 classes, 3,060 + 6,084 images
        title="Caltech-101",
        classes=102,
        metric="mean_per_class",
        split="thirty_per_class",
        torchvision="Caltech101",
        folder="caltech101/101_ObjectCategories",
        published=_published(93.9, 94.1, 94.1, 94.2, 72.5),
    ),
    "flowers": Task(
        title="Oxford Flowers",
        classes=102,
        metric="mean_per_class",
        split="official",
        torchvision="Flowers102",
        folder="flowers-102",
        published=_published(95.0, 94.2, 97.6, 98.0, 92.5),
    ),
}

Rows = Sequence[tuple[Any, Any]]
"""A dataset of torchvision's kind: rows[i] is (PIL image, label); of VOC the label is its annotation."""


def open_task(name: str, root: Path, download: bool) -> dict[str, Rows] | None:
    """The parts of a dataset under `root`: train, test and, if its authors made one, validation; or `all` if the dataset has no splits.

    None if its folder is absent and is not to be downloaded. Raises UserError if the folder is not whole, or torchvision cannot download
    it.
    """
    import torchvision.datasets as library

    name_formats_for_libraries()
    task = TASKS[name]
    here = root / task.folder
    if not here.is_dir() and not (download and task.torchvision):
        return None

    def made(kind: type[Any], at: Path, **arguments: Any) -> Rows:
        """torchvision's dataset. Its exceptions are about files, a network or a missing package, and become UserError."""
        try:
            rows = kind(str(at), **arguments)
        except (RuntimeError, OSError, ValueError, KeyError, ImportError) as error:
            sentence = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{task.title} under {root} cannot be read: {sentence}; mend {here}, or leave it out with --only") from None
        return _Read(rows, f"{task.title} under {root}")  # type: ignore[return-value]

    if download and task.torchvision in ("SUN397", "Caltech101"):
        made(getattr(library, task.torchvision), root, download=True)
    if name == "sun397":
        return _sun397(here)
    if name == "caltech101":
        return {"all": made(library.ImageFolder, here)}
    if not task.torchvision:
        return {part: made(library.ImageFolder, here / part) for part in ("train", "test")}
    kind = getattr(library, task.torchvision)
    return {part: made(kind, root, **_arguments(kind, part, task, download)) for part in _parts(task)}


def _parts(task: Task) -> tuple[str, ...]:
    return ("train", "validation", "test") if task.split == "official" else ("train", "test")


def _arguments(kind: type[Any], part: str, task: Task, download: bool) -> dict[str, Any]:
    """Arguments with which a torchvision class gives `part` of a dataset."""
    known = inspect.signature(kind).parameters
    if task.torchvision == "VOCDetection":
        named: dict[str, Any] = {"year": "2007", "image_set": part.replace("validation", "val")}
    elif task.torchvision == "OxfordIIITPet":
        named = {"split": part.replace("train", "trainval")}
    elif "train" in known:
        named = {"train": part == "train"}
    else:
        named = {"split": part.replace("validation", "val")}
    return named | ({"download": True} if download and task.torchvision != "StanfordCars" else {})  # its download address is gone


_MEND = "mend it, or leave the dataset out with --only"


@dataclass(frozen=True, slots=True)
class _Read:
    """A torchvision dataset that raises UserError for an image that cannot be read."""

    rows: Rows
    where: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        try:
            with reading():
                return self.rows[index]
        except Unreadable as error:
            raise UserError(f"image {index} of {self.where} cannot be read: {error}; {_MEND}") from None


@dataclass(frozen=True, slots=True)
class _Files:
    """Pictures by their paths, with labels."""

    files: list[Path]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> Any:
        try:
            with reading(), opened(self.files[index]) as image:
                return image.convert("RGB"), self.labels[index]
        except Unreadable as error:
            raise UserError(f"{self.files[index]} cannot be read: {error}; {_MEND}") from None


_SUN397 = "the authors' Partitions.zip and SUN397.tar.gz have it"


def _sun397(here: Path) -> dict[str, Rows]:
    """The first partition (Partitions.zip of the authors): lists of files and of classes, which begin with their letter, /a/abbey."""
    lists = {"train": here / "Training_01.txt", "test": here / "Testing_01.txt"}
    for path in (here / "ClassName.txt", *lists.values()):
        if not path.is_file():
            raise UserError(f"SUN397 in {here} cannot be read: {path.name} is missing; {_SUN397}")
    classes = {line.strip(): i for i, line in enumerate(files.read_text(here / "ClassName.txt", _SUN397).split())}
    parts: dict[str, Rows] = {}
    for part, path in lists.items():
        names = files.read_text(path, _SUN397).split()
        if strange := [name for name in names if name.rpartition("/")[0] not in classes]:
            raise UserError(f"SUN397 in {here} cannot be read: {path.name} names {strange[0]}, of no class in ClassName.txt; {_SUN397}")
        parts[part] = _Files([here / n.lstrip("/") for n in names], [classes[n.rpartition("/")[0]] for n in names])  # type: ignore[assignment]
    return parts


def label_of(target: Any) -> int | NDArray[np.int64]:
    """A class number; of a VOC annotation (20,) with 1 = shown, 0 = not, −1 = only difficult to see, which does not count."""
    if not isinstance(target, dict):
        return int(target)
    marks = np.zeros(len(VOC_CLASSES), np.int64)
    for item in target["annotation"]["object"]:
        at = VOC_CLASSES.index(item["name"])
        marks[at] = 1 if item["difficult"] == "0" or marks[at] == 1 else -1
    return marks


def square(image: Image.Image, size_px: int) -> NDArray[np.uint8]:
    """(size, size, 3): the shorter side at `size_px` by bicubic resampling, then the middle square (App. B.8): all of the shorter side,
    while ImageNet's own test crop takes 0.875 of it."""
    image = image.convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    if image.size != (size_px, size_px):
        image = image.resize((size_px, size_px), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return np.asarray(image)


def pictures(
    rows: Rows, order: Sequence[int], size_px: int, batch_size: int, threads: int
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
    """(images (n, size, size, 3), labels (n,) or (n, 20)) of the rows in `order`, decoded `threads` at a time."""

    def read(index: int) -> tuple[NDArray[np.uint8], int | NDArray[np.int64]]:
        image, target = rows[index]
        return square(image, size_px), label_of(target)

    with ThreadPoolExecutor(threads) as pool:
        ahead = [pool.submit(read, i) for i in order[:batch_size]]
        for start in range(batch_size, len(order) + batch_size, batch_size):  # one batch is read while the one before is used
            ready, ahead = ahead, [pool.submit(read, i) for i in order[start : start + batch_size]]
            read_rows = [job.result() for job in ready]
            yield np.stack([image for image, _ in read_rows]), np.array([label for _, label in read_rows], np.int64)
