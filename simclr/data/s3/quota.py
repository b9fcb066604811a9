"""Room for the copies of datasets on this machine: what was used least recently goes, unless a process uses it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from simclr import files
from simclr.data.s3 import pins, uri
from simclr.data.s3.pins import Pin
from simclr.errors import UserError

VARIABLE = "SIMCLR_CACHE_GIB"
_SHARE = 0.8  # of the disk, without the variable
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class _Copy:
    path: Path
    bytes: int
    """That it has on the disk."""
    users: list[Pin]
    last: float
    """Unix time of its last use."""

    @property
    def coming(self) -> int:
        """Bytes that its users will still fetch."""
        return max(max((pin.bytes for pin in self.users), default=0) - self.bytes, 0)

    def __str__(self) -> str:
        return f"{pins.place_of(self.path)} ({_mib(self.bytes + self.coming)} MiB)"


def limit(top: Path) -> int:
    """Bytes that this user's copies may have in the folder `top`: $SIMCLR_CACHE_GIB, else four fifths of its disk. Raises UserError if the
    variable states no such number."""
    text = os.environ.get(VARIABLE, "")
    if not text:
        return int(_SHARE * shutil.disk_usage(top).total)
    if not re.fullmatch(r"\d{1,9}(\.\d*)?|\.\d+", text) or not float(text):
        raise UserError(f"${VARIABLE} is {text!r}; expected a number of GiB above 0, as 500")
    return int(float(text) * 2**30)


def warned(line: str) -> None:
    """Say it where nobody else does."""
    warnings.warn(line, RuntimeWarning, stacklevel=3)


def make_room(path: Path, needed: int, what: str, says: Callable[[str], None] = warned, confirm: Callable[[], None] = lambda: None) -> None:
    """Make room for `needed` more bytes in `path`. If it lies in this user's folder of copies, the least recently used datasets that no
    process uses are evicted for it, as few as are enough, and `says` gets a sentence; before that, `confirm` may raise.

    Raises UserError if that is not enough: then nothing is evicted. In messages `what` follows the number of bytes.
    """
    instead = "set SIMCLR_CACHE to another disk"
    if needed <= 0:
        return
    if not path.is_relative_to(uri.cache()):
        try:
            files.require_space(path, needed, what, instead)
        except UserError:
            confirm()
            raise
        return
    with pins.all_locked(path), contextlib.ExitStack() as locks:
        top = uri.cache()
        copies, others = _copies(top)
        beside = [copy for copy in copies if copy.path != path]
        coming = sum(copy.coming for copy in beside)
        has, free = others + coming + sum(copy.bytes for copy in copies), shutil.disk_usage(top).free
        over, short = has + needed - limit(top), needed + coming - free
        chosen = _chosen([copy for copy in beside if not copy.users], max(over, short), locks)
        if max(over, short) > 0:
            confirm()
        if chosen is None:
            lacks = (
                f"no space left on the disk of {path}: {_mib(free)} MiB free, {_mib(needed)} MiB needed {what}"
                if short >= over
                else f"no room left in {top}: it may have {_mib(limit(top))} MiB ({_why()}) and has {_mib(has)} MiB, "
                f"{_mib(needed)} MiB more are needed {what}"
            )
            raise UserError(f"{lacks}{_in_use(beside)}; free some, {instead if short >= over else f'set {VARIABLE} higher, or {instead}'}")
        gone = ", ".join(_last(copy) for copy in chosen)
        for copy in chosen:
            pins.evict(copy.path)
        if chosen:
            says(f"evicted from {top}, to make room {what}: {gone}")
            files.require_space(path, needed, what, instead)  # a disk may have more users than we know
        pins.reserve(path, needed + sum(copy.bytes for copy in copies if copy.path == path))


def _chosen(free: list[_Copy], wanted: int, locks: contextlib.ExitStack) -> list[_Copy] | None:
    """The least recently used of the copies that together have the `wanted` bytes, each locked by `locks`; None if all have not."""
    found: list[_Copy] = []
    for copy in sorted(free, key=lambda copy: copy.last):
        if sum(one.bytes for one in found) >= wanted:
            break
        with contextlib.suppress(BlockingIOError):  # a process works on it that holds no pin
            locks.enter_context(files.locked(uri.lock_of(copy.path), wait=False, own=True))
            found.append(copy)
    return found if sum(one.bytes for one in found) >= wanted else None


def _copies(top: Path) -> tuple[list[_Copy], int]:
    """The copies in `top` that may be evicted, and the bytes of all else there. No link is followed."""
    found, others = [], 0
    for inside, folders, names in os.walk(top):
        parts = Path(inside).relative_to(top).parts
        if len(parts) == 2 and parts[0] in pins.KINDS:
            mine = [Path(inside, name) for name in (*folders, *names) if not name.startswith(".")]
            copies = [path for path in mine if not path.is_symlink() and files.is_own(path.lstat(), path.parent)]
            found += [_Copy(path, _below(path), pins.pins(path), pins.used(path)) for path in copies]
            folders[:], names = ([name for name in some if Path(inside, name) not in copies] for some in (folders, names))
        others += sum(_bytes(Path(inside, name)) for name in names)
    return [copy for copy in found if copy.bytes or copy.users], others


def _below(copy: Path) -> int:
    """Bytes of a file, or of those below a folder. A manifest does not count: a copy that holds nothing else takes no room, and stays."""
    if not copy.is_dir():
        return _bytes(copy)
    return sum(_bytes(Path(inside, name)) for inside, _, names in os.walk(copy) for name in names if name != "manifest.json")


def _bytes(path: Path) -> int:
    with contextlib.suppress(OSError):  # removed meanwhile
        found = path.lstat()
        return found.st_blocks * 512 if path.suffix == ".partial" else found.st_size  # parts are missing in it, as holes
    return 0


def _in_use(copies: list[_Copy]) -> str:
    """Which copies cannot go, and why."""
    used = [f"{copy} is in use by {copy.users[0]}" for copy in copies if copy.users and copy.bytes + copy.coming]
    more = f", and {len(used) - _SHOWN} more are in use" if len(used) > _SHOWN else ""
    return f"; {', '.join(used[:_SHOWN])}{more}: wait for it, or end it" if used else ""


def _last(copy: _Copy) -> str:
    return f"{pins.place_of(copy.path)} ({_mib(copy.bytes)} MiB, last used on {time.strftime('%d %B %Y', time.localtime(copy.last))})"


def _why() -> str:
    return VARIABLE if os.environ.get(VARIABLE) else f"{_SHARE:.0%} of its disk; {VARIABLE} states another size"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f}"
