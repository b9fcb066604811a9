"""Items of a source in plain values, so that those of two processes can be compared."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from simclr.data.sources.source import Item


def told(items: Iterable[Item]) -> list[list[str | None]]:
    """Everything of each item; of the picture a hash."""
    found = []
    for item in items:
        data = item.data.read_bytes() if isinstance(item.data, Path) else item.data
        if not isinstance(data, bytes):
            data = np.asarray(data).tobytes()  # pixels
        found.append([item.split, item.label, item.name, hashlib.sha256(data).hexdigest()])
    return found
