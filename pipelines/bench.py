"""`simclr bench`: measured comparisons. A figure is a ratio between two things run in turn on this machine, n times each."""

from __future__ import annotations

import multiprocessing
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.queues import Queue
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from pipelines import cluster, storage
from pipelines.rundir import environment
from pipelines.terminal import say
from simclr.config import Config
from simclr.data.manifest import read_manifest
from simclr.recipes import recipe

if TYPE_CHECKING:
    import torch

_WARM_STEPS = 5  # the first steps allocate and compile


@dataclass(frozen=True)
class Args:
    """Compare two ways of doing the same work, in turn, on this machine."""

    what: Annotated[Literal["loop", "optim", "loader", "views", "memory"], tyro.conf.Positional]
    """loop: the step under Ray Train with one worker ÷ the same step of the bare generator.
    optim: LARS ÷ torch's SGD (foreach, and fused) over ResNet-50's parameters.
    loader: images/s of two crops from one decode, each kind of resize ÷ FFCV's own two pipelines.
    views: views/s of flip, colour, grey and blur ÷ kornia's, at 32 and 224 px.
    memory: what the loader's process holds, epoch by epoch, for each kind of cache."""
    data: Path | None = None
    """loop: directory or s3://bucket/prefix of prepared shards, CIFAR-10's for the figure in the README.
    loader: the same of photographs, of which the first shard is read; none = 300 rendered ones, 500 × 375 px.
    memory: any shards."""
    recipe: str = "cifar10_resnet18"
    """loop: recipe whose step is timed."""
    batch_size: int = 32
    """Images per step; views: images of which each gives two views."""
    steps: int = 30
    """Steps of each trial; the first 5 are not counted."""
    trials: int = 3
    """n: trials of each side."""
    threads: int = cluster.Resources().cpus_per_worker
    """CPU threads of the one worker. As many as there are cores leaves none for Ray's own processes: what they take then
    counts, and more than once, for a worker's threads wait for one another."""
    epochs: int = 50
    """memory: passes over the data."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """optim, views: where the work is done."""


def main(args: Args) -> None:
    if args.trials < 1 or args.steps <= _WARM_STEPS:
        raise ValueError(f"--trials {args.trials} --steps {args.steps}; expected at least 1 trial of more than {_WARM_STEPS} steps")
    if args.what == "optim":
        optim(args)
        return
    if args.what == "loader":
        from pipelines.bench_loader import loader

        loader(args.data, args.batch_size, args.steps, args.trials, args.threads)
        _print_environment()
        return
    if args.what == "views":
        from pipelines.bench_views import views

        views(args.batch_size, args.steps, args.trials, args.threads, _device(args))
        _print_environment()
        return
    if args.data is None:
        raise ValueError(f"which data? `simclr bench {args.what} --data DIR`, a directory of prepared shards")
    if args.what == "memory":
        from pipelines.bench_memory import memory

        memory(storage.shards(args.data), args.batch_size, args.epochs, args.threads)
        _print_environment()
        return
    if cluster.joins_a_cluster(None):
        raise ValueError("RAY_ADDRESS is set; this compares on one machine: unset it")
    data = storage.shards(args.data)
    read_manifest(data)
    loop(args, data)


def loop(args: Args, data: Path) -> float:
    """Print and return Ray's share: the median over pairs of trials of (step under Ray ÷ step of the bare generator), minus 1."""
    config = recipe(args.recipe)
    train = replace(config.train, batch_size=args.batch_size, steps=args.steps)
    train = replace(train, report_every_steps=_WARM_STEPS, checkpoint_every_steps=args.steps)
    # The last step is always evaluated; what that costs is not asked here.
    config = replace(config, train=train, watch=replace(config.watch, bank=64, queries=64, k=1, every_epochs=0))
    bare: list[float] = []
    ray: list[float] = []
    for trial in range(args.trials):
        sides: list[tuple[list[float], Callable[[Config, Args, Path], float]]] = [(bare, _bare), (ray, _ray)]
        for seconds, side in sides if trial % 2 == 0 else sides[::-1]:  # in turn, so that what else the machine does falls on both
            seconds.append(side(config, args, data))
        say(f"trial {trial + 1} of {args.trials}: bare {1e3 * bare[-1]:,.1f} ms, under Ray {1e3 * ray[-1]:,.1f} ms a step")
    ratios = sorted(r / b for r, b in zip(ray, bare, strict=True))
    cost = statistics.median(ratios) - 1
    counted = args.steps - _WARM_STEPS
    print(f"step of {args.recipe}, N = {args.batch_size}, {args.threads} threads, median of {counted} steps, n = {args.trials}")
    print(f"bare generator      {1e3 * statistics.median(bare):8,.1f} ms")
    print(f"Ray Train, 1 worker {1e3 * statistics.median(ray):8,.1f} ms   {100 * cost:+.1f} % (pairs {ratios[0]:.3f} … {ratios[-1]:.3f} ×)")
    _print_environment()
    return cost


def _device(args: Args) -> torch.device:
    import torch

    return torch.device("cuda" if args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available()) else "cpu")


def _print_environment() -> None:
    for name, value in environment().items():
        print(f"{name}: {value}")


def optim(args: Args) -> dict[str, float]:
    """Print and return LARS's time over SGD's, each with its momentum and weight decay: the median over pairs of trials."""
    import torch

    from pipelines.worker import keep_freed_memory
    from simclr.optim import LARS, parameter_groups
    from simclr.resnet import resnet

    device = _device(args)
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    sides: dict[str, torch.optim.Optimizer] = {}
    for name in ("SGD, foreach", "SGD, fused", "LARS"):
        network = resnet(50).to(device)
        for p in network.parameters():
            p.grad = torch.randn_like(p)
        groups = parameter_groups(network, 1e-4)
        if name == "LARS":
            sides[name] = LARS(groups, lr=1e-3)
        else:
            way = {"foreach": True} if "foreach" in name else {"fused": True}
            sides[name] = torch.optim.SGD([g | {"adapt": None} for g in groups], lr=1e-3, momentum=0.9, **way)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for trial in range(args.trials):
        for name in list(sides)[:: 1 if trial % 2 == 0 else -1]:
            seconds[name].append(_step_s(sides[name], args.steps))
    print(
        f"step over the {sum(p.numel() for p in network.parameters()) / 1e6:.1f} M parameters of ResNet-50 on {device.type}, "
        f"{args.threads} threads, median of {args.steps - _WARM_STEPS} steps, n = {args.trials}"
    )
    ratios = {}
    for name, times in seconds.items():
        pairs = sorted(ours / theirs for ours, theirs in zip(seconds["LARS"], times, strict=True))
        ratios[name] = statistics.median(pairs)
        than = "" if name == "LARS" else f"   LARS takes {ratios[name]:.2f} × (pairs {pairs[0]:.2f} … {pairs[-1]:.2f})"
        print(f"{name:<13} {1e3 * statistics.median(times):8.2f} ms{than}")
    _print_environment()
    return ratios


def _step_s(optimizer: torch.optim.Optimizer, steps: int) -> float:
    """Median seconds of a step; on a GPU the queue is emptied before and after each."""
    import torch

    def wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    found = []
    for _ in range(steps):
        wait()
        began = time.perf_counter()
        optimizer.step()
        wait()
        found.append(time.perf_counter() - began)
    return statistics.median(found[_WARM_STEPS:])


def _bare(config: Config, args: Args, data: Path) -> float:
    """Median seconds of a step of the generator alone, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    answer: Queue[float] = context.Queue()
    process = context.Process(target=_run_bare, args=(config.to_dict(), str(data), args.threads, answer))
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


def _ray(config: Config, args: Args, data: Path) -> float:
    """Median seconds of a step of one Ray Train worker, in a Ray of its own, which ends with it."""
    from pipelines.worker import train_worker

    folder = Path(tempfile.mkdtemp(prefix="simclr-bench-"))
    resources = cluster.Resources(workers=1, cpus_per_worker=args.threads)
    cluster.connect(resources)
    try:
        job = {"config": config.to_dict(), "data": str(data.absolute()), "run": str(folder)}
        return _steady(list(cluster.launch(train_worker, job, resources, folder / "ray").reports()))
    finally:
        cluster.disconnect()
        shutil.rmtree(folder, ignore_errors=True)


def _steady(reports: list[dict[str, float]]) -> float:
    return statistics.median(r["speed/step_s"] for r in reports if r["step"] > _WARM_STEPS)
