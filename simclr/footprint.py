"""The memory that a pretraining step takes, found without taking it: the real step, on tensors that have shapes and no numbers.

`take_step` runs twice on fake tensors, and every storage that it makes is counted while something refers to it. So weights, gradients,
momentum, what autograd keeps for the backward pass, its temporaries, gradient caching and autocast are what they are in a run, to the byte.
What no shape tells is added by measure (`simclr bench footprint`, docs/training.md): libraries, and what an allocator keeps beyond what is
in use.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

# Not public, and there is no public way yet: torch.utils has the dispatch mode as "experimental", and the fake tensors are what
# torch.export itself runs on. tests/simclr/test_footprint.py fails if either changes.
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from simclr.config import Config, SimCLR
from simclr.family import CLIP, MAE, MoCo, MoCoV3
from simclr.loss import STREAMED_FROM
from simclr.methods.choice import shapes
from simclr.methods.method import Method, Rows
from simclr.optim import build_optimizer
from simclr.precision import autocast, views_dtype, weights_dtype
from simclr.train import take_step

_EVALUATED = 256  # images that an online evaluation embeds at a time
_BATCHES_AHEAD = 5  # of uint8 crops, in the loader
_CPU = torch.device("cpu")

# Measured on 27 November 2026 (torch 2.15, FFCV 1.0.2, glibc 2.36, one thread): resident memory of a worker's process less what the step
# has in use, where freed blocks go back to the system, and how much more of it stays where they do not (`pipelines.allocator`).
CPU_BASE_BYTES = 1105 << 20
CPU_KEPT = 1.4
# CUDA's context, cuDNN's workspaces and what torch's allocator keeps in blocks of its own sizes: not measured, chosen wide.
GPU_BASE_BYTES = 1 << 30
GPU_KEPT = 1.1


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of one worker. `weights`, `momentum`, `views` and `step` are what is in use when most is."""

    weights: int
    """Parameters, BatchNorm's statistics, moving averages of networks, and a queue."""
    momentum: int
    """The optimizer's state."""
    views: int
    """The views of a piece of the batch."""
    step: int
    """Activations that the backward pass wants, gradients, the loss, and temporaries."""
    ranks: int
    """What other workers add, DDP's buckets, which hold the gradients, and what NT-Xent takes for the rows of the whole batch."""
    loader: int
    """Batches of uint8 crops that wait: in host memory."""
    base: int
    """Libraries and, on a GPU, its context."""
    kept: int
    """What the allocator keeps beyond what is in use."""

    @property
    def total(self) -> int:
        """On a CPU of the process, on a GPU of the device."""
        return sum((self.weights, self.momentum, self.views, self.step, self.ranks, self.loader, self.base, self.kept))


def footprint(config: Config, workers: int = 1, classes: int = 0, device: str = "cpu") -> Footprint:
    """The memory of a worker of `workers` that pretrain by `config`, on data with so many labelled `classes`, on "cpu" or "cuda"."""
    config = replace(config, train=replace(config.train, compile=False))
    images = config.images_per_rank(workers)
    most = _piece(config, workers)
    # Alone, this worker's share is the batch. Two pieces of it do: the others are one after the other in the same memory.
    some = max(min(images, 2 * most), 2)
    pieced = config.pieces(workers) > 1
    alone = replace(config, train=replace(config.train, micro_batch=None, shard_groups=1)).of_batch(some)
    alone = replace(alone, train=replace(alone.train, micro_batch=most)) if pieced else alone
    shaped = shapes(alone, classes)
    with FakeTensorMode(allow_non_fake_inputs=True), _Live() as live:
        method = _fake(shaped)
        kept = [*method.network.parameters(), *method.network.buffers(), *method.state.parameters(), *method.state.buffers()]
        live.are(kept, "weights")
        method = replace(method, inputs=_inputs(method, alone, live, device))
        optimizer = build_optimizer(method.groups, alone.optim)
        batch: Any = SimpleNamespace(ids=range(alone.train.batch_size))
        for step in range(2):  # the first makes the momentum
            live.restart()
            last = take_step(method, method.network, optimizer, alone, batch, step)
            live.are([x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)], "momentum")
        step_peak = live.peak
        live.restart()
        if classes:
            _evaluate(method, alone)
        peak = max(step_peak, live.peak, key=lambda found: sum(found.values()))
        del last
    gradients = sum(p.numel() * p.element_size() for group in method.groups for p in group.params)
    ranks = (gradients if workers > 1 else 0) + _rows_of_all(config, images, some)
    loader = _BATCHES_AHEAD * images * sum(crop.count * 3 * crop.size_px**2 for crop in shaped.crops)
    used = sum(peak.values()) + ranks
    on_cpu = device == "cpu"
    return Footprint(
        weights=peak["weights"],
        momentum=peak["momentum"],
        views=peak["views"],
        step=peak["step"],
        ranks=ranks,
        loader=loader if on_cpu else 0,
        base=CPU_BASE_BYTES if on_cpu else GPU_BASE_BYTES,
        kept=round(used * ((CPU_KEPT if on_cpu else GPU_KEPT) - 1)),
    )


def fitting(config: Config, workers: int, room: int, classes: int = 0, device: str = "cpu") -> int | None:
    """The largest `train.micro_batch`, a power of two smaller than the piece that the config has, with which a worker needs at most `room`
    bytes. None where not even two images at a time fit (BatchNorm wants two), or the config cannot have pieces (a queue of SimCLR's)."""

    def needed(piece: int) -> int:
        return footprint(replace(config, train=replace(config.train, micro_batch=piece)), workers, classes, device).total

    largest = 1 << (_piece(config, workers) - 1).bit_length() >> 1
    if config.whole_batch or largest < 2:
        return None
    # Activations grow with the piece's images in a line, which two small pieces give; what it says is then tried.
    low, high = min(8, largest), min(16, largest)
    if high == low:
        return low if needed(low) <= room else None
    few, more = needed(low), needed(high)
    said = int(low + (room - few) * (high - low) / (more - few)) if more > few else largest
    piece = min(1 << max(said, 2).bit_length() - 1, largest)
    while piece >= 2:
        if needed(piece) <= room:
            return piece
        piece //= 2
    return None


def _piece(config: Config, workers: int) -> int:
    """The most images that a worker embeds at a time."""
    return -(-config.images_per_rank(workers) // config.pieces(workers))


class _Live(TorchDispatchMode):
    """Bytes of all storages that operations made and something still refers to, by kind, and those of the moment when most were there."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known: dict[int, tuple[weakref.ref[Any], str, int]] = {}
        self.now = dict.fromkeys(("weights", "momentum", "views", "step"), 0)
        self.peak = dict(self.now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.are(tree_leaves(found), "step", new=True)
        return found

    def restart(self) -> None:
        """Look for the most from here on."""
        self.peak = dict(self.now)

    def are(self, tensors: Sequence[Any], kind: str, new: bool = False) -> None:
        """The `tensors` among these are of this `kind`; those that are `new` count from now on."""
        for tensor in tensors:
            if not isinstance(tensor, Tensor) or tensor.device.type == "meta":
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self.known:
                if not new:
                    there, was, size = self.known[key]
                    self.known[key] = there, kind, size
                    self.now[was] -= size
                    self.now[kind] += size
                continue
            size = storage.nbytes()
            self.known[key] = weakref.ref(storage, partial(self._gone, key)), kind, size
            self.now[kind] += size
            if sum(self.now.values()) > sum(self.peak.values()):
                self.peak = dict(self.now)

    def _gone(self, key: int, _: Any) -> None:
        _, kind, size = self.known.pop(key)
        self.now[kind] -= size


def _fake(method: Method) -> Method:
    """The `method`, built on the meta device, on fake tensors of the CPU. Modules keep their identity, since its hooks refer to them."""
    new: dict[Tensor, nn.Parameter] = {}
    for module in [*method.network.modules(), *method.state.modules()]:
        for name, p in list(module.named_parameters(recurse=False)):
            if p not in new:
                new[p] = nn.Parameter(torch.empty_like(p, device=_CPU), requires_grad=p.requires_grad)
            setattr(module, name, new[p])
        for name, b in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty_like(b, device=_CPU))
    groups = [replace(group, params=tuple(new[p] for p in group.params)) for group in method.groups]
    return replace(method, groups=tuple(groups))


def _inputs(method: Method, config: Config, live: _Live, device: str) -> Any:
    precision = config.train.precision
    dtype = weights_dtype(precision) if isinstance(config, MAE) else views_dtype(precision, torch.device(device))
    labelled = getattr(method.network, "classifier", None) is not None

    def inputs(batch: Any, some: slice) -> Rows:
        n, rows = len(range(*some.indices(len(batch.ids)))), {}
        for name, crop in zip(("views", "local"), method.crops, strict=False):
            shape = (crop.count * n, 3, crop.size_px, crop.size_px)
            views = torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
            live.are([views], "views")
            rows[name] = views.unflatten(0, (crop.count, -1))
        if isinstance(config, MAE):
            rows["order"] = torch.zeros((1, n, config.patches), dtype=torch.int64)
        if isinstance(config, CLIP):
            rows["tokens"] = torch.zeros((1, n, config.context), dtype=torch.int64)
        return {**rows, "labels": torch.zeros((1, n), dtype=torch.int64)} if labelled else rows

    return inputs


def _evaluate(method: Method, config: Config) -> None:
    """The images of an online evaluation that are embedded at a time."""
    px, encoder = config.views.size_px, method.published["encoder"]
    with torch.no_grad(), autocast(config.train.precision, _CPU):
        encoder.eval()(torch.empty((_EVALUATED, 3, px, px)).to(memory_format=torch.channels_last))


def _rows_of_all(config: Config, images: int, counted: int) -> int:
    """Bytes that the loss takes for the rows of all images, but for those of the `counted` ones of this rank's `images`: NT-Xent's
    projections with gradient and logits, or blocks of them; MoCo v3's keys and logits, and CLIP's, of images and of texts; MoCo's logits
    against the queue, and the views that a shuffle gathers. BYOL compares no others."""
    if isinstance(config, SimCLR):
        every = 2 * config.train.batch_size + config.loss.memory
        logits = min(2 * images * every, STREAMED_FROM) - min(4 * counted * counted, STREAMED_FROM)
        return 3 * 4 * ((every - 2 * counted) * config.head.d_out + max(logits, 0))
    if isinstance(config, MoCo):
        logits = 2 * (2 if config.symmetric else 1) * (images - counted) * (config.queue + 1)
        shuffled = 2 * 3 * config.views.size_px**2 * (config.train.batch_size - counted) if config.shuffle else 0
        return 4 * (max(logits, 0) + shuffled)
    if isinstance(config, MoCoV3):
        every = config.train.batch_size
        return 4 * (2 * (every - counted) * config.d_out + 3 * 2 * (images * every - counted * counted))
    if isinstance(config, CLIP):
        every = config.train.batch_size
        return 4 * (2 * 2 * (every - counted) * config.d_out + 3 * 2 * (images * every - counted * counted))
    return 0
