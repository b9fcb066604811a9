"""The operations of views: crop and resize, colour, grey, blur, solarisation. torch, on the device."""

from __future__ import annotations

import functools
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from simclr.config import Resize
from simclr.to_device import to_device
from simclr.views.draw import OPERATIONS, Colours


class Normalised(Protocol):
    """Settings with a mean and a standard deviation per channel, such as `Views`."""

    @property
    def mean(self) -> tuple[float, float, float]: ...

    @property
    def std(self) -> tuple[float, float, float]: ...


def normalise(x: Tensor, by: Normalised) -> Tensor:
    """(n, 3, H, W) in [0, 1] → (x − mean) / std, channel by channel."""
    if by.mean == (0.0, 0.0, 0.0) and by.std == (1.0, 1.0, 1.0):
        return x
    return (x - _per_channel(by.mean, x)) / _per_channel(by.std, x)


def _per_channel(values: tuple[float, ...], x: Tensor) -> Tensor:
    """(1, 3, 1, 1) constants on x's device, filled in there: the host would wait for the copy of a list to a GPU."""
    return torch.cat([x.new_full((1, 1, 1, 1), value) for value in values], 1)


def crop_resize(x: Tensor, boxes: Tensor, size: int, kernel: Resize, flip: Tensor | None = None) -> Tensor:
    """Crop boxes (n, 4) out of images (n, 3, H, W) and resize each to (size, size), in [0, 1]; flipped where `flip` says.

    Half-pixel centres. Bicubic and bilinear do not antialias, like the official code; area is the mean over what an output
    pixel covers. A separable resize is two batched matrix products, whose matrices hold crop, resize and flip at once; for
    small images that is cheaper than gathering. Larger ones come from `data.ffcv.resize`, in whole numbers, by the same weights.
    """
    top, left, height, width = boxes.to(x.dtype).unbind(1)
    rows = _resize_matrix(top, height, x.shape[2], size, kernel)
    columns = _resize_matrix(left, width, x.shape[3], size, kernel)
    if flip is not None:
        columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    return torch.matmul(torch.matmul(rows[:, None], x), columns[:, None].mT).clamp_(0, 1)


def _resize_matrix(start: Tensor, length: Tensor, source: int, size: int, kernel: Resize) -> Tensor:
    """(n, size, source): each output pixel's weights over the source's pixels, of which [start, start + length) exist."""
    steps = torch.arange(size, device=start.device, dtype=start.dtype) + 0.5
    if kernel == "area":
        scale = (length / size)[:, None, None]
        edge = start[:, None, None] + (steps - 0.5)[:, None] * scale
        pixel = torch.arange(source, device=start.device, dtype=start.dtype)
        return (torch.minimum(edge + scale, pixel + 1) - torch.maximum(edge, pixel)).clamp_min(0) / scale
    centre = start[:, None] + steps * (length / size)[:, None] - 0.5
    if kernel == "bilinear":  # beyond the border the last pixel repeats
        centre = centre.clamp(min=start[:, None], max=(start + length - 1)[:, None])
    pixel = torch.arange(source, device=start.device, dtype=start.dtype)
    t = (pixel - centre[:, :, None]).abs()
    if kernel == "bilinear":
        return (1 - t).clamp_min(0)
    # Keys' cubic with a = -1/2; taps outside the crop are dropped and the rest rescaled, as TensorFlow does.
    near = (1.5 * t - 2.5) * t * t + 1
    far = ((-0.5 * t + 2.5) * t - 4) * t + 2
    weights = torch.where(t < 1, near, torch.where(t < 2, far, torch.zeros_like(t)))
    inside = (pixel >= start[:, None]) & (pixel < (start + length)[:, None])
    weights = weights * inside[:, None, :]
    return weights / weights.sum(2, keepdim=True)


def resize_square(x: Tensor, size: int, kernel: Resize) -> Tensor:
    """One square picture on the host, (side, side, channels) float32 in [0, 1] → (channels, size, size), as `crop_resize` of all of it.

    A matrix of `crop_resize` holds two to four weights in a row of hundreds. Here only these are multiplied: for 328 → 224 px the sums
    differ by 3e-7, and take an eighth of the time, in a few calls. Threads that decode pictures hand the interpreter over at each call.
    """
    side, _, channels = x.shape
    indices, first, weights = _taps(side, size, kernel)
    rows = F.embedding_bag(indices, x.reshape(side, side * channels), first, per_sample_weights=weights, mode="sum")
    turned = rows.view(size, side, channels).permute(1, 2, 0).reshape(side, channels * size)
    both = F.embedding_bag(indices, turned, first, per_sample_weights=weights, mode="sum")
    return both.view(size, channels, size).permute(1, 2, 0).contiguous().clamp_(0, 1)


@functools.lru_cache(maxsize=256)
def _taps(length: int, size: int, kernel: Resize) -> tuple[Tensor, Tensor, Tensor]:
    """The pixels whose weights in `_resize_matrix` are not 0, (size · taps,); where each output pixel's begin, (size,); these weights.
    They are kept: photographs have a few sizes."""
    matrix = _resize_matrix(torch.zeros(1), torch.full((1,), float(length)), length, size, kernel)[0]
    taps = int((matrix != 0).sum(1).max())
    indices = matrix.abs().topk(taps, 1).indices.sort(1).values
    return indices.flatten(), torch.arange(0, size * taps, taps), matrix.gather(1, indices).flatten()


def distort(x: Tensor, colours: Colours) -> Tensor:
    """Colour jitter in each view's own order, grey, blur, solarisation. x (m, 3, H, W) in [0, 1]; works in place and returns it.

    Rows are picked by index lists that the host already knows, so nothing waits for the device.
    """
    for position in range(4):
        for operation, name in enumerate(OPERATIONS):
            chosen = colours.jitter & (colours.order[:, position] == operation)
            if not chosen.any():
                continue
            rows = rows_of(chosen, x.device)
            factor = to_device(colours.factors[chosen, operation], x.device, x.dtype)
            x.index_copy_(0, rows, _APPLY[name](x[rows], factor.view(-1, 1, 1, 1)))
    if colours.grey.any():
        rows = rows_of(colours.grey, x.device)
        x.index_copy_(0, rows, grey(x[rows]).expand(-1, 3, -1, -1))
    chosen = colours.blur_sigma > 0
    if chosen.any():
        rows = rows_of(chosen, x.device)
        sigma = to_device(colours.blur_sigma[chosen], x.device, x.dtype)
        x.index_copy_(0, rows, gaussian_blur(x[rows], sigma))
    if colours.solarise.any():
        rows = rows_of(colours.solarise, x.device)
        x.index_copy_(0, rows, solarise(x[rows]))
    return x


def distort_all(x: Tensor, block: Tensor) -> Tensor:
    """`distort` in fixed shapes: every operation on every row, kept where it was drawn. Four times the work.

    For devices that compile a program for each shape, such as TPUs: lists of rows would be compiled anew at each step. x (m, 3, H, W);
    block (m, 17), on its device, rows as in `Drawn`.
    """
    jitter, greyed, sigma, solarised = block[:, 1] > 0, block[:, 10] > 0, block[:, 11], block[:, 12] > 0
    order, turns = block[:, 2:6], block[:, 6:10].to(x.dtype).view(-1, 4, 1, 1, 1)
    for position in range(4):
        before = x
        for operation, name in enumerate(OPERATIONS):
            chosen = (jitter & (order[:, position] == operation)).view(-1, 1, 1, 1)
            x = torch.where(chosen, _APPLY[name](before, turns[:, operation]), x)
    x = torch.where(greyed.view(-1, 1, 1, 1), grey(x), x)
    blurred = (sigma > 0).view(-1, 1, 1, 1)
    x = torch.where(blurred, gaussian_blur(x, torch.where(sigma > 0, sigma, 1.0).to(x.dtype)), x)
    return torch.where(solarised.view(-1, 1, 1, 1), solarise(x), x)


def by_index(device: torch.device) -> bool:
    """Whether a device runs operations of any shape without compiling them."""
    return device.type in ("cpu", "cuda")


def rows_of(chosen: NDArray[np.bool_], device: torch.device) -> Tensor:
    return to_device(np.flatnonzero(chosen), device)


def solarise(x: Tensor) -> Tensor:
    """Values from a half on are inverted: x where x < 0.5, else 1 − x (arXiv:2006.07733, App. B), which is the smaller of the two."""
    return torch.minimum(x, 1 - x)


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    """x · factor (v2's random_brightness; v1 added instead)."""
    return (x * factor).clamp_(0, 1)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Away from the mean of each channel by `factor`, as TensorFlow does (torchvision: from the mean of the grey image)."""
    mean = x.mean((2, 3), keepdim=True)
    return torch.addcmul(mean * (1 - factor), x, factor).clamp_(0, 1)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    """HSV saturation times `factor`, at most 1, without the detour over HSV: v − (v − x) · min(factor, v / (v − min))."""
    v, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    limit = v / (v - low).clamp_min(1e-12)
    return torch.addcmul(v, v - x, torch.minimum(factor, limit), value=-1).clamp_(0, 1)


def hue(x: Tensor, turn: Tensor) -> Tensor:
    """HSV hue turned by `turn` (in turns), saturation and value kept."""
    v, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    chroma = v - low
    r, g, b = x.split(1, 1)
    c = chroma.clamp_min(1e-12)
    sector = torch.where(v == r, (g - b) / c, torch.where(v == g, 2 + (b - r) / c, 4 + (r - g) / c))
    offsets = torch.arange(5, 0, -2, device=x.device, dtype=x.dtype).view(1, 3, 1, 1)  # 5, 3, 1; made on the device, not copied
    k = torch.remainder(sector + 6 * turn + offsets, 6.0)
    return torch.addcmul(v, chroma, torch.minimum(k, 4 - k).clamp_(0, 1), value=-1).clamp_(0, 1)


def grey(x: Tensor) -> Tensor:
    """Luma (n, 1, H, W) with the weights of ITU-R BT.601, as TensorFlow has them."""
    return x[:, 0:1] * 0.2989 + x[:, 1:2] * 0.5870 + x[:, 2:3] * 0.1140


def gaussian_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Separable Gaussian of each image's own `sigma` (n,), in pixels; the kernel spans 10 % of the side (App. A).

    Beyond the border lie zeros, as in the official code. Each direction is a product with a banded matrix.
    """
    for dim in (2, 3):
        size = x.shape[dim]
        radius = x.shape[2] // 10 // 2
        pixel = torch.arange(size, device=x.device, dtype=x.dtype)
        distance = (pixel[:, None] - pixel[None, :]).abs()
        taps = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
        scale = -0.5 / sigma.square()
        total = torch.exp(taps.square()[None] * scale[:, None]).sum(1)
        band = torch.exp(distance.square()[None] * scale[:, None, None]) * (distance <= radius) / total[:, None, None]
        x = torch.matmul(band[:, None], x) if dim == 2 else torch.matmul(x, band[:, None].mT)
    return x


_APPLY = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue}
