"""A folder and all below it, on a disk: links are followed, hidden folders and a file server's thumbnails are not."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from simclr.data.sources.archives import is_archive
from simclr.data.sources.names import Kept, Packed
from simclr.data.sources.source import (
    MOST_DEPTH,
    MOST_TEXT_BYTES,
    MOST_TEXTS,
    PART_IMAGES,
    Digest,
    Part,
    Tree,
    ending,
    is_image,
    is_junk,
    is_text,
    too_long,
)
from simclr.errors import UserError

_TABLES = (".parquet", ".arrow")
_MOST_TIMES = 100  # that one folder is read, by links to it and to those above


class Files:
    """Files below a folder. Of a picture only its place among the packed names remains, and its share of two hashes; other files are kept
    by name where they may matter: texts, archives, tables."""

    def __init__(self) -> None:
        self.parts: list[Sequence[str]] = []
        """Names of pictures, `PART_IMAGES` at a time."""
        self.others: dict[str, int] = {}
        """Name → bytes, of files that are no pictures."""
        self.ignored = Counter[str]()
        self.junk = Counter[str]()
        self.notes: list[str] = []
        self.bare: list[str] = []
        self.pictures = 0
        self._kept, self._new = Kept(), list[str]()
        self._identity, self._times, self._timed = Digest(), Digest(), False
        self._texts = Counter[tuple[str, str]]()

    def add_picture(self, name: str, mark: object, time: object = "") -> None:
        """Names come in the order of their paths' parts. `mark` changes with the content, `time` does so more finely where it is known."""
        self._identity.add(f"{name} {mark}")
        if time != "":
            self._times.add(str(time))
            self._timed = True
        self._new.append(name)
        self.pictures += 1
        if len(self._new) == PART_IMAGES:
            self._end_part()

    def add_other(self, name: str, size: int) -> None:
        """Of texts only so many of one ending are kept by folder as show that there are many: those are about a picture each."""
        self.ignored[ending(name)] += 1
        if is_text(name):
            crowd = name.rpartition("/")[0], ending(name)
            self._texts[crowd] += 1
            if self._texts[crowd] > MOST_TEXTS + 1:
                return
        if is_text(name) or is_archive(name) or name.lower().endswith(_TABLES):
            self.others[name] = size

    def _end_part(self) -> None:
        self.parts.append(Packed(self._new, self._kept))
        self._new = []

    def end(self) -> None:
        """The last picture was added."""
        if self._new:
            self._end_part()

    @property
    def identity(self) -> str:
        return str(self._identity)

    @property
    def times(self) -> str:
        return str(self._times) if self._timed else ""


def walk(root: Path) -> Files:
    """Every file below the directory `root`. Links to folders are followed, but not to a folder in which they lie themselves."""
    found = Files()
    states = [folder.stat() for folder in root.resolve().parents]
    _walk(root, "", found, frozenset((state.st_dev, state.st_ino) for state in states), Counter())
    found.end()
    return found


def _walk(folder: Path, prefix: str, found: Files, above: frozenset[tuple[int, int]], times: Counter[tuple[int, int]]) -> None:
    try:
        state = folder.stat()
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be read ({error.strerror}); change its permissions, or move it away") from None
    here = (state.st_dev, state.st_ino)
    if here in above:
        return
    times[here] += 1
    if times[here] > _MOST_TIMES:  # folders that link to each other are reached by more ways than can be counted
        raise UserError(f"the folder {folder} is reached by more than {_MOST_TIMES} links to folders; give a folder without such links")
    before = found.pictures
    for entry in entries:
        name = prefix + entry.name
        if entry.is_dir():
            if is_junk(entry.name):
                count = sum(len(files) for _, _, files in os.walk(entry.path))
                if count:
                    found.junk[entry.name] += count
            elif too_long(f"{name}/"):
                found.notes.append(f"{name[:80]} … is left out with all that lies in it: it is more than {MOST_DEPTH} folders deep")
            else:
                _walk(Path(entry.path), name + "/", found, above | {here}, times)
            continue
        size, time = -1, 0  # a broken link is a picture that will be skipped
        with contextlib.suppress(OSError):
            state = entry.stat()
            size, time = state.st_size, state.st_mtime_ns
        if is_image(name):
            found.add_picture(name, size, time)
            continue
        found.add_other(name, size)
        if is_text(name) and size > MOST_TEXT_BYTES:
            found.notes.append(f"{name} has {size / 2**20:,.0f} MiB and was not looked at for classes; --labels {name} does it")
    if prefix and found.pictures == before and not any(entry.is_dir() for entry in entries):
        found.bare.append(prefix.removesuffix("/"))


def folder_tree(root: Path, files: Files) -> Tree:
    """The tree of the loose pictures among `files` of the directory `root`."""
    return tree_of(str(root), files, folder_reader(root), lambda name: (root / name).read_bytes())


def folder_reader(root: Path) -> Callable[[Part], Iterator[tuple[str, Path]]]:
    """Gives the pictures of a part as paths: they are read where they are encoded."""

    def read(part: Part) -> Iterator[tuple[str, Path]]:
        for name in part.names:
            yield name, root / name

    return read


def tree_of(spec: str, files: Files, read: Callable[[Part], Iterator[tuple[str, Path | bytes]]], text: Callable[[str], bytes]) -> Tree:
    """The tree of `files`. `read` gives a part's pictures, `text` the bytes of another file."""
    return Tree(
        spec=spec,
        parts=[Part(spec, names) for names in files.parts],
        read=read,
        texts={name: partial(text, name) for name, size in files.others.items() if is_text(name) and size <= MOST_TEXT_BYTES},
        ignored=files.ignored,
        junk=files.junk,
        identity=files.identity,
        times=files.times,
        notes=tuple(files.notes),
        loose=True,
        bare=files.bare,
    )
