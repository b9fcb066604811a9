"""Which copies of datasets on this machine are in use, by whom, and when each was used last.

A process that reads a copy holds the lock of a file of its own beside it, and a note says who it is. The lock ends with its process,
however that ends, and it is seen from every container that shares the disk.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from simclr import fields, files
from simclr.data.s3 import uri
from simclr.errors import UserError

KINDS = ("shards", "features")
"""Kinds of copies that S3 has as they are here: they may be evicted. A run's copy may hold checkpoints that were not sent yet."""
GONE = ".evicted-"
"""An evicted copy first gets a name that begins so, which nothing reads: a reader finds all of it or nothing, also after a kill."""
_INSTEAD = "it is not read"
_held = contextlib.ExitStack()  # until this process ends: it may read what it has mapped at any time
_mine: dict[Path, Path] = {}  # copy → the pin of this process


@dataclass(frozen=True, slots=True)
class Pin:
    """A process that uses a copy."""

    by: str
    """The address of a run, or a command."""
    pid: int
    host: str
    since: float
    """Unix time."""
    bytes: int = 0
    """That the copy will have once the process has fetched what it needs; 0 = not known."""

    def __str__(self) -> str:
        return f"{self.by} (pid {self.pid} on {self.host}, since {time.strftime('%d %B, %H:%M', time.localtime(self.since))})"


@contextlib.contextmanager
def all_locked(copy: Path) -> Iterator[None]:
    """Inside, no other process pins or evicts a copy in this user's folder of copies, which holds `copy`; the rest of an eviction that was
    killed is removed first. Raises UserError as `uri.own`."""
    uri.own(copy)
    with files.locked(uri.cache() / ".evicting.lock", own=True):
        for kind in KINDS:
            for rest in (uri.cache() / kind).glob(f"*/{GONE}*"):
                _remove(rest)
        yield


def hold(copy: Path, place: object, by: str) -> None:
    """Keep `copy` from being evicted until this process ends, and note that it was used now. It is a copy of `place`, and `by` says who
    needs it. A folder that is no copy is left alone. Raises UserError as `uri.own`."""
    if not is_copy(copy):
        return
    with all_locked(copy):
        _touch(copy, str(place))
        if copy in _mine and _mine[copy].exists():
            return
        pin = copy.with_name(f".{copy.name}.pin-{secrets.token_hex(8)}")
        _held.enter_context(files.locked(pin, own=True))
        _mine[copy] = pin
        _write(pin, Pin(by, os.getpid(), socket.gethostname(), time.time()))


def reserve(copy: Path, size: int) -> None:
    """Note that `copy`, if this process holds it, will have `size` bytes: others leave room for them. Inside `all_locked`."""
    if copy in _mine and (pin := _read(_mine[copy])) is not None:
        _write(_mine[copy], replace(pin, bytes=size))


def touch(copy: Path) -> None:
    """Note that `copy` was used until now."""
    if is_copy(copy) and _mark(copy).is_file():
        with contextlib.suppress(OSError):  # of the disk: training has ended well all the same
            _touch(copy)


def used(copy: Path) -> float:
    """Unix time of its last use."""
    for path in (_mark(copy), copy / "manifest.json", copy):  # earlier versions left no mark
        with contextlib.suppress(OSError):
            return path.lstat().st_mtime
    return 0.0


def place_of(copy: Path) -> str:
    """What it is a copy of, for people."""
    with contextlib.suppress(OSError, UserError):
        if text := files.read_text(_mark(copy), _INSTEAD).strip():
            return text
    return str(copy)


def pins(copy: Path) -> list[Pin]:
    """The processes that use `copy`. What dead ones left is removed. Inside `all_locked`."""
    found = []
    for path in sorted(copy.parent.glob(f".{glob.escape(copy.name)}.pin-*")):
        if path.suffix == ".json":
            continue
        try:
            if path in _mine.values():  # on some disks of networks this process would get its own lock once more
                raise BlockingIOError
            with files.locked(path, wait=False, own=True):
                _note(path).unlink(missing_ok=True)
                path.unlink()
        except BlockingIOError:
            found.append(_read(path) or Pin("a process", 0, "this machine", path.lstat().st_mtime))
    return found


def evict(copy: Path) -> None:
    """Remove `copy`. Inside `all_locked`."""
    gone = copy.with_name(f"{GONE}{secrets.token_hex(8)}")
    copy.rename(gone)
    _mark(copy).unlink(missing_ok=True)
    _remove(gone)


def is_copy(place: Path) -> bool:
    """Whether `place` is a copy in this user's folder of copies, of a kind that may be evicted: CACHE/KIND/DIGEST/NAME."""
    top = uri.cache()
    parts = place.relative_to(top).parts if place.is_relative_to(top) else ()
    return len(parts) == 3 and parts[0] in KINDS


def _remove(gone: Path) -> None:
    """Remove a file or a folder, and follow no link. What cannot be removed stays for the next start."""
    with contextlib.suppress(OSError):
        if gone.is_symlink() or not gone.is_dir():
            gone.unlink()
        else:
            shutil.rmtree(gone, ignore_errors=True)


def _mark(copy: Path) -> Path:
    return copy.with_name(f".{copy.name}.used")


def _touch(copy: Path, place: str = "") -> None:
    with open(_mark(copy), "w" if place else "a", opener=files.private, encoding="utf-8") as file:
        file.write(place)
        os.utime(file.fileno())


def _note(pin: Path) -> Path:
    return pin.with_name(f"{pin.name}.json")


def _write(pin: Path, about: Pin) -> None:
    files.write_text(_note(pin), json.dumps(asdict(about)))


def _read(pin: Path) -> Pin | None:
    with contextlib.suppress(OSError, UserError):
        return fields.build(Pin, files.read_json(_note(pin), _INSTEAD), _note(pin), _INSTEAD)
    return None
