"""Moments on the time line of a device, taken without waiting for it.

Kernels run behind the host that asks for them, so a host's clock around them measures the asking. On CUDA a moment is an event
between two kernels, read when it is past; on a CPU it is the host's clock. Other devices have neither here: their moments are the
host's, good for the time of many steps and not for a part of one.
"""

from __future__ import annotations

import time

import torch

Timestamp = float | torch.cuda.Event


def exact(device: torch.device) -> bool:
    """Whether moments on `device` tell parts of a step apart."""
    return device.type in ("cpu", "cuda")


def now(device: torch.device) -> Timestamp:
    """This moment between what `device` was asked for until now and what it will be asked for."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def past(moment: Timestamp) -> bool:
    """Whether the device has got there. Does not wait."""
    return isinstance(moment, float) or bool(moment.query())


def wait_for(moment: Timestamp) -> None:
    """Return once the device has got there."""
    if not isinstance(moment, float):
        moment.synchronize()


def seconds(begin: Timestamp, end: Timestamp) -> float:
    """From one moment to a later one of the same device, both past."""
    if isinstance(begin, float) or isinstance(end, float):
        assert isinstance(begin, float) and isinstance(end, float)
        return end - begin
    return 1e-3 * float(begin.elapsed_time(end))
