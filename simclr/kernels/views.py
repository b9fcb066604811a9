"""Crops to normalised views on a GPU, in three Triton kernels. Twin of `simclr.views.ops.distort`, which defines it.

The plain form copies the rows concerned once per operation. Here a view is read twice, as bytes (for the mean that contrast needs, and for
the rest), and written once, in the dtype and the memory format that the network reads; a blurred view passes through memory once more.
"""

from __future__ import annotations

import torch
from torch import Tensor

PIXELS = 1024
"""Of a program."""


def crops_to_views(crops: Tensor, block: Tensor, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """Views (v·n, 3, size, size), channels last, of crops on the device: [view 0; view 1; …].

    crops: (n, v, size, size, 3) uint8, or (v·n, 3, size, size) float32 in [0, 1], already flipped. block (v, n, 17): their parameters
    (`simclr.views.draw.Drawn`), on the device. mean and std are those of the normalisation. `dtype` is that of the views; all is computed
    in float32, but for bfloat16 and float16 the blur multiplies float16, with sums in float32.
    """
    from simclr.kernels.views_triton import blur_kernel, colours_kernel, means_kernel

    (count, n), size = block.shape[:2], crops.shape[2]
    if crops.dtype == torch.uint8:
        assert crops.shape == (n, count, size, size, 3) and crops.stride()[2:] == (3 * size, 3, 1), crops.shape
        per_image, per_view, layout = crops.stride(0), crops.stride(1), {"PIXEL": 3, "CHANNEL": 1, "BYTES": True}
    else:
        assert crops.shape == (count * n, 3, size, size) and crops.is_contiguous(), crops.shape
        per_image, per_view = 3 * size * size, n * 3 * size * size
        layout = {"PIXEL": 1, "CHANNEL": size * size, "BYTES": False}
    assert block.shape[2] == 17 and block.stride()[1:] == (17, 1), block.shape
    rows, device = count * n, crops.device
    means = torch.empty(rows, 3, device=device)
    unblurred = torch.empty(rows, 3, size, size, device=device, dtype=torch.float16 if dtype.itemsize == 2 else torch.float32)
    out = torch.empty(rows, 3, size, size, device=device, dtype=dtype, memory_format=torch.channels_last)
    normalisation = (*(1 / s for s in std), *(-m / s for m, s in zip(mean, std, strict=True)))
    given = (n, per_image, per_view, block.stride(0))
    means_kernel[(rows,)](crops, block, means, *given, SIZE=size, PIXELS=PIXELS, **layout)
    colours = colours_kernel[(rows * -(-size * size // PIXELS),)]
    colours(crops, block, means, unblurred, out, *given, *normalisation, SIZE=size, PIXELS=PIXELS, **layout)
    square = blur_settings(size)
    blur = blur_kernel[(rows * (-(-size // square["SIDE"])) ** 2,)]
    blur(block, unblurred, out, n, block.stride(0), *normalisation, SIZE=size, **square)
    return out


def blur_settings(size: int) -> dict[str, int]:
    """Compile-time settings of the blur: a square of 32 pixels where it comes from one of 64, else of 16. From 500 px on that one is of
    128, and in float32 an A100 spills registers."""
    radius = size // 10 // 2
    side = 32 if 32 + 2 * radius <= 64 else 16
    return {"RADIUS": radius, "SIDE": side, "WIDE": 1 << (side + 2 * radius - 1).bit_length(), "num_warps": 8}
