"""Keyed parameters of views: crops and colours as pure functions of (seed, epoch, sample id, view), drawn on the host."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simclr import keyed
from simclr.config import Views

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
OPERATIONS = ("brightness", "contrast", "saturation", "hue")
CENTRE_CROP = 0.875
BOX = slice(13, 17)
"""Columns of a row of `Drawn` that have its box; those before are `Colours`."""
_WIDTH = 17


@dataclass(frozen=True, kw_only=True, slots=True)
class Crop:
    """Crops of an image that are drawn and treated alike. A method asks for a list of them; views are numbered through the list."""

    count: int = 2
    """How many."""
    views: Views
    """Their size, area, aspect and resize, and the distortions that follow."""
    distorted: bool = True
    """Whether colour, grey, blur and solarisation follow, or a flip alone."""
    neighbours: int = 0
    """Of two crops, the second is of another frame at most so many before or behind (`simclr.data.videos`); 0 = of the same image."""

    @property
    def size_px(self) -> int:
        """Side of the crops, in pixels."""
        return self.views.size_px


def boxes_of(crops: tuple[Crop, ...], seed: int, epoch: int, ids: Ints, sizes: Ints) -> Ints:
    """Boxes of every crop of `crops`, one after the other: (n, views, 4), as `crop_boxes`."""
    boxes, view = [], 0
    for crop in crops:
        boxes += _boxes(crop, seed, epoch, ids, sizes, view)
        view += crop.count
    return np.stack(boxes, 1)


def _boxes(crop: Crop, seed: int, epoch: int, ids: Ints, sizes: Ints, view: int) -> list[Ints]:
    """`crops_of` each view that `crop` asks for, from number `view` on."""
    first = crops_of(crop.views, seed, epoch, ids, sizes, view)
    if crop.views.operations is not None:  # in the ablation of single operations a crop is one of them: all views begin with the same
        return [first] * crop.count
    return [first, *(crops_of(crop.views, seed, epoch, ids, sizes, other) for other in range(view + 1, view + crop.count))]


def crop_boxes(views: Views, seed: int, epoch: int, ids: Ints, sizes: Ints) -> Ints:
    """Crops of both views: (n, 2, 4) as (top, left, height, width) in pixels of images with `sizes` (n, 2) (height, width).

    By views.crop_law tensorflow they have the distribution of the official `sample_distorted_bounding_box`: aspect uniform, then height
    uniform over what the area allows, then width = height × aspect. Up to 100 attempts, then the whole image. Its mean area is 0.39 of a
    3:4 photograph, against 0.44 by torchvision's RandomResizedCrop: area uniform, log aspect uniform, up to 10 attempts, then the largest
    box in the middle whose aspect is allowed.
    """
    return boxes_of((Crop(views=views),), seed, epoch, ids, sizes)


def crops_of(views: Views, seed: int, epoch: int, ids: Ints, sizes: Ints, view: int) -> Ints:
    """`crop_boxes` of one view: (n, 4)."""
    last, attempt_of, boxes = 100, _attempt, np.concatenate([np.zeros_like(sizes), sizes], 1)
    if views.crop_law == "torchvision":
        last, attempt_of, boxes = 10, _attempt_by_area, _middle(views, sizes)
    waiting = np.arange(len(ids))
    for block in range(0, last, 4):  # drawn four attempts at a time: most images need one
        draws = keyed.uniform(seed, "crop", epoch, ids[waiting], view, 4 * (block + 4))[:, 4 * block :]
        for attempt in range(min(4, last - block)):
            found, box = attempt_of(views, draws[:, 4 * attempt : 4 * attempt + 4], sizes[waiting])
            boxes[waiting[found]] = box[found]
            waiting, draws = waiting[~found], draws[~found]
        if not len(waiting):
            break
    return boxes


def centre_boxes(sizes: Ints, share: float = CENTRE_CROP) -> Ints:
    """(n, 4) boxes (top, left, height, width) in the middle of images of sizes (n, 2): squares of `share` of the shorter side."""
    side = np.maximum(np.rint(share * sizes.min(1)).astype(np.int64), 1)
    top, left = (sizes[:, 0] - side + 1) // 2, (sizes[:, 1] - side + 1) // 2
    return np.stack([top, left, side, side], 1)


def _attempt(views: Views, u: Floats, sizes: Ints) -> tuple[NDArray[np.bool_], Ints]:
    """One attempt per image with uniforms u (n, 4): whether it fits, and the box."""
    h, w = sizes[:, 0], sizes[:, 1]
    low, high = views.area
    aspect = views.aspect[0] + u[:, 0] * (views.aspect[1] - views.aspect[0])
    smallest = np.rint(np.sqrt(low * h * w / aspect)).astype(np.int64)
    largest = np.rint(np.sqrt(high * h * w / aspect)).astype(np.int64)
    largest = np.where(np.rint(largest * aspect) > w, ((w + 0.5 - 1e-7) / aspect).astype(np.int64), largest)
    largest = np.minimum(largest, h)
    smallest = np.minimum(smallest, largest)
    height = smallest + (u[:, 1] * (largest - smallest + 1)).astype(np.int64)
    width = np.rint(height * aspect).astype(np.int64)
    # Rounding may leave the area just outside its bounds: one row more or less mends it.
    nudge = (width * height < low * h * w).astype(np.int64) - (width * height > high * h * w)
    height = height + nudge
    width = np.where(nudge != 0, np.rint(height * aspect).astype(np.int64), width)
    area = width * height
    fits = (area >= views.least_area * h * w) & (area <= high * h * w) & (width <= w) & (height <= h) & (area > 0)
    top = (u[:, 2] * np.maximum(h - height, 1)).astype(np.int64)
    left = (u[:, 3] * np.maximum(w - width, 1)).astype(np.int64)
    return fits, np.stack([top, left, height, width], 1)


def _attempt_by_area(views: Views, u: Floats, sizes: Ints) -> tuple[NDArray[np.bool_], Ints]:
    """`_attempt` by torchvision's law."""
    h, w = sizes[:, 0], sizes[:, 1]
    area = h * w * (views.area[0] + u[:, 0] * (views.area[1] - views.area[0]))
    low, high = np.log(views.aspect)
    aspect = np.exp(low + u[:, 1] * (high - low))
    height = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    width = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    fits = (width > 0) & (width <= w) & (height > 0) & (height <= h)
    top = (u[:, 2] * np.maximum(h - height + 1, 1)).astype(np.int64)
    left = (u[:, 3] * np.maximum(w - width + 1, 1)).astype(np.int64)
    return fits, np.stack([top, left, height, width], 1)


def _middle(views: Views, sizes: Ints) -> Ints:
    """(n, 4) largest boxes in the middle of images of sizes (n, 2) whose aspect is allowed."""
    h, w = sizes[:, 0], sizes[:, 1]
    low, high = views.aspect
    height = np.where(w < low * h, np.rint(w / low).astype(np.int64), h)
    width = np.where(w > high * h, np.rint(h * high).astype(np.int64), w)
    return np.stack([(h - height) // 2, (w - width) // 2, height, width], 1)


@dataclass(frozen=True, slots=True)
class Colours:
    """Parameters of each of m views besides its crop. Rows are views in the order [view 0 of n images; view 1; …]."""

    flip: NDArray[np.bool_]
    """(m,) flipped left to right."""
    jitter: NDArray[np.bool_]
    """(m,) whether the colour jitter applies."""
    order: Ints
    """(m, 4) which of OPERATIONS comes first, second, …"""
    factors: Floats
    """(m, 4) per operation: factors of brightness, contrast and saturation; the turn of the hue, in turns."""
    grey: NDArray[np.bool_]
    """(m,) whether the colour is dropped."""
    blur_sigma: Floats
    """(m,) standard deviation of the blur, in pixels; 0 = none."""
    solarise: NDArray[np.bool_]
    """(m,) whether the values from a half on are inverted, behind the blur."""

    def some(self, views: int, images: slice) -> Colours:
        """Those of some of the images, of each of the `views` views."""
        of = np.arange(len(self.flip)).reshape(views, -1)[:, images].ravel()
        return Colours(*(getattr(self, field.name)[of] for field in fields(self)))


def draw_colours(views: Views, seed: int, epoch: int, ids: Ints, first: int = 0, count: int = 2) -> Colours:
    """Colour, flip, blur and solarisation of `count` views of `ids` (n,), from view number `first` on, as count·n rows (App. A).

    Where a probability differs by view, the first of these `count` has the first. (Numbers go on through all crops of an image; a method's
    large crops and its small ones each have probabilities of their own.)
    """
    u = np.concatenate([keyed.uniform(seed, "colour", epoch, ids, view, 16) for view in range(first, first + count)])
    s = views.colour_strength
    turns = 0.8 * s * np.array([1, 1, views.saturation])
    low, high = np.append(np.maximum(1 - turns, 0.0), -0.2 * s), np.append(1 + turns, 0.2 * s)
    blur_p, solarise_p = (np.repeat([views.of_view(name, view) for view in range(count)], len(ids)) for name in ("blur_p", "solarise_p"))
    return Colours(
        flip=u[:, 0] < views.flip_p,
        jitter=u[:, 1] < views.jitter_p,
        order=np.argsort(u[:, 2:6], axis=1, kind="stable"),
        factors=low + u[:, 6:10] * (high - low),
        grey=u[:, 10] < views.grey_p,
        blur_sigma=np.where(u[:, 11] < blur_p, 0.1 + 1.9 * u[:, 12], 0.0),
        solarise=u[:, 13] < solarise_p,
    )


@dataclass(frozen=True, slots=True)
class Drawn:
    """What was drawn for the views of n images that a `Crop` asks for: the loader's thread draws it ahead of the step."""

    colours: Colours
    block: Tensor
    """(count, n, 17) float32: colours and boxes in one piece, which travels to the device by itself. A row is flip, jitter, four of
    order, four factors, grey, blur_sigma, solarise, and the box (top, left, height, width) of a whole image."""

    def some(self, images: slice) -> Drawn:
        """What was drawn for some of the images."""
        if images == slice(0, self.block.shape[1]):
            return self
        return Drawn(self.colours.some(len(self.block), images), self.block[:, images])


def draw_views(crop: Crop, seed: int, epoch: int, ids: Ints, sizes: Ints | None = None, first: int = 0) -> Drawn:
    """Draw for the views of `ids` (n,), from view number `first` on. `sizes` (n, 2) are those of whole images; None = they are crops."""
    c = draw_colours(crop.views, seed, epoch, ids, first, crop.count)
    block = np.zeros((crop.count * len(ids), _WIDTH), np.float32)
    block[:, : BOX.start] = np.column_stack([getattr(c, field.name) for field in fields(c)])
    if sizes is not None:
        block[:, BOX] = np.concatenate(_boxes(crop, seed, epoch, ids, sizes, first))
    return Drawn(c, torch.from_numpy(block).view(crop.count, len(ids), _WIDTH))


def draw_batch(crops: tuple[Crop, ...], seed: int, epoch: int, ids: Ints, sizes: Ints | None) -> tuple[Drawn | None, ...]:
    """`draw_views` for each of `crops`; None for crops without distortions."""
    firsts = np.cumsum([0, *(crop.count for crop in crops)])
    each = zip(crops, firsts.tolist(), strict=False)
    return tuple(draw_views(crop, seed, epoch, ids, sizes, first) if crop.distorted else None for crop, first in each)
