"""Watches the start of a group of workers, from the controller's side: Ray waits for its processes without a limit, so it would wait for
ever for one that stands still in its imports or on a dead network disk, and would not name it.

A start takes seconds, and nothing is asked in its first tenth of a patience. A process that owes an answer for all of the patience is
killed: that ends Ray's waiting, and the failure policy decides.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

from pipelines.train import hang, ray_private, ray_start

_LOOK_MOST_S = 30.0  # between two looks


class Debts:
    """Who owes a sign of life, and since when; `now` is the controller's clock, in seconds."""

    def __init__(self, patience_s: float, now: float) -> None:
        self.patience_s, self.watch = patience_s, hang.Watch(patience_s, now)
        self.since: dict[Any, float] = {}

    def owes(self, who: Any, now: float) -> None:
        """A sign is asked for, unless one is owed already."""
        self.since.setdefault(who, self.watch.at(now))

    def paid(self, who: Any) -> None:
        self.since.pop(who, None)

    def late(self, now: float) -> dict[Any, float]:
        """Who owes one for longer than the patience, and for how many seconds."""
        now = self.watch.at(now)
        return {who: now - since for who, since in self.since.items() if now - since > self.patience_s}


class Starting(threading.Thread):
    """Looks at the processes of a start until `end` is called."""

    def __init__(self, patience_s: float) -> None:
        super().__init__(name="starting", daemon=True)
        self.patience_s, self.over = patience_s, threading.Event()
        self.workers: list[ray_private.Worker] = []
        self.pending: dict[Any, int] = {}
        self.debts = Debts(self.patience_s, time.monotonic())

    def born(self, workers: list[ray_private.Worker]) -> None:
        """All processes have answered once; from now on they are asked."""
        self.workers = workers

    def end(self) -> None:
        self.over.set()

    def run(self) -> None:
        while not self.over.wait(min(self.patience_s / 20, _LOOK_MOST_S)):
            with contextlib.suppress(Exception):  # the head is away: then Ray's start fails, or the next look succeeds
                self._look()

    def _look(self) -> None:
        now = time.monotonic()
        if self.workers:
            late: list[tuple[Any, str, float]] = [(self.workers[r], str(self.workers[r]), s) for r, s in self._asked(now).items()]
        else:
            found = {process.id: process for process in ray_start.unborn()}
            for process in found:
                self.debts.owes(process, now)
            owed = {process: since for process, since in self.debts.late(now).items() if process in found}
            # Ray's controller asks each process one question; among those that are alive nothing says which does not answer.
            first = {p: s for p, s in owed.items() if not found[p].alive} or owed
            late = [(found[process], found[process].name, since) for process, since in first.items()]
        if late and not self.over.is_set():
            hang.group.stuck = f"no answer for {max(s for *_, s in late):.0f} s from {', '.join(name for _, name, _ in late)}, phase start"
            for process, _, _ in late:
                process.end()
            self.end()

    def _asked(self, now: float) -> dict[int, float]:
        """Ranks that do not answer, and for how long. Asks those that have answered again."""
        import ray

        done, _ = ray.wait(list(self.pending), num_returns=len(self.pending), timeout=0) if self.pending else ([], [])
        for answer in done:
            self.debts.paid(self.pending.pop(answer))
        for rank in set(range(len(self.workers))) - {*self.pending.values()}:
            self.debts.owes(rank, now)
            self.pending[self.workers[rank].ask(len, "")] = rank
        return {rank: since for rank, since in self.debts.late(now).items() if isinstance(rank, int)}
