"""Names of pictures by the million: packed in blocks, sorted by the parts of their paths, in memory or in a file without a name."""

from __future__ import annotations

import heapq
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

from simclr.errors import UserError

_IN_MEMORY_BYTES = 64 << 20
_RUN, _FRAME = 1 << 16, 512  # records that are sorted in memory, and that are read of a run at a time
Record = tuple[str, str, str]
"""A name, and two marks of its content."""


def pack(rows: Iterable[Any]) -> bytes:
    """Some names, or records, as one block. Names on a disk need not be UTF-8; JSON keeps what Python makes of such."""
    return zlib.compress(json.dumps(list(rows), separators=(",", ":")).encode(), 1)


def unpack(block: bytes) -> list[Any]:
    rows: list[Any] = json.loads(zlib.decompress(block))
    return rows


class Kept:
    """Blocks of bytes: the first ones in memory, the others in a file that has no name and ends with this value. Threads may read."""

    def __init__(self, in_memory_bytes: int = _IN_MEMORY_BYTES) -> None:
        self.room, self.size = in_memory_bytes, 0
        self.file: IO[bytes] | None = None

    def keep(self, block: bytes) -> bytes | tuple[int, int]:
        """What `load` gives the block for."""
        if self.file is None and len(block) <= self.room:
            self.room -= len(block)
            return block
        try:
            if self.file is None:
                self.file = tempfile.TemporaryFile(prefix="simclr-names-", buffering=0)  # noqa: SIM115  # it lives as long as this value
            at = self.size
            while block:
                written = os.pwrite(self.file.fileno(), block, self.size)
                self.size, block = self.size + written, block[written:]
        except OSError as error:
            raise UserError(
                f"the names of the pictures do not fit {tempfile.gettempdir()} ({error.strerror}); make room there, or set TMPDIR to a "
                "folder on another disk"
            ) from None
        return at, self.size - at

    def load(self, at: bytes | tuple[int, int]) -> bytes:
        if isinstance(at, bytes):
            return at
        assert self.file is not None
        return os.pread(self.file.fileno(), at[1], at[0])


class Packed(Sequence[str]):
    """Names that take some ten bytes each, unpacked whenever they are asked for; their number is known. They equal a tuple of the same
    names, and are one for another process."""

    __slots__ = ("_at", "_count", "_kept")

    def __init__(self, names: Collection[str], kept: Kept | None = None) -> None:
        self._kept, self._count = kept or Kept(), len(names)
        self._at = self._kept.keep(pack(names))

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[str]:
        return iter(unpack(self._kept.load(self._at)))

    def __getitem__(self, at: Any) -> Any:
        names = unpack(self._kept.load(self._at))
        return tuple(names[at]) if isinstance(at, slice) else names[at]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Packed | tuple) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return f"Packed({list(self)!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return tuple, (list(self),)


def chosen(names: Sequence[str], wanted: Callable[[str], bool]) -> Sequence[str]:
    """Those of a part's names that are wanted, kept as they were: packed, or a tuple."""
    some = tuple(filter(wanted, names))
    return names if len(some) == len(names) else Packed(some) if isinstance(names, Packed) else some


@dataclass(frozen=True, slots=True)
class Filtered(Collection[str]):
    """Those among `names` that are `wanted`, `count` in number, found anew in each pass."""

    names: Collection[str]
    wanted: Callable[[str], bool]
    count: int

    @classmethod
    def of(cls, names: Collection[str], wanted: Callable[[str], bool]) -> Filtered:
        return cls(names, wanted, sum(1 for _ in filter(wanted, names)))

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[str]:
        return filter(self.wanted, self.names)

    def __contains__(self, name: object) -> bool:
        return any(name == other for other in self)


class Sorted:
    """Records in the order of their names' paths, part by part, whatever the order in which they were added. Of several with one name the
    last counts. Those that memory does not hold wait in a file."""

    def __init__(self) -> None:
        self._kept = Kept()
        self._runs: list[list[Any]] = []  # of each, where its frames are kept
        self._last: list[str] = []  # in the last run
        self._new: list[Record] = []

    def add(self, record: Record) -> None:
        self._new.append(record)
        if len(self._new) == _RUN:
            self._end_run()

    def _end_run(self) -> None:
        self._new.sort(key=_by_path)
        # Most listings come nearly in order, and their runs follow each other.
        if not self._runs or _by_path(self._new[0]) < self._last:
            self._runs.append([])
        for begin in range(0, len(self._new), _FRAME):
            self._runs[-1].append(self._kept.keep(pack(self._new[begin : begin + _FRAME])))
        self._last = _by_path(self._new[-1])
        self._new = []

    def __iter__(self) -> Iterator[Record]:
        self._new.sort(key=_by_path)
        runs = [*map(self._read, self._runs), iter(self._new)]
        before: Record | None = None
        for record in heapq.merge(*runs, key=_by_path):
            if before is not None and before[0] != record[0]:
                yield before
            before = record
        if before is not None:
            yield before

    def _read(self, frames: list[Any]) -> Iterator[Record]:
        for at in frames:
            yield from map(tuple, unpack(self._kept.load(at)))


def _by_path(record: Record) -> list[str]:
    return record[0].split("/")
