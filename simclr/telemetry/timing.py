"""How fast a loop runs, how long it waits for data, and how long a rank waits for the others."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

from simclr.collectives import Wait, gradients_met, take_waits
from simclr.telemetry.device_time import Timestamp, exact, now, past, seconds, wait_for

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Pace:
    """One rank's steps since the last report."""

    steps: int
    p50_s: float
    p95_s: float
    max_s: float
    """Seconds of a step: median, 95th percentile, longest."""
    outside_s: float
    inside_s: float
    """Medians of two parts of a step. Outside is the rank's own time, without its waits in collectives, and inside is 0. Collectives of a
    compiled network cannot be timed: for it, inside is the time from the first layer to the last gradient, waits included, and outside is
    the rest."""
    data_wait_pct: float
    communication_pct: float
    """Share of the time since the last report spent in collectives that were not hidden behind computing."""


class Clock:
    """Times the steps since the last report, at `step`. Only `pace` waits for the device.

    A step lasts from one call of `step_over` to the next, by timestamps of the device; the time between a report and `restart` is in no
    step.
    """

    def __init__(self, step: int, device: torch.device, compiled: bool = False) -> None:
        self.device, self.compiled = device, compiled
        self.restart(step)

    def restart(self, step: int) -> None:
        """Forget everything and count from `step` on."""
        self.step, self.began, self.waiting_s = step, time.perf_counter(), 0.0
        self._step_began = now(self.device)
        self._entered: Timestamp | None = None
        self._left: Timestamp | None = None
        self._open: deque[tuple[Timestamp, Timestamp, list[Wait], Wait | None]] = deque()  # steps that the device may not have ended yet
        self._steps: list[tuple[float, float, float]] = []  # of each, in seconds: whole, waits, inside
        take_waits()

    def next(self, stream: Iterator[T]) -> T:
        """The next item of `stream`; waiting for it counts as data wait."""
        asked = time.perf_counter()
        item = next(stream)
        self.waiting_s += time.perf_counter() - asked
        return item

    def enters(self) -> None:
        """The forward pass begins. Of several calls in a step the first counts."""
        if self.compiled and self._entered is None:
            self._entered = now(self.device)

    def leaves(self) -> None:
        """The gradients are complete, those of other ranks included."""
        gradients_met(self.device)
        if self.compiled:
            self._left = now(self.device)

    def step_over(self) -> None:
        """A step ends, the next begins."""
        end = now(self.device)
        inside = (self._entered, self._left) if self._entered is not None and self._left is not None else None
        self._open.append((self._step_began, end, take_waits(), inside))
        self._step_began, self._entered, self._left = end, None, None
        while self._open and past(self._open[0][1]):
            self._read()

    def pace(self) -> Pace:
        """The pace of the finished steps. Waits for the device."""
        take_waits(go_on=False)
        while self._open:
            wait_for(self._open[0][1])
            self._read()
        whole = sorted(step[0] for step in self._steps)
        total, waited = sum(whole), sum(step[1] for step in self._steps)
        parts = [(step - inside, inside) if self.compiled else (step - waits, 0.0) for step, waits, inside in self._steps]
        outside, inner = (statistics.median(part) for part in zip(*parts, strict=True))
        return Pace(
            steps=len(whole),
            p50_s=statistics.median(whole),
            p95_s=whole[math.ceil(0.95 * len(whole)) - 1],
            max_s=whole[-1],
            outside_s=outside if exact(self.device) else 0.0,
            inside_s=inner,
            data_wait_pct=100 * self.waiting_s / (time.perf_counter() - self.began),
            communication_pct=100 * waited / total,
        )

    def speed(self, step: int, images_per_step: int) -> dict[str, float]:
        """The speed metrics at `step`."""
        elapsed = time.perf_counter() - self.began
        return {
            "speed/images_per_s": (step - self.step) * images_per_step / elapsed,
            "speed/data_wait_pct": 100 * self.waiting_s / elapsed,
            "speed/step_s": elapsed / (step - self.step),
        }

    def _read(self) -> None:
        begin, end, waits, inside = self._open.popleft()
        self._steps.append((seconds(begin, end), sum(seconds(*wait) for wait in waits), seconds(*inside) if inside else 0.0))
