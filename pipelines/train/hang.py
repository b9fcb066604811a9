"""Detects workers that hang, and asks workers to leave. Ray Train's controller does both beside its health checks. Knows no Ray.

A rank that hangs stops all others in their next collective, and none of them fails. Torch gives up after half an hour, and then names
a waiting rank, not the blocking one. So the controller asks each worker now and then for its position (`simclr.telemetry.progress`). A
rank that gives no answer for the timeout counts as failed; so does the rank that is behind when no rank has moved for the timeout. The
controller names it, and Ray Train ends the group's processes and starts again from the last checkpoint. Only the controller's clock is
read.
"""

from __future__ import annotations

from simclr.telemetry.progress import Reading

_SLOWEST = 5.0  # times the longest pause so far is no hang: on a slow machine a step may take longer than the timeout
_asked: list[str] = []  # in a worker's process: why it should leave


class Group:
    """What the overseer and the failure policy share about the workers that run now. It is the module's own variable, `group`, because Ray
    copies the two one by one into the controller."""

    saved = 0
    """Step of the newest checkpoint that they have written; 0 = none yet."""


group = Group()


class Hung(Exception):
    """A worker makes no progress, or does not answer."""


class Leave(Exception):
    """A worker leaves without failure: its checkpoint is written, and training goes on with another group of workers."""


def ask_to_leave(reason: str) -> None:
    """Ask the worker in this process to write a checkpoint at its next report, and to leave."""
    _asked.append(reason)


def asked_to_leave() -> str:
    """The reason why the worker in this process should leave, or ""."""
    return _asked[0] if _asked else ""


class HangDetector:
    """Finds ranks that hang, from their answers and the times of these; `now` is the controller's clock, in seconds."""

    def __init__(self, names: list[str], timeout_s: float, now: float) -> None:
        """`names[rank]` is a worker's host, address and pid, for people."""
        self.names, self.timeout_s = names, timeout_s
        self.readings: list[Reading | None] = [None] * len(names)
        self.answered, self.moved, self.stood = [now] * len(names), [now] * len(names), [now] * len(names)
        self.longest = 0.0

    def hear(self, rank: int, reading: Reading, now: float) -> None:
        """`rank` has answered."""
        before, self.readings[rank], self.answered[rank] = self.readings[rank], reading, now
        if before is None or reading.beats != before.beats or not reading.watched:
            if before is not None and before.watched:  # it stood still at least from one answer to the next
                self.longest = max(self.longest, self.stood[rank] - self.moved[rank])
            self.moved[rank] = now
        self.stood[rank] = now

    def hung(self, now: float) -> dict[int, str]:
        """{rank: a sentence} of the ranks that hang; {} if none does."""
        silent = {r: now - at for r, at in enumerate(self.answered) if now - at > self.timeout_s}
        if silent:
            return {rank: f"no answer for {quiet:.0f} s from {self.names[rank]}{self._last(rank)}" for rank, quiet in silent.items()}
        seen = [reading for reading in self.readings if reading is not None and reading.watched]
        still = now - max(self.moved)
        if len(seen) < len(self.names) or still <= max(self.timeout_s, _SLOWEST * self.longest):
            return {}
        lowest = min(reading.step for reading in seen)
        behind = [rank for rank, reading in enumerate(seen) if reading.step == lowest]
        # In the same step a rank that waits for others is not the blocking rank.
        guilty = [rank for rank in behind if not seen[rank].waiting] or behind
        return {rank: f"no progress for {still:.0f} s in {self.names[rank]}{self._last(rank)}" for rank in guilty}

    def _last(self, rank: int) -> str:
        reading = self.readings[rank]
        return f", at step {reading.step} ({reading.place})" if reading is not None and reading.step else ", before its first step"
