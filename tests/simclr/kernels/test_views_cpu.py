"""The CPU kernel of views against its plain-torch definition in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from simclr.config import Views
from simclr.kernels.views_cpu import crops_to_views
from simclr.views import draw, ops, two_views
from tests.conftest import Within

OFF = {"flip_p": 0.0, "jitter_p": 0.0, "grey_p": 0.0, "blur_p": 0.0}
UNEQUAL = {"blur_p": (1.0, 0.3), "solarise_p": (0.3, 1.0), "saturation": 0.5}  # each pair of blurred or not and solarised or not


def plain(crops: torch.Tensor, ids: torch.Tensor, config: Views, seed: int) -> torch.Tensor:
    """Views in float64, by the definition."""
    colours = draw.draw_colours(config, seed, 3, ids.numpy())
    x = crops.permute(1, 0, 4, 2, 3).flatten(0, 1).double() / 255
    x = torch.where(torch.tensor(colours.flip).view(-1, 1, 1, 1), x.flip(3), x)
    return ops.normalise(ops.distort(x, colours), config)


def crops_of(n: int, size: int) -> torch.Tensor:
    """Noise, with a black, a white, a grey and a two-coloured crop: no chroma, or two channels that are equal."""
    crops = torch.randint(0, 256, (n, 2, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
    crops[0], crops[1], crops[2] = 0, 255, crops[2, ..., :1]
    crops[3, ..., 0] = crops[3, ..., 1]
    return crops


@pytest.mark.parametrize("size", [9, 32, 45, 224])
@pytest.mark.parametrize(
    "settings",
    [
        *({}, OFF, OFF | {"flip_p": 1.0}, OFF | {"jitter_p": 1.0}, OFF | {"grey_p": 1.0}, OFF | {"blur_p": 1.0}),
        *(OFF | {"solarise_p": 1.0}, UNEQUAL),
    ],
    ids=["all", "none", "flip", "jitter", "grey", "blur", "solarise", "unequal"],
)
def test_views_on_the_cpu_are_the_plain_ones(within: Within, settings: dict[str, float], size: int) -> None:
    n = 6 if size == 224 else 24
    crops, ids = crops_of(n, size), torch.arange(50, 50 + n)
    config = Views(size_px=size, mean=(0.4, 0.5, 0.3), std=(0.5, 0.6, 0.7), **settings)  # type: ignore[arg-type]
    ours = two_views.two_views(crops, ids, 3, config, seed=7)
    assert ours.dtype == torch.float32 and ours.shape == (2 * n, 3, size, size)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    within("of [0, 1] / 0.5", float((ours - plain(crops, ids, config, 7)).abs().max()), 1e-5)


def test_views_do_not_depend_on_threads_or_neighbours() -> None:
    crops, ids, config = crops_of(9, 32), torch.arange(9), Views(size_px=32)
    whole = two_views.two_views(crops, ids, 0, config, seed=1)
    part = two_views.two_views(crops[4:6], ids[4:6], 0, config, seed=1)
    assert torch.equal(part, torch.cat([whole[4:6], whole[13:15]]))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(two_views.two_views(crops, ids, 0, config, seed=1), whole)
    finally:
        torch.set_num_threads(before)


def test_crops_may_be_a_view_of_something_larger() -> None:
    crops, config = crops_of(4, 16), Views(size_px=16)
    c = draw.draw_colours(config, 0, 0, np.arange(4))
    given = (c.flip, c.jitter, c.order, c.factors, c.grey, c.blur_sigma, c.solarise, config.mean, config.std)
    wide = torch.cat([crops, crops], 3)[:, :, :, :16]
    assert torch.equal(crops_to_views(wide, *given), crops_to_views(crops, *given))
