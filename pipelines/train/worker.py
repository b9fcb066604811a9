"""The function that each Ray Train worker runs: the loop, its reports to the driver, its checkpoints to the run directory."""

from __future__ import annotations

import os
from functools import partial
from typing import Any


def train_worker(job: dict[str, Any]) -> None:
    """Train `job["config"]`, of the stage `job["stage"]`, on the shards in `job["data"]`, from the newest whole checkpoint in
    `job["run"]`, if any. `job["given"]` is what the stage's loop takes besides: ids, the images whose labels it sees.
    `job["compile_key"]` signs compiled code (see `compile_cache`).

    Both are directories or s3://…, of which each node has a copy. Rank 0 puts every report into the queue `job["inbox"]` and
    writes checkpoints. Started again after a failure, it goes on from the last one.
    """
    # Imported here, not above: the driver imports this module too, and need not wait for numba and FFCV.
    import ray
    import ray.train.collective
    import ray.train.torch
    import torch

    from pipelines.allocator import keep_freed_memory
    from pipelines.runs import sync
    from pipelines.train import compile_cache, hang
    from pipelines.train.checkpoints import SCORES, Saver
    from pipelines.train.prometheus import Gauges, with_last_checkpoint
    from simclr.collectives import from_rank_zero
    from simclr.stages import STAGES
    from simclr.telemetry import progress
    from simclr.train import Start, train

    config, stage = STAGES[job["stage"]].from_dict(job["config"]), job["stage"]
    home = sync.Home(job["run"])
    checkpoints = home.path / "checkpoints"
    context, device = ray.train.get_context(), ray.train.torch.get_device()
    me, world = context.get_world_rank(), context.get_world_size()
    first, mark, put = me == 0, job.get("mark", {}), job["inbox"].actor.put
    if device.type == "cpu":
        torch.set_num_threads(job["cpus_per_worker"])
        keep_freed_memory()
    # Every rank asks for its role's credentials at once, and boto3 asks once, for a second.
    os.environ.setdefault("AWS_METADATA_SERVICE_NUM_ATTEMPTS", "8")

    def tell(text: str) -> None:
        put.remote({"say": f"rank {me}: {text}"} | mark)

    patiently = partial(sync.patiently, tell=tell)
    data = patiently(lambda: sync.shards(job["data"], config.train.shard_groups, config.group_of(me, world)))
    home.belongs_to(job.get("created", 0.0))
    # One rank looks: on a shared disk that is slow to show a rename, two might see different ones.
    name = patiently(home.newest) if first else ""
    # One node may fetch for an hour, and NCCL and gloo wait half of one.
    meet = ray.train.collective.barrier if home.at is not None or str(data) != job["data"] else list
    meet()
    name = from_rank_zero(name)
    found = patiently(lambda: home.checkpoint(name)) if name else None
    meet()
    if stage == "distill":
        patiently(home.fetch)
    start = Start(data, device, found, job["cpus_per_worker"], teacher=home.path / "teacher", **job["given"])
    reports = compile_cache.remembered(train(config, start), home, config, device, job.get("compile_key", ""), tell)
    gauges = Gauges(job["run"])
    saver = Saver(home, config.train, start.checkpoint, lambda told: put.remote(told | mark)) if first else None
    with progress.watched():
        for report in with_last_checkpoint(sync.repaired(reports, job["data"]), checkpoints, saver):
            metrics = {**report.metrics, **gauges.show(report), "step": report.step, "total_steps": report.total_steps, **mark}
            if saver is not None:
                sent = saver.hear(metrics)
                leaving = hang.asked_to_leave() if report.step < report.total_steps else ""
                if saver.due(report) or leaving:
                    with progress.unwatched():  # a slow disk is no hang
                        ray.get(sent)  # the driver must not hear of the checkpoint, or that training is over, before it
                        saver.save(report)
                if leaving:
                    saver.leave()
                    raise hang.Leave(leaving)
            # Ray's own report waits for the controller, which looks once in two seconds: it would be the step's clock. So it gets
            # what a scheduler decides by, and the driver's queue gets everything.
            if report.due or set(SCORES) & metrics.keys():
                ray.train.report(metrics)
    if saver is not None:
        patiently(saver.close)
