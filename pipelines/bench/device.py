"""`simclr bench device`: the device's ceilings, which no step of a network exceeds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pipelines.bench.result import Row, compared, in_turn
from pipelines.bench.timing import rate

_COPIED = {"cuda": 1 << 30, "cpu": 1 << 26}  # bytes; on a GPU far more than a cache holds
_SIDE = {"cuda": 8192, "cpu": 512}  # side of the square matrices


def device(trials: int, steps: int, threads: int, at: torch.device) -> list[Row]:
    """Print and return, as medians of `trials`: GB/s (10⁹ bytes) of a copy on the device (read plus written), and from
    page-locked memory of the host to a GPU; TFLOP/s (10¹²) of a product of bfloat16 matrices and of float32 ones as a network
    multiplies them."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    size, side = _COPIED[at.type], _SIDE[at.type]
    source, target = (torch.empty(size, dtype=torch.uint8, device=at) for _ in range(2))
    sides: dict[str, tuple[Callable[[], object], float]] = {"copy": (partial(target.copy_, source), 2 * size / 1e9)}
    if at.type == "cuda":
        host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        sides["host to device"] = (partial(target.copy_, host, non_blocking=True), size / 1e9)
    for kind in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(side, side, device=at).to(kind) for _ in range(2))
        sides[f"product, {str(kind).removeprefix('torch.')}"] = (partial(_product, a, b), 2 * side**3 / 1e12)
    print(f"at most, on {at.type}: copies of {size >> 20:,} MiB, products of {side} × {side}, {threads} threads, n = {trials}")
    rows: list[Row] = []
    for name, (one, amount) in sides.items():
        unit = "TFLOP/s" if name.startswith("product") else "GB/s"
        found = in_turn({name: lambda one=one, amount=amount: amount * rate(one, steps, 1, at)}, trials, unit)  # type: ignore[misc]
        (row,) = compared(found, unit, name)
        print(f"{name:<18} {row['median']:10,.2f} {unit}")
        rows.append({key: row[key] for key in ("name", "unit", "median")} | {"low": min(found[name]), "high": max(found[name])})
    torch.set_num_threads(before)
    return rows


def _product(a: Tensor, b: Tensor) -> Tensor:
    return a @ b
