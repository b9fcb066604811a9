"""The two random views of an image (arXiv:2002.05709, App. A): keyed parameters, and their application on the device.

Parameters are pure functions of (seed, epoch, sample id, view), see `keyed`. Where the official code and torchvision
differ we follow the official code (the tests compare with its pixels): the crop sampler, contrast about the mean of each channel
(torchvision: of the grey image), saturation and hue in HSV, brightness as a factor (v2), a clip to [0, 1] after each operation, a blur
that sees zeros beyond the border. So it is for SimCLR's siblings too, although MoCo's authors crop by torchvision's sampler.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from simclr import keyed
from simclr.config import Views
from simclr.kernels import views as gpu
from simclr.kernels.device import takes_triton
from simclr.to_device import to_device
from simclr.views.draw import BOX, Crop, Drawn, crop_boxes, draw_views
from simclr.views.ops import by_index, crop_resize, distort, distort_all, normalise, rows_of


def two_views(images: Tensor, ids: Tensor, epoch: int, views: Views, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """The normalised views of a batch, (2n, 3, size, size) float32: [view 0 of n images; view 1 of the same n]."""
    return views_of(images, ids, epoch, Crop(views=views), seed, device)


def views_of(
    images: Tensor,
    ids: Tensor,
    epoch: int,
    crop: Crop,
    seed: int,
    device: torch.device | str = "cpu",
    first: int = 0,
    drawn: Drawn | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The normalised views that `crop` asks for, (count·n, 3, size, size): [view `first` of n images; the next view; …].

    images: uint8, (n, H, W, 3) whole images, which are cropped here, or (n, count, size, size, 3) crops. ids (n,): sample ids, on the host.
    `drawn`: their parameters, where the loader has drawn them ahead. On a CPU crops go through a kernel that does the same some seven times
    faster, on a GPU through three; these give views channels last, those of a GPU in `dtype`. Elsewhere they are float32.
    """
    views, device = crop.views, torch.device(device)
    if not crop.distorted:
        assert crop.count == 1 and first == 0, "an undistorted crop is a classifier's: view 0 alone"
        return crop_and_flip(images, ids, epoch, views, seed, device)
    drawn = drawn or _draw(images, ids, epoch, crop, seed, first)
    if images.ndim == 5 and device.type == "cpu" and views.operations is None:
        from simclr.kernels.views_cpu import crops_to_views  # numba takes half a second to import; users of an encoder need not wait

        c = drawn.colours
        return crops_to_views(images, c.flip, c.jitter, c.order, c.factors, c.grey, c.blur_sigma, c.solarise, views.mean, views.std)
    if views.operations is None and takes_triton(device):
        x, block = images.to(device, non_blocking=True), _moved(drawn.block, device)
        x = _cropped(x, block.flatten(0, 1), crop) if images.ndim == 4 else x
        return gpu.crops_to_views(x, block, views.mean, views.std, dtype)
    return normalise(_plain(images, ids, epoch, crop, seed, device, drawn), views)


def raw_views(images: Tensor, ids: Tensor, epoch: int, views: Views, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """`two_views` before normalisation, in [0, 1], for galleries. By the plain functions, which define views."""
    crop = Crop(views=views)
    return _plain(images, ids, epoch, crop, seed, torch.device(device), _draw(images, ids, epoch, crop, seed, 0))


def _draw(images: Tensor, ids: Tensor, epoch: int, crop: Crop, seed: int, first: int) -> Drawn:
    whole = images.ndim == 4
    sizes = np.broadcast_to(np.array(images.shape[1:3], np.int64), (len(images), 2)) if whole else None
    return draw_views(crop, seed, epoch, ids.numpy(), sizes, first)


def _moved(block: Tensor, device: torch.device) -> Tensor:
    return block if block.device.type == device.type else to_device(block, device)


def _cropped(images: Tensor, block: Tensor, crop: Crop) -> Tensor:
    """Whole images (n, H, W, 3) → their crops, flipped, (count·n, 3, size, size) in [0, 1], by the rows (count·n, 17) of `Drawn`."""
    x = images.permute(0, 3, 1, 2).float().div_(255).repeat(crop.count, 1, 1, 1)
    flip = (block[:, 0] > 0) & (crop.views.operations is None)
    return crop_resize(x, block[:, BOX], crop.size_px, crop.views.resize, flip)


def _plain(images: Tensor, ids: Tensor, epoch: int, crop: Crop, seed: int, device: torch.device, drawn: Drawn) -> Tensor:
    views, colours, n = crop.views, drawn.colours, len(images)
    x, block = images.to(device, non_blocking=True), drawn.block
    if images.ndim == 4 or not by_index(device):
        block = _moved(block, device)
    if images.ndim == 4:
        x = _cropped(x, block.flatten(0, 1), crop)
    else:
        flip = colours.flip & (views.operations is None)
        x = x.permute(1, 0, 4, 2, 3).flatten(0, 1).float().div_(255).contiguous()
        if by_index(x.device):
            rows = rows_of(flip, x.device)
            x.index_copy_(0, rows, x[rows].flip(3))
        else:
            x = torch.where(to_device(flip, x.device).view(-1, 1, 1, 1), x.flip(3), x)
    if views.operations is not None:
        from simclr.views.ablations import apply  # only the ablation needs it

        return torch.cat([x[:n], apply(x[n:], views, seed, epoch, ids.numpy())])
    return distort(x, colours) if by_index(x.device) else distort_all(x, block.flatten(0, 1))


def crop_and_flip(images: Tensor, ids: Tensor, epoch: int, views: Views, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """The training view of a classifier, normalised, (n, 3, size, size) float32: view 0 of `two_views`, cropped and flipped alone.

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
