"""A side of a comparison in a process of its own that compiles once, and then is timed as often as it is asked."""

from __future__ import annotations

import contextlib
import ctypes
import math
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING

from pipelines.bench.result import WARM_STEPS

if TYPE_CHECKING:
    import torch

Ask = Callable[[int], float]
"""Number of steps in a row → mean seconds of one."""
Make = Callable[[], Ask]
"""Called in the process that takes the steps."""
_LEAVE_S = 20.0


@dataclass(frozen=True, slots=True)
class Held:
    """The process, and the way to it."""

    process: BaseProcess
    pipe: Connection

    def step_s(self, steps: int) -> float:
        """Mean seconds of `steps` steps in a row. Raises RuntimeError where the process has ended."""
        try:
            self.pipe.send(steps)
            found: float = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(_LEAVE_S)
            raise RuntimeError(f"a side's process ended with code {self.process.exitcode}; its traceback is above") from None
        return found


@contextlib.contextmanager
def held(make: Make) -> Iterator[Held]:
    """A fresh process that answers what `make` gives, with processes of its own if it likes. Between two questions it does nothing."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_answer, args=(make, there))
    process.start()
    there.close()
    try:
        yield Held(process, here)
    finally:
        here.close()  # it is asked no more
        process.join(_LEAVE_S)
        process.kill()
        process.join()


def steps_of(side: Held, steps: int, window_s: float) -> int:
    """Steps that last `window_s` seconds, at least `steps` − 5, by how long the first of them take."""
    side.step_s(1)  # compiles
    return max(steps - WARM_STEPS, math.ceil(window_s / side.step_s(WARM_STEPS)))


def asks(one: Callable[[], object], device: torch.device) -> Ask:
    """The steps of `one`, behind 5 that are not counted. What memory it can it gives the GPU back, for whoever is asked next."""
    import torch

    from pipelines.bench.timing import call_s

    def ask(steps: int) -> float:
        found = call_s(one, steps + WARM_STEPS, device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return found

    return ask


def end_with_parent() -> None:
    """Called in a process, it does not outlive the one that started it, however that is ended. (Linux; elsewhere there is no such call.)"""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG


def _answer(make: Make, pipe: Connection) -> None:
    # Linux shares a busy machine among sessions first (autogroup), and Ray's workers have one of their own: so has what they are
    # compared with.
    os.setsid()
    end_with_parent()
    ask = make()
    while True:
        try:
            steps = pipe.recv()
        except EOFError:
            return
        pipe.send(ask(steps))
