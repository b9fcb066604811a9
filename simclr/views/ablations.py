"""The seven single operations of the paper's study of augmentations (arXiv:2002.05709, Fig. 4 and 5), keyed like all views.

Fig. 5 measures each operation, and each pair in either order. Cropping would hide that, since photographs have many sizes: so both
branches get the same random crop; one goes through the operations, the other stays as it is. The paper names the operations and shows
them; it gives no parameters for cutout, noise and Sobel. Ours stand at each function.
"""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from simclr import keyed
from simclr.config import Operation, Views
from simclr.to_device import to_device
from simclr.views.draw import Colours, crops_of, draw_colours
from simclr.views.ops import crop_resize, distort, grey

_NOISE = 0.1
_OTHER_CROPS = 2  # the crops of view 0 and 1 are App. A's


def apply(x: Tensor, views: Views, seed: int, epoch: int, ids: NDArray[np.int64]) -> Tensor:
    """`views.operations`, one after the other, on crops x (n, 3, S, S) in [0, 1] of sample `ids` (n,). Returns the same shape.

    The draws of an operation are a function of (seed, epoch, sample id, its place in the chain).
    """
    for place, operation in enumerate(views.operations or ()):
        x = _apply(x, operation, views, seed, epoch, ids, place)
    return x


def _apply(x: Tensor, operation: Operation, views: Views, seed: int, epoch: int, ids: NDArray[np.int64], place: int) -> Tensor:
    n, size = len(x), x.shape[3]
    if operation == "noise":
        return noise(x, keyed.uniform(seed, "operation", epoch, ids, place, 2 + 3 * size * size))
    u = keyed.uniform(seed, "operation", epoch, ids, place, 4)
    if operation == "crop":  # with its flip (Fig. 4)
        boxes = crops_of(views, seed, epoch, ids, np.full((n, 2), size, np.int64), _OTHER_CROPS + place)
        flip = to_device(u[:, 0] < views.flip_p, x.device)
        return crop_resize(x, to_device(boxes, x.device), size, views.resize, flip)
    if operation == "cutout":
        return cutout(x, u)
    if operation == "sobel":
        return sobel(x)
    if operation == "rotate":
        return rotate(x, 1 + (3 * u[:, 0]).astype(np.int64))
    colours = _second_view(draw_colours(replace(views, blur_p=0.5), seed, epoch, ids), n)
    if operation == "colour":
        return distort(x.clone(), replace(colours, blur_sigma=np.zeros(n)))
    never = np.zeros(n, np.bool_)
    return distort(x.clone(), replace(colours, jitter=never, grey=never))  # blur: half of the images, sigma in [0.1, 2] (App. A)


def _second_view(colours: Colours, n: int) -> Colours:
    return Colours(*(getattr(colours, field.name)[n:] for field in fields(colours)))


def cutout(x: Tensor, u: NDArray[np.float64]) -> Tensor:
    """A square of half the side, anywhere inside, becomes grey (0.5). u (n, 2 or more) in [0, 1): its place."""
    size = x.shape[3]
    half = size // 2
    corner = to_device((u[:, :2] * (size - half + 1)).astype(np.int64), x.device)
    pixel = torch.arange(size, device=x.device)
    rows, columns = ((pixel >= corner[:, i, None]) & (pixel < corner[:, i, None] + half) for i in (0, 1))
    return x.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.5)


def sobel(x: Tensor) -> Tensor:
    """The magnitude of the gradient of the luma, by Sobel's 3 × 3 filters ÷ 4, in all three channels; the border repeats."""
    across = to_device(torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 4, x.device, x.dtype)
    both = torch.stack([across, across.T])[:, None]
    gradient = F.conv2d(F.pad(grey(x), (1, 1, 1, 1), mode="replicate"), both)
    return gradient.square().sum(1, keepdim=True).sqrt().clamp(0, 1).expand(-1, 3, -1, -1).contiguous()


def noise(x: Tensor, u: NDArray[np.float64]) -> Tensor:
    """Gaussian noise of a standard deviation between 0 and 0.1, clipped to [0, 1]. u (n, 2 + 3 S²), drawn on the host: the standard
    deviation, then pairs, which the Box–Muller transform turns into pairs of normal numbers."""
    count = x[0].numel()
    first, second = np.split(u[:, 1 : 1 + count + count % 2], 2, axis=1)
    radius, angle = np.sqrt(-2 * np.log1p(-first)), 2 * np.pi * second
    normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], 1)[:, :count]
    return (x + to_device(_NOISE * u[:, :1] * normal, x.device, x.dtype).view_as(x)).clamp_(0, 1)


def rotate(x: Tensor, quarters: NDArray[np.int64]) -> Tensor:
    """Each image by its own number (n,) of quarter turns, 1 to 3 (Fig. 4), counter-clockwise."""
    x = x.clone()
    for turns in (1, 2, 3):
        rows = to_device(np.flatnonzero(quarters == turns), x.device)
        x[rows] = torch.rot90(x[rows], turns, (2, 3))
    return x
