"""Detects workers that hang, and asks workers to leave. Ray Train's controller does both beside its health checks. Knows no Ray.

A rank that hangs stops all others in their next collective, and none of them fails. Torch gives up after half an hour, and then names
a waiting rank, not the blocking one; Ray waits without a limit for processes that start, and in its barrier. So the controller asks each
worker now and then for its phase and its position (`simclr.telemetry.progress`). Each phase has a patience of its own (`PATIENCE`).
A rank that gives no answer for so long counts as failed; so does one that makes no progress where it works alone, and the rank that is
behind when no rank makes progress. The controller names it, and Ray Train ends the group's processes and starts again from the last
checkpoint.

Only the controller's clock is read, and it counts only while the controller looks: a laptop that slept has no hung workers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from simclr.telemetry.progress import PHASES, Reading

PATIENCE: Mapping[str, float] = MappingProxyType(
    {
        "start": 2,
        "import": 2,  # hundreds of processes may read the same files of a network disk
        "rendezvous": 1,
        "fetch": 1,
        "lock": math.inf,  # the process that it waits for may fetch terabytes; that one is watched by its own job
        "first batch": 6,  # a large network compiles for many minutes without a sign
        "training": 1,
        "evaluation": 2,
        "saving": 2,
        "upload": 1,
    }
)
"""Without any progress, times `--hang-timeout-s`. Bytes that travel are progress, however long all of them take."""
_LEAST_S = 120.0  # where processes start, import and compile: what a loaded machine needs for that does not depend on the flag

# Times the longest pause so far in a phase, or the slowest answer, is no hang: on a slow machine a step may take longer than the timeout.
_SLOWEST = 5.0
_ALONE = ("import", "fetch", "upload")  # where a rank needs no other one, so that its own silence is enough
# Where all ranks go through the same steps, a rank's phase says nothing about who is behind.
_ORDER = {"start": 0, "import": 1, "rendezvous": 2, "fetch": 3, "lock": 3, **dict.fromkeys(PHASES[5:9], 4), "upload": 5}
_asked: list[str] = []  # in a worker's process: why it should leave


class Group:
    """What the overseer and the failure policy share about the workers that run now. It is the module's own variable, `group`, because Ray
    copies the two one by one into the controller."""

    saved = 0
    """Step of the newest checkpoint that they have written; 0 = none yet."""
    kills: ClassVar[dict[int, tuple[Any, int]]] = {}
    """Rank → its worker, and how many processes its machine's kernel had killed for lack of memory when it last answered."""
    short = 0
    """How often in a row, without a new checkpoint between them, a group ended because a node's memory was used up."""
    stuck = ""
    """Which worker was ended because its start hung, as a sentence; "" = none."""


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


def patience_s(phase: str, timeout_s: float) -> float:
    """Seconds without progress that are no hang in `phase`; `timeout_s` is --hang-timeout-s."""
    least = _LEAST_S if phase in ("start", "import", "first batch") else 0.0
    return max(PATIENCE[phase] * timeout_s, least)


class Watch:
    """A clock that stands still while nobody looks: a machine that slept, or a controller that was stopped, has seen nothing of that
    time. Seconds."""

    def __init__(self, timeout_s: float, now: float) -> None:
        self.most, self.last, self.counted = timeout_s / 4, now, 0.0

    def at(self, now: float) -> float:
        """The time that was looked at, up to `now`."""
        self.counted += min(max(now - self.last, 0.0), self.most)
        self.last = now
        return self.counted


class HangDetector:
    """Finds ranks that hang, from their answers and the times of these; `now` is the controller's clock, in seconds."""

    def __init__(self, names: list[str], timeout_s: float, now: float) -> None:
        """`names[rank]` is a worker's host, address and pid, for people."""
        self.names, self.timeout_s, self.watch = names, timeout_s, Watch(timeout_s, now)
        self.readings: list[Reading | None] = [None] * len(names)
        self.answered, self.moved, self.stood = [0.0] * len(names), [0.0] * len(names), [0.0] * len(names)
        self.asked = [math.inf] * len(names)
        self.longest, self.slowest = dict.fromkeys(PHASES, 0.0), dict.fromkeys(PHASES, 0.0)

    def asks(self, rank: int, now: float) -> None:
        """`rank` is asked now; it has answered all questions before."""
        self.asked[rank] = self.watch.at(now)

    def hear(self, rank: int, reading: Reading, now: float) -> None:
        """`rank` has answered."""
        now = self.watch.at(now)
        phase = self._phase(rank)
        self.slowest[phase] = max(self.slowest[phase], now - self.asked[rank])
        before, self.readings[rank], self.answered[rank] = self.readings[rank], reading, now
        if before is None or (reading.phase, reading.beats) != (before.phase, before.beats) or not reading.phase or reading.stopped:
            if before is not None and before.phase and not before.stopped:  # it stood still at least from one answer to the next
                self.longest[before.phase] = max(self.longest[before.phase], self.stood[rank] - self.moved[rank])
            self.moved[rank] = now
        self.stood[rank] = now

    def hung(self, now: float) -> dict[int, str]:
        """{rank: a sentence} of the ranks that hang; {} if none does."""
        now = self.watch.at(now)
        silent = {r: now - at for r, at in enumerate(self.answered) if now - at > self._patience(r)}
        if silent:
            return {rank: f"no answer for {quiet:.0f} s from {self.names[rank]}, {self._last(rank)}" for rank, quiet in silent.items()}
        alone = {r: self.stood[r] - self.moved[r] for r, seen in self._at_work().items() if seen.phase in _ALONE and not seen.waiting}
        still = {rank: since for rank, since in alone.items() if since > self._limit(rank)} or self._blocked()
        return {rank: f"no progress for {since:.0f} s in {self.names[rank]}, {self._last(rank)}" for rank, since in still.items()}

    def waits_for_others(self) -> str:
        """The sentence of ranks that wait for another process of their machine while no rank goes on; "" if there is none."""
        still, at_work = self._still(), self._at_work()
        locked = [rank for rank, seen in at_work.items() if seen.phase == "lock"]
        if still <= self.timeout_s or not locked or any(at_work[r].phase != "lock" and not at_work[r].waiting for r in at_work):
            return ""
        who = ", ".join(self.names[rank] for rank in locked)
        return f"waiting for {still:.0f} s for another process that works on the same files ({who}, {self._last(locked[0])})"

    def _at_work(self) -> dict[int, Reading]:
        return {rank: reading for rank, reading in enumerate(self.readings) if reading is not None and reading.phase}

    def _still(self) -> float:
        """For how long no rank has made progress, as far as all have answered."""
        at_work = self._at_work()
        return min(self.stood[rank] for rank in at_work) - max(self.moved[rank] for rank in at_work) if at_work else 0.0

    def _blocked(self) -> dict[int, float]:
        """Ranks that keep all ranks from going on, and for how long."""
        at_work, still = self._at_work(), self._still()
        if not at_work or None in self.readings:
            return {}
        lowest = min((_ORDER[reading.phase], reading.step) for reading in at_work.values())
        behind = [rank for rank, reading in at_work.items() if (_ORDER[reading.phase], reading.step) == lowest]
        # In the same step a rank that waits for others is not the blocking rank.
        guilty = [rank for rank in behind if not at_work[rank].waiting] or behind
        return dict.fromkeys(guilty, still) if still > max(map(self._limit, guilty)) else {}

    def _phase(self, rank: int) -> str:
        """Where `rank` was last seen, or is on its way to its first answer, or out."""
        reading = self.readings[rank]
        return (reading.phase or "upload") if reading is not None else "start"

    def _patience(self, rank: int) -> float:
        """Seconds of silence that are no hang for `rank`."""
        phase = self._phase(rank)
        return max(patience_s("fetch" if phase == "lock" else phase, self.timeout_s), _SLOWEST * self.slowest[phase])

    def _limit(self, rank: int) -> float:
        """Seconds without progress that are no hang for `rank`, which answers."""
        phase = self._at_work()[rank].phase
        return max(patience_s(phase, self.timeout_s), _SLOWEST * self.longest[phase])

    def _last(self, rank: int) -> str:
        reading = self.readings[rank]
        if reading is None or not reading.phase:
            return "phase start, before its first answer" if reading is None else "at its end"
        return f"phase {reading.phase}" + (f", at step {reading.step}" if reading.step else "") + f" ({reading.place})"
