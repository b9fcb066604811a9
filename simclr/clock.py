"""How fast a loop runs, and how long it waits for data."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TypeVar

T = TypeVar("T")


class Clock:
    """Time since the last report, at `step`, and how much of it went into waiting for data."""

    def __init__(self, step: int) -> None:
        self.step, self.began, self.waiting_s = step, time.perf_counter(), 0.0

    def next(self, stream: Iterator[T]) -> T:
        """The next of `stream`, waited for."""
        asked = time.perf_counter()
        item = next(stream)
        self.waiting_s += time.perf_counter() - asked
        return item

    def speed(self, step: int, images_per_step: int) -> dict[str, float]:
        """The metrics at `step`."""
        elapsed = time.perf_counter() - self.began
        return {
            "speed/images_per_s": (step - self.step) * images_per_step / elapsed,
            "speed/data_wait_pct": 100 * self.waiting_s / elapsed,
            "speed/step_s": elapsed / (step - self.step),
        }
