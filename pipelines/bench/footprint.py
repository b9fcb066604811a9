"""`simclr bench footprint`: the most memory that a training process holds, as `pretrain --dry-run` estimates it ÷ as it is."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from pathlib import Path

import torch

from pipelines.bench.result import Row
from simclr.config import Config
from simclr.data.manifest import read_manifest
from simclr.footprint import footprint

_STEPS = 3  # the first makes the momentum, the last is followed by an online evaluation


def measured(config: Config, data: Path, threads: int, device: torch.device) -> list[Row]:
    """Print and return the estimate, the peak of a fresh process that takes three steps and evaluates, and their ratio. The peak is the
    process's resident memory (VmHWM), its libraries and the pages of the shards that it has read included; on a GPU what torch's allocator
    has reserved at most, and the estimate is without the context."""
    classes = len(read_manifest(data).classes)
    config = replace(config, train=replace(config.train, steps=_STEPS, report_every_steps=1))
    expected = footprint(config, 1, classes, device.type)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        peak = pool.apply(_peak, (config, str(data), threads, device.type))
    estimate = expected.total - (expected.base if device.type == "cuda" else 0)
    piece = config.train.micro_batch or config.train.batch_size
    print(
        f"{config.encoder.title} at {config.views.size_px} px, N = {config.train.batch_size}, pieces of "
        f"{piece}, {config.train.precision}: estimated {estimate / 2**20:,.0f} MiB, measured {peak / 2**20:,.0f} MiB, "
        f"ratio {estimate / peak:.2f}"
    )
    return [{"name": device.type, "estimated_mib": estimate / 2**20, "measured_mib": peak / 2**20, "ratio": estimate / peak}]


def _peak(config: Config, data: str, threads: int, device: str) -> int:
    """Bytes at most, in a process of its own, set up as a worker is."""
    from pipelines.allocator import keep_freed_memory
    from simclr.train import Start, train

    torch.set_num_threads(threads)
    if device == "cpu":
        keep_freed_memory()
    for _ in train(config, Start(Path(data), torch.device(device), threads=threads)):
        pass
    if device == "cuda":
        return int(torch.cuda.max_memory_reserved())
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) << 10
