"""A driver on a cluster with a pretended TPU slice:  python -m tests.support.tpu_slice ADDRESS FOLDER

Starts one worker for each chip of a v4 slice of 2x2x2 through pipelines.train.ray_train, as `simclr pretrain --device tpu`
does, and prints what each worker found, a JSON list by rank.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

from pipelines.train import ray_train
from pipelines.train.messages import Reported, Task
from simclr.errors import UserError
from simclr.recipes import patterns_tiny

SLICE = {"device": "tpu", "topology": "2x2x2", "accelerator_type": "TPU-V4"}
TOLD = ("TORCH_TPU_SLICEBUILDER_ADDRESSES", "TORCH_TPU_TOPOLOGY", "TORCH_TPU_XPROF_SESSION_ID", "TPU_NAME", "TPU_WORKER_ID", "LOCAL_RANK")


def look(task: Task) -> None:
    """The environment of a worker of `simclr pretrain` at its start, and the result of one collective."""
    import ray
    import ray.train.torch
    import torch
    import torch.distributed as dist

    rank = ray.train.get_context().get_world_rank()
    total = torch.tensor([float(rank + 1)])
    dist.all_reduce(total)
    seen = {
        "rank": rank,
        "host": ray.util.get_node_ip_address(),
        "chips": ray.get_runtime_context().get_accelerator_ids()["TPU"],
        "device": str(ray.train.torch.get_device()),
        "backend": dist.get_backend(),
        "sum": total.item(),
        **{name: os.environ.get(name) for name in TOLD},
    }
    ray.get(task.inbox.actor.put.remote(Reported(step=rank, total_steps=8, metrics=seen)))  # type: ignore[arg-type]


def main(address: str, folder: str) -> None:
    resources = ray_train.Resources(workers=8, address=address, max_failures=0, **SLICE)  # type: ignore[arg-type]
    ray_train.connect(resources)
    other = ray_train.Resources(workers=16, address=address, device="tpu", topology="2x2x4", accelerator_type="TPU-V4")
    try:
        ray_train.require(other)
        refused = ""
    except UserError as error:
        refused = str(error)
    config = replace(patterns_tiny(), train=replace(patterns_tiny().train, batch_size=64))
    running = ray_train.launch(look, Task(stage="pretrain", config=config, data="", run=""), resources, Path(folder))
    seen = [report.metrics for report in sorted(running.reports(), key=lambda report: report.step) if isinstance(report, Reported)]
    print(json.dumps({"refused": refused, "seen": seen}))
    ray_train.disconnect()


if __name__ == "__main__":
    main(*sys.argv[1:])
