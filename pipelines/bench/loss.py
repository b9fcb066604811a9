"""`simclr bench loss`: NT-Xent with its gradient, without stored logits ÷ written out in float32. Time, memory, difference.

In bfloat16 it is the call of a step: `simclr.loss.nt_xent` of projections z in bfloat16."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.bench.result import Row, in_turn
from simclr.kernels.nt_xent import streamed
from simclr.loss import nt_xent

WRITTEN, STREAMED, CALLED = "written out", "streamed", "of bfloat16"
_D = 128  # dimensions of z, the papers'
_TEMPERATURE = 0.1
_CALLS = 5  # of a trial; the median counts
_COPIES = 4  # tables of logits: a little more than the peak of the written-out form


def loss(
    batches: tuple[int, ...], trials: int, threads: int, device: torch.device, precision: Literal["float32", "bfloat16"] = "float32"
) -> Iterator[Row]:
    """Print and give, for each N, milliseconds and MiB of both forms, and the largest difference of their gradients; of ours also the
    milliseconds of forward alone.

    MiB are the memory that a call adds at its peak: on a GPU the allocator's, on a CPU that of a fresh process. The written-out form,
    always float32, is left out if it does not fit.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    ours, dtype = (STREAMED, torch.float32) if precision == "float32" else (CALLED, torch.bfloat16)
    print(f"NT-Xent and its gradient, {precision}, d = {_D}, τ = {_TEMPERATURE}, {device.type}, {threads} threads, n = {trials}")
    for n in batches:
        given = {ours: projections(n, device, dtype)}
        if fits := (2 * n) ** 2 * 4 * _COPIES < _free_bytes(device):
            given[WRITTEN] = projections(n, device)
        found = in_turn({name: partial(_ms, FORMS[name], z, device) for name, z in given.items()}, trials, "ms")
        mib = {name: _peak_mib(name, n, device, z.dtype) for name, z in given.items()}
        row: Row = {"name": f"N = {n}", "n": n, "precision": precision}
        row |= {"streamed_ms": statistics.median(found[ours]), "streamed_mib": mib[ours]}
        row["forward_ms"] = _ms(FORMS[ours], given[ours], device, graded=False)
        print(f"N = {n:>7,}  {ours} {row['streamed_ms']:>10,.1f} ms, forward {row['forward_ms']:,.1f}", end="")
        print(f" {row['streamed_mib']:>9,.0f} MiB", end="")
        if fits:
            pairs = sorted(w / s for w, s in zip(found[WRITTEN], found[ours], strict=True))
            row |= {"written_ms": statistics.median(found[WRITTEN]), "written_mib": mib[WRITTEN]}
            row |= {"ratio": statistics.median(pairs), "low": pairs[0], "high": pairs[-1]}
            row |= {"deviation": deviation(given[WRITTEN], ours, given[ours])}
            print(
                f"   {WRITTEN} {row['written_ms']:>10,.1f} ms {row['written_mib']:>9,.0f} MiB   {row['ratio']:.2f} × as fast "
                f"(pairs {row['low']:.2f} … {row['high']:.2f}), apart {row['deviation']:.0e} of the largest gradient",
                end="",
            )
        print("" if fits else f"   {WRITTEN}: does not fit", flush=True)
        yield row
    torch.set_num_threads(before)


def projections(n: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """(2n, d) normal rows, the second view near the first: cosines as in training."""
    first, noise = torch.randn(2, n, _D, generator=torch.Generator().manual_seed(n))
    return torch.cat([first, first + 0.5 * noise]).to(device, dtype).requires_grad_()


def written_out(z: Tensor) -> Tensor:
    """Eq. 1 in its usual form: all logits, the diagonal masked, cross entropy."""
    unit = F.normalize(z, dim=1)
    logits = unit @ unit.T / _TEMPERATURE
    own = torch.arange(len(z), device=z.device)
    return F.cross_entropy(logits.masked_fill(own[:, None] == own, float("-inf")), own.roll(len(z) // 2))


def by_blocks(z: Tensor) -> Tensor:
    """The same without the table, as `simclr.loss.nt_xent` calls it for large batches and on a GPU."""
    unit = F.normalize(z, dim=1)
    return streamed(unit, unit, 0, _TEMPERATURE)


def as_called(z: Tensor) -> Tensor:
    """As a step calls it: the loss chooses precision and whether logits are stored."""
    return nt_xent(z, _TEMPERATURE)


FORMS: dict[str, Callable[[Tensor], Tensor]] = {WRITTEN: written_out, STREAMED: by_blocks, CALLED: as_called}


def deviation(z: Tensor, name: str, same: Tensor) -> float:
    """Largest difference of the gradients of the written-out form at z and of another at the `same` rows, as a share of the largest
    entry."""
    (a,), (b,) = torch.autograd.grad(written_out(z), z), torch.autograd.grad(FORMS[name](same), same)
    return float((a - b.float()).abs().max() / a.abs().max())


def _ms(form: Callable[[Tensor], Tensor], z: Tensor, device: torch.device, graded: bool = True) -> float:
    """Median milliseconds of value and gradient, or of the value alone, after one call that compiles and allocates."""
    times = []
    for _ in range(_CALLS + 1):
        began = time.perf_counter()
        value = form(z)
        if graded:
            torch.autograd.grad(value, z)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times[1:])


def _peak_mib(name: str, n: int, device: torch.device, dtype: torch.dtype) -> float:
    if device.type == "cuda":
        z = projections(n, device, dtype)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        torch.autograd.grad(FORMS[name](z), z)
        return (torch.cuda.max_memory_allocated(device) - held) / 2**20
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # a process's own peak never falls again
        return float(pool.apply(_added_mib, (name, n, dtype)))


def _added_mib(name: str, n: int, dtype: torch.dtype) -> float:
    torch.set_num_threads(1)
    form, cpu = FORMS[name], torch.device("cpu")
    torch.autograd.grad(form(small := projections(8, cpu, dtype)), small)  # loads the libraries' memory
    z = projections(n, cpu, dtype)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak: a spawned process starts with its parent's
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
