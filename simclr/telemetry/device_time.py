"""Timestamps between the kernels of a device, taken without waiting for it.

Kernels run after the host has launched them, so the host's clock around them measures the launches. On CUDA a timestamp is an event
between two kernels, read once it is reached; on a CPU it is the host's clock. Other devices use the host's clock too, which is good for
the time of many steps and not for a part of one.
"""

from __future__ import annotations

import time

import torch

Timestamp = float | torch.cuda.Event


def exact(device: torch.device) -> bool:
    """Whether timestamps on `device` can time parts of a step."""
    return device.type in ("cpu", "cuda")


def now(device: torch.device) -> Timestamp:
    """A timestamp after all work launched on `device` so far, before all later work."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def past(timestamp: Timestamp) -> bool:
    """Whether the device has reached `timestamp`. Does not wait."""
    return isinstance(timestamp, float) or bool(timestamp.query())


def wait_for(timestamp: Timestamp) -> None:
    """Wait until the device has reached `timestamp`."""
    if not isinstance(timestamp, float):
        timestamp.synchronize()


def seconds(begin: Timestamp, end: Timestamp) -> float:
    """Seconds between two timestamps of one device, both reached."""
    if isinstance(begin, float) or isinstance(end, float):
        assert isinstance(begin, float) and isinstance(end, float)
        return end - begin
    return 1e-3 * float(begin.elapsed_time(end))
