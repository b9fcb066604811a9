"""The controller's callback that watches the workers for hangs and preemption notices."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from pipelines.train import hang, memory, ray_private
from pipelines.train.messages import Said, Tell, WorkerFailed
from pipelines.train.starting import Starting
from simclr.telemetry import progress

_ASK_MOST_S = 30.0  # between two questions for a worker's position


def _position() -> tuple[progress.Reading, int]:
    return progress.read(), memory.kernel_kills()


def overseer(hang_timeout_s: float, tell: Tell) -> Any:
    """A callback of the controller: it checks the workers whenever Ray asks for their health."""
    import ray

    class Overseer(ray_private.group_callback()):  # type: ignore[misc]
        workers: list[ray_private.Worker]
        detector: hang.HangDetector | None = None
        size = 0

        def __reduce__(self) -> Any:
            return overseer, (hang_timeout_s, tell)  # Ray sends every worker a copy of all callbacks; the copy knows no workers

        @contextlib.contextmanager
        def starts(self) -> Iterator[None]:
            hang.group.stuck = ""
            self.starting = Starting(hang.patience_s("start", hang_timeout_s))
            self.starting.start()
            try:
                yield
            finally:
                self.starting.end()

        def born(self, workers: list[ray_private.Worker]) -> None:
            self.starting.born(workers)

        def started(self, count: int) -> None:
            if self.size:
                tell(Said(f"starting again with {count} workers" + (f", {self.size} before" if count != self.size else "")))
            self.size = count

        def trains(self, workers: list[ray_private.Worker]) -> None:
            self.workers = workers
            self.detector = hang.HangDetector([str(worker) for worker in workers], hang_timeout_s, time.monotonic())
            self.pending: dict[Any, int] = {}
            self.next = 0.0
            self.warned = self.told = False
            hang.group.saved = 0
            hang.group.kills.clear()

        def ends(self) -> None:
            self.detector = None

        def heard(self, health: ray_private.Health) -> None:
            if self.detector is None or health.failed():
                return
            self._ask(self.detector)
            hung = self.detector.hung(time.monotonic())
            if not self.told and (sentence := self.detector.waits_for_others()):
                self.told = True
                tell(Said(sentence))
            for rank, sentence in hung.items():
                health.fail(rank, hang.Hung(sentence))
            if hung:  # Ray called the callbacks that report failed workers before this one, so they miss this failure
                rank = min(hung)
                tell(WorkerFailed(rank=rank, error=hung[rank]))
            notice = health.notice()
            if notice is not None and not self.warned:
                self.warned = True
                left = f" in {notice.deadline_ms / 1000 - time.time():.0f} s" if notice.deadline_ms else ""
                reason = f"rank {', '.join(map(str, notice.preempted_ranks))} loses its node{left}"
                self.workers[0].ask(hang.ask_to_leave, reason)

        def _ask(self, detector: hang.HangDetector) -> None:
            """Take the answers that have come, and ask these workers again when it is time."""
            done, _ = ray.wait(list(self.pending), num_returns=len(self.pending), timeout=0) if self.pending else ([], [])
            for answer in done:
                rank = self.pending.pop(answer)
                try:
                    reading, kills = ray.get(answer)
                except ray.exceptions.RayError:  # the worker is gone: Ray's health check reports it
                    continue
                detector.hear(rank, reading, time.monotonic())
                hang.group.kills[rank] = self.workers[rank], kills
                hang.group.saved = max(hang.group.saved, reading.saved)
            if (now := time.monotonic()) >= self.next:
                self.next = now + min(detector.timeout_s / 10, _ASK_MOST_S)
                waited_for = set(self.pending.values())
                for rank, worker in enumerate(self.workers):
                    if rank not in waited_for:
                        detector.asks(rank, now)
                        self.pending[worker.ask(_position)] = rank

    return Overseer()
