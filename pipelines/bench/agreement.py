"""`simclr bench agreement`: the differences of a device's numbers from the CPU's, and the lines that make the host wait for the device."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pipelines.bench.result import Row
from simclr.config import Config, Views
from simclr.data.manifest import read_manifest
from simclr.loss import nt_xent
from simclr.methods.method import Start
from simclr.train import train
from simclr.views.two_views import two_views

_SIZES = {32: 64, 224: 32}  # side of a view in px → images
_FEW = 4  # of 224 px, on a CPU
_WIDTHS = (64, 128, 200, 256, 512, 1024, 2048)  # of z: within a kernel's tile, at its edges, larger
_ROWS = 600
_TEMPERATURE = 0.1
_STEPS, _EVERY = 12, 4  # steps of training, and steps between two reports
_WATCHED = 4  # blocking calls are counted between this step's report and the next
Precision = Literal["float32", "bfloat16"]


def agreement(config: Config, data: Path | None, threads: int, device: torch.device) -> Iterator[Row]:
    """Print and give the largest differences between the device and the CPU: of views, of the loss and its gradient, of the losses of the
    first steps. On a GPU also the source lines that block the host between two reports.

    On a CPU the differences are 0, apart from those of precision. The steps train `config` on the shards in `data`; without data they
    are left out.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    if data is not None:  # raises before anything is measured
        config = _short(config, read_manifest(data).examples("train"))
    print(f"{device.type} − cpu, {threads} threads")
    yield from _views(device)
    yield from _losses(device)
    if data is None:
        print("no --data: the first steps are left out")
    else:
        yield from _first_steps(config, data, threads, device)
    torch.set_num_threads(before)


def _views(device: torch.device) -> Iterator[Row]:
    """Normalised views of random crops, both distortions."""
    for size, images in _SIZES.items():
        n = images if device.type == "cuda" or size < 100 else _FEW
        crops = torch.randint(0, 256, (n, 2, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        views, ids = Views(size_px=size, mean=(0.4, 0.5, 0.3), std=(0.5, 0.6, 0.7)), torch.arange(n)
        there, here = (two_views(crops.to(at), ids, 3, views, 7, at).cpu() for at in (device, torch.device("cpu")))
        row = {"name": f"views, {size} px", "images": n, "deviation": float((there - here).abs().max())}
        print(f"{row['name']:<26} {n} images, largest difference {row['deviation']:.1e}")
        yield row


def _losses(device: torch.device) -> Iterator[Row]:
    """NT-Xent of 600 rows as a step calls it, against the CPU's in the same precision and in float64."""
    for dtype in (torch.float32, torch.bfloat16):
        for width in _WIDTHS:
            z = torch.randn(_ROWS, width, generator=torch.Generator().manual_seed(1)).to(dtype)
            there, here, exact = _graded(z.to(device)), _graded(z), _graded(z.double())
            name = f"NT-Xent, {str(dtype).removeprefix('torch.')}, d = {width}"
            row: Row = {"name": name, "loss": abs(there[0] - here[0]), "gradient": _apart(there[1], here[1])}
            row |= {"loss_from_float64": abs(there[0] - exact[0]), "gradient_from_float64": _apart(there[1], exact[1])}
            print(
                f"{name:<26} loss {row['loss']:.1e}, gradient {row['gradient']:.1e} of its largest entry; "
                f"from float64 {row['loss_from_float64']:.1e}, {row['gradient_from_float64']:.1e}"
            )
            yield row


def _graded(z: Tensor) -> tuple[float, Tensor]:
    z = z.clone().requires_grad_()
    loss = nt_xent(z, _TEMPERATURE)
    (gradient,) = torch.autograd.grad(loss, z)
    return float(loss.detach()), gradient.double().cpu()


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


# ── The first steps ────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Curve:
    """The loss of each report, and for each source line how often it made the host wait."""

    losses: tuple[float, ...]
    blocking: Counter[str] = field(default_factory=Counter)


def _short(config: Config, examples: int) -> Config:
    """`config` for a dozen steps of few images, evaluated once, at the end."""
    train = replace(config.train, batch_size=min(64, examples), micro_batch=None, steps=_STEPS, report_every_steps=_EVERY)
    return replace(config, train=train, watch=replace(config.watch, bank=64, queries=64, k=1, every_epochs=0))


def _first_steps(config: Config, data: Path, threads: int, device: torch.device) -> Iterator[Row]:
    here = _curve(config, "float32", data, threads, torch.device("cpu"))
    precisions: tuple[Precision, ...] = ("float32", "bfloat16")
    for precision in precisions:
        there = _curve(config, precision, data, threads, device)
        apart = max(abs(a - b) for a, b in zip(there.losses, here.losses, strict=True))
        name = f"first steps, {precision}"
        print(f"{name:<26} losses {_shown(there)}, the CPU's in float32 {_shown(here)}: largest difference {apart:.1e}")
        row: Row = {"name": name, "losses": there.losses, "cpu_losses": here.losses, "deviation": apart}
        if device.type == "cuda":
            print(f"{'':<26} {_EVERY} steps and a report block the host {there.blocking.total()} times")
            for line, count in there.blocking.most_common():
                print(f"{'':<26} {count:>4} × {line}")
            row["blocking"] = dict(there.blocking.most_common())
        yield row


def _curve(config: Config, precision: Precision, data: Path, threads: int, device: torch.device) -> Curve:
    config = replace(config, train=replace(config.train, precision=precision, compile=False))
    losses = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            for report in train(config, Start(data, device, threads=threads)):
                losses.append(report.metrics["train/loss"])
                if device.type == "cuda":
                    torch.cuda.set_sync_debug_mode("warn" if report.step == _WATCHED else "default")
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    blocking = [one for one in caught if "synchroniz" in str(one.message)]
    return Curve(tuple(losses), Counter(f"{'/'.join(Path(one.filename).parts[-2:])}:{one.lineno}" for one in blocking))


def _shown(curve: Curve) -> str:
    return " ".join(f"{loss:.4f}" for loss in curve.losses)
