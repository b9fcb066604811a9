"""A side of a comparison in its own process, which compiles once and is then timed any number of times."""

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
    """The process of a side, and the pipe to it."""

    process: BaseProcess
    pipe: Connection

    def step_s(self, steps: int) -> float:
        """Mean seconds of `steps` steps in a row. Raises RuntimeError if the process has ended."""
        try:
            self.pipe.send(steps)
            found: float = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(_LEAVE_S)
            raise RuntimeError(f"a side's process ended with code {self.process.exitcode}; its traceback is above") from None
        return found


@contextlib.contextmanager
def held(make: Make) -> Iterator[Held]:
    """A fresh process that answers with the side from `make`; it may start processes itself. Between two questions it does nothing."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_answer, args=(make, there))
    process.start()
    there.close()
    try:
        yield Held(process, here)
    finally:
        here.close()  # no further question
        process.join(_LEAVE_S)
        process.kill()
        process.join()


def steps_of(side: Held, steps: int, window_s: float) -> int:
    """The number of steps that last `window_s` seconds, at least `steps` − 5, estimated from the first steps."""
    side.step_s(1)  # compiles
    return max(steps - WARM_STEPS, math.ceil(window_s / side.step_s(WARM_STEPS)))


def asks(one: Callable[[], object], device: torch.device) -> Ask:
    """The steps of `one`, after 5 that are not counted. It returns unused memory to the GPU, for the side that is asked next."""
    import torch

    from pipelines.bench.timing import call_s

    def ask(steps: int) -> float:
        found = call_s(one, steps + WARM_STEPS, device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return found

    return ask


def end_with_parent() -> None:
    """Let this process end with its parent, however that ends. (Linux; elsewhere there is no such call.)"""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG


def _answer(make: Make, pipe: Connection) -> None:
    # Linux first shares a busy machine among sessions (autogroup), and Ray's workers have their own session. So the side that they
    # are compared with gets its own session too.
    os.setsid()
    end_with_parent()
    ask = make()
    while True:
        try:
            steps = pipe.recv()
        except EOFError:
            return
        pipe.send(ask(steps))
