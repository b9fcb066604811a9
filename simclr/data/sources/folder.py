"""A folder and all below it, on a disk: links are followed, hidden folders and a file server's thumbnails are not."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from simclr.data.sources.source import (
    MOST_DEPTH,
    MOST_TEXT_BYTES,
    Part,
    Tree,
    digest,
    divided,
    ending,
    is_image,
    is_junk,
    is_text,
    too_long,
)
from simclr.errors import UserError

_MOST_TIMES = 100  # that one folder is read, by links to it and to those above


@dataclass(slots=True)
class Files:
    """Files below a folder: path in it → a mark that changes with the content, and another that does so more finely."""

    sizes: dict[str, object] = field(default_factory=dict)
    """Size in bytes, of a broken link −1; in S3 the ETag."""
    times: dict[str, int] = field(default_factory=dict)
    """Modification time in ns; empty where the size above says all."""
    junk: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)


def walk(root: Path) -> Files:
    """Every file below the directory `root`. Links to folders are followed, but not to a folder in which they lie themselves."""
    found = Files()
    states = [folder.stat() for folder in root.resolve().parents]
    _walk(root, "", found, frozenset((state.st_dev, state.st_ino) for state in states), Counter())
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
        try:
            state = entry.stat()
            found.sizes[name], found.times[name] = state.st_size, state.st_mtime_ns
            if is_text(name) and state.st_size > MOST_TEXT_BYTES:
                mib = state.st_size / 2**20
                found.notes.append(f"{name} has {mib:,.0f} MiB and was not looked at for classes; --labels {name} does it")
        except OSError:  # a broken link is a picture that will be skipped
            found.sizes[name], found.times[name] = -1, 0


def folder_tree(root: Path, files: Files) -> Tree:
    """The tree of the loose pictures among `files` of the directory `root`."""

    def read(part: Part) -> Iterator[tuple[str, Path]]:
        for name in part.names:
            yield name, root / name  # read where they are encoded

    return tree_of(str(root), files, read, lambda name: (root / name).read_bytes())


def tree_of(spec: str, files: Files, read: Callable[[Part], Iterator[tuple[str, Path | bytes]]], text: Callable[[str], bytes]) -> Tree:
    """The tree of `files`. `read` gives a part's pictures, `text` the bytes of another file."""
    images = in_order(files.sizes)
    return Tree(
        spec=spec,
        parts=divided(spec, images),
        read=read,
        texts={name: _reader(text, name) for name, size in files.sizes.items() if is_text(name) and _small(size)},
        ignored=Counter(ending(name) for name in files.sizes if not is_image(name)),
        junk=files.junk,
        identity=digest(*(f"{name} {files.sizes[name]}" for name in images)),
        times=digest(*(str(files.times[name]) for name in images)) if files.times else "",
        notes=tuple(files.notes),
    )


def in_order(names: Mapping[str, object]) -> list[str]:
    """The pictures among `names`, in the order of their paths' parts."""
    return sorted((name for name in names if is_image(name)), key=lambda name: name.split("/"))


def _small(size: object) -> bool:
    return not isinstance(size, int) or size <= MOST_TEXT_BYTES


def _reader(text: Callable[[str], bytes], name: str) -> Callable[[], bytes]:
    return lambda: text(name)
