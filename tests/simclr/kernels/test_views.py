"""The Triton kernels of views against their plain-torch definition in float64: interpreted, compiled ahead, and on a GPU where there is
one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from simclr.config import Views
from simclr.kernels import views
from simclr.kernels.views import PIXELS, crops_to_views
from simclr.views import draw, ops, two_views
from tests.conftest import Within
from tests.simclr.kernels.test_views_cpu import OFF, UNEQUAL, crops_of, plain
from tests.support import ahead
from tests.support.ahead import ARCHITECTURES, compiled

NORMALISED = {"mean": (0.4, 0.5, 0.3), "std": (0.5, 0.6, 0.7)}
SETTINGS = {"all": {}, "none": OFF, "jitter": OFF | {"jitter_p": 1.0}, "grey": OFF | {"grey_p": 1.0}, "blur": OFF | {"blur_p": 1.0}}
SETTINGS |= {"solarise": OFF | {"solarise_p": 1.0}, "unequal": UNEQUAL}
# 9 px: no blur; 45: a run of pixels ends within a row; 70: squares at the edge; 224: the papers', 23 taps.
CASES = [(9, 4, "all"), (32, 12, "all"), (45, 4, "all"), (70, 4, "all"), (224, 1, "all")]
CASES += [(32, 4, one) for one in SETTINGS if one != "all"]
LARGE = [(224, 16, "all"), (224, 16, "unequal"), (448, 4, "blur"), (448, 4, "all")]
BOUNDS = {
    torch.float64: 1e-5,
    torch.float32: 1e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 4e-3,
}  # of values up to 2.5: bfloat16 rounds them by 2^-8


def differences(
    device: torch.device, dtypes: tuple[torch.dtype, ...], cases: list[tuple[int, int, str]] = CASES
) -> list[tuple[str, float, float]]:
    """(what, largest difference from float64, bound) of every case, for crops, and for some of the images; and for whole images."""
    found: list[tuple[str, float, float]] = []
    for size, n, name in cases:
        config = Views(size_px=size, **NORMALISED, **SETTINGS[name])  # type: ignore[arg-type]
        crops, ids = crops_of(max(n, 4), size)[-n:], torch.arange(50, 50 + n)
        exact = plain(crops, ids, config, 7)
        drawn = draw.draw_views(draw.Crop(views=config), 7, 3, ids.numpy())
        for dtype in dtypes:
            ours = crops_to_views(crops.to(device), drawn.block.to(device), config.mean, config.std, dtype)
            assert ours.dtype == dtype and ours.is_contiguous(memory_format=torch.channels_last)
            found.append((f"{size} px, {name}, {dtype}", _apart(ours, exact), BOUNDS[dtype]))
        if n != 4:
            continue
        some = slice(1, 3)
        part = crops_to_views(crops.to(device)[some], drawn.block.to(device)[:, some], config.mean, config.std, torch.float32)
        rows = torch.arange(2 * n).view(2, n)[:, some].flatten()
        found.append((f"{size} px, {name}, some of the images", _apart(part, exact[rows]), BOUNDS[torch.float32]))
    images, config = crops_of(6, 40)[:, 0], Views(size_px=32, **NORMALISED)  # type: ignore[arg-type]
    drawn = draw.draw_views(draw.Crop(views=config), 7, 3, np.arange(6), np.full((6, 2), 40))
    cropped = two_views._cropped(images, drawn.block.flatten(0, 1), draw.Crop(views=config))
    exact = ops.normalise(ops.distort(cropped.double(), drawn.colours), config)
    for dtype in (torch.float32, torch.float64):
        ours = crops_to_views(cropped.to(device), drawn.block.to(device), config.mean, config.std, dtype)
        found.append((f"whole images, {dtype}", _apart(ours, exact), BOUNDS[dtype]))
    return found


def _apart(ours: Tensor, exact: Tensor) -> float:
    return float((ours.cpu().double() - exact).abs().max())


def interpreted() -> list[tuple[str, float, float]]:
    # The interpreter keeps bfloat16 as bits; float16, which takes the same way through the kernels, replaces it here.
    found = differences(torch.device("cpu"), (torch.float32, torch.float16))
    of = views.blur_settings
    views.blur_settings = lambda size: {**of(size), "SIDE": 16}  # as from 340 px on, of which the interpreter would make minutes
    return found + differences(torch.device("cpu"), (torch.float32,), [(70, 4, "blur")])


def test_views_in_the_kernels_are_the_plain_ones(within: Within) -> None:
    found = ahead.interpreted(__name__)
    assert len(found) == 2 * len(CASES) + 9 + 2 + 4
    for what, deviation, bound in found:
        within(what, deviation, bound)


# One GPU in every run, the others by `make test-compile`: each costs six seconds.
OTHERS = [pair for pair in itertools.product(ARCHITECTURES, (32, 224)) if pair != (90, 224)]


@pytest.mark.parametrize(
    ("capability", "size"), [(90, 224), *(pytest.param(*pair, marks=pytest.mark.compile) for pair in [*OTHERS, (90, 448)])]
)
def test_the_kernels_compile_without_spills(capability: int, size: int) -> None:
    """Photographs come as crops, small images as what was cropped on the device."""
    pytest.importorskip("triton")
    from simclr.kernels import views_triton

    layout = {"PIXEL": 3, "CHANNEL": 1, "BYTES": True} if size > 32 else {"PIXEL": 1, "CHANNEL": size * size, "BYTES": False}
    settings = {"SIZE": size, "PIXELS": PIXELS, **layout, **views.blur_settings(size)}
    for dtype, scratch in (("bf16", "*fp16"), ("fp32", "*fp32")):
        kinds = {
            "crops": "*u8" if layout["BYTES"] else "*fp32",
            "block": "*fp32",
            "means": "*fp32",
            "unblurred": scratch,
            "out": f"*{dtype}",
        }
        for kernel, warps in ((views_triton.means_kernel, 4), (views_triton.colours_kernel, 4), (views_triton.blur_kernel, 8)):
            numbers = {name: "fp32" if name.startswith(("scale", "shift")) else "i32" for name in kernel.arg_names}
            arguments = {name: settings.get(name, kinds.get(name, kind)) for name, kind in numbers.items()}
            report = compiled(kernel, arguments, capability, warps, aligned=("per_image", "per_view", "block_view"))
            print(report.line(f"{kernel.__name__}, {size} px, {dtype}, {ARCHITECTURES[capability]}"))
            assert report.spilled == 0 and report.registers <= 232, "a second block of four warps fits a multiprocessor"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_views_on_the_device_are_the_plain_ones(within: Within) -> None:
    for what, deviation, bound in differences(torch.device("cuda"), (torch.float32, torch.bfloat16), CASES + LARGE):
        within(what, deviation, bound)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["crops", "whole"])
def test_a_batch_on_the_device_has_the_cpus_views_at_every_call(within: Within, kind: str) -> None:
    """Through `two_views`, which chooses the kernels; twice the same to the bit."""
    crops, ids, config = crops_of(64, 32), torch.arange(64), Views(size_px=32)
    images = crops if kind == "crops" else crops[:, 0]
    here = two_views.two_views(images, ids, 3, config, 7)
    there, again = (two_views.two_views(images.cuda(), ids, 3, config, 7, "cuda") for _ in range(2))
    assert torch.equal(there, again)
    within(kind, float((there.cpu() - here).abs().max()), 1e-4)
