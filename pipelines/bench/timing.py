"""What the benches of steps share: how long whole steps take, what they hold at their peak, and where the host waits for the device."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from pipelines.bench.result import WARM_STEPS

Call = Callable[[], object]
"""Takes one step, or a part of one. Nobody waits for the device in it."""

_PROFILED = 5  # steps
_ENOUGH = 0.05  # of the seconds that are asked for, to guess the number of steps from
_SYNCHRONISE = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cuStreamSynchronize", "cuCtxSynchronize")
_SPAN = "steps between two reports"


def wait(device: torch.device) -> None:
    """Until everything that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def call_s(one: Call, steps: int, device: torch.device, least_s: float = 0.0, warm: int = WARM_STEPS) -> float:
    """Seconds of a step: the mean of the `steps` − 5 behind the first `warm`, or of as many as last `least_s` seconds.

    As in the loop, the host waits at the end, not in between: a window of few short steps would measure that wait.
    """
    _taken_s(one, 1, device)  # it compiles and allocates
    tried, spent_s = warm - 1, _taken_s(one, warm - 1, device)
    while spent_s < _ENOUGH * least_s:  # to guess from: what is prepared in advance takes no time at first
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
    """GiB that the allocator held at most since this was asked before; None without a GPU."""
    if device.type != "cuda":
        return None
    found = torch.cuda.max_memory_allocated(device) / 2**30
    torch.cuda.reset_peak_memory_stats(device)
    return found


def graph_breaks() -> int:
    """How often torch.compile has fallen back to Python in this process so far. A network that is one graph adds nothing."""
    from torch._dynamo.utils import counters  # no public name says it of a network that runs; `explain` compiles another

    return sum(counters["graph_break"].values())


def write_profile(one: Call, path: Path, device: torch.device) -> Counter[str] | None:
    """Write the operators that take longest, over 5 steps, to `path`; return `host_waits`, None without a GPU."""
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
    """How often the host waited for the device inside the span of 5 steps, by call, of (name, start, end). The profiler itself, and
    whoever times the steps, waits once more at their end: outside."""
    spans = [(start, end) for name, start, end in events if name == _SPAN]
    inside = (name for name, start, end in events if name in _SYNCHRONISE and any(a <= start and end <= b for a, b in spans))
    return Counter(inside)
