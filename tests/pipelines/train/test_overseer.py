"""The overseer, as Ray Train's controller calls it: last of the callbacks, with a copy at every worker."""

from __future__ import annotations

import math
import threading
from types import SimpleNamespace
from typing import Any

from pipelines.train import hang
from pipelines.train.messages import WorkerFailed
from pipelines.train.overseer import overseer


def test_a_silent_worker_counts_as_failed_and_is_reported() -> None:
    """Ray calls its other callbacks first, so no other one reports it."""
    from ray.train.v2._internal.execution.worker_group import WorkerGroupPollStatus, WorkerStatus

    told: list[Any] = []
    callback = overseer(0.02, told.append)
    about = [SimpleNamespace(pid=7 + rank, hostname=f"h{rank}", node_ip=f"10.0.0.{rank}") for rank in range(2)]
    group = SimpleNamespace(get_workers=lambda: [SimpleNamespace(metadata=each) for each in about])
    callback.after_worker_group_start(group)
    callback.after_worker_group_training_start(group)
    callback.next = math.inf  # it asks no worker
    status = WorkerGroupPollStatus({rank: WorkerStatus(running=True) for rank in range(2)})
    callback.after_worker_group_poll_status(status)
    assert not status.errors and not told
    callback.detector.answered[:] = [math.inf, -121.0]
    callback.after_worker_group_poll_status(status)
    assert set(status.errors) == {1} and isinstance(status.errors[1], hang.Hung)
    sentence = "no answer for 121 s from pid 8 on h1 (10.0.0.1), phase start, before its first answer"
    assert str(status.errors[1]) == sentence and told == [WorkerFailed(rank=1, error=sentence)]
    callback.after_worker_group_poll_status(status)
    assert len(told) == 1
    callback.before_worker_group_shutdown(group)
    assert callback.detector is None


def test_a_copy_knows_nobody() -> None:
    """Under Ray Tune each new group of workers gets a copy of the controller's overseer."""
    from ray import cloudpickle

    first = overseer(3.0, print)
    first.workers, first.size, first.pending = [threading.Lock()], 2, {threading.Lock(): 0}
    copy = cloudpickle.loads(cloudpickle.dumps(first))
    assert copy.size == 0 and copy.detector is None and not hasattr(copy, "workers")
