"""The loader of a registered encoder, which the version's MLmodel file names: code over safetensors, nothing pickled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import simclr

_ROWS = 256


class EncoderModel:
    """`predict(images)`: uint8 (n, H, W, 3) of any size → float32 features (n, d)."""

    def __init__(self, path: Path) -> None:
        self.encoder = simclr.load_encoder(path)

    def predict(self, images: NDArray[np.uint8], params: dict[str, Any] | None = None) -> NDArray[np.float32]:
        rows = [self.encoder.embed(images[i : i + _ROWS]).numpy() for i in range(0, len(images), _ROWS)]
        return np.concatenate(rows) if rows else np.zeros((0, self.encoder.d_h), np.float32)


def _load_pyfunc(path: str) -> EncoderModel:
    """MLflow's entry point; `path` is the encoder's directory."""
    return EncoderModel(Path(path))
