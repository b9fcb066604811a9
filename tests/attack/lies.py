"""Archives and tables whose records say less than they hold."""

from __future__ import annotations

import io
import struct
import zipfile

import pyarrow
import pyarrow.parquet

_PICTURE = b"\x89PNG"  # as far as a table's column is known by


def entries(count: int, long: bool = False) -> bytes:
    """A zip whose directory has so many entries of 47 bytes, all of one file, and states that there is one; `long`: as zip64."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a", b"")
    one = buffer.getvalue()
    at, end = one.rindex(b"PK\1\2"), one.rindex(b"PK\5\6")
    listed = one[at:end] * count
    if not long:
        return one[:at] + listed + one[end : end + 8] + struct.pack("<HHIIH", 1, 1, len(listed), at, 0)
    record = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, len(listed), at)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, at + len(listed), 1)
    tail = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    return one[:at] + listed + record + locator + tail


def lying_footer(values: list[bytes]) -> bytes:
    """A table of pictures and large values in one page, whose footer says that it unpacks to 100 bytes."""
    data = _table({"image": [*[_PICTURE] * 3, *values]}, compression="zstd", use_dictionary=False)
    stated = pyarrow.parquet.ParquetFile(io.BytesIO(data)).metadata.row_group(0).column(0).total_uncompressed_size
    coded = bytes((2 * stated >> shift) & 0x7F | 0x80 for shift in range(0, (2 * stated).bit_length(), 7))
    coded = coded[:-1] + bytes([coded[-1] & 0x7F])
    lie = b"\xc8\x81" + b"\x80" * (len(coded) - 3) + b"\0"
    assert data.count(coded) >= 1
    return data.replace(coded, lie)


def prefixes(size: int, times: int) -> bytes:
    """A table in which each row repeats the large one before it, and stores nothing."""
    value = _PICTURE + bytes(size)
    options = {"compression": "zstd", "use_dictionary": False, "column_encoding": {"image": "DELTA_BYTE_ARRAY"}}
    return _table({"image": [value] * times}, **options)


def _table(columns: dict[str, list[bytes]], **options: object) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer, **options)
    return buffer.getvalue()
