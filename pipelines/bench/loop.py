"""`simclr bench loop`: what Ray Train adds to a step of the loop's generator."""

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

_ENDLESS = 1_000_000  # windows: the schedule ends never


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
    """What to compare trial i of a job in the middle with: the mean of two trials as far from its middle, one before and one behind.
    So what grows or falls steadily while all are timed falls on both."""
    return {side: [statistics.fmean(pair) for pair in zip(before[side], behind[side][::-1], strict=True)] for side in before}


def require_ray(what: str) -> None:
    """Raise UserError, before anything is measured, where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise UserError(f"ray is not installed, and `simclr bench {what}` trains under it; install it, or take `bench step --data DIR`")


def timed(config: Config, window: int, windows: int) -> Config:
    """`config` for a window that is not counted and `windows` that are, each a report, with one checkpoint and one small evaluation,
    after the last."""
    steps = (windows + 1) * max(window, WARM_STEPS)
    train = replace(config.train, steps=steps, report_every_steps=max(window, WARM_STEPS), checkpoint_every_steps=steps)
    # The last step is always evaluated; what that costs is not asked here.
    return replace(config, train=train, watch=replace(config.watch, bank=64, queries=64, k=1, every_epochs=0))


def _bare(values: dict[str, Any], data: str, threads: int) -> Callable[[int], float]:
    """Number of steps → seconds of one, of the generator alone, which reports behind each window. Between two windows it waits where it
    is, and the loader prepares three batches in advance."""
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
            reports.clear()  # ends the one before
            reports[steps] = train(timed(Config.from_dict(values), steps, _ENDLESS), Start(Path(data), device, threads=threads))
            for report in reports[steps]:  # of the first step, and of a window that is not counted
                if report.step > 1:
                    break
        return next(reports[steps]).metrics["speed/step_s"]

    return ask


def under_ray(config: Config, data: Path, threads: int) -> list[float]:
    """Seconds of a step of one Ray Train worker in each window of a config that is `timed`, in a Ray of its own, which ends with it."""
    from pipelines.train import ray_train
    from pipelines.train.messages import Reported, Task
    from pipelines.train.worker import train_worker

    folder = Path(tempfile.mkdtemp(prefix="simclr-bench-"))
    resources = ray_train.Resources(workers=1, cpus_per_worker=threads)
    ray_train.connect(resources)
    try:
        task = Task(stage="pretrain", config=config, data=str(data.absolute()), run=str(folder))
        told = ray_train.launch(train_worker, task, resources, folder / "ray").reports()
        window = config.train.report_every_steps
        return [report.metrics["speed/step_s"] for report in told if isinstance(report, Reported) and report.step > window]
    finally:
        ray_train.disconnect()
        shutil.rmtree(folder, ignore_errors=True)
