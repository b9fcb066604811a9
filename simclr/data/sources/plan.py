"""What was decided about a tree: how a picture's path gives its split and its class."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from simclr.data.sources.source import digest
from simclr.data.sources.splits import Folders, Kind, split_of
from simclr.data.sources.videos import video_of


@dataclass(slots=True)
class Plan:
    """The decisions: a picture's split and class."""

    depth: int | None
    """Depth of the splits' folders."""
    words: dict[str, Kind] = field(default_factory=dict)
    """Their names. If one is train's, pictures beside them are left out; else the folders beside them are train's classes."""
    level: dict[Kind, int | None] = field(default_factory=dict)
    """Depth of the class's folder, among the folders without the split's; None = there is none."""
    how: str = "folder"
    values: dict[str, str] = field(default_factory=dict)
    """Picture → class, from data or files; it counts before its folder."""
    only_values: set[Kind] = field(default_factory=set)
    """Kinds whose pictures have no class but by `values`."""
    used: list[str] = field(default_factory=list)
    """Files that classes were read from."""
    split_values: dict[str, str] | None = None
    """Picture → split's word, from a file."""
    share: float = 0.0
    """Fraction held out."""
    videos: bool = False
    """Whether a picture's folder is its video: then the folders above that one tell split and class, and videos are held out whole."""
    split: dict[Kind, str | None] = field(
        default_factory=lambda: {"train": "train", "val": "test", "test": "test", "pred": None, "other": None}
    )
    """Kind → split; None = left out."""
    known: dict[str, tuple[Kind, Folders]] = field(default_factory=dict)

    def copy(self) -> Plan:
        """The decisions so far, which later ones do not change."""
        return replace(self, level=dict(self.level), values=dict(self.values), only_values=set(self.only_values), split=dict(self.split))

    def divided(self, folder: str) -> tuple[Kind, Folders]:
        """(kind, folders without that of the split) of the pictures in `folder`."""
        if (found := self.known.get(folder)) is None:
            above = above_of(folder)
            kind: Kind = "train"
            if self.depth is not None and len(above) > self.depth and (word := self.words.get(above[self.depth])):
                kind, above = word, above[: self.depth] + above[self.depth + 1 :]
            elif "train" in self.words.values():
                kind, above = "other", ()
            found = self.known[folder] = (kind, above)
        return found

    def folder_of(self, name: str) -> str:
        """The folder in which a picture lies, or its video."""
        folder = name.rpartition("/")[0]
        return folder.rpartition("/")[0] if self.videos else folder

    def unit_of(self, name: str) -> str:
        """What is held out as a whole: a picture, or its video."""
        return video_of(name) if self.videos else name

    def kind(self, name: str) -> Kind:
        if self.split_values is not None:
            return split_of(self.split_values.get(name, "train"))[0] or "train"
        kind = self.divided(self.folder_of(name))[0]
        if not self.share or name.endswith("/"):  # of an archive whose pictures are not known yet
            return kind
        return "test" if kind != "train" else "val" if int(digest(self.unit_of(name)), 16) < self.share * 2**64 else "train"

    def label(self, name: str) -> str | None:
        if (stated := self.values.get(name)) is not None or (self.only_values and self.kind(name) in self.only_values):
            return stated
        kind, above = self.divided(self.folder_of(name))
        return labelled(above, self.how, self.level.get(kind))


def above_of(folder: str) -> Folders:
    """The names of the folders in a path of folders."""
    return tuple(folder.split("/")) if folder else ()


def labelled(above: Folders, how: str, level: int | None) -> str | None:
    """The class that the folders `above` a picture state, the split's left out; `level`: the depth of the class's folder."""
    if how == "none" or level is None or len(above) <= level:
        return None
    return above[-1] if how == "parent" else "/".join(above[level:]) if how == "path" else above[level]
