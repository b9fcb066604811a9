"""Which folder's name is that of a split, and at which depth of a tree the splits lie."""

from __future__ import annotations

import re
from collections.abc import Mapping
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
        *("imagenet", "ilsvrc", "tiny", "coco", "cifar", "stl", "px", "x", "k", "list", "lists", "file", "files", "names", "ids"),
    )
)
Folders = tuple[str, ...]


def split_of(folder: str) -> tuple[Kind | None, bool]:
    """(the split that a folder's name states, whether the name says nothing else). `test_tube` may be a split's, but says more."""
    words = re.findall(r"[a-z]+", folder.lower())
    kinds = {_WORDS[word] for word in words if word in _WORDS}
    if len(kinds) != 1:
        return None, False
    return kinds.pop(), all(word in _WORDS or word in _BESIDE for word in words)


def split_depth(folders: Mapping[Folders, int]) -> tuple[int | None, str]:
    """(depth of the splits' folders among those above the pictures, a sentence about folders that look like a split and are none).

    `folders`: the folders above a picture → number of pictures. Splits lie where every folder's name is a split's (train/, val/;
    cat/train, cat/test), or at the first depth that has several names, if a test split stands there beside other folders (train
    flattened into classes), or a train split with folders of its own beside others. A lone `train` among classes is a class.
    """
    doubtful = ""
    branched = False
    for depth in range(max((len(above) for above in folders), default=0)):
        names = {above[depth] for above in folders if len(above) > depth}
        everywhere = all(len(above) > depth for above in folders)
        found = {name: split_of(name) for name in names}
        kinds = {kind for kind, _ in found.values() if kind}
        plain = {name for name, (kind, only) in found.items() if kind and only}
        if (
            kinds
            and all(kind for kind, _ in found.values())
            and (everywhere or not branched)
            and (len(plain) == len(names) or len(kinds) > 1)
        ):
            return depth, doubtful
        if not branched:
            judged = {name for name in plain if found[name][0] != "train" and name.lower() not in ("dev", "eval", "evaluation")}
            divided = {name for name in plain if found[name][0] == "train" and _inner(folders, depth, name) > 1}
            others = [name for name in names - plain if _inner(folders, depth, name) > 1]
            if judged or (divided and not others):
                return depth, doubtful
        if plain and not doubtful:
            some = sorted(plain)[0]
            beside = sorted(names - plain)[:3]
            doubtful = (
                f"the folder {some} looks like a split"
                + (f" and was taken for none, because {', '.join(beside)} stand beside it" if beside else " and was taken for none")
                + "; --split-from FILE or a fraction says otherwise"
            )
        branched = branched or len(names) > 1 or not everywhere
    return None, doubtful


def _inner(folders: Mapping[Folders, int], depth: int, name: str) -> int:
    """How many folders lie directly below the folder `name` at `depth`."""
    return len({above[depth + 1] for above in folders if len(above) > depth + 1 and above[depth] == name})
