"""The two random views of an image (arXiv:2002.05709, App. A): keyed parameters, and their application on the device.

Parameters are pure functions of (seed, epoch, sample id, view), see `keyed`. Where the official code and torchvision
differ we follow the official code (the tests compare with its pixels): the crop sampler, contrast about the mean of each channel
(torchvision: of the grey image), saturation and hue in HSV, brightness as a factor (v2), a clip to [0, 1] after each operation, a blur
that sees zeros beyond the border.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from simclr import keyed
from simclr.config import Views
from simclr.to_device import to_device
from simclr.views.draw import Crop, crop_boxes, crops_of, draw_colours
from simclr.views.ops import by_index, crop_resize, distort, distort_all, normalise, rows_of


def two_views(images: Tensor, ids: Tensor, epoch: int, views: Views, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """The normalised views of a batch, (2n, 3, size, size) float32: [view 0 of n images; view 1 of the same n]."""
    return views_of(images, ids, epoch, Crop(views=views), seed, device)


def views_of(images: Tensor, ids: Tensor, epoch: int, crop: Crop, seed: int, device: torch.device | str = "cpu", first: int = 0) -> Tensor:
    """The normalised views that `crop` asks for, (count·n, 3, size, size) float32: [view `first` of n images; the next view; …].

    images: uint8, (n, H, W, 3) whole images, which are cropped here, or (n, count, size, size, 3) crops.
    ids (n,): sample ids, on the host, because the parameters are drawn there. On the CPU crops go through a kernel that does
    the same some seven times faster, and gives them channels last.
    """
    views = crop.views
    if not crop.distorted:
        assert crop.count == 1 and first == 0, "an undistorted crop is a classifier's: view 0 alone"
        return crop_and_flip(images, ids, epoch, views, seed, device)
    if images.ndim == 5 and torch.device(device).type == "cpu" and views.operations is None:
        from simclr.kernels.views_cpu import crops_to_views  # numba takes half a second to import; users of an encoder need not wait

        c = draw_colours(views, seed, epoch, ids.numpy(), first, crop.count)
        return crops_to_views(images, c.flip, c.jitter, c.order, c.factors, c.grey, c.blur_sigma, views.mean, views.std)
    return normalise(raw_views(images, ids, epoch, views, seed, device, first, crop.count), views)


def raw_views(
    images: Tensor,
    ids: Tensor,
    epoch: int,
    views: Views,
    seed: int,
    device: torch.device | str = "cpu",
    first: int = 0,
    count: int = 2,
) -> Tensor:
    """`views_of` before normalisation, in [0, 1], for galleries."""
    n = len(images)
    keys = ids.numpy()
    colours = draw_colours(views, seed, epoch, keys, first, count)
    flip = colours.flip & (views.operations is None)
    x = images.to(device, non_blocking=True)
    if images.ndim == 4:
        sizes = np.broadcast_to(np.array(images.shape[1:3], np.int64), (n, 2))
        # In the ablation of single operations a crop is one of them, so all views begin with the same crop.
        each = [crops_of(views, seed, epoch, keys, sizes, first if views.operations is not None else first + view) for view in range(count)]
        x = x.permute(0, 3, 1, 2).float().div_(255).repeat(count, 1, 1, 1)
        x = crop_resize(x, to_device(np.concatenate(each), device), views.size_px, views.resize, to_device(flip, device))
    else:
        x = x.permute(1, 0, 4, 2, 3).flatten(0, 1).float().div_(255).contiguous()
        if by_index(x.device):
            rows = rows_of(flip, x.device)
            x.index_copy_(0, rows, x[rows].flip(3))
        else:
            x = torch.where(to_device(flip, x.device).view(-1, 1, 1, 1), x.flip(3), x)
    if views.operations is not None:
        from simclr.views.ablations import apply  # only the ablation needs it

        return torch.cat([x[:n], apply(x[n:], views, seed, epoch, keys)])
    if by_index(x.device):
        return distort(x, colours)
    parts = (colours.jitter, colours.order, colours.factors, colours.grey, colours.blur_sigma)
    # Converted to float32 before the copy: not every device has float64.
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
