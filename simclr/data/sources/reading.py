"""What a user says about splits and classes, and what was understood."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from simclr import files
from simclr.data.sources.source import digest
from simclr.errors import UserError

HOW = ("auto", "folder", "parent", "path", "none")
SPLIT_HOW = ("auto", "folder", "none")
_MOST_LABELS_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """How splits and classes are read from a source."""

    labels: str = "auto"
    """Where classes come from. folder: the first folder below the split that tells pictures apart; parent: the folder that holds the
    file; path: all folders from the first that tells apart, joined; none; or a file of names and classes (CSV, TSV, JSON lines, text).
    auto: what the source itself states, else folder, and for pictures without one a file beside them that names them."""
    split_from: str = "auto"
    """Where splits come from. folder: folders called like splits (train, val2017, seg_test, Testing …); none: all trains; a file of names
    and splits, or of the test split's names; or a fraction of the training pictures to hold out, as 0.1. auto: folder, where there are."""
    keep_masks: bool = False
    """Read folders that are called like masks of others as well."""
    captions: str = "none"
    """Whether and whence shards get captions, for training on image–text pairs. auto: what the source itself has in words: KEY.txt of
    WebDataset, a column caption or text of Parquet; or a file of names and captions (CSV, TSV, JSON lines: file_name or filepath, and
    caption or title). Training images without one are skipped."""
    caption_columns: tuple[str, str] | None = None
    """Columns of names and of captions in that file, where they are not called as usual."""
    label_columns: tuple[str, str] | None = None
    """Columns of names and of values in those files, where they are not called as usual (file_name, label)."""
    videos: bool = False
    """Each folder of pictures is a video, DIR/video/frame.jpg or DIR/class/video/frame.jpg, its frames in the order of the numbers in their
    names; splits are of whole videos, and classes are the folders above them. For pairs from time (--time.neighbours)."""

    def __post_init__(self) -> None:
        given = [value for value in (self.labels, self.split_from) if value not in (*HOW, *SPLIT_HOW) and files.user_path(value).is_file()]
        for path in map(files.user_path, given):
            if (size := path.stat().st_size) > _MOST_LABELS_BYTES:
                raise UserError(
                    f"{path} has {size / 2**20:,.0f} MiB; expected a file of names and values of at most 1,024; leave columns out"
                )
        if self.captions not in ("none", "auto") and not files.user_path(self.captions).is_file():
            raise UserError(
                f"--captions is {self.captions!r}, and there is no such file; expected none, auto or a file of names and captions"
            )
        if self.caption_columns and self.captions in ("none", "auto"):
            raise UserError("--caption-columns names columns of a file, and --captions names none; leave it out")
        if self.label_columns and not given:
            raise UserError("--label-columns names columns of a file, and neither --labels nor --split-from is one; leave it out")
        if self.labels not in HOW and not files.user_path(self.labels).is_file():
            raise UserError(
                f"--labels is {self.labels!r}, and there is no such file; expected {', '.join(HOW)} or a file of names and classes"
            )
        if self.split_from in SPLIT_HOW or files.user_path(self.split_from).is_file():
            return
        try:
            share = float(self.split_from)
        except ValueError:
            share = -1.0
        if not 0 < share < 1:
            raise UserError(
                f"--split-from is {self.split_from!r}, and there is no such file; expected {', '.join(SPLIT_HOW)}, a file of names and "
                "splits, or a fraction between 0 and 1"
            )

    def to_dict(self) -> dict[str, str]:
        """What was asked for, in plain values, with the digest of each file."""
        stated = {}
        for name in ("labels", "split_from"):
            value = getattr(self, name)
            path = files.user_path(value)
            known = value in (*HOW, *SPLIT_HOW) or not path.is_file()
            stated[name] = value if known else f"{path.name} {digest(path.read_bytes())}"
        if self.captions != "none":
            path = files.user_path(self.captions)
            if self.caption_columns:
                stated["caption_columns"] = " ".join(self.caption_columns)
            stated["captions"] = f"{path.name} {digest(path.read_bytes())}" if path.is_file() else self.captions
        return stated | ({"videos": "yes"} if self.videos else {})


@dataclass(frozen=True, slots=True)
class Split:
    """What a split holds."""

    classes: Counter[str | None]
    """Class → pictures; None = those without one."""
    examples: tuple[tuple[str, str | None], ...]
    """Some pictures with the class that each gets."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Understood:
    """What was understood of a tree."""

    splits: dict[str, Split]
    """train and test."""
    how_split: str
    how_labelled: str
    notes: tuple[str, ...]
    """Sentences about what may not be what the owner meant."""
    counted: bool
    """False where pictures are counted only when they are read."""
    ignored: Counter[str] = field(default_factory=Counter)
    junk: Counter[str] = field(default_factory=Counter)

    def to_dict(self) -> dict[str, Any]:
        """In plain values, for the manifest and its readers."""
        splits = {
            name: {
                "images": sum(split.classes.values()),
                "labelled": sum(split.classes.values()) - split.classes[None],
                "classes": {
                    str(label): count for label, count in sorted(split.classes.items(), key=lambda kv: str(kv[0])) if label is not None
                },
                "examples": [list(example) for example in split.examples],
            }
            for name, split in self.splits.items()
        }
        return {
            "splits_by": self.how_split,
            "classes_by": self.how_labelled,
            "counted": self.counted,
            "splits": splits,
            "notes": list(self.notes),
            "left_out": dict(self.ignored) | {f"in {folder}/": count for folder, count in self.junk.items()},
        }


def essence(understood: dict[str, Any]) -> dict[str, Any]:
    """What of a manifest's `understood` two sources must have in common: how many pictures of each class a split has, and what files say
    of single ones. Words, notes and files that are left out may differ."""
    splits = {name: split["classes"] for name, split in understood.get("splits", {}).items()}
    videos = {"videos": understood["videos"]} if "videos" in understood else {}
    return {"splits": splits, "values": understood.get("values", "")} | videos if splits else {}


def counted(understood: dict[str, Any], found: dict[str, Counter[str | None]]) -> dict[str, Any]:
    """`understood` of a source whose pictures were not known before they were read, with the numbers that were `found` in each split."""
    if understood.get("counted", True):
        return understood
    splits = {
        name: {
            "images": of.total(),
            "labelled": of.total() - of[None],
            "classes": {label: of[label] for label in sorted(label for label in of if label is not None)},
            "examples": understood["splits"].get(name, {}).get("examples", []),
        }
        for name, of in found.items()
        if of
    }
    return understood | {"splits": splits}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table of splits."""

    split: str
    images: int
    labelled: int
    classes: int
    smallest: str
    """Class with the fewest pictures, and how many."""
    largest: str


def rows_of(understood: dict[str, Any]) -> list[Row]:
    """The table of the splits in a manifest's `understood`."""
    rows = []
    for name, split in understood.get("splits", {}).items():
        ordered = sorted(split["classes"].items(), key=lambda kv: kv[1])
        ends = [f"{label} ({count:,})" for label, count in (ordered[0], ordered[-1])] if ordered else ["–", "–"]
        rows.append(Row(name, split["images"], split["labelled"], len(ordered), *ends))
    return rows


def pictures(count: int) -> str:
    """The number with its noun."""
    return f"{count:,} picture{'s' * (count != 1)}"


def some(names: Sequence[str], most: int = 3) -> str:
    """The first names, and how many more."""
    more = len(names) - most
    return ", ".join(re.sub(r"\s+", " ", name) for name in names[:most]) + (f" and {more:,} more" if more > 0 else "")
