"""Pickles whose loading leaves a file, for tests that nothing loads them."""

from __future__ import annotations

import pickle
from pathlib import Path


class Trap:
    """An object whose unpickling creates the file `marker`."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str, bytes]]:
        return (Path.write_bytes, (self.marker, b"a pickle was loaded"))  # type: ignore[return-value]

    @property
    def content(self) -> bytes:
        return pickle.dumps(self, 2)

    def planted(self, folder: Path, *names: str) -> Path:
        """Write the pickle under each of `names` in `folder`. Returns the file that must not appear."""
        for name in names:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.content)
        return self.marker
