"""The loop: a generator that yields a Report every few steps, and is read from top to bottom. One for every method and stage.

It knows no Ray, no MLflow and no argv. The caller decides what a report means: a Ray worker sends it to the driver, a test collects
losses, a sweep stops early by no longer iterating. In a process group it trains data-parallel; W ranks compute what one would, up to the
order of float summation, also where W does not divide the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from simclr import checkpoint
from simclr.collectives import data_parallel, rank, world_size
from simclr.config import Config
from simclr.data import loader
from simclr.data.manifest import read_manifest
from simclr.gradient_cache import cached_gradient
from simclr.methods.choice import method_of
from simclr.methods.method import Method, Rows, Start, examples_of, no_evaluation
from simclr.networks.batchnorm import share_statistics, take_first_ranks
from simclr.optim import build_optimizer, clip_gradients, set_schedules
from simclr.precision import autocast, set_backends
from simclr.telemetry import progress
from simclr.telemetry.guards import Health
from simclr.telemetry.sums import Sums, shares
from simclr.telemetry.timing import Clock

__all__ = ["Report", "Start", "take_step", "train"]

ADVICE = "train with a lower --optim.base-lr or more --optim.warmup-epochs"


@dataclass(frozen=True, slots=True)
class Report:
    """The metrics and the state of a run after `step` steps. The numbers are the same on every rank."""

    step: int
    total_steps: int
    metrics: dict[str, float]
    state: checkpoint.State
    """Its tensors are live: write or copy them before asking for the next report."""
    due: bool
    """Whether the config asks for a checkpoint here: at the end, and every `train.checkpoint_every_steps`."""
    ranks: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """Some metrics of each rank, in order of ranks."""
    stragglers: tuple[int, ...] = ()
    """Ranks that have kept the others waiting for long (`simclr.telemetry.straggler`)."""


def train(config: Config, start: Start, method: Method | None = None) -> Iterator[Report]:
    """Train, yielding a Report every `train.report_every_steps` steps and at the end. The config chooses the method, unless one is given.

    Raises UserError for a batch that fits neither the data nor the ranks, or a checkpoint of another config, before the
    first step, and Diverged if the loss is not finite (it names step, ranks and images) or grows without bound.
    """
    # ── The plan ───────────────────────────────────────────────────────────────────────────────────────────────────
    for group in config.groups_of(rank(), world_size()):
        manifest = read_manifest(start.data, groups=config.train.shard_groups, group=group)
    examples = examples_of(config, start, manifest)
    per_epoch, total, watch_every = config.steps_per_epoch(examples), config.total_steps(examples), config.watch_steps(examples)
    images, device, precision = config.train.batch_size, start.device, config.train.precision
    set_backends(precision, device)

    # ── Method and optimizer, fresh or from a checkpoint ───────────────────────────────────────────────────────────
    method = method or method_of(config, start, manifest)
    share_statistics((method.network, method.state), config.train.batch_size)
    optimizer = build_optimizer(method.groups, config.optim)
    step = first = 0
    if start.checkpoint is not None:
        state = checkpoint.read(start.checkpoint)
        checkpoint.restore(state, method.network, optimizer, method.state)
        step = first = state.step
    network = data_parallel(method.network, config.train.bucket_mib, config.train.compress_gradients, config.train.compile)

    # ── Steps ──────────────────────────────────────────────────────────────────────────────────────────────────────
    stream = loader.batches(config, start.data, step, rank(), world_size(), start.loader_threads, start.ids, method.crops)
    batches = loader.on_device(stream, device)
    since, sums = Clock(step, device, config.train.compile), Sums(device)
    health = Health(method.network, device, images, start.data, method.chance, ADVICE)
    try:
        while step < total:
            batch = since.next(batches)
            outputs, targets, loss, found = take_step(method, network, optimizer, config, batch, step, since.enters, since.leaves)
            sums.add(found)
            step += 1
            health.see(step, batch.ids, next(iter(outputs.values())).flatten(0, 1), loss)
            since.step_over()
            last = step == total
            watch = method.evaluate is not no_evaluation and (last or (watch_every > 0 and step % watch_every == 0))
            due = config.checkpoint_due(step, total)
            alive = step == first + 1  # the first step reports too: it shows that training works
            if not (due or watch or alive or step % config.train.report_every_steps == 0):
                continue

            # ── A report: the only place where the host waits for the device ───────────────────────────────────────
            pace, means = since.pace(), sums.means(step - since.step)
            metrics, ranks = health.report(step, means | method.report(outputs, targets), pace)
            metrics = shares(metrics) | {"epoch": step / per_epoch, "train/lr": optimizer.param_groups[0]["lr"]}
            metrics |= since.speed(step, images)
            if watch:
                take_first_ranks(method.network)
                with progress.within("evaluation"):
                    metrics |= method.evaluate()
            state = checkpoint.capture(step, config.to_dict(), method.network, optimizer, method.state)
            yield Report(step, total, metrics, state, due, ranks, tuple(health.stragglers.named()))
            sums.clear()
            since.restart(step)
    finally:
        batches.close()  # ends the loader's thread, also when the caller stops iterating


def _nothing() -> None: ...


def take_step(
    method: Method,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: Config,
    batch: loader.Batch,
    step: int,
    enters: Callable[[], None] = _nothing,
    leaves: Callable[[], None] = _nothing,
) -> tuple[Rows, Rows, Tensor, Rows]:
    """Optimizer step `step` (0-based) on this rank's `batch`; `network` is `method.network`, wrapped for ranks. Returns its outputs,
    targets, loss and sums, on the device. `enters` is called as a forward pass begins, `leaves` when all gradients are complete."""
    device, precision, images = next(method.network.parameters()).device, config.train.precision, len(batch.ids)
    pieces = config.pieces(world_size())

    def forward(rows: Rows) -> Rows:
        enters()
        with autocast(precision, device):
            out: Rows = network(rows)
        return out

    def targets_of(rows: Rows) -> Rows:
        with torch.no_grad(), autocast(precision, device):
            return method.targets(rows)

    method.before(step)
    optimizer.zero_grad(set_to_none=True)
    if pieces == 1:
        inputs = method.inputs(batch, slice(0, images))
        outputs, targets = forward(inputs), targets_of(inputs)
        loss, sums = method.loss(outputs, targets, step)
        loss.backward()
    else:
        inputs = {}
        outputs, targets, loss, sums = cached_gradient(
            network,
            method.state,
            lambda rows: method.inputs(batch, rows),
            forward,
            targets_of,
            lambda outputs, targets: method.loss(outputs, targets, step),
            images,
            pieces,
        )
    leaves()
    method.gradients(step)
    norm = clip_gradients(optimizer, config.optim)
    if norm is not None:
        sums = {**sums, "health/grad_norm": norm}
    set_schedules(optimizer, method.groups, step)
    optimizer.step()
    with torch.no_grad(), autocast(precision, device):
        method.after(inputs, targets, step)
    return outputs, targets, loss, sums
