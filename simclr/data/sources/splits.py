"""Which folder's name is that of a split, and at which depth of a tree the splits lie."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Literal

Kind = Literal["train", "val", "test", "pred", "other"]
"""pred: pictures to predict the classes of, which nobody knows; other: those beside the splits' folders."""
KINDS: tuple[Kind, ...] = ("train", "val", "test", "pred", "other")
_WORDS: dict[str, Kind] = {
    **dict.fromkeys(("train", "training", "trainset", "trainval"), "train"),
    **dict.fromkeys(("unlabeled", "unlabelled"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "valset", "dev", "eval", "evaluation"), "val"),
    **dict.fromkeys(("test", "testing", "testset"), "test"),
    **dict.fromkeys(("pred", "predict", "prediction"), "pred"),
}
# Words that stand beside a split's name and say nothing more: seg_train, train_images, val2017, ILSVRC2012_img_val.
_BESIDE = frozenset(
    (
        *("seg", "img", "imgs", "image", "images", "jpeg", "jpegimages", "jpegs", "jpg", "png", "photo", "photos", "picture", "pictures"),
        *("data", "dataset", "set", "split", "cls", "loc", "raw", "standard", "large", "small", "full", "crop", "cropped", "resized"),
        *("imagenet", "ilsvrc", "tiny", "coco", "cifar", "stl", "px", "list", "lists", "file", "files", "names", "ids", "of"),
    )
)
_UNSURE = ("dev", "eval", "evaluation")  # beside other folders these may be classes
_SWAPS = (("training", ("testing", "validation")), ("train", ("test", "val", "valid", "validation", "dev", "eval")))
_MOST = 0.5
Folders = tuple[str, ...]


def split_of(folder: str) -> tuple[Kind | None, bool]:
    """(the split that a folder's name states, whether the name says nothing else). `test_tube` may be a split's, but says more."""
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", folder)]
    kinds = {_WORDS[word] for word in words if word in _WORDS}
    if len(kinds) != 1:
        return None, False
    return kinds.pop(), all(word in _WORDS or word in _BESIDE or len(word) == 1 for word in words)


def splits_among(names: Iterable[str]) -> dict[str, Kind]:
    """Those of the `names` of folders beside each other that are splits': by themselves, or because two differ by nothing else
    (bounding_box_train, bounding_box_test)."""
    there = set(names)
    found: dict[str, Kind] = {}
    for name in there:
        kind, only = split_of(name)
        if kind and only and f"in{name.lower()}" not in {other.lower() for other in there}:  # valid beside invalid
            found[name] = kind
    lower = {name.lower(): name for name in there}
    for name in there:
        for train, others in _SWAPS:
            for other in others:
                twin = lower.get(name.lower().replace(train, other)) if train in name.lower() else None
                if twin is not None:
                    found[name], found[twin] = "train", _WORDS[other]
    return found


def split_depth(folders: Mapping[Folders, int]) -> tuple[int | None, dict[str, Kind], str]:
    """(depth of the splits' folders among those above the pictures, their names, a sentence about folders that look like a split and are
    none).

    `folders`: the folders above a picture → number of pictures. Splits lie where a train and a test folder lie beside each other with
    most pictures below; where every folder's name is a split's; or at the first depth that has several names, if a test split stands
    there beside classes (train flattened), or a train split with folders of its own. A lone `train` among classes is a class.
    """
    beside: dict[Folders, set[str]] = defaultdict(set)
    below: dict[Folders, int] = defaultdict(int)
    for above, count in folders.items():
        for depth, name in enumerate(above):
            beside[above[:depth]].add(name)
            below[above[:depth]] += count
    whole = sum(folders.values())
    both = {parent for parent, names in beside.items() if {"train"} < set(splits_among(names).values()) - {"pred"}}
    least = min((len(parent) for parent in both), default=0)
    if both and sum(below[parent] for parent in both if len(parent) == least) > _MOST * whole:
        return least, {name: kind for parent in both if len(parent) == least for name, kind in splits_among(beside[parent]).items()}, ""
    doubtful = ""
    branched = False
    for depth in range(max((len(above) for above in folders), default=0)):
        names = {above[depth] for above in folders if len(above) > depth}
        everywhere = all(len(above) > depth for above in folders)
        found = splits_among(names)
        if found and len(found) == len(names) and (everywhere or not branched):
            return depth, found, doubtful
        if not branched:
            others = names - found.keys()
            classes = len(others) > 1 or any(_inner(folders, depth, name) > 1 for name in others)
            judged = any(kind != "train" and name.lower() not in _UNSURE for name, kind in found.items())
            divided = any(kind == "train" and _inner(folders, depth, name) > 1 for name, kind in found.items())
            if (judged and classes) or (divided and not any(_inner(folders, depth, name) > 1 for name in others)):
                return depth, found, doubtful
        if not doubtful and (like := sorted(name for name in names if split_of(name)[0])):
            some, around = like[0], sorted(names - {like[0]})[:3]
            why = f", because {', '.join(around)} {'stand' if len(around) > 1 else 'stands'} beside it" if around else ""
            doubtful = f"the folder {some} looks like a split and was taken for none{why}; --split-from FILE or a fraction says otherwise"
        branched = branched or len(names) > 1 or not everywhere
    return None, {}, doubtful


def _inner(folders: Mapping[Folders, int], depth: int, name: str) -> int:
    """How many folders lie directly below the folder `name` at `depth`."""
    return len({above[depth + 1] for above in folders if len(above) > depth + 1 and above[depth] == name})
