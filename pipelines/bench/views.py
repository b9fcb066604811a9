"""`simclr bench views`: uint8 crops → normalised views, against kornia's augmentations of the same probabilities and strengths; beside
them, those of BYOL and MoCo v3."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipelines.bench.result import Row, compared, in_turn
from simclr.compiling import compiled
from simclr.config import Views
from simclr.views.draw import Crop, Drawn, draw_views
from simclr.views.ops import distort, distort_all, normalise
from simclr.views.two_views import views_of

WARM = 2  # calls that do not count: they allocate and compile
_SIDES_PX = (32, 224)
_SMALL = 8  # times as many images of 32 px, as in a step
_BYOL = Views(colour_strength=0.5, saturation=0.5, blur_p=(1.0, 0.1), solarise_p=(0.0, 0.2))
_INSTALL = "pip install --no-deps kornia==0.9.0 kornia_rs==0.2.0 packaging"


def views(batch_size: int, steps: int, trials: int, threads: int, device: torch.device) -> list[Row]:
    """Print and return views/s by side in px and, if kornia is installed, ours ÷ kornia's: the median over pairs of trials.

    Kornia draws factors per sample as we do, but one order of the colour operations per batch; its blur takes the same
    taps, and mirrors at the border where ours sees zeros. All sides get the same uint8 crops on the device and give float32, unless said.
    BYOL's views blur the first always and the second seldom, and solarise some of the second: 55 % are blurred, where ours are 50 %.
    Ours were drawn ahead, as the loader's thread does; the time of that is printed. Kornia draws in the call. On a GPU our kernels are
    compared with the plain functions too, which define them, as they are and as one compiled program.
    """
    torch.set_num_threads(threads)
    has_kornia = importlib.util.find_spec("kornia") is not None
    if not has_kornia:
        print(f"kornia is not installed, so ours is timed alone; `{_INSTALL}` installs kornia")
    rows: list[Row] = []
    for side in _SIDES_PX:
        n = batch_size * (_SMALL if side == min(_SIDES_PX) else 1)
        crops = torch.randint(0, 256, (n, 2, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(device)
        config = Views(size_px=side)
        sides: dict[str, Callable[[], Tensor]] = {"ours": _ours(crops, config, device)}
        sides["ours, BYOL's"] = _ours(crops, replace(_BYOL, size_px=side), device)
        if device.type == "cuda":
            sides |= {"ours, bfloat16": _ours(crops, config, device, torch.bfloat16)}
            sides |= {"plain torch": _plain(crops, config), "plain, compiled": _compiled(crops, config)}
        if has_kornia:
            sides["kornia"] = _kornia(crops, Views(size_px=side))
        timed = {name: partial(_views_per_s, call, 2 * n, steps) for name, call in sides.items()}
        found = compared(in_turn(timed, trials, "views/s"), "views/s", "ours", inverted=True)
        counted = f"median of {steps - WARM} calls, n = {trials}"
        ahead_ms = 1e3 * _call_s(partial(_drawn, n, config), steps)
        print(f"views of {side} px on {device.type}, {threads} threads, {n} images of 2 views, {counted}; drawn ahead in {ahead_ms:.1f} ms")
        for row in found:
            than = "" if row["name"] == "ours" else f"   ours is {row['ratio']:.2f} × (pairs {row['low']:.2f} … {row['high']:.2f})"
            print(f"{row['name']:<15} {row['median']:10,.0f} views/s{than}")
            rows.append({"size_px": side, **row, "drawn_ahead_ms": ahead_ms})
    return rows


def _views_per_s(call: Callable[[], Tensor], views_per_call: int, steps: int) -> float:
    return views_per_call / _call_s(call, steps)


def _drawn(n: int, config: Views) -> Drawn:
    return draw_views(Crop(views=config), 0, 0, np.arange(n))


def _ours(crops: Tensor, config: Views, device: torch.device, dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
    ids, drawn = torch.arange(len(crops)), _drawn(len(crops), config)
    drawn = replace(drawn, block=drawn.block.to(device))
    return lambda: views_of(crops, ids, 0, Crop(views=config), 0, device, drawn=drawn, dtype=dtype)


def _plain(crops: Tensor, config: Views) -> Callable[[], Tensor]:
    drawn = _drawn(len(crops), config)
    flip = (drawn.block[..., 0] > 0).flatten().to(crops.device)
    return lambda: normalise(distort(_flipped(_planes(crops), flip), drawn.colours), config)


def _compiled(crops: Tensor, config: Views) -> Callable[[], Tensor]:
    block = _drawn(len(crops), config).block.to(crops.device).flatten(0, 1)

    def made() -> Tensor:
        return normalise(distort_all(_flipped(_planes(crops), block[:, 0] > 0), block), config)

    program: Callable[[], Tensor] = compiled(made, dynamic=False)
    return program


def _planes(crops: Tensor) -> Tensor:
    """(n, 2, size, size, 3) uint8 → (2n, 3, size, size) in [0, 1]."""
    return crops.permute(1, 0, 4, 2, 3).flatten(0, 1).float().div_(255).contiguous()


def _flipped(x: Tensor, flip: Tensor) -> Tensor:
    return torch.where(flip[:, None, None, None], x.flip(3), x)


def _kornia(crops: Tensor, config: Views) -> Callable[[], Tensor]:
    import kornia.augmentation as kornia

    s, taps = config.colour_strength, 2 * (config.size_px // 10 // 2) + 1
    steps: list[Any] = [
        kornia.RandomHorizontalFlip(p=config.flip_p),
        kornia.ColorJitter(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s, p=config.jitter_p),
        kornia.RandomGrayscale(p=config.grey_p),
        kornia.RandomGaussianBlur((taps, taps), (0.1, 2.0), p=config.of_view("blur_p", 0)),  # of both views
    ]
    augment = nn.Sequential(*steps)

    def call() -> Tensor:
        out: Tensor = augment(_planes(crops))
        return out

    return call


@torch.no_grad()
def _call_s(call: Callable[[], object], steps: int) -> float:
    """Median seconds of a call; on a GPU the queue is emptied before and after each."""
    found = []
    for _ in range(steps):
        began = time.perf_counter()
        out = call()
        if isinstance(out, Tensor) and out.is_cuda:
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return statistics.median(found[WARM:])
