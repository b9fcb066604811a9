"""What all archives have in common: their members, called as in a folder, and the tree that results."""

from __future__ import annotations

import itertools
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from simclr.data.sources.source import Data, Part, Tree, digest, divided, ending, is_image, is_junk, is_text

_ENDS_BYTES = 1 << 20
MOST_PICTURE_BYTES = 512 << 20
"""What `prepare` reads of a picture's file, if no flag says otherwise: of a larger one in an archive, the memory would hold all."""
_MOST_TEXT_BYTES = 64 << 20


@dataclass(kw_only=True, slots=True)
class Listing:
    """The members of an archive. What links in it lead to counts as a member under the link's name, too."""

    spec: str
    """The archive, for messages."""
    sizes: dict[str, int]
    """Path of each file → bytes, in the order in which files are read fastest."""
    read: Callable[[Iterable[str]], Iterator[tuple[str, bytes]]]
    """(path, content) of some files, in the order given, each asked for when it is read. Many threads may read."""
    seekable: bool = True
    """Whether a file is read without all that lie before it."""
    listed: dict[str, Listing] = field(default_factory=dict)
    """Path of an archive in this one, without its ending → its members."""
    inner: dict[str, Callable[[], Iterator[tuple[str, Data]]]] = field(default_factory=dict)
    """Path of another archive in this one, without its ending → its pictures, which are known only when they are read."""
    junk: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)
    """Ending → files that are none of the above."""
    notes: list[str] = field(default_factory=list)
    identity: str = ""
    times: str = ""


def ends_of(path: Path) -> str:
    """A hash of a file's size, first and last MiB, which identifies an archive without reading all of it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(_ENDS_BYTES)
        file.seek(max(size - _ENDS_BYTES, 0))
        return digest(str(size), first, file.read())


def path_in(name: str) -> str:
    """A member's path in its archive: without a leading / or ./, and without .., which would lead out of it."""
    return "/".join(part for part in name.split("/") if part not in ("", ".", ".."))


def junk_in(path: str) -> str:
    """The folder in `path` that is no folder of pictures, or ''."""
    return next((folder for folder in path.split("/")[:-1] if is_junk(folder)), "")


def linked(name: str, target: str) -> str:
    """Where a symbolic link called `name` leads, as a path in the archive."""
    return path_in(posixpath.normpath(posixpath.join(posixpath.dirname(name), target)))


def followed(links: Mapping[str, str], known: Mapping[str, object]) -> tuple[dict[str, str], list[str]]:
    """(link → the file among `known` to which it leads, over further links if need be; links that lead to none)."""
    ends: dict[str, str] = {}  # link → where it leads in the end; "" = round and round
    for link in links:
        passed, target = [], link
        while target in links and target not in ends:
            passed.append(target)
            ends[target] = ""
            target = links[target]
        end = ends.get(target, target)
        ends |= dict.fromkeys(passed, end)
    found = {link: end for link, end in ends.items() if end in known and end not in links}
    return found, [link for link in links if link not in found]


def oddities(spec: str, lost: Sequence[str], twice: Sequence[str]) -> list[str]:
    """Notes on links that lead to no file of the archive, and on files that it has more than once."""
    notes = []
    if lost:
        notes.append(f"{len(lost):,} links in {spec} lead to no file of it (to a folder, or out of it), as {lost[0]}; they are left out")
    if twice:
        notes.append(f"{len(twice):,} files of {spec} were packed again later, as {twice[0]}; the last of each counts")
    return notes


def below(prefix: str, path: str) -> str:
    return f"{prefix}/{path}" if prefix else path


def tree_of(listing: Listing, prefix: str = "", pictures: Mapping[str, str] | None = None, texts: bool = True) -> Tree:
    """The tree of an archive, with `prefix` as the folder above. `pictures` (name in the tree → path in the archive) are all pictures in
    it, if they are not given. Pictures of more than 512 MiB are left out."""
    ignored, notes = listing.ignored + Counter(ending(path) for path in listing.sizes if not is_image(path)), list(listing.notes)
    if pictures is None:
        pictures = {below(prefix, path): path for path in listing.sizes if is_image(path)}
    if huge := [name for name, path in pictures.items() if listing.sizes[path] > MOST_PICTURE_BYTES]:
        mib = listing.sizes[pictures[huge[0]]] / 2**20
        notes.append(
            f"{len(huge):,} pictures of {listing.spec} are left out: {huge[0]} has {mib:,.0f} MiB, more than a picture in an archive may "
            f"have ({MOST_PICTURE_BYTES >> 20}); unpack it, and give the folder"
        )
        ignored[f"over {MOST_PICTURE_BYTES >> 20} MiB"] += len(huge)
        pictures = {name: path for name, path in pictures.items() if name not in set(huge)}
    inner = {below(prefix, path): read for path, read in listing.inner.items()}
    tables = [path for path in listing.sizes if is_text(path)] if texts else []
    if large := [path for path in tables if listing.sizes[path] > _MOST_TEXT_BYTES]:
        others = f", nor were {len(large) - 1:,} others of more than {_MOST_TEXT_BYTES >> 20} MiB" if len(large) > 1 else ""
        notes.append(
            f"{large[0]} in {listing.spec} has {listing.sizes[large[0]] / 2**20:,.0f} MiB and was not looked at for classes{others}; "
            "unpack it and give it as --labels FILE"
        )

    def read(part: Part) -> Iterator[tuple[str, Data]]:
        if not part.names:
            for path, data in inner[part.name]():
                yield f"{part.name}/{path}", data
            return
        asked, named = itertools.tee(part.names)
        for name, (_, data) in zip(named, listing.read(pictures[name] for name in asked), strict=True):
            yield name, data

    names = list(pictures)
    return Tree(
        spec=listing.spec,
        parts=[
            *(divided(listing.spec, names) if listing.seekable else [Part(listing.spec, tuple(names), True)] if names else []),
            *(Part(name) for name in inner),
        ],
        read=read,
        texts={below(prefix, path): partial(_text, listing, path) for path in tables if path not in large},
        ignored=ignored,
        junk=listing.junk,
        identity=listing.identity,
        times=listing.times,
        notes=tuple(notes),
    )


def _text(listing: Listing, path: str) -> bytes:
    return next(listing.read([path]))[1]
