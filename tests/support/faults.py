"""Workers with planned faults: a plan on disk states step, rank and kind of each fault. Each fault happens once."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

from torch import Tensor

from pipelines.train.messages import Task
from simclr import files
from simclr.config import Config


def plan(folder: Path, *faults: tuple[int, int, str], step_s: float = 0.0) -> None:
    """Write (step, rank, how) to `folder`; how = kill, stop (its process), hang (the thread that trains) or nothing. A step takes
    `step_s` longer than it would; a new plan may change this during training."""
    folder.mkdir(parents=True, exist_ok=True)
    files.write_text(folder / "step_s", str(step_s))
    for step, rank, how in faults:
        (folder / f"{step:04}-{rank}").write_text(how)


def happened(folder: Path) -> dict[int, float]:
    """Step → Unix time of its fault, by that rank's clock."""
    return {int(path.name[:4]): json.loads(path.read_text()) for path in sorted(folder.glob("*.done"))}


def faulty_worker(task: Task) -> None:
    """`train_worker` with the faults of the plan, each raised when its batch is given out."""
    import ray.train

    from pipelines.train.worker import train_worker
    from simclr.telemetry import progress

    folder, rank, beat = Path(f"{task.run}-faults"), ray.train.get_context().get_world_rank(), progress.beat

    def grievous(step: int | None = None) -> None:
        beat(step)
        if step is None:
            return
        time.sleep(float((folder / "step_s").read_text()))
        path = folder / f"{step + 1:04}-{rank}"
        if not path.exists():
            return
        how = path.read_text()
        with path.with_suffix(".writing").open("w") as file:
            file.write(json.dumps(time.time()))
        path.with_suffix(".writing").rename(path.with_suffix(".done"))
        path.unlink()
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif how == "hang":
            threading.Event().wait()

    progress.beat = grievous
    train_worker(task)


def undisturbed(config: Config, data: Path) -> tuple[dict[int, float], dict[str, Tensor]]:
    """Step → loss, and the encoder at the end, of a training without faults, on the ranks that there are."""
    from simclr.train import Start, train

    losses, state = {}, {}
    for report in train(config, Start(data)):
        losses[report.step], state = report.metrics["train/loss"], report.state.tensors
    return losses, {name: tensor.clone() for name, tensor in state.items() if name.startswith("model.")}


def command() -> None:
    """`simclr …` as it is, with faulty workers."""
    from pipelines import cli
    from pipelines.train import worker

    worker.train_worker = faulty_worker
    cli.main()
