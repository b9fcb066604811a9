"""`simclr bench`: measured comparisons. A figure is a ratio between two things run in turn on this machine, n times each."""

from __future__ import annotations

import multiprocessing
import shutil
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pipelines import cluster
from pipelines.rundir import environment
from pipelines.terminal import say
from simclr.config import Config
from simclr.data.manifest import read_manifest
from simclr.recipes import recipe

_WARM_STEPS = 5  # the first steps allocate and compile


@dataclass(frozen=True)
class Args:
    """Compare two ways of doing the same work, in turn, on this machine."""

    what: Annotated[Literal["loop"], tyro.conf.Positional]
    """loop: the step under Ray Train with one worker ÷ the same step of the bare generator."""
    data: Path
    """Directory of prepared shards, CIFAR-10's for the figure in the README."""
    recipe: str = "cifar10_resnet18"
    """Recipe whose step is timed."""
    batch_size: int = 32
    """N: images per step."""
    steps: int = 30
    """Steps of each trial; the first 5 are not counted."""
    trials: int = 3
    """n: trials of each side."""
    threads: int = cluster.Resources().cpus_per_worker
    """CPU threads of the one worker. As many as there are cores leaves none for Ray's own processes: what they take then
    counts, and more than once, for a worker's threads wait for one another."""


def main(args: Args) -> None:
    if args.trials < 1 or args.steps <= _WARM_STEPS:
        raise ValueError(f"--trials {args.trials} --steps {args.steps}; expected at least 1 trial of more than {_WARM_STEPS} steps")
    if cluster.joins_a_cluster(None):
        raise ValueError("RAY_ADDRESS is set; this compares on one machine: unset it")
    read_manifest(args.data)
    loop(args)


def loop(args: Args) -> float:
    """Print and return Ray's share: the median over pairs of trials of (step under Ray ÷ step of the bare generator), minus 1."""
    config = recipe(args.recipe)
    train = replace(config.train, batch_size=args.batch_size, steps=args.steps)
    train = replace(train, report_every_steps=_WARM_STEPS, checkpoint_every_steps=args.steps)
    # The last step is always evaluated; what that costs is not asked here.
    config = replace(config, train=train, watch=replace(config.watch, bank=64, queries=64, k=1, every_epochs=0))
    bare: list[float] = []
    ray: list[float] = []
    for trial in range(args.trials):
        sides: list[tuple[list[float], Callable[[Config, Args], float]]] = [(bare, _bare), (ray, _ray)]
        for seconds, side in sides if trial % 2 == 0 else sides[::-1]:  # in turn, so that what else the machine does falls on both
            seconds.append(side(config, args))
        say(f"trial {trial + 1} of {args.trials}: bare {1e3 * bare[-1]:,.1f} ms, under Ray {1e3 * ray[-1]:,.1f} ms a step")
    ratios = sorted(r / b for r, b in zip(ray, bare, strict=True))
    cost = statistics.median(ratios) - 1
    counted = args.steps - _WARM_STEPS
    print(f"step of {args.recipe}, N = {args.batch_size}, {args.threads} threads, median of {counted} steps, n = {args.trials}")
    print(f"bare generator      {1e3 * statistics.median(bare):8,.1f} ms")
    print(f"Ray Train, 1 worker {1e3 * statistics.median(ray):8,.1f} ms   {100 * cost:+.1f} % (pairs {ratios[0]:.3f} … {ratios[-1]:.3f} ×)")
    for name, value in environment().items():
        print(f"{name}: {value}")
    return cost


def _bare(config: Config, args: Args) -> float:
    """Median seconds of a step of the generator alone, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    answer: Queue[float] = context.Queue()
    process = context.Process(target=_run_bare, args=(config.to_dict(), str(args.data), args.threads, answer))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"the bare loop ended with code {process.exitcode}")
    return answer.get()


def _run_bare(config: dict[str, object], data: str, threads: int, answer: Queue[float]) -> None:
    import torch

    from pipelines.worker import keep_freed_memory
    from simclr.pretrain import Start, pretrain

    torch.set_num_threads(threads)
    keep_freed_memory()
    steps = [r.metrics | {"step": r.step} for r in pretrain(Config.from_dict(config), Start(Path(data), threads=threads))]
    answer.put(_steady(steps))


def _ray(config: Config, args: Args) -> float:
    """Median seconds of a step of one Ray Train worker, in a Ray of its own, which ends with it."""
    from pipelines.worker import train_worker

    folder = Path(tempfile.mkdtemp(prefix="simclr-bench-"))
    resources = cluster.Resources(workers=1, cpus_per_worker=args.threads)
    cluster.connect(resources)
    try:
        job = {"config": config.to_dict(), "data": str(args.data.absolute()), "run": str(folder)}
        return _steady(list(cluster.launch(train_worker, job, resources, folder / "ray").reports()))
    finally:
        cluster.disconnect()
        shutil.rmtree(folder, ignore_errors=True)


def _steady(reports: list[dict[str, float]]) -> float:
    return statistics.median(r["speed/step_s"] for r in reports if r["step"] > _WARM_STEPS)
