"""How a picture becomes an encoder's input outside training: for online evaluation, `evaluate`, `embed` and registered models alike."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from simclr.config import Resize, Views
from simclr.errors import UserError
from simclr.to_device import to_device
from simclr.views.draw import Ints, centre_boxes
from simclr.views.ops import crop_resize, normalise, resize_square

_LARGE_PX = 5000  # side of a crop


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocessing:
    """How a picture becomes the encoder's input; a wrong setting costs tenths of a point to points."""

    size_px: int
    """Side of the encoder's input. A picture of this size is taken as it is."""
    centre_crop: float
    """Side of the central square crop of any other picture, as a share of its shorter side; the official code takes 0.875, and all of a
    CIFAR image."""
    resize: Resize
    """Kernel that brings the crop to `size_px`, without antialiasing, as the training crops are made. A crop of more than twice the size
    is first reduced to twice the size, with antialiasing."""
    mean: tuple[float, float, float]
    """Mean, subtracted from pixels in [0, 1]. The official encoders subtract nothing."""
    std: tuple[float, float, float]
    """Standard deviation, by which they are then divided. The official encoders divide by nothing."""

    def __post_init__(self) -> None:
        for name, value, fits, expected in (
            ("size_px", self.size_px, 8 <= self.size_px <= 4096, "8 to 4096 pixels"),
            ("centre_crop", self.centre_crop, 0 < self.centre_crop <= 1, "a share in (0, 1]"),
            ("std", self.std, min(self.std) > 0, "positive numbers"),
        ):
            if not fits:
                raise UserError(f"preprocessing.{name} is {value}; expected {expected}")

    @classmethod
    def of(cls, views: Views) -> Preprocessing:
        """The preprocessing for an encoder that was trained on `views`."""
        whole = views.size_px <= 32
        return cls(size_px=views.size_px, centre_crop=1.0 if whole else 0.875, resize=views.resize, mean=views.mean, std=views.std)

    def boxes(self, sizes: Ints) -> Ints:
        """(n, 4) boxes (top, left, height, width) that the encoder sees of pictures of sizes (n, 2) (height, width)."""
        ready = (sizes == self.size_px).all(1)[:, None]
        return np.where(ready, np.concatenate([np.zeros_like(sizes), sizes], 1), centre_boxes(sizes, self.centre_crop))

    def resized(self, images: Tensor) -> Tensor:
        """uint8 images (n, H, W, 3) → (n, 3, size, size) float32 in [0, 1], cropped and resized."""
        x, size = images.permute(0, 3, 1, 2), self.size_px
        if x.shape[2:] == (size, size):
            return x.float() / 255
        top, left, side = _square(self, x.shape[2], x.shape[3])
        crop = x[:, :, top : top + side, left : left + side]
        if side > _LARGE_PX:  # one colour at a time: as floats, all three of 90 million pixels are a gigabyte, twice
            return torch.cat([self.from_squares(colour.float() / 255) for colour in crop.split(1, 1)], 1)
        return self.from_squares(crop.float() / 255)

    def of_picture(self, pixels: Tensor) -> Tensor:
        """One picture on the host, uint8 (H, W, 3) → (3, size, size): `self(pixels[None])[0]` to 1e-6 of the largest entry.

        In a third of the time, with a quarter of the calls."""
        height, width, _ = pixels.shape
        if (height, width) == (self.size_px, self.size_px):
            return self(pixels[None])[0]
        top, left, side = _square(self, height, width)
        crop = pixels[top : top + side, left : left + side]
        if side > 2 * self.size_px:
            colours = crop.permute(2, 0, 1)[None].split(1 if side > _LARGE_PX else 3, 1)
            x = torch.cat([self._reduced(colour.float() / 255) for colour in colours], 1)[0].permute(1, 2, 0)
        else:
            x = crop.float() / 255
        return normalise(resize_square(x, self.size_px, self.resize)[None], self)[0]

    def from_squares(self, x: Tensor) -> Tensor:
        """Crops (n, 3, side, side) in [0, 1] → (n, 3, size, size)."""
        x = self._reduced(x)
        whole = to_device(np.array([[0, 0, x.shape[2], x.shape[3]]]), x.device)
        return crop_resize(x, whole, self.size_px, self.resize)

    def _reduced(self, x: Tensor) -> Tensor:
        """Crops (n, channels, side, side) in [0, 1], at most twice as large as the encoder's input."""
        twice = 2 * self.size_px
        return F.interpolate(x, (twice, twice), mode="bicubic", antialias=True).clamp(0, 1) if x.shape[3] > twice else x

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 images (n, H, W, 3) of any size → the encoder's input, (n, 3, size, size) float32, normalised."""
        return normalise(self.resized(images), self)


@functools.lru_cache(maxsize=1024)
def _square(preprocessing: Preprocessing, height: int, width: int) -> tuple[int, int, int]:
    """Top, left and side of the square that the encoder sees of a picture of another size than its own."""
    top, left, side, _ = preprocessing.boxes(np.array([(height, width)]))[0].tolist()
    return top, left, side
