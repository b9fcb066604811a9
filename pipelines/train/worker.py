"""The function that each Ray Train worker runs: the loop, its reports to the driver, its checkpoints to the run directory."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

from pipelines.train.messages import Message, Reported, Said, Task
from simclr.telemetry import progress


@progress.watched()
def train_worker(task: Task) -> None:
    """Train as `task` says, from the newest whole checkpoint of its run, if any.

    Rank 0 puts every report into the driver's queue and writes checkpoints. After a failure, training goes on from the last one.
    """
    # Imported here: the driver imports this module too, and need not wait for numba and FFCV.
    import ray.train.torch
    import torch

    from pipelines.allocator import keep_freed_memory
    from pipelines.runs import sync
    from pipelines.train import compile_cache, hang, ray_start
    from pipelines.train.checkpoints import SCORES, Saver
    from pipelines.train.prometheus import Gauges, with_last_checkpoint
    from simclr.collectives import from_rank_zero
    from simclr.errors import UserError
    from simclr.train import Start, train

    config, home = task.config, sync.Home(task.run, task.lease)
    context, device = ray.train.get_context(), ray.train.torch.get_device()
    me, world = context.get_world_rank(), context.get_world_size()
    first = me == 0
    torch.set_num_threads(task.cpus_per_worker)
    if device.type == "cpu":
        keep_freed_memory()
    # All ranks ask for their role's credentials at once, and by default boto3 tries only once, for a second.
    os.environ.setdefault("AWS_METADATA_SERVICE_NUM_ATTEMPTS", "8")

    def send(message: Message) -> Any:
        return task.inbox.actor.put.remote(message)

    def tell(text: str) -> None:
        send(Said(f"rank {me}: {text}", task.trial))

    ray_start.meet()
    home.says = tell
    retried = partial(sync.retry_unreachable, tell=tell)
    for group in config.groups_of(me, world):
        data = retried(partial(sync.shards, task.data, config.train.shard_groups, group, task.run, tell))
    home.belongs_to(task.created)
    # One rank looks: a shared disk may be slow to show a rename, and two ranks might see different checkpoints.
    name = retried(home.newest) if first else ""
    meet = ray_start.barrier if home.at is not None or str(data) != task.data else list
    meet()
    name = from_rank_zero(name)
    if task.begun and not name:  # it would begin with its seed's weights
        raise UserError(f"{task.run} began with given weights, and no checkpoint in it is whole; use another --run")
    found = retried(lambda: home.checkpoint(name)) if name else None
    meet()
    if task.stage == "distill":
        retried(home.fetch)
    progress.enter("first batch")
    start = Start(data, device, found, task.cpus_per_worker, teacher=home.path / "teacher", **task.given)
    reports = compile_cache.remembered(train(config, start), home, config, device, task.compile_key, tell)
    gauges = Gauges(task.run)
    saver = Saver(home, config.train, start.checkpoint, send, task.trial) if first else None
    for report in with_last_checkpoint(sync.repaired(reports, task.data), home.path / "checkpoints", saver):
        slow = gauges.show(report)
        said = Reported(step=report.step, total_steps=report.total_steps, metrics=report.metrics, stragglers=slow, trial=task.trial)
        if saver is not None:
            sent = saver.hear(said)
            leaving = hang.asked_to_leave() if report.step < report.total_steps else ""
            if saver.due(report) or leaving:
                with progress.within("saving"):
                    ray.get(sent)  # the driver must get the report before the checkpoint's message and the end
                    saver.save(report)
            if leaving:
                progress.enter("upload")
                saver.leave()
                raise hang.Leave(leaving)
        # Ray's own report waits for the controller, which looks every two seconds, and would slow the step. So it gets only the
        # reports that a scheduler decides by, and the driver's queue gets all.
        if report.due or set(SCORES) & report.metrics.keys():
            ray.train.report(said.line())
    progress.enter("upload")
    if saver is not None:
        retried(saver.close)
