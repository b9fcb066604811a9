"""`simclr bench memory`: the loader's memory, epoch after epoch: does it stay flat?"""

from __future__ import annotations

import multiprocessing
import time
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pipelines.bench.result import Row
from simclr.data.manifest import read_manifest
from simclr.errors import UserError
from simclr.recipes import recipe


def memory(data: Path, batch_size: int, epochs: int, threads: int) -> list[Row]:
    """Print and return, epoch by epoch, MiB of the process's own and of mapped files, for each kind of cache in a fresh process."""
    if epochs < 1:
        raise UserError(f"--epochs is {epochs}; expected at least 1")
    manifest = read_manifest(data)
    examples = manifest.examples("train")
    if batch_size > examples:
        raise UserError(f"--batch-size is {batch_size}, {data} has {examples} training images; use that or less")
    found: list[Row] = []
    print(f"{epochs} epochs of {examples:,} images ({sum(s.bytes for s in manifest.splits['train']) / 2**20:,.0f} MiB of shards)")
    print(f"{'cache':<8} {'epoch':>6} {'own, MiB':>9} {'mapped files, MiB':>18} {'images/s so far':>16}")
    caches: tuple[Literal["page", "process"], ...] = ("page", "process")
    for cache in caches:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows = pool.apply(_run, (str(data), batch_size, epochs, threads, cache))
        for epoch, own, mapped, rate in rows:
            print(f"{cache:<8} {epoch:>6} {own:>9,.0f} {mapped:>18,.0f} {rate:>16,.0f}")
            found.append({"name": cache, "epoch": epoch, "own_mib": own, "mapped_mib": mapped, "images_per_s": rate})
    return found


def _run(data: str, batch_size: int, epochs: int, threads: int, cache: Literal["page", "process"]) -> list[tuple[int, float, float, float]]:
    from simclr.data.loader import batches

    photographs = read_manifest(Path(data)).kind == "jpeg"
    config = recipe("imagenet_resnet50" if photographs else "cifar10_resnet18")
    config = replace(config, train=replace(config.train, batch_size=batch_size, cache=cache))
    per_epoch = config.steps_per_epoch(read_manifest(Path(data)).examples("train"))
    shown = {1, 2, 5, epochs, *range(10, epochs, 10)}
    rows, began = [], time.monotonic()
    for batch in batches(config, Path(data), 0, 0, 1, threads):
        done, rest = divmod(batch.step + 1, per_epoch)
        if not rest and done in shown and done <= epochs:
            rows.append((done, *_resident(), done * per_epoch * batch_size / (time.monotonic() - began)))
        if done == epochs:
            break
    return rows


def _resident() -> tuple[float, float]:
    """MiB in memory: this process's own, and those of mapped files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own, mapped = (int(lines[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile"))
    return own, mapped
