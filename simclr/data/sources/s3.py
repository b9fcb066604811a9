"""Images below an s3:// prefix, or in an archive there."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from simclr import files
from simclr.data.s3.uri import Address, copy_of, own
from simclr.data.sources.folder import Files, tree_of
from simclr.data.sources.names import Sorted
from simclr.data.sources.source import MOST_TEXT_BYTES, Data, Part, Tree, digest, ending, is_image, is_junk, is_text

if TYPE_CHECKING:
    from simclr.data.s3.listing import Object
    from simclr.data.s3.store import Store

_OBJECTS_AT_ONCE = 16
_MOST_OBJECTS = 1_000_000_000
_MOST_BYTES = 1 << 30
"""The largest picture that is read from S3: it is held in memory, and several of them."""


def s3_prefix(at: Address, store: Store | None = None) -> Tree:
    """The tree of the objects below a prefix."""
    from simclr.data.s3.listing import Disordered
    from simclr.data.s3.store import Store

    store = store or Store(threads=_OBJECTS_AT_ONCE)
    try:
        found = _gathered(at, store.listed_side_by_side(at, _MOST_OBJECTS))
    except Disordered:
        found = _gathered(at, store.listed(at, _MOST_OBJECTS))
    return tree_of(str(at), found, s3_reader(at, store), partial(_one, store, at))


def s3_reader(at: Address, store: Store | None = None) -> Callable[[Part], Iterator[tuple[str, bytes]]]:
    """Fetches the pictures of a part, which are objects below `at`, many at once."""
    from simclr.data.s3.store import Store

    store = store or Store(threads=_OBJECTS_AT_ONCE)

    def read(part: Part) -> Iterator[tuple[str, bytes]]:
        ahead: deque[tuple[str, Future[bytes]]] = deque()
        try:
            for name in part.names:
                ahead.append((name, store.pool.submit(_one, store, at, name)))
                if len(ahead) == 4 * _OBJECTS_AT_ONCE:
                    first, waiting = ahead.popleft()
                    yield first, waiting.result()
            while ahead:
                first, waiting = ahead.popleft()
                yield first, waiting.result()
        finally:
            for _, waiting in ahead:
                waiting.cancel()

    return read


def _one(store: Store, at: Address, name: str) -> bytes:
    from simclr.data.s3.answers import Missing, TooLarge

    try:
        return store.read(at / name, _MOST_BYTES)
    except (Missing, TooLarge):  # deleted or replaced since the listing: treated as a file that cannot be read
        return b""


def _gathered(at: Address, objects: Iterator[Object]) -> Files:
    """The files among `objects`, which come in any order; what is said of them is in the order of their names."""
    found, pictures = Files(), Sorted()
    notes: list[tuple[str, str]] = []
    junk_at: dict[str, str] = {}  # folder of junk → the first name in it
    other_at: dict[str, str] = {}  # ending → the first name of another file
    for listed in objects:
        name = listed.name
        junk = next((folder for folder in name.split("/")[:-1] if is_junk(folder)), None)
        if junk is not None:
            found.junk[junk] += 1
            junk_at[junk] = min(name, junk_at.get(junk, name))
        elif is_text(name) and listed.bytes > MOST_TEXT_BYTES:
            mib = listed.bytes >> 20
            notes.append((name, f"{at / name} has {mib:,} MiB and was not looked at for classes; fetch it for --labels FILE"))
        elif listed.bytes > _MOST_BYTES:
            mib = listed.bytes >> 20
            notes.append((name, f"{at / name} has {mib:,} MiB, too much for a picture in memory, and was left out"))
        elif is_image(name):
            pictures.add((name, listed.etag, ""))
        else:
            found.add_other(name, listed.bytes)
            other_at[ending(name)] = min(name, other_at.get(ending(name), name))
    for name, etag, _ in pictures:
        found.add_picture(name, etag)
    found.end()
    found.others = dict(sorted(found.others.items()))
    found.ignored = Counter({kind: found.ignored[kind] for kind in sorted(other_at, key=lambda kind: other_at[kind])})
    found.junk = Counter({folder: found.junk[folder] for folder in sorted(junk_at, key=lambda folder: junk_at[folder])})
    found.notes = [note for _, note in sorted(notes)]
    return found


class _Fetched:
    """An archive's copy on this machine, which its processes share. It is removed with the last reference to it, by the last of them; one
    that a killed process left is taken over by the next."""

    def __init__(self, at: Address, store: Store, found: Object) -> None:
        self.path = copy_of(at, f"archives/{digest(found.etag)}")
        own(self.path)
        with files.locked(_lock(self.path), own=True):
            # A copy has its name when it is whole.
            if not self.path.exists() or self.path.stat().st_size != found.bytes:
                store.download(at, self.path)
            used = files.locked(_uses(self.path), own=True, shared=True)
            used.__enter__()
        weakref.finalize(self, _left, self.path, used)


def _lock(copy: Path) -> Path:
    return copy.with_name(f".{copy.name}.lock")


def _uses(copy: Path) -> Path:
    return copy.with_name(f".{copy.name}.uses")


def _left(copy: Path, used: AbstractContextManager[None]) -> None:
    used.__exit__(None, None, None)
    # Whoever holds either lock is using the copy or about to, and removes it later.
    locks = [files.locked(path, wait=False, own=True) for path in (_lock(copy), _uses(copy))]
    with contextlib.suppress(BlockingIOError), locks[0], locks[1]:
        copy.unlink(missing_ok=True)


def s3_archive(at: Address, tree: Callable[[Path, str], Tree]) -> Tree:
    """The `tree` (path, spec) of an archive. It is fetched to be listed, and lies in this machine's cache as long as it is read."""
    from simclr.data.s3.store import Store

    store = Store()
    found = store.look(at)
    fetched = _Fetched(at, store, found)
    listed = tree(fetched.path, str(at))

    def read(part: Part, _kept: _Fetched = fetched) -> Iterator[tuple[str, Data]]:
        return listed.read(part)

    return replace(listed, read=read, identity=found.etag, times="")
