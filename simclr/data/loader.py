"""Batches from shards: keyed order, one decode per image, resumed at any step. The door to the FFCV reader.

FFCV reads one file per Loader. Here every shard of a split is mapped into one range of addresses, back to back, and the
samples' pointers are shifted to match (`samples`), so that FFCV's compiled operations see one file and nothing is copied. FFCV's own
epoch iterator is not used: it hangs when its thread fails, drains at the end of each epoch, and knows no step.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import traceback
import warnings
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch

import simclr.data.ffcv.imports  # noqa: F401  (first: it makes the next import fast)

# isort: split
from ffcv.fields.rgb_image import SimpleRGBImageDecoder
from ffcv.pipeline.compiler import Compiler
from ffcv.pipeline.operation import Operation
from ffcv.pipeline.state import State
from numpy.typing import NDArray
from torch import Tensor

from simclr import keyed
from simclr.config import Config, time_of
from simclr.data.ffcv.decode import Crops, read_bytes
from simclr.data.ffcv.resize import KINDS, REDUCE
from simclr.data.manifest import read_manifest, require_sizes
from simclr.data.memory import slots_for
from simclr.data.s3.uri import Corrupt
from simclr.data.samples import Samples, Shards
from simclr.data.videos import apart, neighbours, videos_of
from simclr.shares import groups_of, share
from simclr.telemetry import progress
from simclr.to_device import to_device
from simclr.views.draw import Crop, Drawn, boxes_of, draw_batch
from simclr.views.preprocessing import Preprocessing

# numba's workqueue layer aborts the process when two threads enter parallel regions at once.
_compiled_code = threading.Lock()
_LOOKED_UP = 4096  # samples at a time: a look-up of 64 costs a third of one of 4,096
_kept: dict[tuple[type, bool], Callable[..., Any]] = {}


@dataclass(frozen=True, slots=True)
class Batch:
    """One rank's share of a batch. Its images are valid until the next batch is asked for, which reuses their memory."""

    step: int
    """Its optimizer step (0-based); in evaluation, the number of the batch."""
    epoch: int
    images: tuple[Tensor, ...]
    """uint8. Raw shards: one (n, H, W, 3), whole images. JPEG shards: for each `Crop` (n, count, size, size, 3), and in evaluation
    one (n, size, size, 3), as `Preprocessing` cuts them."""
    ids: Tensor
    """(n,) int64: positions in the split."""
    labels: Tensor
    """(n,) int64; −1 = unlabelled."""
    drawn: tuple[Drawn | None, ...] = ()
    """In training, for each `Crop` what was drawn for its views; None if it has no distortions."""
    captions: tuple[str, ...] = ()
    """Of each image, where the shards are of pairs."""
    mates: Tensor | None = None
    """(n,) int64: of pairs from time (`Crop.neighbours`) the ids of the images of which view 1 is. `images` of raw shards are then two,
    one for each view. None = both views are of the same images."""


def batches(
    config: Config,
    data: Path,
    start_step: int,
    rank: int,
    world: int,
    threads: int = 1,
    ids: NDArray[np.int64] | None = None,
    crops: tuple[Crop, ...] | None = None,
) -> Generator[Batch, None, None]:
    """Endless training batches of `rank` from `start_step` on, prepared in advance; closing the iterator ends the loader's thread.

    Step s lies in epoch s // (examples // N). The global batch is N consecutive entries of the epoch's keyed order (`keyed.order`, by the
    manifest's rule); a rank's `share` is consecutive entries of the batch. So the images of step s depend on config, s and the data alone.
    With G shard groups, each group has its own order and gives N / G consecutive entries: then the images depend on G too. Raises UserError
    for damaged shards, naming shard and sample.

    `ids`, ascending, restrict training to a subset, of ungrouped shards. `crops` are cut from JPEG shards; by default the two of
    `config.views`. With `Crop.neighbours` the second is cut from another frame of the same video, which is decoded as well; parameters of
    both views are keyed by the first frame. Raises UserError where that, or time.one_per_video, meets shards without videos.
    """
    groups, held = config.train.shard_groups, config.groups_of(rank, world)
    split = _Split(data, "train", threads, groups, held, config.train.cache == "process")
    assert ids is None or groups == 1, "a subset of grouped shards"
    per_epoch = config.steps_per_epoch(split.examples if ids is None else len(ids))
    mine, taken = config.images_of(rank, world), config.train.batch_size // groups  # from each group, in a step
    n = mine.stop - mine.start
    # Of each group this rank's entries, among those that the group gives in a step; and the numbers of the group's samples.
    entries = [np.arange(max(mine.start - group * taken, 0), min(mine.stop - group * taken, taken)) for group in held]
    numbers = [split.shards.rows_of[group] for group in held]
    crops = crops or (Crop(views=config.views),)
    assert all(crop.views.resize == config.views.resize for crop in crops), "one decode resizes all its crops alike"
    one_per_video, most = time_of(config).one_per_video, crops[0].neighbours
    videos = videos_of(split.manifest, data) if one_per_video or most else None
    assert not most or [crop.count for crop in crops] == [2], "pairs from time are of two crops"
    # Two images that give a crop each lie in memory like one that gives two.
    shapes = tuple((crop.count, crop.size_px) for crop in crops) if not most else ((1, crops[0].size_px),)
    read, ahead = split.reader(2 * n if most else n, shapes, KINDS.index(config.views.resize))
    at_once = max(_LOOKED_UP // n, 1)  # steps
    order_of = -1
    orders: list[Callable[[NDArray[np.int64]], NDArray[np.int64]]] = []
    found_of, found = (-1, -1), split.shards.find(np.empty(0, np.int64))

    def batch(step: int) -> Batch:
        nonlocal order_of, orders, found_of, found
        epoch, place = divmod(step, per_epoch)
        if epoch != order_of:
            split.require_sizes()
            order_of = epoch
            if videos is not None and one_per_video:
                orders = [apart(videos, config.seed, epoch, split.examples if ids is None else ids, config.train.batch_size)]
            else:
                orders = [keyed.order(config.seed, epoch, len(rows) if ids is None else ids, split.order) for rows in numbers]
        if (epoch, place // at_once) != found_of:
            found_of = epoch, place // at_once
            steps = np.arange(place - place % at_once, min(place - place % at_once + at_once, per_epoch))
            of_groups = [
                rows.start + order((steps[:, None] * taken + own).ravel()).reshape(len(steps), len(own))
                for order, own, rows in zip(orders, entries, numbers, strict=True)
            ]
            wanted = np.concatenate(of_groups, 1).ravel()
            if most and videos is not None:  # behind them their mates; of ungrouped shards, whose rows are ids
                wanted = np.concatenate([wanted, neighbours(videos, config.seed, epoch, wanted, most, ids)])
            found = split.shards.find(wanted)
        mine = found[place % at_once * n : (place % at_once + 1) * n]
        boxes = None if split.raw else boxes_of(crops, config.seed, epoch, mine.ids, mine.sizes)
        drawn = draw_batch(crops, config.seed, epoch, mine.ids, mine.sizes if split.raw else None)
        if not most:
            return replace(_batch(read, step, epoch, mine, boxes), drawn=drawn, captions=split.shards.captions(mine))
        mates = found[len(found.ids) // 2 :][place % at_once * n : (place % at_once + 1) * n]
        if boxes is not None:
            boxes = np.stack([boxes[:, 0], boxes_of(crops, config.seed, epoch, mine.ids, mates.sizes)[:, 1]], 1)
        images, rows = _of_pairs(read, mine, mates, boxes), (torch.from_numpy(mine.ids), torch.from_numpy(mine.labels))
        return Batch(step, epoch, images, *rows, drawn, split.shards.captions(mine), torch.from_numpy(mates.ids))

    return _prefetched(batch, itertools.count(start_step), ahead, training=True)


def in_order(
    data: Path,
    split: str,
    preprocessing: Preprocessing,
    batch_size: int,
    limit: int | None = None,
    threads: int = 1,
    rank: int = 0,
    world: int = 1,
    groups: int = 1,
    only: NDArray[np.int64] | None = None,
) -> Generator[Batch, None, None]:
    """Every image of a split once, or `limit` of them, or those with the ids `only`, in order; a rank gets its consecutive share. With
    training shards in more than one group, it gets a share of its own group, or of two.

    The `limit` images are drawn once, the same for every caller. (Evenly spaced ones would be of a single class where classes take turns
    in the split.)

    Raw shards give whole images, JPEG shards what `preprocessing` leaves of them, (n, size, size, 3) in whole numbers.
    """
    groups = groups if split == "train" else 1
    held = groups_of(groups, rank, world)
    rows = _Split(data, split, threads, groups, held)
    if only is not None:
        ids = only[share(len(only), rank, world)]
    else:
        ids = np.concatenate([_portion(rows, group, limit // groups if limit else None, rank, world) for group in held])
    most, size = min(batch_size, max(len(ids), 1)), preprocessing.size_px
    read, ahead = rows.reader(most, ((1, size),), KINDS.index(preprocessing.resize))
    largest = preprocessing.boxes(np.full((1, 2), rows.shards.short_px))[0, 2]
    reduce = rows.reader(most, ((1, 2 * size),), REDUCE)[0] if not rows.raw and largest > 2 * size else None

    def batch(number: int) -> Batch:
        mine = rows.shards.find(ids[number * batch_size : (number + 1) * batch_size])
        if rows.raw:
            return _batch(read, number, 0, mine, None)
        boxes = preprocessing.boxes(mine.sizes)
        batch = _batch(read, number, 0, mine, boxes[:, None])
        images, some = batch.images[0][:, 0], np.flatnonzero(boxes[:, 2] > 2 * size)
        if reduce is not None and len(some):
            (halved,) = _batch(reduce, number, 0, mine[some], boxes[some, None]).images
            x = preprocessing.from_squares(halved[:, 0].permute(0, 3, 1, 2).float() / 255)
            images[some] = (x * 255).round().byte().permute(0, 2, 3, 1)
        return replace(batch, images=(images,))

    return _prefetched(batch, range(-(-len(ids) // batch_size)), ahead)


def _portion(split: _Split, group: int, limit: int | None, rank: int, world: int) -> NDArray[np.int64]:
    """The samples of `group`, at most `limit` of them, that are this rank's."""
    numbers = split.shards.rows_of[group]
    total = len(numbers) if limit is None else min(limit, len(numbers))
    ids = np.arange(total, dtype=np.int64)
    if total < len(numbers):
        ids = np.sort(keyed.order(0, 0, len(numbers), split.order)(ids))
    # The ranks lie side by side over all groups: from this one's beginning, a rank's borders are at so many W-ths of it.
    first, last = (min(max(total * (edge * split.groups - group * world) // world, 0), total) for edge in (rank, rank + 1))
    return numbers.start + ids[first:last]


def labels(data: Path, split: str = "train") -> NDArray[np.int64]:
    """(n,) label of every image of a split, in the order of sample ids; −1 = unlabelled."""
    return np.concatenate([samples.labels for samples in _Split(data, split, 1).shards.all()])


def on_device(stream: Generator[Batch, None, None], device: torch.device) -> Generator[Batch, None, None]:
    """`stream` with its images, and what was drawn for them, on `device`. A batch is copied to a GPU while the step before it computes, on
    its own CUDA stream; ids and labels stay on the host. Closing it closes `stream`."""
    with contextlib.closing(stream):
        if device.type != "cuda":
            yield from stream
            return
        copying = torch.cuda.Stream(device)
        waiting: tuple[Batch, torch.cuda.Event] | None = None
        try:
            for batch in stream:
                with torch.cuda.stream(copying):
                    images = tuple(part.to(device, non_blocking=True) for part in batch.images)
                    drawn = tuple(one and replace(one, block=to_device(one.block, device)) for one in batch.drawn)
                    moved = replace(batch, images=images, drawn=drawn)
                    done = torch.cuda.Event()
                    done.record()
                if waiting is not None:
                    yield _after_copy(*waiting, device)
                waiting = moved, done
                done.synchronize()  # the next request lets the loader reuse the batch's memory
            if waiting is not None:
                yield _after_copy(*waiting, device)
        finally:
            copying.synchronize()  # a running copy reads memory that is freed with the loader


def _after_copy(batch: Batch, done: torch.cuda.Event, device: torch.device) -> Batch:
    """`batch`, after the computing stream was told to wait for its copy."""
    computing = torch.cuda.current_stream(device)
    computing.wait_event(done)
    for part in (*batch.images, *(one.block for one in batch.drawn if one is not None)):
        part.record_stream(computing)
    return batch


class _Split:
    """The shards of a split, or those of some groups, as one dataset. Rows are numbered from 0; `Samples.ids` are places in the split."""

    def __init__(self, data: Path, split: str, threads: int, groups: int = 1, held: Sequence[int] = (0,), own_memory: bool = False) -> None:
        for group in held:
            manifest = read_manifest(data, groups=groups, group=group)
        self.groups = groups
        self.examples = manifest.examples(split, groups)  # for an unknown split, raises with the names of all
        self.raw, self.order, self.manifest = manifest.kind == "raw", manifest.order, manifest
        self.threads = max(1, min(threads, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
        self.data, self.own_memory = data, own_memory
        self.shards = Shards(data, manifest, split, groups, held, own_memory)

    def __len__(self) -> int:
        return len(self.shards)

    def require_sizes(self) -> None:
        """Raise Corrupt if a shard that is mapped has another size by now: another process writes to it."""
        if not self.own_memory:
            require_sizes(self.data, self.shards.shards)

    def reader(self, most: int, shapes: tuple[tuple[int, int], ...], kind: int) -> tuple[Callable[[Any, Samples], tuple[Tensor, ...]], int]:
        """A function (metadata rows, their samples) → images, compiled by FFCV, for up to `most` rows at a time; and the number of batches
        that may be ready before the memory of the caller's batch is reused. `shapes`: (count, size) of crops; `kind`: see
        `ffcv.resize`."""
        operation = SimpleRGBImageDecoder() if self.raw else Crops(shapes)
        operation.accept_globals(self.shards.largest, Compiler.compile(read_bytes))
        _, queries = operation.declare_state_and_memory(State(jit_mode=True, device=torch.device("cpu"), shape=(), dtype=np.dtype("u1")))
        code = _compile(operation, self.threads)
        memory = slots_for(queries, most)
        slots = itertools.cycle(memory)
        scratch = None if self.raw else np.empty((self.threads, operation.scratch_bytes), np.uint8)

        def read(rows: Any, samples: Samples) -> tuple[Tensor, ...]:
            nonlocal code
            slot = next(slots)
            by_pointer = np.argsort(samples.images["data_ptr"])
            storage = self.shards.region, samples.images["data_ptr"][by_pointer], samples.bytes[by_pointer]
            given = (np.arange(len(rows)), slot if self.raw else (slot[:-1], slot[-1], scratch, kind), rows, storage)
            with _compiled_code:
                if self.threads > 1:
                    numba.set_num_threads(self.threads)
                try:
                    code(*given)
                except KeyError as error:
                    # From numba, now and then: see `ffcv.signatures`, which leaves it no place that is known to raise it. If none is
                    # reported any more, this can go.
                    place = "".join(traceback.format_exception(error)).rstrip()
                    warnings.warn(f"numba lost a key, and the decoder is compiled anew; please report this:\n{place}", RuntimeWarning, 2)
                    operation.accept_globals(self.shards.largest, Compiler.compile(read_bytes))
                    code = _compile(operation, self.threads, anew=True)
                    code(*given)
            if not self.raw and (bad := np.flatnonzero(slot[-1][: len(rows)])).size:
                shard, sample = self.shards.where(int(samples.rows[bad[0]]))
                said = f"shard {shard.name}: sample {sample} is damaged: its JPEG cannot be decoded; prepare the data again"
                raise Corrupt(said, shard.name)
            return tuple(torch.from_numpy(part[: len(rows)]) for part in ((slot,) if self.raw else slot[:-1]))

        return read, len(memory) - 2


def _batch(
    read: Callable[[Any, Samples], tuple[Tensor, ...]], step: int, epoch: int, samples: Samples, boxes: NDArray[np.int64] | None
) -> Batch:
    """The images of `samples`; `boxes` (n, crops, 4) of photographs."""
    return Batch(step, epoch, _images(read, samples, boxes), torch.from_numpy(samples.ids), torch.from_numpy(samples.labels))


def _images(read: Callable[[Any, Samples], tuple[Tensor, ...]], samples: Samples, boxes: NDArray[np.int64] | None) -> tuple[Tensor, ...]:
    rows: Any = samples.images
    if boxes is not None:
        rows = np.empty(len(boxes), [*rows.dtype.descr, ("box", "<i4", boxes.shape[1:])])
        for name in samples.images.dtype.names:
            rows[name] = samples.images[name]
        rows["box"] = boxes
    return read(rows, samples)


def _of_pairs(
    read: Callable[[Any, Samples], tuple[Tensor, ...]], mine: Samples, mates: Samples, boxes: NDArray[np.int64] | None
) -> tuple[Tensor, ...]:
    """`Batch.images` of pairs: view 0 is of `mine`, view 1 of `mates`; `boxes` (n, 2, 4) of photographs."""
    n, both = len(mine.ids), mine.then(mates)
    if boxes is None:
        (whole,) = _images(read, both, None)
        return whole[:n], whole[n:]
    # An image and its mate by turns: so the two crops of a pair lie as those of one image do.
    (crops,) = _images(read, both[np.arange(2 * n).reshape(2, n).T.ravel()], boxes.reshape(2 * n, 1, 4))
    return (crops.view(n, 2, *crops.shape[2:]),)


def _compile(operation: Operation, threads: int, anew: bool = False) -> Callable[..., Any]:
    """FFCV's compiled code of `operation`, kept for the process: compiling takes a second, at each evaluation."""
    key = type(operation), threads > 1
    if anew or key not in _kept:
        Compiler.num_threads = threads  # not set_num_threads, which would set torch's as well
        _kept[key] = Compiler.compile(operation.generate_code())
    return _kept[key]


def _prefetched(make: Callable[[int], Batch], numbers: Iterable[int], ahead: int, training: bool = False) -> Generator[Batch, None, None]:
    """make(number) for each number, up to `ahead` of them in advance, by a thread that ends with the iterator."""
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(ahead)
    over = threading.Event()

    def put(item: Batch | BaseException | None) -> bool:
        while not over.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        try:
            for number in numbers:
                if not put(make(number)):
                    return
            put(None)
        except BaseException as error:  # raised again where the batch is asked for
            put(error)

    thread = threading.Thread(target=produce, name="loader", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            progress.beat(item.step if training else None)
            yield item
    finally:
        over.set()
        thread.join(timeout=5)
