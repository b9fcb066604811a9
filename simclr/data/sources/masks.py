"""Pictures that are no samples but say something about others: masks, segmentations, ground truth."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import Iterator

from simclr.data.sources.names import chosen
from simclr.data.sources.source import Tree

_FOLDERS = frozenset(
    (
        *("mask", "masks", "annotation", "annotations", "trimap", "trimaps", "segmentation", "segmentations", "segmentationclass"),
        *("segmentationobject", "groundtruth", "ground_truth", "gt", "gts", "gtfine", "gtcoarse", "labels"),
    )
)
_PICTURES = frozenset(
    ("img", "imgs", "image", "images", "jpegimages", "photo", "photos", "picture", "pictures", "input", "inputs", "rgb", "original")
)
_SUFFIX = re.compile(
    r"([-_. ]?(gtfine|gtcoarse))?"
    r"[-_. ]?(mask|gt|seg|segmentation|label|labelid|labeltrainid|instanceid|color|trimap|groundtruth|leftimg8bit)s?$",
    re.IGNORECASE,
)
_ALIKE = 0.9  # of the pictures in a folder that are called like others


def without_masks(tree: Tree) -> Tree:
    """`tree` without the folders that are called like masks (masks/, SegmentationClass/, annotations/) beside the one folder of pictures
    that they belong to: their files are called like its, with another ending or `_mask` behind, or it is called like one of pictures
    (images/, JPEGImages/). Beside several folders such a name is that of a class. A note says what was left out."""
    folders = {name.rpartition("/")[0] for part in tree.parts for name in part.names}
    masks = {folder: at for folder in folders if (at := _mask_at(folder)) is not None}
    if not masks:
        return tree
    kept = {folder for folder in folders if folder not in masks}
    found: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for folder, stem, ending in _files(tree):
        if folder in masks:
            found[folder].add((stem, ending))
    called = {_SUFFIX.sub("", stem) for files in found.values() for stem, _ in files}
    others: dict[str, set[str]] = defaultdict(set)  # stem → endings, of those that a mask is called like
    for folder, stem, ending in _files(tree):
        if folder not in masks and (short := _SUFFIX.sub("", stem)) in called:
            others[short].add(ending)
    drop = {folder for folder in masks if _belongs(folder, masks[folder], kept, found[folder], others)}
    if not drop:
        return tree
    left = Counter(name.rpartition("/")[0] for part in tree.parts for name in part.names if name.rpartition("/")[0] in drop)
    parts = [
        dataclasses.replace(part, names=names) if part.names else part
        for part in tree.parts
        if (names := chosen(part.names, lambda name: name.rpartition("/")[0] not in drop)) or not part.names
    ]
    some, more = min(drop), f" and {len(drop) - 1:,} folders more" if len(drop) > 1 else ""
    note = f"{left.total():,} pictures in {some}{more} are called like others and are left out as their masks; --keep-masks reads them"
    junk = Counter[str]()
    for folder in drop:
        junk[folder.split("/")[masks[folder]]] += left[folder]
    return dataclasses.replace(tree, parts=parts, junk=tree.junk + junk, notes=(*tree.notes, note))


def _files(tree: Tree) -> Iterator[tuple[str, str, str]]:
    """Folder, stem and ending of every picture."""
    for part in tree.parts:
        for name in part.names:
            folder, _, file = name.rpartition("/")
            stem, _, ending = file.rpartition(".")
            yield folder, stem, ending.lower()


def _mask_at(folder: str) -> int | None:
    """Which of the folders in a path is called like masks."""
    return next((at for at, name in enumerate(folder.split("/")) if name.lower() in _FOLDERS), None)


def _belongs(folder: str, at: int, kept: set[str], files: set[tuple[str, str]], others: dict[str, set[str]]) -> bool:
    above = folder.split("/")[:at]
    beside = {parts[at] for other in kept if len(parts := other.split("/")) > at and parts[:at] == above}
    if len(beside) != 1:
        return False
    pictures = any(word.lower() in _PICTURES for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", beside.pop()))
    alike = [
        (stem, ending)
        for stem, ending in files
        if (short := _SUFFIX.sub("", stem)) in others and (pictures or short != stem or ending not in others[short])
    ]
    return len(alike) >= _ALIKE * len(files)
