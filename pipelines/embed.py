"""`simclr embed`: encoder + images → features.npz."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import tyro
from numpy.typing import NDArray

from pipelines.terminal import Bar
from simclr.data.sources import is_image

if TYPE_CHECKING:
    from simclr.model import PublishedEncoder

_BATCH = 64


@dataclass(frozen=True)
class Args:
    """Features of image files, with the preprocessing that the encoder was trained under."""

    encoder: Annotated[Path, tyro.conf.Positional]
    """A published encoder's directory (`simclr pull`, or RUN/encoder)."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Image files, folders of them, or an .npy file of uint8 images (n, H, W, 3)."""
    out: Path = Path("features.npz")
    """Written: features (n, d) float32 and names (n,)."""


def main(args: Args) -> None:
    if not args.images:
        raise ValueError("which images? give files, folders or an .npy file")
    names, arrays = _open(args.images)
    import torch

    import simclr

    encoder = simclr.load_encoder(args.encoder)
    features: list[NDArray[np.float32]] = []
    with Bar("embed", len(names)) as bar, torch.inference_mode():
        for begin in range(0, len(names), _BATCH):
            features += _embed(encoder, [arrays(i) for i in range(begin, min(begin + _BATCH, len(names)))])
            bar.update(len(features))
    scratch = args.out.with_name(f".{args.out.name}.writing")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with scratch.open("wb") as file:
        np.savez(file, features=np.stack(features), names=np.array(names))
    scratch.replace(args.out)
    print(f"{args.out}: {len(features)} × {features[0].shape[0]} features")


def _embed(encoder: PublishedEncoder, images: list[NDArray[np.uint8]]) -> list[NDArray[np.float32]]:
    """(d,) features of each image; images of one size go through the encoder together."""
    by_size: dict[tuple[int, ...], list[int]] = {}
    for i, image in enumerate(images):
        by_size.setdefault(image.shape, []).append(i)
    features: dict[int, NDArray[np.float32]] = {}
    for rows in by_size.values():
        features |= zip(rows, encoder.embed(np.stack([images[i] for i in rows])).numpy(), strict=True)
    return [features[i] for i in range(len(images))]


def _open(paths: tuple[Path, ...]) -> tuple[list[str], Callable[[int], NDArray[np.uint8]]]:
    """(names, function: index → uint8 (H, W, 3))."""
    if len(paths) == 1 and paths[0].suffix == ".npy":
        if not paths[0].is_file():
            raise ValueError(f"no file {paths[0]}; expected images")
        array = np.load(paths[0], mmap_mode="r")
        if array.ndim != 4 or array.shape[3] != 3 or array.dtype != np.uint8:
            raise ValueError(f"{paths[0]} holds {array.dtype} {array.shape}; expected uint8 (n, H, W, 3)")
        return [str(i) for i in range(len(array))], lambda i: np.asarray(array[i])
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += sorted(p for p in path.rglob("*") if is_image(p.name))
        elif path.is_file():
            files.append(path)
        else:
            raise ValueError(f"no file or folder {path}; expected images")
    if not files:
        raise ValueError(f"no images in {', '.join(map(str, paths))}")
    return [str(f) for f in files], lambda i: _read(files[i])


def _read(path: Path) -> NDArray[np.uint8]:
    from PIL import Image, UnidentifiedImageError

    from simclr.data.pixels import upright_rgb

    try:
        with Image.open(path) as image:
            image.load()
            return np.asarray(upright_rgb(image))
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise ValueError(f"{path} is no image that can be read ({error}); leave it out") from None
