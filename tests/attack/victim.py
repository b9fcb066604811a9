"""What the second user attacks: a training of two workers on a private Ray, which waits. `python -m tests.attack.victim FOLDER`

It prints, as a line of JSON, what the second user can find out by itself, and the token, which only a check of the attack gets. It ends
when FOLDER/over exists.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from pipelines.train import ray_train
from pipelines.train.messages import Reported, Task
from simclr.recipes import recipe
from tests.support.listeners import addresses
from tests.support.processes import children


def worker(task: Task) -> None:
    """Meets the other rank, tells the driver, and waits."""
    import time
    from pathlib import Path

    import torch
    import torch.distributed as dist

    total = torch.ones(())
    dist.all_reduce(total)
    if dist.get_rank() == 0:
        task.inbox.put(Reported(step=int(total), total_steps=2, metrics={}))
    while not Path(task.run, "over").exists():
        time.sleep(0.1)


def main(folder: Path) -> None:
    resources = ray_train.Resources(workers=2, max_failures=0)
    ray_train.connect(resources)
    import ray

    try:
        task = Task(stage="pretrain", config=recipe("patterns_tiny"), data="", run=str(folder))
        running = ray_train.launch(worker, task, resources, folder / "ray")
        assert next(running.reports()).step == 2
        pids = [os.getpid(), *children(os.getpid())]
        context = ray.get_runtime_context()
        found = {"gcs": context.gcs_address, "folder": context.get_temp_dir(), "pids": pids, "listens": sorted(addresses(pids))}
        print(json.dumps(found | {"token": os.environ.get("RAY_AUTH_TOKEN", "")}), flush=True)
        running.thread.join()
    finally:
        ray_train.disconnect()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
