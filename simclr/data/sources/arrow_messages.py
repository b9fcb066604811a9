"""What an Arrow message says of itself, without pyarrow's own reading of it."""

from __future__ import annotations

import struct
from typing import Any

_DICTIONARY, _BATCH = 2, 3  # kinds of messages


def is_packed(message: Any) -> bool:
    """Whether the body of an Arrow message is compressed: its header is a flatbuffer, in which a table begins with the distance back to
    the list of its fields' places. Arrow itself tells only by unpacking. Raises OSError for a damaged header."""
    head = message.metadata.to_pybytes()

    def place(table: int, number: int) -> int:
        """Of a table's field; 0 where it is left out."""
        fields = table - struct.unpack_from("<i", head, table)[0]
        inside = 4 + 2 * number < struct.unpack_from("<H", head, fields)[0]
        found: int = struct.unpack_from("<H", head, fields + 4 + 2 * number)[0] if inside else 0
        return table + found if found else 0

    def below(at: int) -> int:
        return at + int(struct.unpack_from("<I", head, at)[0])

    try:
        root = below(0)
        if (kind := head[place(root, 1)]) not in (_DICTIONARY, _BATCH):
            return False
        batch = below(place(root, 2))
        return bool(place(below(place(batch, 1)) if kind == _DICTIONARY else batch, 3))
    except (struct.error, IndexError):
        raise OSError("a header is damaged") from None
