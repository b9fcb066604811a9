"""Workers that fail as a test asks: a plan on disk says at which step, on which rank, and how. Each line of it happens once."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any


def plan(folder: Path, *faults: tuple[int, int, str]) -> None:
    """Write (step, rank, how) to `folder`; how = kill, stop (its process) or hang (the thread that trains)."""
    folder.mkdir(parents=True, exist_ok=True)
    for step, rank, how in faults:
        (folder / f"{step:04}-{rank}").write_text(how)


def happened(folder: Path) -> dict[int, float]:
    """Step → when its fault came, Unix time."""
    return {int(path.name[:4]): json.loads(path.read_text()) for path in sorted(folder.glob("*.done"))}


def faulty_worker(job: dict[str, Any]) -> None:
    """`train_worker`, which comes to grief when a batch of the plan is handed out."""
    import ray.train

    from pipelines.worker import train_worker
    from simclr import pulse

    folder, rank, beat = Path(job["run"]) / "faults", ray.train.get_context().get_world_rank(), pulse.beat

    def grievous(step: int | None = None) -> None:
        beat(step)
        if step is None:
            return
        time.sleep(float(os.environ.get("STEP_S", "0")))
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
        else:
            threading.Event().wait()

    pulse.beat = grievous
    train_worker(job)
