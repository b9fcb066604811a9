"""What the benches of steps share: the time of whole steps, their peak memory, and the host's waits for the device."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from pipelines.bench.result import WARM_STEPS

Call = Callable[[], object]
"""Takes one step, or a part of one, without waiting for the device."""

_PROFILED = 5  # steps
_ENOUGH = 0.05  # share of the requested seconds that is spent to estimate the number of steps
_SYNCHRONISE = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cuStreamSynchronize", "cuCtxSynchronize")
_SPAN = "steps between two reports"


def wait(device: torch.device) -> None:
    """Wait until the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def call_s(one: Call, steps: int, device: torch.device, least_s: float = 0.0, warm: int = WARM_STEPS) -> float:
    """Seconds of a step: the mean of the `steps` − 5 after the first `warm`, or of as many as last `least_s` seconds.

    As in the loop, the host waits for the device at the end and not in between. A window of few short steps would measure that wait.
    """
    _taken_s(one, 1, device)  # it compiles and allocates
    tried, spent_s = warm - 1, _taken_s(one, warm - 1, device)
    while spent_s < _ENOUGH * least_s:  # an estimate: batches prepared in advance take no time at first
        tried *= 2
        spent_s = _taken_s(one, tried, device)
    taken, elapsed_s, more = 0, 0.0, max(steps - WARM_STEPS, math.ceil(least_s / spent_s * tried))
    while more > 0:
        elapsed_s += _taken_s(one, more, device)
        taken += more
        more = math.ceil((least_s - elapsed_s) / elapsed_s * taken)
    return elapsed_s / taken


def _taken_s(one: Call, times: int, device: torch.device) -> float:
    began = time.perf_counter()
    for _ in range(times):
        one()
    wait(device)
    return time.perf_counter() - began


def rate(one: Call, steps: int, images: int, device: torch.device, least_s: float = 0.0, warm: int = WARM_STEPS) -> float:
    """Images per second of steps of so many `images`: see `call_s`."""
    return images / call_s(one, steps, device, least_s, warm)


def peak_gib(device: torch.device) -> float | None:
    """The allocator's peak in GiB since the last call of this; None without a GPU."""
    if device.type != "cuda":
        return None
    found = torch.cuda.max_memory_allocated(device) / 2**30
    torch.cuda.reset_peak_memory_stats(device)
    return found


def graph_breaks() -> int:
    """How often torch.compile has fallen back to Python in this process so far. A network that is one graph adds nothing."""
    from torch._dynamo.utils import counters  # no public name tells it of a running network; `explain` compiles another

    return sum(counters["graph_break"].values())


def write_profile(one: Call, path: Path, device: torch.device) -> Counter[str] | None:
    """Write the slowest operators of 5 steps to `path`; return `host_waits`, None without a GPU."""
    from torch.profiler import ProfilerActivity, profile, record_function

    gpu = device.type == "cuda"
    one()
    wait(device)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as seen:
        with record_function(_SPAN):
            for _ in range(_PROFILED):
                one()
        wait(device)
    table = seen.key_averages().table(sort_by=f"self_{'cuda' if gpu else 'cpu'}_time_total", row_limit=25, max_name_column_width=70)
    path.write_text(table + "\n")
    if not gpu:
        return None
    return host_waits([(e.name, e.time_range.start, e.time_range.end) for e in seen.events() or ()])


def host_waits(events: list[tuple[str, float, float]]) -> Counter[str]:
    """How often the host waited for the device within the span of 5 steps, by call, from (name, start, end). The profiler and the timing
    each wait once more after the span, which does not count."""
    spans = [(start, end) for name, start, end in events if name == _SPAN]
    inside = (name for name, start, end in events if name in _SYNCHRONISE and any(a <= start and end <= b for a, b in spans))
    return Counter(inside)
