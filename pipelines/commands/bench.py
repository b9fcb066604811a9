"""`simclr bench`: measured comparisons. A figure is the ratio of two sides that run in turn on this machine, n times each."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from pipelines.bench.result import WARM_STEPS, Row, machine, write_json
from pipelines.runs import config_file, sync
from pipelines.terminal import show
from simclr import files
from simclr.config import Config
from simclr.data.manifest import read_manifest
from simclr.errors import UserError
from simclr.recipes import recipe

if TYPE_CHECKING:
    import torch

Alone = Literal["device", "scale", "loss", "optim", "views", "prepare", "probe", "embed", "listing", "order"]
Shards = Literal["agreement", "step", "train", "loop", "loader", "cifar", "methods", "memory", "footprint"]

_EPOCHS = 50


@dataclass(frozen=True)
class Args:
    """Compare two ways of doing the same work, in turn, on this machine."""

    what: Annotated[Literal["all"] | Alone | Shards, tyro.conf.Positional]
    """all: the others, most valuable first, each in its own process, within --budget-min; needs no Ray.
    device: its ceilings: GB/s of a copy, TFLOP/s of a product.
    agreement: views, loss and first steps on the device − on the CPU; lines that block the host.
    step: images/s of the training step on resident data ÷ the same network's step in plain torch, or for a recipe of another method ÷
    SimCLR's of the same encoder and batch; with --data also fed from shards.
    train: images/s end to end under Ray Train with one worker ÷ the step on resident data.
    scale: the step on 1 and 2 ranks, the share of communication, and a model's expectation for more, by a flat ring and in two levels.
    loss: NT-Xent with its gradient, without stored logits ÷ written out: time, memory, difference.
    loop: the step under Ray Train with one worker ÷ the same step of the bare generator.
    optim: LARS ÷ torch's SGD (foreach, and fused) over ResNet-50's parameters.
    loader: images/s of two crops from one decode, each kind of resize ÷ FFCV's own two pipelines; or of --crops of several sizes.
    views: views/s of flip, colour, grey and blur ÷ kornia's, at 32 and 224 px.
    cifar: a short pretraining by the loop alone: images/s, kNN and linear probe on all images.
    methods: pretrainings by --recipes of the same epochs and batch, --seeds each, by the loop alone: one table of kNN, linear probe,
    fine-tuning on a tenth of the labels, time of a step and memory; the same command again goes on.
    memory: MiB of the loader's process, epoch by epoch, for each kind of cache.
    footprint: the most memory of a training process, as `simclr pretrain --dry-run` estimates it ÷ as it is.
    probe: bytes that kNN and the quick probe take for a row of ImageNet's features, and GiB for all.
    prepare: images/s of writing shards, for the others.
    embed: images/s of `simclr embed`, with threads and with processes that decode, ÷ one picture after the other; on CPUs also two workers.
    listing: seconds and memory of planning from a bucket of very many keys, which is only pretended; page by page ÷ side by side.
    order: what an image of a large dataset costs a rank: ms and MiB of a batch's ids at 1e6 to 1e12 images; bytes of its own an image."""
    data: Path | None = None
    """loop, train, step, agreement, cifar: directory or s3://bucket/prefix of prepared shards, CIFAR-10's for docs/benchmarks.md.
    loader: shards of photographs, of which the first is read; none = 300 rendered photographs, 500 × 375 px.
    memory: any shards. prepare, embed: archive or folder of images, none = rendered photographs. all: folder with cifar10-jpeg.tar.xz
    and imagenet-photos-256.tar, or archives of such names; absent ones are rendered."""
    recipe: str = "cifar10_resnet18"
    """step, train, scale, loop, agreement, cifar, footprint: recipe whose step counts. embed: recipe whose encoder sees the photographs."""
    config_file: Annotated[Path | None, tyro.conf.arg(name="config")] = None
    """A file with the config, in place of --recipe: YAML as `simclr recipes RECIPE` writes it, or the run.json of a run. The options below
    change it."""
    size_px: int | None = None
    """footprint: side of a view. Default: the recipe's."""
    batch_size: int = 32
    """Images per step; scale: of each rank; views: images of which each gives two views."""
    steps: int = 30
    """Steps of each trial; the first 5 are not counted."""
    trials: int = 3
    """n: trials of each side."""
    window_s: float = 2.0
    """step, train, loop: the least seconds of a trial; if --steps take less, it takes more steps."""
    threads: int = 1
    """CPU threads of the one worker. As many threads as cores leave no core for Ray's own processes. Their time then counts, and more
    than once, because a worker's threads wait for one another."""
    precision: Literal["recipe", "float32", "tf32", "bfloat16"] = "recipe"
    """step, train, scale, loop, cifar, methods, embed: as in the config's `train.precision`; recipe = the recipe's. loss: bfloat16 = z
    as a step has it."""
    compile: bool = False
    """step, train, scale, loop, cifar, methods: torch.compile on both sides; step then counts graph breaks."""
    micro_batch: int | None = None
    """step: a third side embeds this many images at a time (gradient caching). train, scale: every side does."""
    sides: tuple[Literal["resident", "plain", "simclr", "cached", "fed", "views", "loader"], ...] = ()
    """step: only these sides, as `cached` for a batch that does not fit at once; nothing = all that --micro-batch and --data allow."""
    crops: str | None = None
    """loader: crops of several sizes, as 2x224+6x96, against two of the first size and as many of it."""
    profile: Path | None = None
    """step: file for the table of the slowest operators; also prints how often the host waits for a GPU."""
    peer: Literal["none", "lightly"] = "none"
    """train: also time lightly's SimCLR, its loader and transforms, over the folder --peer-data."""
    peer_data: Path | None = None
    """train: folder of the photographs that the shards were prepared from; lightly reads the photographs."""
    bandwidth_gb_s: float | None = None
    """scale: GB/s (10⁹ bytes) that a rank sends to another node, for the expected tables; nothing = as measured between these two ranks."""
    latency_us: float | None = None
    """scale: microseconds of one message to another node, for the expected tables; nothing = as measured."""
    node_bandwidth_gb_s: float | None = None
    """scale: GB/s that a rank sends within its node (NVLink); nothing = as measured, or on one GPU as between nodes."""
    node_latency_us: float | None = None
    """scale: microseconds of one message within a node; nothing = as measured, or on one GPU as between nodes."""
    ranks_per_node: int = 8
    """scale: GPUs of a node, for the expected tables."""
    batchnorm: Literal["recipe", "global", "per_worker"] | int = "recipe"
    """scale: as in the config's `encoder.batchnorm`, as 8 for groups of 8 ranks; recipe = the recipe's."""
    batches: tuple[int, ...] = (1024, 2048, 4096)
    """loss: values of N to time: images in the global batch, each with two views."""
    keys: tuple[int, ...] = (100_000, 1_000_000)
    """listing: numbers of keys in the bucket."""
    answer_ms: float = 50.0
    """listing: how long each answer of the bucket takes where keys/s are compared."""
    epochs: int | None = None
    """memory, cifar, methods: passes over the data. Default: 50; of methods the recipes'."""
    recipes: tuple[str, ...] = ("patterns_tiny", "patterns_moco", "patterns_mocov3", "patterns_byol")
    """methods: the recipes to compare, the baseline first."""
    like: str | None = None
    """methods: a recipe whose encoder, epochs and batch all of --recipes take in the place of their own."""
    seeds: int = 3
    """methods: runs of each recipe, of seeds 0, 1, …"""
    kind: Literal["small", "photographs"] = "photographs"
    """prepare: small = labelled images in splits and classes, as CIFAR-10's."""
    images: int = 2048
    """prepare, embed: number of photographs, which repeat if there are fewer; of small images the number to render.
    order: images of the shards that two processes read, in portions of 20,000."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """all, device, agreement, step, scale, loss, optim, views, cifar, embed: the device."""
    budget_min: float = 9.0
    """all: minutes; a phase that would not end within them is skipped, with a line."""
    out: Path | None = None
    """all: folder for results, log and profiles; the same command again goes on with it. Default: runs/bench-DATE.
    prepare: folder for the shards. methods: folder for its runs. Default: runs/methods."""
    dry: bool = False
    """all: everything at toy size on the CPU, to see that it works; its figures mean nothing."""
    json: Path | None = None
    """File for the result: what, machine, versions, date, setting, n, rows."""


def main(args: Args) -> None:
    if args.trials < 1 or args.steps <= WARM_STEPS:
        raise UserError(f"--trials {args.trials} --steps {args.steps}; expected at least 1 trial of more than {WARM_STEPS} steps")
    if args.window_s < 0:
        raise UserError(f"--window-s is {args.window_s}; expected seconds, 0 = as --steps say")
    if args.what == "all":
        from pipelines.bench.all import bench_all

        if unfinished := bench_all(args.budget_min, args.out, args.device, args.dry, args.data):
            show(f"failed or ended early: {', '.join(unfinished)}")
            sys.exit(1)
        return
    for path, kinds in ((args.json, (".json",)), (args.profile, ())):
        if path is not None:
            files.require_file(path, kinds)
            path.parent.mkdir(parents=True, exist_ok=True)
    machine()  # an error in it should come now, not after the measurement
    setting = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(args).items() if k not in ("what", "json")}
    n = 1 if args.what in ("agreement", "cifar", "memory", "footprint", "prepare", "probe") else args.trials
    rows: list[Row] = []
    for row in measure(args):
        rows.append(row)
        if args.json is not None:
            write_json(args.json, args.what, setting, n, rows, complete=False)
    for name, value in machine().items():
        show(f"{name}: {value}")
    if args.json is not None:
        write_json(args.json, args.what, setting, n, rows)


def measure(args: Args) -> Iterable[Row]:
    """Print the table of `args.what` and give its rows, one by one if that takes long. Each bench's imports are its own: only train and
    loop need Ray."""
    plan: dict[str, Any] = {"steps": args.steps, "trials": args.trials, "threads": args.threads}
    match args.what:
        case "device":
            from pipelines.bench.device import device

            return device(at=_device(args), **plan)
        case "scale":
            from pipelines.bench.scale import scale

            config = _config(args)
            if args.batchnorm != "recipe":
                config = replace(config, encoder=replace(config.encoder, batchnorm=args.batchnorm))
            links: dict[str, Any] = {"bandwidth_gb_s": args.bandwidth_gb_s, "latency_us": args.latency_us}
            links |= {"node_bandwidth_gb_s": args.node_bandwidth_gb_s, "node_latency_us": args.node_latency_us}
            return scale(config, device=_device(args).type, ranks_per_node=args.ranks_per_node, **links, **plan)
        case "loss":
            from pipelines.bench.loss import loss

            if min(args.batches, default=0) < 1:
                raise UserError(f"--batches is {' '.join(map(str, args.batches)) or 'empty'}; expected numbers of images, at least 1")
            if args.precision == "tf32":
                raise UserError("--precision tf32 is for convolutions; `simclr bench loss` takes float32 or bfloat16")
            precision: Literal["float32", "bfloat16"] = "bfloat16" if args.precision == "bfloat16" else "float32"
            return loss(args.batches, args.trials, args.threads, _device(args), precision)
        case "optim":
            from pipelines.bench.optim import optim

            return optim(device=_device(args), **plan)
        case "probe":
            from pipelines.bench.probe import probe

            return probe((20_000, 40_000), 2048, 1000)
        case "views":
            from pipelines.bench.views import views

            return views(args.batch_size, device=_device(args), **plan)
        case "prepare":
            from pipelines.bench.prepare import prepare

            if args.out is None:
                raise UserError("where to? `simclr bench prepare --out DIR`, a folder for the shards")
            return prepare(args.kind, args.data, args.out, args.images, args.threads)
        case "order":
            from pipelines.bench.order import order

            return order(args.images, args.batch_size, **plan)
        case "embed":
            from pipelines.bench.embed import embed

            return embed(args.recipe, args.data, args.images, args.trials, args.threads, _device(args), _config(args).train.precision)
        case "listing":
            from pipelines.bench.listing import listing

            return listing(args.keys, args.answer_ms, args.trials)
        case _:
            return _of_shards(args, plan)


def _of_shards(args: Args, plan: dict[str, Any]) -> Iterable[Row]:
    """The benches that read shards or can read them."""
    data = None if args.data is None else sync.shards(args.data)
    if data is None and args.what in ("train", "loop", "cifar", "methods", "memory", "footprint"):
        raise UserError(f"which data? `simclr bench {args.what} --data DIR`, a directory of prepared shards")
    if args.what == "loader":
        from pipelines.bench.loader import loader

        return loader(data, args.batch_size, crops=args.crops, **plan)
    if data is not None:
        read_manifest(data)
    if args.what == "agreement":
        from pipelines.bench.agreement import agreement

        return agreement(_config(args), data, args.threads, _device(args))
    if args.what == "step":
        from pipelines.bench.step import step

        return step(_config(args), device=_device(args), profile=args.profile, data=data, asked=args.sides, window_s=args.window_s, **plan)
    assert data is not None
    if args.what == "cifar":
        from pipelines.bench.cifar import cifar

        return cifar(args.recipe, _config(args), data, _EPOCHS if args.epochs is None else args.epochs, args.threads, _device(args))
    if args.what == "methods":
        from pipelines.bench.methods import methods

        precision = None if args.precision == "recipe" else args.precision
        out = args.out or Path("runs/methods")
        like = recipe(args.like) if args.like else None
        return methods(args.recipes, args.seeds, args.epochs, data, out, args.threads, _device(args), precision, args.compile, like)
    if args.what == "memory":
        from pipelines.bench.memory import memory

        return memory(data, args.batch_size, args.epochs or _EPOCHS, args.threads)
    if args.what == "footprint":
        from pipelines.bench.footprint import measured

        return measured(_config(args), data, args.threads, _device(args))
    if os.environ.get("RAY_ADDRESS"):
        raise UserError("RAY_ADDRESS is set; this compares on one machine: unset it")
    if args.what == "train":
        from pipelines.bench.train import train

        given: dict[str, Any] = {"peer": args.peer, "peer_data": args.peer_data, "window_s": args.window_s}
        return train(args.recipe, _config(args), data, **given, **plan)
    from pipelines.bench.loop import loop

    return loop(args.recipe, _config(args), data, window_s=args.window_s, **plan)


def _config(args: Args) -> Config:
    """The recipe with the batch sizes, precision and compiling of the command line; a queue keeps about its length."""
    if args.config_file is not None and args.recipe != Args.recipe:
        raise UserError(f"--recipe {args.recipe} and --config {args.config_file} each have a whole config; leave out one of them")
    config = recipe(args.recipe) if args.config_file is None else config_file.read(args.config_file).config
    if args.size_px is not None:
        config = replace(config, views=replace(config.views, size_px=args.size_px))
    precision = config.train.precision if args.precision == "recipe" else args.precision
    config = config.of_batch(args.batch_size)
    config = replace(config, train=replace(config.train, micro_batch=args.micro_batch, shard_groups=1))
    return replace(config, train=replace(config.train, precision=precision, compile=args.compile, steps=args.steps))


def _device(args: Args) -> torch.device:
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, and torch sees no GPU here; leave it out")
    return torch.device("cpu" if args.device == "cpu" or not torch.cuda.is_available() else "cuda")
