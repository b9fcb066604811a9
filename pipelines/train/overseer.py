"""The controller's callback that looks after the workers: who hangs, who loses its node."""

from __future__ import annotations

import time
from typing import Any

from pipelines.train import hang
from pipelines.train.messages import Said, Tell
from simclr.telemetry import progress

_ASK_MOST_S = 30.0  # between two questions where a worker is


def overseer(hang_timeout_s: float, tell: Tell) -> Any:
    """A callback of the controller, that looks after the workers whenever Ray asks for their health."""
    import ray
    from ray.train.v2._internal.execution.callback import WorkerGroupCallback

    class Overseer(WorkerGroupCallback):
        workers: list[Any]
        detector: hang.HangDetector | None = None
        size = 0

        def after_worker_group_start(self, worker_group: Any) -> None:
            count = len(worker_group.get_workers())
            if self.size:
                tell(Said(f"starting again with {count} workers" + (f", {self.size} before" if count != self.size else "")))
            self.size = count

        def after_worker_group_training_start(self, worker_group: Any) -> None:
            self.workers = worker_group.get_workers()
            about = [worker.metadata for worker in self.workers]
            names = [f"pid {m.pid} on {m.hostname} ({m.node_ip})" for m in about]
            self.detector = hang.HangDetector(names, hang_timeout_s, time.monotonic())
            self.pending: dict[Any, int] = {}
            self.next = 0.0
            self.warned = False
            hang.group.saved = 0

        def before_worker_group_shutdown(self, worker_group: Any) -> None:
            self.detector = None

        def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
            if self.detector is None or worker_group_status.errors:
                return
            self._ask(self.detector)
            for rank, sentence in self.detector.hung(time.monotonic()).items():
                worker_group_status.worker_statuses[rank].error = hang.Hung(sentence)
            notice = worker_group_status.get_preemption_info()
            if notice is not None and not self.warned:
                self.warned = True
                left = f" in {notice.deadline_ms / 1000 - time.time():.0f} s" if notice.deadline_ms else ""
                reason = f"rank {', '.join(map(str, notice.preempted_ranks))} loses its node{left}"
                self.workers[0].execute_async(hang.ask_to_leave, reason)

        def _ask(self, detector: hang.HangDetector) -> None:
            """Hear who has answered meanwhile, and ask again those who have, when it is time."""
            done, _ = ray.wait(list(self.pending), num_returns=len(self.pending), timeout=0) if self.pending else ([], [])
            for answer in done:
                rank = self.pending.pop(answer)
                try:
                    reading = ray.get(answer)
                except ray.exceptions.RayError:  # a worker that is gone: Ray's health check names it
                    continue
                detector.hear(rank, reading, time.monotonic())
                hang.group.saved = max(hang.group.saved, reading.saved)
            if (now := time.monotonic()) >= self.next:
                self.next = now + min(detector.timeout_s / 10, _ASK_MOST_S)
                waited_for = set(self.pending.values())
                for rank, worker in enumerate(self.workers):
                    if rank not in waited_for:
                        self.pending[worker.execute_async(progress.read)] = rank

    return Overseer()
