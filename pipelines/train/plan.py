"""What a pretraining would do, need and leave, said before anything is started (`simclr pretrain --dry-run`, `simclr cluster check`)."""

from __future__ import annotations

import contextlib
import math
import shlex
import shutil
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from pipelines.runs.config_file import given_to
from pipelines.runs.directory import Run, load_run
from pipelines.runs.environment import environment
from simclr.config import Config
from simclr.data.manifest import Manifest
from simclr.errors import UserError

_WORKERS = 2  # where a command does not say
_LABEL = 13
_SETTLED = 3  # first reports of a run, whose rates have its start in them


@dataclass(frozen=True, slots=True)
class Room:
    """The memory of a device that a worker may fill."""

    device: str
    """cpu or cuda."""
    bytes: int
    what: str
    """The device, and whose share it is, for people."""


# ── The lines ──────────────────────────────────────────────────────────────────────────────────────────────────────


def line(label: str, text: str) -> str:
    return f"{label:<{_LABEL}}{text}"


def steps(config: Config, examples: int, workers: int) -> Iterator[str]:
    """How long, and how a step is shared, of a run over `examples` images."""
    per_epoch, total, n = config.steps_per_epoch(examples), config.total_steps(examples), config.train.batch_size
    epochs = f"{total / per_epoch:,.4g} epochs of {per_epoch:,} steps"
    yield line("steps", f"{total:,}, {epochs} of N = {n:,} of {examples:,} images; {config.warmup_steps(examples):,} are warm-up")
    yield from shares(config, workers)


def shares(config: Config, workers: int) -> Iterator[str]:
    """What each worker has of a step."""
    n = config.train.batch_size
    most, fewest, pieces = config.images_per_rank(workers), n // workers, config.pieces(workers)
    each = f"{most:,}" if most == fewest else f"{fewest:,} or {most:,}"
    cut = "" if pieces == 1 else f", in {pieces:,} pieces of at most {-(-most // pieces):,}"
    yield line("workers", f"{workers:,}, {each} images each{cut}")


def memory(config: Config, workers: int, classes: int, room: Room | None, device: str = "") -> Iterator[str]:
    """The memory of a worker, by `simclr.footprint`, and a --train.micro-batch where there is not so much `room`; None = unknown."""
    from simclr import sense
    from simclr.footprint import fitting, footprint  # torch takes seconds

    device = room.device if room is not None else device or "cuda"
    found = footprint(config, workers, classes, device)
    parts = {
        "weights": found.weights,
        "momentum": found.momentum,
        "views": found.views,
        "activations, gradients and the loss": found.step,
        "other workers' rows and buckets": found.ranks,
        "batches ahead": found.loader,
        "libraries": found.base,
        "kept by the allocator": found.kept,
    }
    listed = ", ".join(f"{name} {_gib(size)}" for name, size in parts.items() if size >= (1 << 30) / 200)  # what shows as 0.01
    where = "on a GPU" if device == "cuda" else "of a process on the CPU"
    yield line("memory", f"about {_gib(found.total)} GiB a worker, {where}: {listed}")
    if room is None:
        return
    if found.total <= room.bytes:
        yield line("", f"fits {room.what}, {_gib(room.bytes)} GiB")
        return
    piece = fitting(config, workers, room.bytes, classes, device)
    if piece is not None:
        smaller = footprint(replace(config, train=replace(config.train, micro_batch=piece)), workers, classes, device)
        norm = ", with BatchNorm over a piece of every worker" if sense.normalises(config) else ""
        mend = f"--train.micro-batch {piece} takes about {_gib(smaller.total)} GiB{norm}"
    elif config.whole_batch:
        mend = f"{config.whole_batch}; use more workers or a smaller batch, or leave it out"
    else:
        mend = "no --train.micro-batch does; use a smaller encoder or views"
    yield line("", f"does NOT fit {room.what}, {_gib(room.bytes)} GiB: {mend}")


def duration(config: Config, examples: int, workers: int, device: str, home: Path) -> str:
    """The time by the rate of the newest run like it in the folder `home`, made on a machine like this one."""
    images = config.total_steps(examples) * config.train.batch_size
    rate, run = measured_rate(config, workers, device, home)
    if run is None:
        return line(
            "time", f"no measured rate: no run in {home}/ has this network, size, precision and --workers {workers} on such a machine"
        )
    return line(
        "time",
        f"about {_time(images / rate)} at {rate:,.4g} images/s, as {run.path} had on such a machine; start and evaluations come on top",
    )


def measured_rate(config: Config, workers: int, device: str, home: Path) -> tuple[float, Run | None]:
    """(images/s, the newest run in `home` that measured it): with the same network, views, precision, pieces and number of workers, on a
    machine of the same description. (0, None) where there is none."""
    here = environment()["machine"]
    found: list[tuple[float, float, Run]] = []
    for path in sorted(home.glob("*/run.json")):
        with contextlib.suppress(UserError, OSError):  # a damaged run has no rate
            run = load_run(path.parent)
            if run.stage != "pretrain" or run.environment.get("machine") != here or _cost(run.config) != _cost(config):
                continue
            if (workers, device) != _resources(run.command, device):
                continue
            rates = [row["speed/images_per_s"] for row in run.history()[_SETTLED:] if row.get("speed/images_per_s", 0) > 0]
            if rates and math.isfinite(rate := statistics.median(rates)):
                found.append((run.created, rate, run))
    if not found:
        return 0.0, None
    _, rate, newest = max(found, key=lambda one: one[0])
    return rate, newest


def _resources(command: str, device: str) -> tuple[int, str]:
    """--workers and --device of a `command`; the `device` where it says none."""
    words = shlex.split(command)
    workers, given = given_to("--workers", words), given_to("--device", words)
    count = int(workers) if workers and workers.isdigit() else _WORKERS
    return count, given if given in ("cpu", "cuda") else device


def _cost(config: Config) -> tuple[object, ...]:
    """What the time of an image depends on most."""
    train = config.train
    shared = Config().flat()
    own = tuple((name, value) for name, value in config.flat().items() if name not in shared and not name.startswith("loss."))
    return config.METHOD, config.encoder, own, config.views.size_px, train.batch_size, train.micro_batch, train.precision, train.compile


def storage(config: Config, manifest: Manifest, at_s3: bool, run: Path, size: int) -> Iterator[str]:
    """The shards that a node holds, and the run's checkpoints, of `size` bytes each."""
    shards = sum(shard.bytes for split in manifest.splits.values() for shard in split)
    groups = config.train.shard_groups
    share = f", of which a node fetches those of its workers' groups ({groups} in all)" if groups > 1 else ""
    how = f"fetched once to each node's cache{share}" if at_s3 else "read where they lie"
    yield line("data", f"{_gib(shards)} GiB of shards, {how}")
    keep = config.train.keep_checkpoints
    existing = next(p for p in [run.absolute(), *run.absolute().parents] if p.exists())
    free = shutil.disk_usage(existing).free
    every = config.train.checkpoint_every_steps
    when = f"every {every:,} steps" if every else "every one to five minutes"
    yield line(
        "checkpoints",
        f"{when}, of {_mib(size)} MiB; the newest {keep} and the best stay, so {_mib(size * (keep + 2))} MiB with the one being written; "
        f"{_gib(free)} GiB are free there",
    )
    if size * (keep + 2) > free:
        yield line("", "does NOT fit that disk; use --run on another one, or a smaller --train.keep-checkpoints")


# ── The room ───────────────────────────────────────────────────────────────────────────────────────────────────────


def room_here(device: str, workers: int) -> Room:
    """What a worker has on this machine: a GPU of its own, or its share of the memory."""
    import torch

    from simclr.data.limits import memory_bytes

    if device == "cuda" or (device == "auto" and torch.cuda.device_count() >= workers):
        if not torch.cuda.is_available():
            raise UserError(
                "--device cuda, and torch sees no GPU here; a dry run with --device cpu, or on a machine with one, can say more"
            )
        return Room("cuda", torch.cuda.get_device_properties(0).total_memory, f"this machine's {torch.cuda.get_device_name(0)}")
    share = "" if workers == 1 else f", shared by {workers} workers"
    return Room("cpu", memory_bytes() // workers, f"this machine's memory{share}")


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f}" if size < 10 << 30 else f"{size / 2**30:,.1f}"


def _mib(size: float) -> str:
    return f"{size / 2**20:,.0f}"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:,.1f} h" if seconds < 172_800 else f"{seconds / 86400:,.1f} days"
