"""SimCLR v1 and v2: the method, its data path and its kernels. Knows torch, numpy and its data; never Ray, MLflow or argv."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from simclr.encoder.directory import PublishedEncoder

__version__ = "0.1.0"


def load_encoder(path: str | Path, *, device: str | torch.device = "cpu") -> PublishedEncoder:
    """The encoder published in directory `path` (encoder.safetensors + config.json), in evaluation mode, on `device` ("cpu", "cuda", or
    "auto": a GPU where there is one). `path` may be "hf://ORG/NAME" or "hf://ORG/NAME@REVISION", an encoder on the Hugging Face Hub.

    `load_encoder(path).embed(images)` takes uint8 images (n, H, W, 3) of any size, lists of such, pictures of Pillow's, and image files by
    bytes or path, and returns features (n, d_h) on the CPU. Raises UserError where the directory is no published encoder or its weights do
    not fit its config.
    """
    from simclr.encoder import hub
    from simclr.encoder.directory import read_encoder  # torch costs seconds; `simclr --help` must not wait for it

    return read_encoder(hub.fetched(path) if hub.is_address(path) else Path(path), device)


__all__ = ["__version__", "load_encoder"]
