"""Tables of features that tests write themselves."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simclr.data.feature_parts import About, write_part


def write(
    folder: Path,
    h: NDArray[Any],
    paths: Sequence[str],
    *,
    labels: Sequence[str | None] | None = None,
    sizes: Sequence[tuple[int, int]] | None = None,
    splits: Sequence[str] | None = None,
    source: str = "gone",
    encoder: str = "ab" * 32,
    dtype: Any = "float32",
    parts: int = 2,
) -> Path:
    """Features h (n, d) of the pictures `paths` as `parts` in `folder`; sizes are (width, height)."""
    folder.mkdir(parents=True, exist_ok=True)
    n = len(h)
    about = About(encoder=encoder, preprocessing={}, source=source, d=h.shape[1], dtype=dtype, key="k")
    rows: dict[str, list[Any]] = {
        "id": list(range(n)),
        "split": list(splits or ["train"] * n),
        "path": list(paths),
        "sha256": ["0"] * n,
        "label": list(labels or [None] * n),
        "width": [w for w, _ in sizes or [(8, 8)] * n],
        "height": [h for _, h in sizes or [(8, 8)] * n],
    }
    edges = np.linspace(0, n, parts + 1).astype(int)
    for part, (begin, end) in enumerate(itertools.pairwise(edges)):
        some = {name: values[begin:end] for name, values in rows.items()}
        write_part(folder / f"part-{part:05d}.parquet", about, some, h[begin:end])
    return folder


def at_angles(degrees: Sequence[float]) -> NDArray[np.float32]:
    """(n, 2) vectors at these angles, of several lengths, so that cosines are those of differences."""
    turn = np.radians(np.array(degrees, np.float64))
    return (np.stack([np.cos(turn), np.sin(turn)], 1) * (1 + np.arange(len(degrees)) % 3)[:, None]).astype(np.float32)
