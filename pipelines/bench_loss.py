"""`simclr bench loss`: NT-Xent with its gradient, without stored logits ÷ written out in float32. Time, memory, deviation."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.bench_result import Row, in_turn
from simclr.kernels.nt_xent import streamed

WRITTEN, STREAMED = "written out", "streamed"
_D = 128  # dimensions of z, the papers'
_TEMPERATURE = 0.1
_CALLS = 5  # in a trial, of which the median counts
_COPIES = 4  # tables of logits that the written-out form holds at its worst, and a little more


def loss(batches: tuple[int, ...], trials: int, threads: int, device: torch.device) -> list[Row]:
    """Print and return, for each N, milliseconds and MiB of both forms and how far their values and gradients are apart.

    MiB are what a call adds at its peak: on a GPU the allocator's, on a CPU that of a fresh process. The written-out form is
    left out where it would not fit.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    rows: list[Row] = []
    print(f"NT-Xent and its gradient, float32, d = {_D}, τ = {_TEMPERATURE}, {device.type}, {threads} threads, n = {trials}")
    for n in batches:
        forms: dict[str, Callable[[Tensor], Tensor]] = {STREAMED: by_blocks}
        if fits := (2 * n) ** 2 * 4 * _COPIES < _free_bytes(device):
            forms[WRITTEN] = written_out
        z = projections(n, device)
        sides = {name: partial(_ms, form, z, device) for name, form in forms.items()}
        found = in_turn(sides, trials, "ms")
        mib = {name: _peak_mib(name, n, device) for name in forms}
        row: Row = {"name": f"N = {n}", "n": n, "streamed_ms": statistics.median(found[STREAMED]), "streamed_mib": mib[STREAMED]}
        print(f"N = {n:>7,}  {STREAMED} {row['streamed_ms']:>10,.1f} ms {row['streamed_mib']:>9,.0f} MiB", end="")
        if fits:
            pairs = sorted(w / s for w, s in zip(found[WRITTEN], found[STREAMED], strict=True))
            row |= {"written_ms": statistics.median(found[WRITTEN]), "written_mib": mib[WRITTEN]}
            row |= {"ratio": statistics.median(pairs), "low": pairs[0], "high": pairs[-1]}
            row |= {"deviation": deviation(z)}
            print(
                f"   {WRITTEN} {row['written_ms']:>10,.1f} ms {row['written_mib']:>9,.0f} MiB   {row['ratio']:.2f} × as fast "
                f"(pairs {row['low']:.2f} … {row['high']:.2f}), apart {row['deviation']:.0e} of the largest gradient",
                end="",
            )
        print("" if fits else f"   {WRITTEN}: does not fit")
        rows.append(row)
    torch.set_num_threads(before)
    return rows


def projections(n: int, device: torch.device) -> Tensor:
    """(2n, d) normal rows, the second view near the first: cosines as in training."""
    first, noise = torch.randn(2, n, _D, generator=torch.Generator().manual_seed(n))
    return torch.cat([first, first + 0.5 * noise]).to(device).requires_grad_()


def written_out(z: Tensor) -> Tensor:
    """Eq. 1 as everybody writes it: all logits, the diagonal masked, cross entropy."""
    unit = F.normalize(z, dim=1)
    logits = unit @ unit.T / _TEMPERATURE
    own = torch.arange(len(z), device=z.device)
    return F.cross_entropy(logits.masked_fill(own[:, None] == own, float("-inf")), own.roll(len(z) // 2))


def by_blocks(z: Tensor) -> Tensor:
    """The same without the table, as `simclr.loss.nt_xent` calls it for large batches and on a GPU."""
    unit = F.normalize(z, dim=1)
    return streamed(unit, unit, 0, _TEMPERATURE)


def deviation(z: Tensor) -> float:
    """Largest difference of the two gradients, as a share of the largest entry."""
    (a,), (b,) = (torch.autograd.grad(form(z), z) for form in (written_out, by_blocks))
    return float((a - b).abs().max() / a.abs().max())


def _ms(form: Callable[[Tensor], Tensor], z: Tensor, device: torch.device) -> float:
    """Median milliseconds of value and gradient, after one call that compiles and allocates."""
    times = []
    for _ in range(_CALLS + 1):
        began = time.perf_counter()
        torch.autograd.grad(form(z), z)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times[1:])


def _peak_mib(name: str, n: int, device: torch.device) -> float:
    if device.type == "cuda":
        z, form = projections(n, device), written_out if name == WRITTEN else by_blocks
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        torch.autograd.grad(form(z), z)
        return (torch.cuda.max_memory_allocated(device) - held) / 2**20
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # a process's own peak never falls again
        return float(pool.apply(_added_mib, (name, n)))


def _added_mib(name: str, n: int) -> float:
    torch.set_num_threads(1)
    form = written_out if name == WRITTEN else by_blocks
    torch.autograd.grad(form(small := projections(8, torch.device("cpu"))), small)  # what the libraries take
    z = projections(n, torch.device("cpu"))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew; a spawned process begins with its parent's
    before = _kib("/proc/self/status", "VmRSS")
    torch.autograd.grad(form(z), z)
    return (_kib("/proc/self/status", "VmHWM") - before) / 1024


def _kib(file: str, name: str) -> int:
    lines = dict(line.split(":", 1) for line in Path(file).read_text().splitlines())
    return int(lines[name].split()[0])


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return _kib("/proc/meminfo", "MemAvailable") * 1024
