"""The pretraining loop: a generator that yields a Report every few steps, and is read from top to bottom.

It knows no Ray, no MLflow and no argv. Who iterates decides what a report means: the Ray worker sends it to the driver, a
test collects losses, a sweep stops early by no longer iterating. In a process group it trains data-parallel; W ranks
compute what one would, up to the order of float summation.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from simclr import checkpoint
from simclr.collectives import data_parallel, rank, world_size
from simclr.config import Config, Loss
from simclr.data import loader
from simclr.data.manifest import read_manifest
from simclr.evaluation import features, knn, representation
from simclr.gradient_cache import cached_gradient
from simclr.loss import margin_triplet, nt_logistic, nt_xent, nt_xent_dot
from simclr.methods.simclr import SimCLR, build_model
from simclr.optim import build_optimizer, lr_peak, warmup_cosine
from simclr.precision import autocast, set_backends, weights_dtype
from simclr.telemetry.guards import Health, contrastive, over_labelled
from simclr.telemetry.timing import Clock
from simclr.to_device import to_device
from simclr.views.two_views import two_views


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run begins: its data, its device, and the checkpoint it goes on from."""

    data: Path
    """Directory of prepared shards."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    checkpoint: Path | None = None
    threads: int = 1
    """Threads of this rank: the loader's, and on a GPU the one that launches kernels."""

    @property
    def loader_threads(self) -> int:
        """On a GPU one fewer: where every core decodes, the kernels' launches wait for one."""
        return self.threads if self.device.type == "cpu" else max(self.threads - 1, 1)


@dataclass(frozen=True, slots=True)
class Report:
    """What a run says after `step` steps. The numbers are the same on every rank."""

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


def pretrain(config: Config, start: Start) -> Iterator[Report]:
    """Train, yielding a Report every `train.report_every_steps` steps and at the end.

    Raises UserError for a batch that fits neither the data nor the ranks, or a checkpoint of another config, before the
    first step, and Diverged where the loss is not finite, naming step, ranks and images, or runs away.
    """
    # ── The plan ───────────────────────────────────────────────────────────────────────────────────────────────────
    groups = config.train.shard_groups
    manifest = read_manifest(start.data, groups=groups, group=config.group_of(rank(), world_size()))
    examples = manifest.examples("train", groups)
    per_epoch, total = config.steps_per_epoch(examples), config.total_steps(examples)
    warmup, watch_every = config.warmup_steps(examples), config.watch_steps(examples)
    peak = lr_peak(config.optim.base_lr, config.train.batch_size, config.optim.scaling)
    per_rank = config.images_per_rank(world_size())
    watched, classes = bool(manifest.classes) and "test" in manifest.splits, len(manifest.classes)
    device, precision = start.device, config.train.precision
    dtype, contrast = weights_dtype(precision), partial(_contrast, loss=config.loss)
    set_backends(precision, device)

    # ── Model and optimizer, fresh or from a checkpoint ────────────────────────────────────────────────────────────
    model = build_model(config, classes, drawn=start.checkpoint is None).to(device, dtype).to(memory_format=torch.channels_last)
    optimizer = build_optimizer(model, config.optim)
    step = first = 0
    if start.checkpoint is not None:
        state = checkpoint.read(start.checkpoint)
        checkpoint.restore(state, model, optimizer)
        step = first = state.step
    model.train()
    network = data_parallel(model, config.train.bucket_mib, config.train.compress_gradients, config.train.compile)

    # ── Steps ──────────────────────────────────────────────────────────────────────────────────────────────────────
    batches = loader.on_device(loader.batches(config, start.data, step, rank(), world_size(), start.loader_threads), device)
    summed = torch.zeros(4, device=device, dtype=torch.float64)  # since the last report: loss, classifier's loss, hits, labelled
    guessing = math.log(2 * config.train.batch_size - 1 + config.loss.memory) if config.loss.name.startswith("nt_xent") else 0.0
    health = Health(model, device, per_rank, start.data, guessing, "train with a lower --optim.base-lr or more --optim.warmup-epochs")
    since = Clock(step, device, config.train.compile)
    try:
        while step < total:
            batch = since.next(batches)

            def see(rows: slice, batch: loader.Batch = batch) -> Tensor:
                views = two_views(batch.images[rows], batch.ids[rows], batch.epoch, config.views, config.seed, device)
                return views.to(dtype, memory_format=torch.channels_last)

            def embed(views: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                since.enters()
                with autocast(precision, device):
                    out: tuple[Tensor, Tensor, Tensor] = network(views)
                return out

            def classify(logits: Tensor, rows: slice, labels: Tensor = batch.labels) -> tuple[Tensor, Tensor]:
                return _classify(logits, to_device(labels[rows], device))

            optimizer.zero_grad(set_to_none=True)
            if config.train.micro_batch in (None, per_rank):
                views = see(slice(0, per_rank))
                _, z, logits = embed(views)
                loss = contrast(z, memory=model.memory.negatives(step, 2 * config.train.batch_size) if model.memory else None)
                classified, hits = classify(logits, slice(0, per_rank))
                (loss + classified).backward()
            else:
                pieces = (per_rank, config.train.micro_batch)
                z, loss, classified, hits = cached_gradient(network, lambda rows: embed(see(rows)), *pieces, contrast, classify)
            since.leaves()
            lr = warmup_cosine(step, peak, warmup, total)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            if model.memory is not None:
                with autocast(precision, device):
                    model.memory.remember(views, model.encoder, model.head, step)

            summed += torch.cat([torch.stack([loss.detach(), classified.detach()]), hits])
            step += 1
            health.see(step, batch.ids, z, loss)
            since.step_over()
            last = step == total
            watch = watched and (last or (watch_every > 0 and step % watch_every == 0))
            due = config.checkpoint_due(step, total)
            alive = step == first + 1  # the first step reports too: whoever waits sees that it works
            if not (due or watch or alive or step % config.train.report_every_steps == 0):
                continue

            # ── A report: the only place where the host waits for the device ───────────────────────────────────────
            pace, steps = since.pace(), step - since.step
            metrics, ranks = health.report(step, contrastive(summed / steps, z, config, model.classifier is not None), pace)
            metrics = over_labelled(metrics, "train/linear_top1") | {"epoch": step / per_epoch, "train/lr": lr}
            metrics |= since.speed(step, per_rank * world_size())
            if watch:
                metrics |= watch_knn(model, config, start)
            state = checkpoint.capture(step, config.to_dict(), model, optimizer)
            yield Report(step, total, metrics, state, due, ranks, tuple(health.stragglers.named()))
            summed.zero_()
            since.restart(step)
    finally:
        batches.close()  # stops the loader's thread also when the caller stops iterating


def watch_knn(model: SimCLR, config: Config, start: Start) -> dict[str, float]:
    """kNN accuracy of the encoder as it stands, and the effective rank of its features: {"eval/knn_top1", …}."""
    watch = config.watch
    dtype = next(model.parameters()).dtype
    began = time.perf_counter()
    with autocast(config.train.precision, start.device):  # the encoder as it trains; the neighbours' cosines below are float32
        bank, queries = (
            features.embed_split(
                *(model.encoder, start.data, split, config.views, limit, start.device, dtype),
                threads=start.loader_threads,
                groups=config.train.shard_groups,
            )
            for split, limit in (("train", watch.bank), ("test", watch.queries))
        )
    measured = {"health/rankme": float(representation.rankme(queries.h[:2048])), "eval/seconds": time.perf_counter() - began}
    bank, queries = bank.labelled(), queries.labelled()
    if len(bank.y) and len(queries.y):
        measured["eval/knn_top1"] = knn.knn(bank.h, bank.y, queries.h, queries.y, watch.k, watch.temperature)["top1"]
    return measured


def _contrast(z: Tensor, loss: Loss, memory: Tensor | None = None) -> Tensor:
    """The configured loss of this rank's projections z (2n, d), with the negatives of a memory (m, d)."""
    if loss.name == "nt_logistic":
        return nt_logistic(z, loss.temperature, loss.semi_hard)
    if loss.name == "margin_triplet":
        return margin_triplet(z, loss.margin, loss.semi_hard)
    if loss.name == "nt_xent_dot":
        return nt_xent_dot(z, loss.temperature)
    return nt_xent(z, loss.temperature, memory)


def _classify(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy of the linear evaluation, logits (2n, classes), labels (n,), and (2,) its hits and the labelled views.

    All are 0 without classes. An image without a label (−1) adds nothing, and the divisor stays 2n: so the mean over ranks
    is the global batch's, however labels are spread.
    """
    logits = logits.float() if logits.dtype == torch.bfloat16 else logits
    if not logits.shape[1]:
        return logits.new_zeros(()), logits.new_zeros(2)
    labels = labels.repeat(2)
    loss = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
    hits = torch.stack([(logits.detach().argmax(1) == labels).sum(), (labels >= 0).sum()])
    return loss / len(labels), hits.to(loss.dtype)
