"""The loader's memory: shards as one range of addresses, and buffers for batches."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import weakref
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from simclr.data.s3.uri import Corrupt
from simclr.errors import UserError

PAGE = mmap.PAGESIZE
"""Shards begin at multiples of it. At those of a larger number there would be a gap behind each, which counts as a mapping of its own."""
_LIMIT, _IN_USE = Path("/proc/sys/vm/max_map_count"), Path("/proc/self/maps")
_SPARE_MAPPINGS = 4096  # for what the process maps later: threads, blocks of memory, another split's shards
_LEAST, _MOST = 3, 5  # batches in memory: one being filled, one in the caller's hands, the others ready


def mapped(files: list[tuple[Path, int]], bases: list[int]) -> NDArray[np.uint8]:
    """Map `files` (path, bytes) read-only at offsets `bases` of one reserved range of addresses, as one array of bases[-1] bytes.

    Raises UserError where they are more than the system maps into one process."""
    _require_mappings(len(files))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    none, readable, shared, private, fixed, anonymous, no_reserve = 0, 1, 1, 2, 0x10, 0x20, 0x4000
    failed = ctypes.c_void_p(-1).value

    def mapped_at(address: int | None, length: int, protection: int, flags: int, descriptor: int) -> int:
        result = libc.mmap(address, length, protection, flags, descriptor, 0)
        if result == failed or result is None:
            raise OSError(ctypes.get_errno(), f"cannot map {length} bytes: {os.strerror(ctypes.get_errno())}")
        return int(result)

    start = mapped_at(None, bases[-1], none, private | anonymous | no_reserve, -1)
    for (path, size), base in zip(files, bases, strict=False):
        with _opened(path, size) as file:
            mapped_at(start + base, size, readable, shared | fixed, file.fileno())
    memory = (ctypes.c_uint8 * bases[-1]).from_address(start)
    weakref.finalize(memory, libc.munmap, start, bases[-1]).atexit = False  # at exit a loader thread may still read
    return np.ctypeslib.as_array(memory)


def copied(files: list[tuple[Path, int]], bases: list[int]) -> NDArray[np.uint8]:
    """`files` (path, bytes) at offsets `bases` of this process's own memory, which other processes' reading does not evict."""
    memory = np.empty(bases[-1], np.uint8)
    for (path, size), base in zip(files, bases, strict=False):
        with _opened(path, size) as file:
            view, at = memory[base : base + size].data, 0
            while at < len(view):
                got = file.readinto(view[at:])
                if not got:
                    raise Corrupt(f"shard {path} ends early; prepare or fetch the data again", path.name)
                at += got
    return memory


def _require_mappings(count: int) -> None:
    """Raise UserError if this process may not have `count` mappings more."""
    if not _LIMIT.is_file():
        return
    limit, used = int(_LIMIT.read_text()), _IN_USE.read_bytes().count(b"\n")
    needed = used + count + _SPARE_MAPPINGS
    if needed > limit:
        raise UserError(
            f"{count:,} shards are too many to map: this system allows a process {limit:,} mappings (vm.max_map_count), of which {used:,} "
            f"are in use and {_SPARE_MAPPINGS:,} are kept for what comes later; prepare with a larger --shard-mib, train with more "
            f"--train.shard-groups, or let root raise the limit (`sysctl vm.max_map_count={2 * needed}`)"
        )


def _opened(path: Path, size: int) -> FileIO:
    """The shard `path`. Raises Corrupt if it does not have the `size` of its manifest: a larger one would be mapped over what lies behind
    it. The opened file is asked, since another may have the name by now."""
    file = FileIO(path)
    found = os.fstat(file.fileno()).st_size
    if found != size:
        file.close()
        raise Corrupt(f"shard {path} has {found:,} bytes, the manifest says {size:,}; prepare or fetch the data again", path.name)
    return file


def slots_for(queries: Any, rows: int) -> list[Any]:
    """Memory for three to five batches of `rows`: each an array or, for several `queries`, a tuple of arrays."""
    if isinstance(queries, tuple):
        return list(zip(*(slots_for(query, rows) for query in queries), strict=False))
    shape = (rows, *map(int, queries.shape))  # FFCV gives the sides of raw images as uint16, whose products overflow
    if queries.dtype != np.uint8 or not torch.cuda.is_available():
        return [np.empty(shape, queries.dtype) for _ in range(_MOST)]
    # Page-locked memory, which a GPU reads by itself. torch rounds such blocks up to powers of two, so all slots share one block, and
    # further slots fill what the third leaves of it: 512 MiB for 512 photographs of two crops of 224 px, where five blocks took 1,280.
    size = math.prod(shape)
    count = min((1 << (_LEAST * size - 1).bit_length()) // size, _MOST)
    return list(torch.empty((count, *shape), dtype=torch.uint8, pin_memory=True).numpy())
