"""`simclr bench loop`: what Ray Train adds to a step of the loop's generator."""

from __future__ import annotations

import multiprocessing
import shutil
import statistics
import tempfile
from dataclasses import replace
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

from pipelines import cluster
from pipelines.bench_result import WARM_STEPS, Row, compared, in_turn
from simclr.config import Config


def loop(name: str, config: Config, data: Path, steps: int, trials: int, threads: int) -> list[Row]:
    """Print and return Ray's share: the median over pairs of trials of step under Ray ÷ step of the bare generator."""
    config = timed(config, steps)
    bare, ray = "bare generator", "Ray Train, 1 worker"
    sides = {bare: lambda: 1e3 * _bare(config, data, threads), ray: lambda: 1e3 * under_ray(config, data, threads)}
    rows = compared(in_turn(sides, trials, "ms"), "ms", bare)
    print(f"step of {name}, N = {config.train.batch_size}, {threads} threads, median of {steps - WARM_STEPS} steps, n = {trials}")
    for row in rows:
        more = f"   {100 * (row['ratio'] - 1):+.1f} % (pairs {row['low']:.3f} … {row['high']:.3f} ×)" if row["name"] == ray else ""
        print(f"{row['name']:<19} {row['median']:8,.1f} ms{more}")
    return rows


def timed(config: Config, steps: int) -> Config:
    """`config` for `steps` steps that report every 5, with one checkpoint and one small evaluation, after the last."""
    train = replace(config.train, steps=steps, report_every_steps=WARM_STEPS, checkpoint_every_steps=steps)
    # The last step is always evaluated; what that costs is not asked here.
    return replace(config, train=train, watch=replace(config.watch, bank=64, queries=64, k=1, every_epochs=0))


def _bare(config: Config, data: Path, threads: int) -> float:
    """Median seconds of a step of the generator alone, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    answer: Queue[float] = context.Queue()
    process = context.Process(target=_run_bare, args=(config.to_dict(), str(data), threads, answer))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"the bare loop ended with code {process.exitcode}")
    return answer.get()


def _run_bare(config: dict[str, object], data: str, threads: int, answer: Queue[float]) -> None:
    import torch

    from pipelines.allocator import keep_freed_memory
    from simclr.pretrain import Start, pretrain

    torch.set_num_threads(threads)
    keep_freed_memory()
    steps = [r.metrics | {"step": r.step} for r in pretrain(Config.from_dict(config), Start(Path(data), threads=threads))]
    answer.put(_steady(steps))


def under_ray(config: Config, data: Path, threads: int) -> float:
    """Median seconds of a step of one Ray Train worker, in a Ray of its own, which ends with it."""
    from pipelines.worker import train_worker

    folder = Path(tempfile.mkdtemp(prefix="simclr-bench-"))
    resources = cluster.Resources(workers=1, cpus_per_worker=threads)
    cluster.connect(resources)
    try:
        job: dict[str, Any] = {"stage": "pretrain", "given": {}}
        job |= {"config": config.to_dict(), "data": str(data.absolute()), "run": str(folder)}
        told = cluster.launch(train_worker, job, resources, folder / "ray").reports()
        return _steady([report for report in told if "checkpoint" not in report])
    finally:
        cluster.disconnect()
        shutil.rmtree(folder, ignore_errors=True)


def _steady(reports: list[dict[str, float]]) -> float:
    return statistics.median(r["speed/step_s"] for r in reports if r["step"] > WARM_STEPS)
