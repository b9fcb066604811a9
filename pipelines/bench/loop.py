"""`simclr bench loop`: the cost of Ray Train in a step of the loop's generator."""

from __future__ import annotations

import importlib.util
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pipelines.bench.held import held, steps_of
from pipelines.bench.result import WARM_STEPS, Row, compared, in_turn
from simclr.config import Config
from simclr.errors import UserError
from simclr.family import pretraining

_ENDLESS = 1_000_000  # windows: the schedule never ends


def loop(name: str, config: Config, data: Path, steps: int, trials: int, threads: int, window_s: float = 2.0) -> list[Row]:
    """Print and return Ray's share: the median over pairs of step under Ray ÷ step of the bare generator, each in one process that
    compiles once. A step is the mean over a window of `steps` − 5 steps, or of as many as last `window_s` seconds: see `around`."""
    require_ray("loop")
    bare, ray = "bare generator", "Ray Train, 1 worker"
    with held(partial(_bare, config.to_dict(), str(data), threads)) as side:
        taken = steps_of(side, steps, window_s)
        asked = {bare: lambda: 1e3 * side.step_s(taken)}
        before = in_turn(asked, trials, "ms")
        told = [1e3 * step_s for step_s in under_ray(timed(config, taken, trials), data, threads)]
        rows = compared(around(before, in_turn(asked, trials, "ms")) | {ray: told}, "ms", bare)
    print(f"step of {name}, N = {config.train.batch_size}, {threads} threads, windows of {taken} steps, n = {trials}")
    for row in rows:
        more = f"   {100 * (row['ratio'] - 1):+.1f} % (pairs {row['low']:.3f} … {row['high']:.3f} ×)" if row["name"] == ray else ""
        print(f"{row['name']:<19} {row['median']:8,.1f} ms{more}")
    return rows


def around(before: dict[str, list[float]], behind: dict[str, list[float]]) -> dict[str, list[float]]:
    """The comparison of trial i of a job that runs in the middle: the mean of two trials at equal distances from its middle, one before and
    one after it. So a steady drift of the machine falls on both sides."""
    return {side: [statistics.fmean(pair) for pair in zip(before[side], behind[side][::-1], strict=True)] for side in before}


def require_ray(what: str) -> None:
    """Raise UserError, before anything is measured, if Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise UserError(f"ray is not installed, and `simclr bench {what}` trains under it; install it, or take `bench step --data DIR`")


def timed(config: Config, window: int, windows: int) -> Config:
    """`config` for one window that is not counted and `windows` that are. Each window is a report; one checkpoint and one small evaluation
    follow the last."""
    steps = (windows + 1) * max(window, WARM_STEPS)
    train = replace(config.train, steps=steps, report_every_steps=max(window, WARM_STEPS), checkpoint_every_steps=steps)
    # The last step is always evaluated, outside the timed windows.
    return replace(config, train=train, watch=replace(config.watch, bank=64, queries=64, k=1, every_epochs=0))


def _bare(values: dict[str, Any], data: str, threads: int) -> Callable[[int], float]:
    """Number of steps → seconds of one, of the generator alone, with a report after each window. Between two windows the generator waits,
    and the loader prepares three batches in advance."""
    import torch

    from pipelines.allocator import keep_freed_memory
    from simclr.methods.method import Start
    from simclr.train import Report, train

    torch.set_num_threads(threads)
    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reports: dict[int, Iterator[Report]] = {}

    def ask(steps: int) -> float:
        steps = max(steps, WARM_STEPS)
        if steps not in reports:
            reports.clear()  # ends the previous one
            reports[steps] = train(timed(pretraining(values), steps, _ENDLESS), Start(Path(data), device, threads=threads))
            for report in reports[steps]:  # reports of the first step and of the window that is not counted
                if report.step > 1:
                    break
        return next(reports[steps]).metrics["speed/step_s"]

    return ask


def under_ray(config: Config, data: Path, threads: int) -> list[float]:
    """Seconds of a step of one Ray Train worker in each window of a `timed` config, in a private Ray."""
    from pipelines.train import ray_train
    from pipelines.train.messages import Reported, Task
    from pipelines.train.resources import Resources
    from pipelines.train.worker import train_worker

    folder = Path(tempfile.mkdtemp(prefix="simclr-bench-"))
    resources = Resources(workers=1, cpus_per_worker=threads)
    ray_train.connect(resources)
    try:
        task = Task(stage="pretrain", config=config, data=str(data.absolute()), run=str(folder))
        told = ray_train.launch(train_worker, task, resources, folder / "ray").reports()
        window = config.train.report_every_steps
        return [report.metrics["speed/step_s"] for report in told if isinstance(report, Reported) and report.step > window]
    finally:
        ray_train.disconnect()
        shutil.rmtree(folder, ignore_errors=True)
