"""A method is a value that the loop (`simclr.train`) trains. Each is made by one file beside this one, from its own config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from simclr import keyed
from simclr.config import Config, Views
from simclr.data.loader import Batch
from simclr.data.manifest import Manifest
from simclr.gradient_cache import Rows
from simclr.networks.initial import unfilled
from simclr.networks.vit import SIZES, path_factors
from simclr.optim import Group, lr_peak, warmup_cosine
from simclr.precision import views_dtype, weights_dtype
from simclr.sections import Local
from simclr.telemetry.collapse import Least
from simclr.to_device import to_device
from simclr.views.draw import Crop
from simclr.views.two_views import views_of

__all__ = ["Method", "Rows", "Start"]

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class Start:
    """The start of a run: its data, its device, and the checkpoint that it resumes from."""

    data: Path
    """Directory of prepared shards."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """The meta device gives shapes without memory."""
    checkpoint: Path | None = None
    threads: int = 1
    """Threads of this rank: the loader's, and on a GPU the one that launches kernels."""
    ids: NDArray[np.int64] | None = None
    """The only training images, ascending; None = all."""
    labelled: NDArray[np.int64] | None = None
    """Images whose labels a distillation may use, ascending; None = none."""
    held: NDArray[np.int64] | None = None
    """Training images that a classifier is scored on, where there is no test split; None = those of that split."""
    teacher: Path | None = None
    """Directory of the published classifier that a distillation learns from."""

    @property
    def begins(self) -> bool:
        """Whether initial values are wanted: not for shapes alone, and not where a checkpoint gives them."""
        return self.checkpoint is None and self.device.type != "meta"

    @property
    def loader_threads(self) -> int:
        """Threads of the loader. On a GPU one fewer: if every core decodes, kernel launches wait for a core."""
        return self.threads if self.device.type == "cpu" else max(self.threads - 1, 1)


def views_for(
    batch: Batch, some: slice, crops: tuple[Crop, ...], config: Config, device: torch.device, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """The views of some images of a batch: for each of `crops` (count·n, 3, size, size), channels last, as a network reads them or in
    `dtype`."""
    dtype, found, first = dtype or views_dtype(config.train.precision, device), [], 0
    for index, crop in enumerate(crops):
        images = batch.images[0 if batch.images[0].ndim == 4 else index][some]  # whole images serve all crops
        ahead = batch.drawn[index] if batch.drawn else None
        drawn = ahead and ahead.some(some)
        views = views_of(images, batch.ids[some], batch.epoch, crop, config.seed, device, first, drawn, dtype)
        if batch.mates is not None and images.ndim == 4:  # whole images; view 1 is of another one
            mates, n = batch.images[1][some], len(images)
            others = views_of(mates, batch.ids[some], batch.epoch, crop, config.seed, device, first, drawn, dtype)
            views = torch.cat([views[:n], others[n:]])
        found.append(views.to(dtype, memory_format=torch.channels_last))
        first += crop.count
    return found


def paths_for(batch: Batch, some: slice, crops: tuple[Crop, ...], config: Config, device: torch.device) -> Rows:
    """{"paths": (views, n, 2 · blocks)}, the factors of each view's blocks by encoder.drop_path, for `encoders.encoded`; {} without it.
    They are functions of (seed, epoch, sample id, view), like the views: the same on any number of ranks, and in a resumed run."""
    encoder = config.encoder
    if not encoder.drop_path or encoder.vit is None:
        return {}
    draws, views = 2 * SIZES[encoder.vit][1], sum(crop.count for crop in crops)
    uniform = [keyed.uniform(config.seed, "path", batch.epoch, batch.ids[some].numpy(), view, draws) for view in range(views)]
    factors = torch.from_numpy(path_factors(np.stack(uniform), encoder.drop_path))
    return {"paths": to_device(factors, device)}


def pairs_for(batch: Batch, some: slice, config: Config, device: torch.device, labelled: bool) -> Rows:
    """Input rows of a method of two views: "views" (2, n, 3, H, W), "paths" with drop path, "labels" (1, n) where they are `labelled`."""
    crops = (Crop(views=config.views),)
    (views,) = views_for(batch, some, crops, config, device)
    found = {"views": views.unflatten(0, (2, -1)), **paths_for(batch, some, crops, config, device)}
    return {**found, "labels": to_device(batch.labels[some], device)[None]} if labelled else found


def crops_of(views: Views, local: Local) -> tuple[Crop, ...]:
    """Two large crops, and the small ones."""
    large = Crop(views=views)
    return (large, Crop(count=local.crops, views=local.of(views))) if local.crops else (large,)


def crops_for(batch: Batch, some: slice, crops: tuple[Crop, ...], config: Config, device: torch.device, labelled: bool) -> Rows:
    """Input rows of a method of several sizes: "views" (2, n, 3, H, W) of the first of `crops`, "local" (crops, n, 3, h, w) of the second,
    "paths" of all with drop path, "labels" (1, n) where they are `labelled`."""
    found = views_for(batch, some, crops, config, device)
    rows = {name: x.unflatten(0, (crop.count, -1)) for name, x, crop in zip(("views", "local"), found, crops, strict=False)}
    rows |= paths_for(batch, some, crops, config, device)
    return {**rows, "labels": to_device(batch.labels[some], device)[None]} if labelled else rows


def by_size(rows: Rows) -> list[Rows]:
    """What an encoder reads of input rows (`encoders.encoded`), the crops of each size by themselves: one pass for each size."""
    found, first = [], 0
    for name in ("views", "local"):
        if name in rows:
            last = first + len(rows[name])
            found.append({"views": rows[name], **({"paths": rows["paths"][first:last]} if "paths" in rows else {})})
            first = last
    return found


def by_view(rows: Rows) -> list[Rows]:
    """What an encoder reads of input rows (`encoders.encoded`), each view by itself, for methods whose BatchNorms see a view at a time."""
    return [{name: x[view : view + 1] for name, x in rows.items() if name != "labels"} for view in range(len(rows["views"]))]


def no_rows(rows: Rows) -> Rows:
    """No targets."""
    return {}


def labels_of(rows: Rows) -> Rows:
    """The labels among the inputs."""
    return {"labels": rows["labels"]}


def nothing_at(step: int) -> None:
    """Nothing, at any step."""


def nothing_after(inputs: Rows, targets: Rows, step: int) -> None:
    """Nothing, after any step."""


def nothing_seen(outputs: Rows, targets: Rows) -> dict[str, Tensor]:
    """No further metrics."""
    return {}


def no_evaluation() -> dict[str, float]:
    """No score: the data has no labels or no test split."""
    return {}


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """One step is: before, inputs → network → outputs, targets, loss, backward, gradients, optimizer, after.

    A hook holds the config, data and modules that it needs. Every rank runs a step as the same function, and all randomness in it is
    keyed.
    """

    crops: tuple[Crop, ...]
    """The crops that the loader cuts from each image, in one decode."""
    inputs: Callable[[Batch, slice], Rows]
    """Rows of some images of this rank, on the device. Keyed: the same images give the same rows to the bit, at every call."""
    network: nn.Module
    """With gradient: input rows → output rows. DDP and compile wrap it. The guards look at its first output, image by image."""
    loss: Callable[[Rows, Rows, int], tuple[Tensor, Rows]]
    """(outputs, targets, step) → this rank's share of the global mean, exact over ranks; and values that are summed until the next
    report: a mean (), or hits and their possible number (2,), whose ratio is reported. "train/loss" is always among them."""
    groups: tuple[Group, ...]
    """Parameters, their optimizer settings and schedules. The first group's "lr" is what reports say."""
    published: dict[str, nn.Module]
    """What `simclr publish` writes, parts of the network or of the state: {"encoder": …}."""
    state: nn.Module = field(default_factory=nn.Module)
    """Without gradient, in the checkpoint: moving averages, queues, centres."""
    before: Callable[[int], None] = nothing_at
    """Once a step, before the first forward pass."""
    targets: Callable[[Rows], Rows] = no_rows
    """Input rows → target rows, without gradient and under autocast, once per piece. Statistics that it moves, of a BatchNorm of the state
    in training mode, move once in a step, by the mean over pieces."""
    gradients: Callable[[int], None] = nothing_at
    """After the all-reduce, before the optimizer."""
    after: Callable[[Rows, Rows, int], None] = nothing_after
    """(inputs, targets, step), after the optimizer, without gradient and under autocast: enqueue, recentre, average. With a batch in
    pieces, inputs are {}."""
    report: Callable[[Rows, Rows], dict[str, Tensor]] = nothing_seen
    """Metrics of a step's outputs and targets, computed only when a report is due: shares of means, as of the loss."""
    evaluate: Callable[[], dict[str, float]] = no_evaluation
    """Online evaluation. It leaves the network as it was."""
    chance: float = 0.0
    """Chance-level loss; 0 = not known."""
    least: Least = field(default_factory=Least)
    """Below it a run's projections have collapsed."""


def placed(module: M, start: Start, precision: str) -> M:
    """`module` on the device of `start`, in the weights' dtype of `precision` (`train.precision`), channels last."""
    return module.to(start.device, weights_dtype(precision)).to(memory_format=torch.channels_last)


def begun(make: Callable[[], M], start: Start) -> M:
    """The module that `make` builds, with its initial weights or, in a run that resumes from a checkpoint, with uninitialised ones."""
    if start.device.type == "meta":
        with start.device:
            return make()
    return make() if start.checkpoint is None else unfilled(make)


def examples_of(config: Config, start: Start, manifest: Manifest) -> int:
    """Images of an epoch: the training split of all shard groups, or those that `start.ids` leaves."""
    return manifest.examples("train", config.train.shard_groups) if start.ids is None else len(start.ids)


def schedule(config: Config, examples: int) -> Callable[[int], float]:
    """Learning rate at a step of a run over `examples` images: linear warm-up to the scaled peak, then half a cosine to the last one."""
    optim, images = config.optim, config.train.batch_size
    peak, last = (lr_peak(rate, images, optim.scaling) for rate in (optim.base_lr, optim.last_lr))
    warmup, total = config.warmup_steps(examples), config.total_steps(examples)
    return partial(warmup_cosine, peak=peak, warmup_steps=warmup, total_steps=total, last=last)
