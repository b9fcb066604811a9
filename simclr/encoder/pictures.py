"""What people hand an encoder: arrays, tensors, pictures of Pillow, files by their paths or their bytes. Each becomes the pixels that
`simclr embed` would see, by the same rules (`simclr.data.raster`)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from simclr.data.depth import Rule, Values, decided, kind_of, values_of
from simclr.data.options import Options
from simclr.data.pixels import Unreadable
from simclr.data.raster import measured, opened_file, pixels_of_image, raster_of_image, rgb_of
from simclr.errors import UserError

Picture = NDArray[Any] | Tensor | Image.Image | bytes | bytearray | memoryview | str | os.PathLike[str]
"""uint8 (H, W, 3); a picture of Pillow's; the bytes of a file, or its path."""
Pictures = Picture | Iterable[Picture]
"""One, several of any sizes and kinds, or uint8 (n, H, W, 3)."""
Listed = Sequence[Picture] | NDArray[np.uint8] | Tensor
"""Several; their entries along the first axis."""
_SAMPLE = 64  # pictures that decide how those of more than 8 bits become 8
_ORDER = {3: (1, 2, 0), 4: (0, 2, 3, 1)}
_LINE = "expected uint8 images (n, H, W, 3) or (H, W, 3), with RGB from 0 to 255 as the last axis"


def listed(given: Pictures) -> Listed:
    """What was given, with a picture for each entry. Raises UserError for arrays that are no images."""
    if isinstance(given, np.ndarray | Tensor):
        return require_images(given, 3)[None] if given.ndim == 3 else require_images(given)
    if isinstance(given, bytes | bytearray | memoryview | str | os.PathLike | Image.Image):
        return [given]
    if not isinstance(given, Iterable):
        raise UserError(
            f"got {type(given).__name__} in the place of pictures; expected arrays, pictures of Pillow, bytes or paths of files"
        )
    return list(given)


def require_images(images: NDArray[Any] | Tensor, ndim: int = 4) -> NDArray[np.uint8] | Tensor:
    """`images`, if they are uint8 (n, H, W, 3), or (H, W, 3) for `ndim` 3. Raises UserError, without their pixels."""
    shape, kind = tuple(images.shape), str(images.dtype).removeprefix("torch.")
    if len(shape) == ndim and shape[-1] == 3 and 0 not in shape[-3:] and kind == "uint8":
        return images
    advice = ""
    if len(shape) in _ORDER and shape[-3] == 3 and shape[-1] != 3:
        advice = f"; put the channels last, {'permute' if isinstance(images, Tensor) else 'transpose'}{_ORDER[len(shape)]}"
    elif kind.startswith(("float", "bfloat")):
        advice = "; of images from 0 to 1 multiply by 255, round, and convert to uint8"
    raise UserError(f"got {kind} of shape {shape}; {_LINE}{advice}")


def rule_of(pictures: Listed, options: Options) -> Rule:
    """How `pictures` become 8-bit RGB: those of more than 8 bits by the stated range, or by a sample of them, as `simclr embed` has it."""
    first = options.rule({})
    if options.value_range or isinstance(pictures, np.ndarray | Tensor):
        return first
    sample = [_deep(picture, first) for picture in pictures[:: max(len(pictures) // _SAMPLE, 1)]]
    return options.rule(decided([values for values in sample if values]))


def pixels(picture: Picture, rule: Rule, name: str) -> NDArray[np.uint8] | Tensor:
    """(H, W, 3) uint8 of one picture, upright, RGB by `rule`. Raises UserError with the `name` of one that cannot be used."""
    try:
        if isinstance(picture, np.ndarray | Tensor):
            return require_images(picture, 3)
        if isinstance(picture, Image.Image):
            return pixels_of_image(picture, rule)
        return np.asarray(rgb_of(*opened_file(_file(picture), rule), rule).image)
    except Unreadable as error:
        named = str(os.fspath(picture)) if isinstance(picture, str | os.PathLike) else name
        raise UserError(f"{named} is no image that can be read ({error}); leave it out") from None
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def tensor_of(images: NDArray[np.uint8] | Tensor) -> Tensor:
    """The same memory as a tensor."""
    # torch warns about an array that is read-only.
    return torch.from_numpy(np.require(images, requirements=["W", "C"])) if isinstance(images, np.ndarray) else images


def _file(picture: object) -> bytes | Path:
    if isinstance(picture, str | os.PathLike):
        return Path(picture)
    if isinstance(picture, bytes | bytearray | memoryview):
        return bytes(picture)
    raise UserError(f"got {type(picture).__name__}; expected an array, a picture of Pillow, the bytes of a file or its path")


def _deep(picture: Picture, rule: Rule) -> Values | None:
    """Pixels of a picture that has more than 8 bits."""
    try:
        if isinstance(picture, np.ndarray | Tensor):
            return None
        if isinstance(picture, Image.Image):
            raster = raster_of_image(picture, rule)
            return values_of(raster.values) if raster and kind_of(raster.values) else None
        return measured(*opened_file(_file(picture), rule), rule)[2]
    except UserError:  # told when it is its turn
        return None
