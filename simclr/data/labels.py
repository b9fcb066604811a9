"""The labels that fine-tuning may use, and the images that pretraining may see: class-balanced, keyed subsets of a split, and lists.

A list is text: lines that begin with # are notes, every other line is one image, by its sample id or, if the
shards have their files' names, by its file name (as in the published 1 % and 10 % lists of ImageNet). A label file is a list of
labelled images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from simclr import files, keyed
from simclr.data.manifest import line_of, name_in
from simclr.errors import UserError

Ids = NDArray[np.int64]


def subset(labels: Ids, share: float, seed: int) -> Ids:
    """Sample ids, ascending, of `share` of each class in labels (n,). −1 is unlabelled and never chosen.

    Of a class with m images, share · m are chosen, rounded (a half rounds up) but at least 1: those with the smallest 64 keyed bits under
    `seed`. So a larger share contains the smaller ones, and the choice in one class does not depend on the others. Raises UserError for a
    share outside (0, 1], and if no image is labelled.
    """
    if not 0 < share <= 1:
        raise UserError(f"the share of labels is {share}; expected above 0 and at most 1, as 0.01 for 1 %")
    labelled = np.flatnonzero(labels >= 0)
    if not len(labelled):
        raise UserError("no image of the training split has a label; prepare it from a folder of class/file")
    words = keyed.bits(seed, "subset", 0, labelled, 0, 2)
    drawn = labelled[np.argsort(words[:, 0] << np.uint64(32) | words[:, 1], kind="stable")]
    chosen = []
    for label in np.unique(labels[labelled]):
        members = drawn[labels[drawn] == label]
        chosen.append(members[: max(int(share * len(members) + 0.5), 1)])
    return np.sort(np.concatenate(chosen))


def balanced(labels: Ids, classes: int) -> NDArray[np.float64]:
    """(classes,) weights n / (C · n_c): n labels (n,), n_c of them of class c, C classes that have any; 0 for the others. Their mean over
    the labels is 1."""
    counts = np.bincount(labels, minlength=classes)
    return np.where(counts > 0, len(labels) / np.maximum(np.count_nonzero(counts) * counts, 1), 0.0)


def digest(ids: Ids) -> str:
    """sha256 of a set of sample ids."""
    return hashlib.sha256(np.sort(ids).astype("<i8").tobytes()).hexdigest()


def write(path: Path, ids: Ids, names: Sequence[str] | None, notes: dict[str, object]) -> None:
    """Write a label file: `notes` as its head, then one image per line, by name if there are `names` (of all images, in order of ids),
    else by id."""
    head = [f"# {key}: {value}" for key, value in notes.items()]
    files.write_text(path, "\n".join([*head, *(line_of(names[i]) if names else str(i) for i in ids.tolist())]) + "\n")


def read(path: Path, labels: Ids, names: Sequence[str] | None) -> Ids:
    """Sample ids, ascending, of the images that a label file lists.

    A name may be a whole path in the source (train/cat/12.jpg), or its end (12.jpg), if only one image's path has this end. Raises
    UserError naming the first line that fits no image or more than one, or one without a label.
    """
    found = _listed(path, "label file", len(labels), names)
    for sample, (number, line) in found.items():
        if labels[sample] < 0:
            raise UserError(f"{path}, line {number}: image {line!r} has no label; leave it out")
    return np.sort(np.fromiter(found, np.int64))


def read_subset(path: Path, images: int, names: Sequence[str] | None) -> Ids:
    """Sample ids, ascending, of those of `images` training images that a list names, as in `read`; they need no labels."""
    return np.sort(np.fromiter(_listed(path, "list of images", images, names), np.int64))


def _listed(path: Path, kind: str, images: int, names: Sequence[str] | None) -> dict[int, tuple[int, str]]:
    """Sample id → (number, text) of its line in the list `path`, which messages call a `kind`."""
    if not path.is_file():
        raise UserError(f"there is no {kind} {path}; expected text, one file name or sample id a line")
    text = files.read_text(path, "save it as UTF-8").removeprefix("\ufeff")  # the mark with which Windows begins a text
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1)]
    lines = [(number, name_in(line)) for number, line in lines if line and not line.startswith("#")]
    if not lines:
        raise UserError(f"{path} lists no image; expected one file name or sample id a line")
    ends = _ends(names, {len(PurePosixPath(line).parts) for _, line in lines if not line.isdigit()}) if names else {}
    numbers = {name: sample for sample, name in enumerate(names or ()) if name.isdigit()}  # names that look like ids
    found: dict[int, tuple[int, str]] = {}
    for number, line in lines:
        where = f"{path}, line {number}"
        if line.isdigit():
            sample = int(line)
            if numbers.get(line, sample) != sample:
                raise UserError(
                    f"{where}: {line} is a sample id, and the name of image {numbers[line]}; give sample ids alone, and prepare the "
                    "images under other names where names are wanted"
                )
            if sample >= images:
                raise UserError(f"{where}: there is no sample {sample}; the training split has {images:,} images")
        elif names is None:
            raise UserError(
                f"{where} is a name, {line!r}, and these shards have no file names; give sample ids, "
                "or prepare the shards again, from files"
            )
        else:
            sample = ends.get(line, -1)
            if sample < 0:
                many = "more than one image has" if sample == _MANY else "no image of the training split has"
                raise UserError(f"{where}: {many} the name {line!r}; expected a file name as in the source, {names[0]!r} for one")
        if sample in found:
            raise UserError(f"{where}: {line!r} is listed already, in line {found[sample][0]}")
        found[sample] = number, line
    return found


_MANY = -2


def _ends(names: Sequence[str], lengths: set[int]) -> dict[str, int]:
    """The last parts of each name, as many as `lengths` says → its sample id; _MANY if several names have the same end. What is one
    image's whole name means that image, also where it is the end of another's."""
    ends: dict[str, int] = {}
    whole: dict[str, int] = {}
    for sample, name in enumerate(names):
        parts = PurePosixPath(name).parts
        for length in lengths:
            known = whole if length == len(parts) else ends
            if length <= len(parts):
                end = "/".join(parts[-length:])
                known[end] = _MANY if end in known else sample
    return ends | whole
