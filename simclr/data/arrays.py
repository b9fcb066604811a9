"""NumPy's files of somebody else."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import IO

_MOST_HEADER_BYTES, _MOST_BRACKETS = 10_000, 64


def require_plain_headers(path: Path) -> None:
    """Raise ValueError for an .npy or .npz file with a header that is no short literal. NumPy has Python's own parser read it, which a few
    thousand brackets in each other end with the whole process."""
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            _require_plain(file)
        return
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            with archive.open(name) as member:
                _require_plain(member)


def require_small(path: Path, most: int) -> None:
    """Raise ValueError for an .npz file whose arrays have more than `most` bytes; BadZipFile for another file."""
    with zipfile.ZipFile(path) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
    if size > most:
        raise ValueError(f"it would unpack to {size / 2**20:,.0f} MiB")


def _require_plain(file: IO[bytes]) -> None:
    start = file.read(12 + _MOST_HEADER_BYTES)
    begin = 10 if start[6:7] == b"\1" else 12
    length = int.from_bytes(start[8:begin], "little")
    if start[:6] == b"\x93NUMPY" and (
        length > _MOST_HEADER_BYTES or sum(map(start[begin : begin + length].count, b"([{")) > _MOST_BRACKETS
    ):
        raise ValueError(f"its header of {length:,} bytes describes no plain array")
