"""Workers with planned faults: a plan on disk states step or phase, rank and kind of each fault. Each fault happens once."""

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

At = int | str
"""A step, as its batch is given out, or a phase, as it begins."""


def plan(folder: Path, *faults: tuple[At, int, str], step_s: float = 0.0) -> None:
    """Write (step or phase, rank, how) to `folder`; how = kill, stop (its process), hang (the thread that works), disk (what is written
    from now on is never written) or nothing. A step takes `step_s` longer than it would; a new plan may change this during training."""
    folder.mkdir(parents=True, exist_ok=True)
    files.write_text(folder / "step_s", str(step_s))
    for at, rank, how in faults:
        _path(folder, at, rank).write_text(how)


def happened(folder: Path) -> dict[At, float]:
    """Step or phase → Unix time of its fault, by that rank's clock."""
    names = {path: path.stem.partition("-")[0] for path in sorted(folder.glob("*.done"))}
    return {int(name) if name.isdecimal() else name: json.loads(path.read_text()) for path, name in names.items()}


def _path(folder: Path, at: At, rank: int) -> Path:
    return folder / (f"{at:04}-{rank}" if isinstance(at, int) else f"{at}-{rank}")


def faulty_worker(task: Task) -> None:
    """`train_worker` with the faults of the plan."""
    import ray.train

    from pipelines.train.worker import train_worker
    from simclr.telemetry import progress

    folder, rank = Path(f"{task.run}-faults"), ray.train.get_context().get_world_rank()
    beat, enter = progress.beat, progress.enter

    def grievous(step: int | None = None) -> None:
        beat(step)
        if step is not None:
            time.sleep(float((folder / "step_s").read_text()))
            _suffer(folder, step + 1, rank)

    def grievous_too(phase: str) -> None:
        enter(phase)
        _suffer(folder, phase, rank)

    progress.beat, progress.enter = grievous, grievous_too
    train_worker(task)


def _suffer(folder: Path, at: At, rank: int) -> None:
    """The fault that is planned for here, if any."""
    from simclr import checkpoint

    path = _path(folder, at, rank)
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
        if isinstance(at, str):
            time.sleep(4.0)  # until it was asked for its phase
        os.kill(os.getpid(), signal.SIGSTOP)
    elif how == "hang":
        threading.Event().wait()
    elif how == "disk":
        checkpoint.save_file = lambda *_: threading.Event().wait()


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
