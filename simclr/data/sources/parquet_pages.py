"""What the pages of a Parquet column unpack to, by their own headers: the file's footer may say anything, and no reader minds.

The headers are Thrift structs in its compact protocol (apache.org/thrift, thrift-compact-protocol.md; parquet.thrift has the fields)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from simclr.errors import UserError

_TYPE, _UNPACKED, _STORED, _DATA, _DATA_V2 = 1, 2, 3, 5, 8  # fields of a header
_ENCODING, _ENCODING_V2 = 2, 4  # of the struct for data in it
_DICTIONARY, _FROM_BEFORE = 2, 7  # a type of page; the encoding in which a value repeats the beginning of the one before
_TRUE, _FALSE, _BYTE, _DOUBLE, _BYTES, _LIST, _SET, _STRUCT = 1, 2, 3, 7, 8, 9, 10, 12
_NUMBERS = (4, 5, 6)
_BOMB_BYTES, _BOMB_RATIO = 256 << 20, 200
_MOST_DEEP, _HEAD_BYTES, _MOST_HEAD_BYTES = 8, 256, 16 << 20  # statistics in a header hold two values of the column


@dataclass(frozen=True, slots=True)
class Page:
    """A page of a column."""

    unpacked: int
    """Bytes."""
    stored: int
    """Bytes in the file, without the header."""
    repeats: bool
    """Whether each of its rows may be as large as all of it: a dictionary, or values that begin as the one before."""


def pages(path: Path, begin: int, size: int) -> Iterator[Page]:
    """The pages of a column in a row group, which has `size` bytes from `begin` on. Raises UserError for one that is damaged."""
    at = begin
    with path.open("rb") as file:
        while at < begin + size:
            try:
                header, length = _header(file, at)
                unpacked, stored = header.get(_UNPACKED), header.get(_STORED)
                if not (isinstance(unpacked, int) and isinstance(stored, int) and unpacked >= 0 and stored >= 0):
                    raise ValueError("a page has no size")
            except ValueError as error:
                raise UserError(f"{path} ends early or is damaged ({error}); fetch it again") from None
            data, data_v2 = (part if isinstance(part := header.get(number), dict) else {} for number in (_DATA, _DATA_V2))
            from_before = _FROM_BEFORE in (data.get(_ENCODING), data_v2.get(_ENCODING_V2))
            yield Page(unpacked, stored, header.get(_TYPE) == _DICTIONARY or from_before)
            at += length + stored


def require_modest(path: Path, metadata: Any) -> None:
    """Raise UserError for a table of ours, of `metadata` as pyarrow has it, in which a column unpacks to far more than numbers and names
    do."""
    for chunk in (
        metadata.row_group(group).column(number) for group in range(metadata.num_row_groups) for number in range(metadata.num_columns)
    ):
        begin = chunk.data_page_offset
        if chunk.has_dictionary_page and 0 < chunk.dictionary_page_offset < begin:
            begin = chunk.dictionary_page_offset
        unpacked = sum(page.unpacked for page in pages(path, begin, chunk.total_compressed_size)) if chunk.num_values else 0
        if unpacked > _BOMB_BYTES + _BOMB_RATIO * chunk.total_compressed_size or chunk.num_values > _BOMB_BYTES + _BOMB_RATIO * unpacked:
            raise UserError(
                f"{path}: {chunk.total_compressed_size:,} bytes of the column {chunk.path_in_schema} unpack to {unpacked >> 20:,} MiB and "
                f"{chunk.num_values:,} values, which no features do; embed the images again"
            )


def _header(file: IO[bytes], at: int) -> tuple[dict[int, Any], int]:
    """The header at `at`, and its bytes."""
    wanted = _HEAD_BYTES
    while True:
        file.seek(at)
        head = file.read(wanted)
        try:
            return _struct(head, 0, 0)
        except IndexError:
            if len(head) < wanted or wanted >= _MOST_HEAD_BYTES:
                raise ValueError("the header of a page does not end") from None
        wanted *= 16


def _varint(head: bytes, place: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        byte = head[place]
        value, shift, place = value | (byte & 0x7F) << shift, shift + 7, place + 1
        if byte < 0x80:
            return value, place
        if shift > 63:
            raise ValueError("a number in the header of a page has no end")


def _zigzag(head: bytes, place: int) -> tuple[int, int]:
    value, place = _varint(head, place)
    return value >> 1 ^ -(value & 1), place


def _struct(head: bytes, place: int, deep: int) -> tuple[dict[int, Any], int]:
    """Field → value of the struct at `place`, and the place behind it. Raises IndexError where `head` ends within it."""
    if deep > _MOST_DEEP:
        raise ValueError("the header of a page is nested too deep")
    found: dict[int, Any] = {}
    number = 0
    while head[place]:
        kind, step = head[place] & 15, head[place] >> 4
        place += 1
        if step:
            number += step
        else:
            number, place = _zigzag(head, place)
        if kind in (_TRUE, _FALSE):
            found[number] = kind == _TRUE
        else:
            found[number], place = _value(head, place, kind, deep)
    return found, place + 1


def _value(head: bytes, place: int, kind: int, deep: int) -> tuple[Any, int]:
    """A number or a struct; None for what a page's size does not depend on."""
    if kind in _NUMBERS:
        return _zigzag(head, place)
    if kind == _STRUCT:
        return _struct(head, place, deep + 1)
    if kind == _BYTES:
        length, place = _varint(head, place)
        place += length
    elif kind in (_TRUE, _FALSE, _BYTE):
        place += 1
    elif kind == _DOUBLE:
        place += 8
    elif kind in (_LIST, _SET):
        kind, count = head[place] & 15, head[place] >> 4
        place += 1
        if count == 15:
            count, place = _varint(head, place)
        for _ in range(count):
            _, place = _value(head, place, kind, deep + 1)
    else:  # a map, which no header of a page has
        raise ValueError("the header of a page is of no known form")
    if place > len(head):
        raise IndexError
    return None, place
