"""Pictures that are no samples but say something about others: masks, segmentations, ground truth."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter, defaultdict

from simclr.data.sources.source import Tree

_FOLDERS = frozenset(
    (
        *("mask", "masks", "annotation", "annotations", "trimap", "trimaps", "segmentation", "segmentations", "segmentationclass", "seg"),
        *("segmentationobject", "groundtruth", "ground", "truth", "gt", "label", "labels", "labelled", "labeled"),
    )
)
_SUFFIX = re.compile(r"[-_. ]?(mask|masks|gt|seg|segmentation|label|labels|labelids|color|trimap|groundtruth)s?$", re.IGNORECASE)
_ALIKE = 0.9  # of the pictures in a folder that are called like others


def without_masks(tree: Tree) -> Tree:
    """`tree` without the folders that are called like masks (masks/, SegmentationClass/, annotations/) and whose pictures are called like
    pictures elsewhere. They are counted as left out, and a note says so."""
    found: dict[str, set[str]] = defaultdict(set)
    folders = {name.rpartition("/")[0] for part in tree.parts for name in part.names}
    masks = {folder for folder in folders if any(_is_mask(name) for name in folder.split("/"))}
    if not masks:
        return tree
    others: set[str] = set()
    for part in tree.parts:
        for name in part.names:
            folder, _, file = name.rpartition("/")
            stem = file.rpartition(".")[0]
            if folder in masks:
                found[folder].add(_SUFFIX.sub("", stem))
            else:
                others.add(stem)
                others.add(_SUFFIX.sub("", stem))
    drop = {folder for folder, stems in found.items() if len(stems & others) >= _ALIKE * len(stems)}
    if not drop:
        return tree
    left = Counter(name.rpartition("/")[0] for part in tree.parts for name in part.names if name.rpartition("/")[0] in drop)
    parts = [
        dataclasses.replace(part, names=names) if part.names else part
        for part in tree.parts
        if (names := tuple(name for name in part.names if name.rpartition("/")[0] not in drop)) or not part.names
    ]
    some, more = min(drop), f" and {len(drop) - 1:,} folders more" if len(drop) > 1 else ""
    note = f"{left.total():,} pictures in {some}{more} are called like others and are left out as their masks"
    return dataclasses.replace(
        tree, parts=parts, junk=tree.junk + Counter({folder.rpartition("/")[2]: left[folder] for folder in drop}), notes=(*tree.notes, note)
    )


def _is_mask(folder: str) -> bool:
    return any(word.lower() in _FOLDERS for word in (folder, *re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", folder)))
