"""The directories of a command, on disk or at s3://bucket/prefix. Work is done on disk, for S3 in this machine's copy.

Every flag that takes a directory of shards or a run takes an address too. A flag of type Path folds the slashes of s3:// into one;
`simclr.data.s3.uri.address` reads it all the same.
"""

from __future__ import annotations

import contextlib
import math
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from pipelines.runs.home import Home as Home  # others find it here
from pipelines.terminal import Bar, say
from simclr.data.manifest import Manifest, read_manifest
from simclr.data.s3 import pins
from simclr.data.s3.uri import Address, Corrupt, Refetched, Unreachable, address, copy_of
from simclr.errors import UserError

T = TypeVar("T")
_PATIENCE_S, _AGAIN_S, _TOLD_S = 1800.0, 20.0, 60.0


def shown(place: str | Path) -> str:
    """`place` as its user wrote it."""
    return str(address(place) or place)


def shards(place: str | Path, groups: int = 1, group: int = 0, by: str = "", tell: Callable[[str], None] = say) -> Path:
    """The directory of shards at `place`; for s3://… this machine's copy, after fetching what is missing. With several `groups` only
    the training shards of `group` are fetched. Until this process ends the copy is not evicted from the cache; `by`, by default this
    command, is who needs it, for the message to others. `tell` gets sentences: what is evicted for it, what is hashed first.

    Raises UserError if there are no shards, S3 does not give them, or there is no room for them.
    """
    at = address(place)
    if at is None:
        pins.hold(Path(place).absolute(), place, by or _command())
        return Path(place)
    from simclr.data.s3 import remote
    from simclr.data.s3.store import Store

    copy = copy_of(at, "shards")
    pins.hold(copy, at, by or _command())
    with Bar("download", None, "MiB", "MiB/s") as bar:
        remote.fetch(at, copy, mebibytes(bar) if tell is say else _minutely(at, tell), Store(), groups, group, tell)
    return copy


def manifest(place: str | Path, look: bool = True, by: str = "") -> tuple[Path, Manifest]:
    """The directory of shards at `place` and their manifest, for a process that reads no shard: of s3://… this machine gets the manifest
    alone, which is kept as `shards` keeps a copy. On disk there is a `look` at the size of each shard. Raises UserError if there are no
    shards."""
    at = address(place)
    if at is None:
        return Path(place), read_manifest(Path(place), look)
    from simclr.data.s3 import remote
    from simclr.data.s3.store import Store

    copy = copy_of(at, "shards")
    pins.hold(copy, at, by or _command())
    return copy, remote.fetch_manifest(at, copy, Store())


def _command() -> str:
    """The command of this process, without its words, which may hold what is secret."""
    return f"simclr {sys.argv[1]}" if len(sys.argv) > 1 and sys.argv[1].isalpha() else "a process"


def _minutely(at: Address, tell: Callable[[str], None]) -> Callable[[int, int], None]:
    """progress(done, total) in bytes of what is fetched from `at`, told once a minute by a process that has no terminal."""
    told = -math.inf

    def progress(done: int, total: int) -> None:
        nonlocal told
        if done < total and time.monotonic() - told >= _TOLD_S:
            told = time.monotonic()
            tell(f"fetching {at}: {done >> 20:,} of {total >> 20:,} MiB are on {socket.gethostname()}")

    return progress


def retry_unreachable(work: Callable[[], T], tell: Callable[[str], None], within_s: float = _PATIENCE_S) -> T:
    """`work()`, retried while S3 cannot be reached; `tell` gets a sentence. Raises Unreachable after `within_s` seconds. Without this,
    workers would use up their retries in an outage of minutes."""
    began = time.monotonic()
    while True:
        try:
            return work()
        except Unreachable as error:
            if time.monotonic() - began > within_s:
                raise
            tell(f"waiting for S3, for {within_s / 60:.0f} minutes at most: {error}")
            time.sleep(_AGAIN_S)


def repaired(reports: Iterator[T], place: str | Path) -> Iterator[T]:
    """`reports` of a training on the shards at `place`. If a shard of s3://… is corrupt in this machine's copy, it is fetched again, and
    Refetched is raised in place of Corrupt: a retry may succeed. On disk, or if S3's shard is corrupt too, Corrupt is raised."""
    began, at = time.time(), address(place)
    try:
        yield from reports
    except Corrupt as error:
        if at is None:
            raise
        from simclr.data.s3 import remote
        from simclr.data.s3.store import Store

        if not remote.refetch(at, copy_of(at, "shards"), error.shard, began, Store()):
            raise
        raise Refetched(f"{error.shard} was corrupt on this machine and was fetched again from {at}") from None
    finally:
        if at is not None:
            pins.touch(copy_of(at, "shards"))  # weeks may have passed since it was fetched


def mebibytes(bar: Bar) -> Callable[[int, int], None]:
    """progress(done, total) in bytes, for a bar of MiB."""

    def progress(done: int, total: int) -> None:
        bar.resize(total >> 20)
        bar.update(done >> 20)

    return progress


@contextlib.contextmanager
def directory(place: Path) -> Iterator[Path]:
    """The run or encoder directory at `place`, to read and write in. For s3://… it is the copy, and changed files are sent at the end."""
    home = Home(place)
    home.fetch()
    if home.at is not None and not home.path.is_dir():
        raise UserError(f"there is neither a run nor a published encoder at {home.at}; correct the address")
    yield home.path
    home.send()
