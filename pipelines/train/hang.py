"""Who hangs and who should leave: what Ray Train's controller asks its workers for, beside their health. Knows no Ray.

A rank that hangs stops all others, in their next collective, and none of them fails: torch gives up after half an hour, and
names whoever waited, not who was waited for. So the controller asks each worker now and then where it is (`simclr.telemetry.progress`). Who
does not answer, or is behind when nobody has moved for the timeout, is named, and counts as failed: Ray Train
ends the group's processes and starts again from the last checkpoint. Only the controller's clock is read.
"""

from __future__ import annotations

from simclr.telemetry.progress import Reading

_SLOWEST = 5.0  # steps of a slow machine may take longer than the timeout: as many times the longest pause so far is no hang
_asked: list[str] = []  # in a worker's process: why it should leave


class Group:
    """What the controller's two halves, who watches workers and who judges failures, know of the workers that run now. It is the
    module's own, `group`, since Ray hands the two over one by one, each a copy."""

    saved = 0
    """Step of the newest checkpoint that they have written; 0 = none yet."""


group = Group()


class Hung(Exception):
    """A worker that does not get on."""


class Leave(Exception):
    """A worker's way out that is no failure: its checkpoint is written, and training goes on with another group of workers."""


def ask_to_leave(reason: str) -> None:
    """Have this process' worker write a checkpoint at its next report, and leave."""
    _asked.append(reason)


def asked_to_leave() -> str:
    """Why this process' worker should leave, or ""."""
    return _asked[0] if _asked else ""


class HangDetector:
    """Which of the ranks hang, by what they say and by when they said it; `now` is the controller's clock, in seconds."""

    def __init__(self, names: list[str], timeout_s: float, now: float) -> None:
        """`names[rank]` is where a worker is, for people: its host, address and pid."""
        self.names, self.timeout_s = names, timeout_s
        self.readings: list[Reading | None] = [None] * len(names)
        self.answered, self.moved, self.stood = [now] * len(names), [now] * len(names), [now] * len(names)
        self.longest = 0.0

    def hear(self, rank: int, reading: Reading, now: float) -> None:
        """`rank` has answered."""
        before, self.readings[rank], self.answered[rank] = self.readings[rank], reading, now
        if before is None or reading.beats != before.beats or not reading.watched:
            if before is not None and before.watched:  # it stood from one answer to another, at least
                self.longest = max(self.longest, self.stood[rank] - self.moved[rank])
            self.moved[rank] = now
        self.stood[rank] = now

    def hung(self, now: float) -> dict[int, str]:
        """{rank: a sentence} of those that hang; {} while all is well."""
        silent = {r: now - at for r, at in enumerate(self.answered) if now - at > self.timeout_s}
        if silent:
            return {rank: f"no answer for {quiet:.0f} s from {self.names[rank]}{self._last(rank)}" for rank, quiet in silent.items()}
        seen = [reading for reading in self.readings if reading is not None and reading.watched]
        still = now - max(self.moved)
        if len(seen) < len(self.names) or still <= max(self.timeout_s, _SLOWEST * self.longest):
            return {}
        lowest = min(reading.step for reading in seen)
        behind = [rank for rank, reading in enumerate(seen) if reading.step == lowest]
        # In the same step those who wait for others are not who is waited for.
        guilty = [rank for rank in behind if not seen[rank].waiting] or behind
        return {rank: f"no progress for {still:.0f} s in {self.names[rank]}{self._last(rank)}" for rank in guilty}

    def _last(self, rank: int) -> str:
        reading = self.readings[rank]
        return f", at step {reading.step} ({reading.place})" if reading is not None and reading.step else ", before its first step"
