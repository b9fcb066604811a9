"""What this user's processes have hashed, where nothing on the disk tells users apart: one of them hashes a shard, and the others take
its word while the file is unchanged.

The word is kept in the user's home folder, beside the folder of copies and not in it: whoever can change a copy must not be able to
vouch for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import threading
from pathlib import Path
from typing import Any

from simclr import files
from simclr.errors import UserError

_SETTLED_NS = 2_000_000_000
"""A change that follows another one within the same tick of a disk's clock leaves its times as they were; the slowest clock ticks so."""


class Hashed:
    """The word on the files of `directory`, as it was when this was made. Several threads may add to it."""

    def __init__(self, directory: Path) -> None:
        self.place = Path("~/.cache/simclr-hashed")
        with contextlib.suppress(RuntimeError):  # this user has no home folder: then there is no such place
            self.place = self.place.expanduser()
        self.path = self.place / f"{hashlib.sha256(bytes(directory.absolute())).hexdigest()[:16]}.json"
        self.now = files.clock_on(directory)
        self.lock = threading.Lock()
        self.known: dict[str, Any] = {}
        with contextlib.suppress(OSError, UserError):  # without one, or with a damaged one, files are hashed
            if _is_closed(self.place) and files.only_own(self.path.lstat()):
                self.known = files.read_json(self.path, "remove it")

    def has(self, path: Path, sha256: str) -> bool:
        """Whether the file had this sha256 when it was hashed, and has not changed since."""
        if path.name not in self.known:
            return False
        # A network disk looks at its server when a file is opened, and only then.
        with contextlib.suppress(OSError), open(path, "rb", opener=files.plain) as file:
            return bool(self.known[path.name] == [*stamp(os.fstat(file.fileno())), sha256])
        return False

    def add(self, path: Path, found: list[int], sha256: str) -> None:
        """The file had this sha256 and the stamp `found`, before and after it was hashed."""
        if found[-1] + _SETTLED_NS <= self.now:
            with self.lock:
                self.known[path.name] = [*found, sha256]

    def keep(self, names: set[str]) -> bool:
        """Write the word on the files of these names. Returns whether there is a place for it that no other user can write."""
        try:
            for folder in (self.place.parent, self.place):
                with contextlib.suppress(FileExistsError):
                    folder.mkdir(mode=0o700)
            if not _is_closed(self.place):
                return False
            with files.whole(self.path) as scratch, open(scratch, "x", opener=files.private) as file:
                json.dump({name: word for name, word in self.known.items() if name in names}, file)
        except OSError:
            return False
        return True


def stamp(found: os.stat_result) -> list[int]:
    """What changes with a file: inode, size, and the times of its content and of itself in nanoseconds."""
    return [found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _is_closed(place: Path) -> bool:
    """Whether `place` in the home folder, and what is above it there, is surely this user's alone."""
    found = [folder.stat() for folder in (place.parent.parent, place.parent, place)]
    mine = all(state.st_uid == os.geteuid() and not state.st_mode & files.OTHERS_WRITE for state in found)
    return mine and all(stat.S_ISDIR(state.st_mode) for state in found)
