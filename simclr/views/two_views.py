"""The two random views of an image (arXiv:2002.05709, App. A): keyed parameters, and their application on the device.

Parameters are pure functions of (seed, epoch, sample id, view), see `keyed`. Where the official code and torchvision
differ we follow the official code (the tests hold its pixels): the crop sampler, contrast about the mean of each channel
(torchvision: of the grey image), saturation and hue in HSV, brightness as a factor (v2), a clip to [0, 1] after each
operation, a blur that sees zeros beyond the border.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simclr import keyed
from simclr.config import Resize, Views
from simclr.to_device import to_device

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
OPERATIONS = ("brightness", "contrast", "saturation", "hue")
CENTRE_CROP = 0.875
_ATTEMPTS = 100
_MIN_COVERED = 0.1  # the official code asks a crop to cover 10 % of the image, which overrules its 8 %


# ── Parameters: numpy, on the host ─────────────────────────────────────────────────────────────────────────────────


def crop_boxes(views: Views, seed: int, epoch: int, ids: Ints, sizes: Ints) -> Ints:
    """Crops of both views: (n, 2, 4) as (top, left, height, width) in pixels of images with `sizes` (n, 2) (height, width).

    The distribution of the official `sample_distorted_bounding_box`: aspect uniform, then height uniform over what the
    area allows, then width = height × aspect. Its mean area is 0.39 of a 3:4 photograph, against 0.54 for
    torchvision's RandomResizedCrop, which draws the area uniformly. Up to 100 attempts, then the whole image.
    """
    first = crops_of(views, seed, epoch, ids, sizes, 0)
    # In the ablation of single operations a crop is one of them, and what both views begin with is the same.
    return np.stack([first, first if views.operations is not None else crops_of(views, seed, epoch, ids, sizes, 1)], 1)


def crops_of(views: Views, seed: int, epoch: int, ids: Ints, sizes: Ints, view: int) -> Ints:
    """`crop_boxes` of one view: (n, 4)."""
    boxes = np.concatenate([np.zeros_like(sizes), sizes], 1)
    waiting = np.arange(len(ids))
    for block in range(0, _ATTEMPTS, 4):  # drawn four attempts at a time: most images need one
        draws = keyed.uniform(seed, "crop", epoch, ids[waiting], view, 4 * (block + 4))[:, 4 * block :]
        for attempt in range(4):
            found, box = _attempt(views, draws[:, 4 * attempt : 4 * attempt + 4], sizes[waiting])
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
    fits = (area >= max(low, min(_MIN_COVERED, high)) * h * w) & (area <= high * h * w) & (width <= w) & (height <= h) & (area > 0)
    top = (u[:, 2] * np.maximum(h - height, 1)).astype(np.int64)
    left = (u[:, 3] * np.maximum(w - width, 1)).astype(np.int64)
    return fits, np.stack([top, left, height, width], 1)


@dataclass(frozen=True, slots=True)
class Colours:
    """What happens to each of m views besides its crop. Rows are views in the order [view 0 of n images; view 1]."""

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
    """(m,) deviation of the blur, in pixels; 0 = none."""


def draw_colours(views: Views, seed: int, epoch: int, ids: Ints) -> Colours:
    """Colour, flip and blur parameters of both views of `ids` (n,), as 2n rows (App. A)."""
    u = np.concatenate([keyed.uniform(seed, "colour", epoch, ids, view, 16) for view in range(2)])
    s = views.colour_strength
    low = np.array([max(1 - 0.8 * s, 0.0)] * 3 + [-0.2 * s])
    high = np.array([1 + 0.8 * s] * 3 + [0.2 * s])
    return Colours(
        flip=u[:, 0] < views.flip_p,
        jitter=u[:, 1] < views.jitter_p,
        order=np.argsort(u[:, 2:6], axis=1, kind="stable"),
        factors=low + u[:, 6:10] * (high - low),
        grey=u[:, 10] < views.grey_p,
        blur_sigma=np.where(u[:, 11] < views.blur_p, 0.1 + 1.9 * u[:, 12], 0.0),
    )


# ── Application: torch, on the device ──────────────────────────────────────────────────────────────────────────────


def two_views(images: Tensor, ids: Tensor, epoch: int, views: Views, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """The normalised views of a batch, (2n, 3, size, size) float32: [view 0 of n images; view 1 of the same n].

    images: uint8, (n, H, W, 3) whole images, which are cropped here, or (n, 2, size, size, 3) crops of both views.
    ids (n,): sample ids, on the host, because the parameters are drawn there. On the CPU crops go through a kernel that does
    the same some seven times faster, and gives them channels last.
    """
    if images.ndim == 5 and torch.device(device).type == "cpu" and views.operations is None:
        from simclr.kernels.views_cpu import crops_to_views  # numba takes half a second to import, for which no encoder waits

        c = draw_colours(views, seed, epoch, ids.numpy())
        return crops_to_views(images, c.flip, c.jitter, c.order, c.factors, c.grey, c.blur_sigma, views.mean, views.std)
    return normalise(raw_views(images, ids, epoch, views, seed, device), views)


def normalise(x: Tensor, views: Views) -> Tensor:
    """(n, 3, H, W) in [0, 1] → (x − mean) / std, channel by channel."""
    if views.mean == (0.0, 0.0, 0.0) and views.std == (1.0, 1.0, 1.0):
        return x
    return (x - _per_channel(views.mean, x)) / _per_channel(views.std, x)


def _per_channel(values: tuple[float, ...], x: Tensor) -> Tensor:
    """(1, 3, 1, 1) constants beside x, filled in there: a list that becomes a tensor on a GPU is a copy that the host waits for."""
    return torch.cat([x.new_full((1, 1, 1, 1), value) for value in values], 1)


def raw_views(images: Tensor, ids: Tensor, epoch: int, views: Views, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """`two_views` before normalisation, in [0, 1]: what a gallery shows."""
    n = len(images)
    keys = ids.numpy()
    colours = draw_colours(views, seed, epoch, keys)
    flip = colours.flip & (views.operations is None)
    x = images.to(device, non_blocking=True)
    if images.ndim == 4:
        sizes = np.broadcast_to(np.array(images.shape[1:3], np.int64), (n, 2))
        boxes = crop_boxes(views, seed, epoch, keys, sizes)
        both = to_device(np.concatenate([boxes[:, 0], boxes[:, 1]]), device)
        x = x.permute(0, 3, 1, 2).float().div_(255).repeat(2, 1, 1, 1)
        x = crop_resize(x, both, views.size_px, views.resize, to_device(flip, device))
    else:
        x = x.permute(1, 0, 4, 2, 3).flatten(0, 1).float().div_(255).contiguous()
        if _by_index(x.device):
            rows = _rows(flip, x.device)
            x.index_copy_(0, rows, x[rows].flip(3))
        else:
            x = torch.where(to_device(flip, x.device).view(-1, 1, 1, 1), x.flip(3), x)
    if views.operations is not None:
        from simclr.views.ablations import apply  # which builds on this module

        return torch.cat([x[:n], apply(x[n:], views, seed, epoch, keys)])
    if _by_index(x.device):
        return distort(x, colours)
    parts = (colours.jitter, colours.order, colours.factors, colours.grey, colours.blur_sigma)
    # float32 before they travel: not every device has float64.
    return distort_all(x, *(to_device(part.astype(np.float32) if part.dtype == np.float64 else part, x.device) for part in parts))


def crop_and_flip(images: Tensor, ids: Tensor, epoch: int, views: Views, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """The training view of a classifier, normalised, (n, 3, size, size) float32: view 0 of `two_views` without colour and blur.

    images: uint8, (n, H, W, 3) whole images, which are cropped here, or (n, 1 or 2, size, size, 3) crops. One view, not two: an
    epoch then sees each image once, as the papers' fine-tuning and distillation do, at half the cost.
    """
    keys = ids.numpy()
    flip = to_device(keyed.uniform(seed, "colour", epoch, keys, 0, 1)[:, 0] < views.flip_p, device)
    x = images.to(device, non_blocking=True)
    if images.ndim == 4:
        sizes = np.broadcast_to(np.array(images.shape[1:3], np.int64), (len(images), 2))
        boxes = to_device(crop_boxes(views, seed, epoch, keys, sizes)[:, 0], device)
        x = crop_resize(x.permute(0, 3, 1, 2).float().div_(255), boxes, views.size_px, views.resize, flip)
    else:
        x = x[:, 0].permute(0, 3, 1, 2).float().div_(255)
        x = torch.where(flip[:, None, None, None], x.flip(3), x)
    return normalise(x, views)


def crop_resize(x: Tensor, boxes: Tensor, size: int, kernel: Resize, flip: Tensor | None = None) -> Tensor:
    """Crop boxes (n, 4) out of images (n, 3, H, W) and resize each to (size, size), in [0, 1]; flipped where `flip` says.

    Half-pixel centres. Bicubic and bilinear do not antialias, like the official code; area is the mean over what an output
    pixel covers. A separable resize is two batched matrix products, whose matrices hold crop, resize and flip at once; for
    small images that is cheaper than gathering. Larger ones come from `data.resize`, in whole numbers, by the same weights.
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
    if kernel == "bilinear":  # beyond the border the last pixel goes on
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


def distort(x: Tensor, colours: Colours) -> Tensor:
    """Colour jitter in each view's own order, grey, blur. x (m, 3, H, W) in [0, 1]; works in place and returns it.

    Rows are picked by index lists that the host already knows, so nothing waits for the device.
    """
    for position in range(4):
        for operation, name in enumerate(OPERATIONS):
            chosen = colours.jitter & (colours.order[:, position] == operation)
            if not chosen.any():
                continue
            rows = _rows(chosen, x.device)
            factor = to_device(colours.factors[chosen, operation], x.device, x.dtype)
            x.index_copy_(0, rows, _APPLY[name](x[rows], factor.view(-1, 1, 1, 1)))
    if colours.grey.any():
        rows = _rows(colours.grey, x.device)
        x.index_copy_(0, rows, grey(x[rows]).expand(-1, 3, -1, -1))
    chosen = colours.blur_sigma > 0
    if chosen.any():
        rows = _rows(chosen, x.device)
        sigma = to_device(colours.blur_sigma[chosen], x.device, x.dtype)
        x.index_copy_(0, rows, gaussian_blur(x[rows], sigma))
    return x


def distort_all(x: Tensor, jitter: Tensor, order: Tensor, factors: Tensor, greyed: Tensor, sigma: Tensor) -> Tensor:
    """`distort` in shapes that no draw changes: every operation on every row, kept where it was drawn. Four times the work.

    For devices whose programs are compiled for one shape, as TPUs' are: lists of rows would be compiled anew at each step. The
    fields of `Colours` as tensors on x's device.
    """
    turns = factors.to(x.dtype).view(-1, 4, 1, 1, 1)
    for position in range(4):
        before = x
        for operation, name in enumerate(OPERATIONS):
            chosen = (jitter & (order[:, position] == operation)).view(-1, 1, 1, 1)
            x = torch.where(chosen, _APPLY[name](before, turns[:, operation]), x)
    x = torch.where(greyed.view(-1, 1, 1, 1), grey(x), x)
    blurred = (sigma > 0).view(-1, 1, 1, 1)
    return torch.where(blurred, gaussian_blur(x, torch.where(sigma > 0, sigma, 1.0).to(x.dtype)), x)


def _by_index(device: torch.device) -> bool:
    """Whether a device runs each operation as it comes, of whatever shape."""
    return device.type in ("cpu", "cuda")


def _rows(chosen: NDArray[np.bool_], device: torch.device) -> Tensor:
    return to_device(np.flatnonzero(chosen), device)


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
    offsets = torch.arange(5, 0, -2, device=x.device, dtype=x.dtype).view(1, 3, 1, 1)  # 5, 3, 1; counted there, not copied
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
