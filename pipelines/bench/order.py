"""`simclr bench order`: what an image of a large dataset costs each rank: its place in the epoch's order, and its metadata."""

from __future__ import annotations

import itertools
import multiprocessing
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import numpy as np

from pipelines.bench.result import Row
from simclr import keyed
from simclr.config import Config, Train
from simclr.data import shards
from simclr.data.manifest import write_manifest
from simclr.data.sources.source import Item, Part, Source
from simclr.errors import UserError

SIZES = (10**6, 10**7, 10**8, 10**9, 10**12)
_MOST_SORTED = 10**7  # a sort of 1e8 ids takes 10 GiB
_SHARD = 20_000  # images of a shard of the made-up dataset
_SIDE_PX = 4
_WARM = 3


def order(images: int, batch_size: int, steps: int, trials: int, threads: int) -> list[Row]:
    """Print and return, for ranges of a million to 1e12, ms and MiB of a batch's ids, sorted and by `keyed.entries`; and, of two processes
    that read the same shards of `images` images of 4 × 4 px, bytes an image that are each one's own, and images/s."""
    if images < _SHARD or batch_size > _SHARD:
        raise UserError(
            f"--images is {images} and --batch-size {batch_size}; expected at least {_SHARD} images, and batches of at most that"
        )
    rows: list[Row] = []
    print(f"ids of a batch of {batch_size:,}, n = {trials}: an epoch's first batch, for which a sort sorts all, and later ones")
    print(f"{'images':>18} {'way':<8} {'first, ms':>11} {'later, ms':>11} {'peak, MiB':>11}")
    for size, (name, rule) in itertools.product(SIZES, (("sort", "sort"), ("entries", "by size"))):
        if name == "entries" or size <= _MOST_SORTED:
            rows.append(_ids(size, name, rule, batch_size, trials))  # type: ignore[arg-type]
            print("{images:>18,} {name:<8} {first_ms:>11,.2f} {later_ms:>11,.2f} {peak_mib:>11,.1f}".format(**rows[-1]))
    with tempfile.TemporaryDirectory(prefix="simclr-bench-") as folder:
        few, many = (made(Path(folder) / name, count) for name, count in (("few", 1), ("many", images // _SHARD)))
        for _ in range(trials):
            base, large = (_two_readers(data, batch_size, steps, threads) for data in (few, many))
            more = (images // _SHARD - 1) * _SHARD
            each = [(own - before) / more for (own, _, _), (before, _, _) in zip(large, base, strict=True)] if more else []
            row: Row = {"name": "reader", "images": images // _SHARD * _SHARD, "own_bytes_an_image": each}
            row |= {"start_s": [s for _, s, _ in large], "images_per_s": [rate for _, _, rate in large]}
            rows.append(row)
            own = " and ".join(f"{value:.2f}" for value in each)
            rate = " and ".join(f"{value:,.0f}" for value in row["images_per_s"])
            start = " and ".join(f"{value:.1f}" for value in row["start_s"])
            print(f"two readers of {row['images']:,} images: {own} bytes an image of their own; first batch {start} s; {rate} images/s")
    return rows


def _ids(size: int, name: str, rule: keyed.Rule, batch_size: int, trials: int) -> Row:
    """Medians over `trials` epochs, and the peak of what one more allocates."""
    first, later = [], []
    places = np.arange(batch_size)

    def batch(epoch: int) -> Callable[[keyed.Ids], keyed.Ids]:
        found = keyed.order(0, epoch, size, rule)
        found(places)
        return found

    for epoch in range(trials):
        began = time.perf_counter()
        found = batch(epoch)
        then = time.perf_counter()
        found(places + size // 2)
        later.append(1000 * (time.perf_counter() - then))
        first.append(1000 * (then - began))
    tracemalloc.start()
    batch(trials)
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    return {"name": name, "images": size, "first_ms": median(first), "later_ms": median(later), "peak_mib": peak}


def made(folder: Path, count: int) -> Path:
    """A dataset of `count` shards of 20,000 images of 4 × 4 px each, which are one another's copies: it is made in seconds."""
    pixels = np.zeros((_SIDE_PX, _SIDE_PX, 3), np.uint8)

    def read(part: Part) -> Iterator[Item]:
        yield from (Item("train", None, str(i), pixels + np.uint8(i % 256)) for i in range(_SHARD))

    source = Source(spec="made", parts=[Part("all", tuple(map(str, range(_SHARD))))], read=read, total=_SHARD)
    manifest = shards.prepare(source, folder, shards.Options(shard_mib=1024), 1, lambda done: None)
    (one,) = manifest.splits["train"]
    content = (folder / one.name).read_bytes()
    copies = tuple(replace(one, name=f"train-{number:05}.beton") for number in range(count))
    for copy in copies[1:]:
        (folder / copy.name).write_bytes(content)
    write_manifest(folder, replace(manifest, splits={"train": copies}, schema=0))
    return folder


def _two_readers(data: Path, batch_size: int, steps: int, threads: int) -> list[tuple[int, float, float]]:
    """(bytes of its own, seconds to the first batch, images/s) of each of two processes, which both hold the shards at the end."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for _ in range(2):
        here, there = context.Pipe()
        process = context.Process(target=_reader, args=(there, data, batch_size, steps, threads))
        process.start()
        pipes.append(here)
        processes.append(process)
    found = [pipe.recv() for pipe in pipes]
    sizes = []
    for pipe in pipes:  # now that both have read: what only one of two has mapped counts as its own
        pipe.send("look")
        sizes.append(pipe.recv())
    for pipe in pipes:
        pipe.send("end")
    for process in processes:
        process.join()
    return [(size, start, rate) for size, (start, rate) in zip(sizes, found, strict=True)]


def _reader(pipe: Connection, data: Path, batch_size: int, steps: int, threads: int) -> None:
    from simclr.data.loader import batches

    began = time.perf_counter()
    stream = batches(Config(train=Train(batch_size=batch_size)), data, 0, 0, 1, threads)
    next(stream)
    start = time.perf_counter() - began
    for _ in range(_WARM):
        next(stream)
    began = time.perf_counter()
    for _ in range(steps):
        next(stream)
    pipe.send((start, steps * batch_size / (time.perf_counter() - began)))
    while pipe.recv() == "look":
        pipe.send(_own_bytes())
    stream.close()


def _own_bytes() -> int:
    """Bytes in memory that no other process shares."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return sum(int(lines[name].split()[0]) * 1024 for name in ("Private_Clean", "Private_Dirty"))
