"""`simclr bench`: measured comparisons. A figure is a ratio between two things run in turn on this machine, n times each."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from pipelines import cluster, storage
from pipelines.bench_result import WARM_STEPS, Row, machine, write_json
from simclr import disk
from simclr.config import Config
from simclr.data.manifest import read_manifest
from simclr.recipes import recipe

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Args:
    """Compare two ways of doing the same work, in turn, on this machine."""

    what: Annotated[Literal["step", "train", "scale", "loss", "loop", "optim", "loader", "views", "memory"], tyro.conf.Positional]
    """step: images/s of the training step on resident data ÷ the same network's step in plain torch.
    train: images/s end to end under Ray Train with one worker ÷ the step on resident data.
    scale: the step on 1 and 2 ranks, the share of communication, and what a model of it expects of more ranks.
    loss: NT-Xent with its gradient, without stored logits ÷ written out: time, memory, deviation.
    loop: the step under Ray Train with one worker ÷ the same step of the bare generator.
    optim: LARS ÷ torch's SGD (foreach, and fused) over ResNet-50's parameters.
    loader: images/s of two crops from one decode, each kind of resize ÷ FFCV's own two pipelines.
    views: views/s of flip, colour, grey and blur ÷ kornia's, at 32 and 224 px.
    memory: what the loader's process holds, epoch by epoch, for each kind of cache."""
    data: Path | None = None
    """loop, train: directory or s3://bucket/prefix of prepared shards, CIFAR-10's for the figure in the README.
    loader: the same of photographs, of which the first shard is read; none = 300 rendered ones, 500 × 375 px.
    memory: any shards."""
    recipe: str = "cifar10_resnet18"
    """step, train, scale, loop: recipe whose step is timed."""
    batch_size: int = 32
    """Images per step; scale: of each rank; views: images of which each gives two views."""
    steps: int = 30
    """Steps of each trial; the first 5 are not counted."""
    trials: int = 3
    """n: trials of each side."""
    threads: int = cluster.Resources().cpus_per_worker
    """CPU threads of the one worker. As many as there are cores leaves none for Ray's own processes: what they take then
    counts, and more than once, for a worker's threads wait for one another."""
    precision: Literal["recipe", "float32", "bfloat16"] = "recipe"
    """step, train, scale, loop: as in the config's `train.precision`; recipe = the recipe's."""
    compile: bool = False
    """step, train, scale, loop: torch.compile on both sides; step then counts graph breaks."""
    micro_batch: int | None = None
    """step: a third side embeds so many images at a time (gradient caching). train, scale: every side does."""
    profile: Path | None = None
    """step: file for the table of the operators that take longest; says how often the host waits for a GPU."""
    peer: Literal["none", "lightly"] = "none"
    """train: also time lightly's SimCLR, its loader and transforms, over the folder --peer-data."""
    peer_data: Path | None = None
    """train: folder of the photographs that the shards were prepared from, which lightly reads as they are."""
    bandwidth_gb_s: float | None = None
    """scale: GB/s (10⁹ bytes) that a rank sends in the expected table; nothing = as measured between these two ranks."""
    latency_us: float | None = None
    """scale: microseconds of one message in the expected table; nothing = as measured."""
    batches: tuple[int, ...] = (1024, 2048, 4096)
    """loss: the N that are timed, images in the global batch, each with two views."""
    epochs: int = 50
    """memory: passes over the data."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """step, scale, loss, optim, views: where the work is done."""
    json: Path | None = None
    """File for the result: what, machine, versions, date, setting, n, rows."""


def main(args: Args) -> None:
    if args.trials < 1 or args.steps <= WARM_STEPS:
        raise ValueError(f"--trials {args.trials} --steps {args.steps}; expected at least 1 trial of more than {WARM_STEPS} steps")
    for path in (args.json, args.profile):
        if path is not None:
            disk.require_writable(path)
            path.parent.mkdir(parents=True, exist_ok=True)
    rows = measure(args)
    for name, value in machine().items():
        print(f"{name}: {value}")
    if args.json is not None:
        setting = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(args).items() if k not in ("what", "json")}
        write_json(args.json, args.what, setting, args.trials, rows)


def measure(args: Args) -> list[Row]:
    """Print the table of `args.what` and return its rows. What a bench needs is imported for it alone."""
    plan: dict[str, Any] = {"steps": args.steps, "trials": args.trials, "threads": args.threads}
    if args.what == "step":
        from pipelines.bench_step import step

        return step(_config(args), device=_device(args), profile=args.profile, **plan)
    if args.what == "scale":
        from pipelines.bench_scale import scale

        return scale(_config(args), device=_device(args).type, bandwidth_gb_s=args.bandwidth_gb_s, latency_us=args.latency_us, **plan)
    if args.what == "loss":
        from pipelines.bench_loss import loss

        if min(args.batches, default=0) < 1:
            raise ValueError(f"--batches is {' '.join(map(str, args.batches)) or 'empty'}; expected numbers of images, at least 1")
        return loss(args.batches, args.trials, args.threads, _device(args))
    if args.what == "optim":
        from pipelines.bench_optim import optim

        return optim(device=_device(args), **plan)
    if args.what == "loader":
        from pipelines.bench_loader import loader

        return loader(args.data, args.batch_size, **plan)
    if args.what == "views":
        from pipelines.bench_views import views

        return views(args.batch_size, device=_device(args), **plan)
    if args.data is None:
        raise ValueError(f"which data? `simclr bench {args.what} --data DIR`, a directory of prepared shards")
    if args.what == "memory":
        from pipelines.bench_memory import memory

        return memory(storage.shards(args.data), args.batch_size, args.epochs, args.threads)
    if cluster.joins_a_cluster(None):
        raise ValueError("RAY_ADDRESS is set; this compares on one machine: unset it")
    data = storage.shards(args.data)
    read_manifest(data)
    if args.what == "train":
        from pipelines.bench_train import train

        return train(args.recipe, _config(args), data, peer=args.peer, peer_data=args.peer_data, **plan)
    from pipelines.bench_loop import loop

    return loop(args.recipe, _config(args), data, **plan)


def _config(args: Args) -> Config:
    """The recipe with what the command line says of its batches, precision and compiling."""
    config = recipe(args.recipe)
    precision = config.train.precision if args.precision == "recipe" else args.precision
    train = replace(
        config.train, batch_size=args.batch_size, micro_batch=args.micro_batch, precision=precision, compile=args.compile, steps=args.steps
    )
    return replace(config, train=train)


def _device(args: Args) -> torch.device:
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, and torch sees no GPU here; leave it out")
    return torch.device("cpu" if args.device == "cpu" or not torch.cuda.is_available() else "cuda")
