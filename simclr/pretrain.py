"""The pretraining loop: a generator that yields a Report every few steps, and is read from top to bottom.

It knows no Ray, no MLflow and no argv. Who iterates decides what a report means: the Ray worker sends it to the driver, a
test collects losses, a sweep stops early by no longer iterating. In a process group it trains data-parallel; W ranks
compute what one would, up to the order of float summation.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from simclr import checkpoint, diagnostics, evaluate
from simclr.collectives import mean_over_ranks, rank, world_size
from simclr.config import Config
from simclr.data import loader
from simclr.data.manifest import read_manifest
from simclr.loss import nt_xent
from simclr.model import SimCLR, build_model
from simclr.optim import build_optimizer, lr_peak, warmup_cosine
from simclr.views import two_views

_DTYPES = {"float32": torch.float32, "bfloat16": torch.float32, "float64": torch.float64}


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run begins: its data, its device, and the checkpoint it goes on from."""

    data: Path
    """Directory of prepared shards."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    checkpoint: Path | None = None
    threads: int = 1
    """Loader threads of this rank."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a run says after `step` steps. The numbers are the same on every rank."""

    step: int
    total_steps: int
    metrics: dict[str, float]
    state: checkpoint.State | None
    """Not None when a checkpoint is due. Its tensors are live: write it before asking for the next report."""


def pretrain(config: Config, start: Start) -> Iterator[Report]:
    """Train, yielding a Report every `train.report_every_steps` steps and at the end.

    Raises ValueError for a batch that fits neither the data nor the ranks, or a checkpoint of another config, before the
    first step, and FloatingPointError naming rank and step where the loss is not finite.
    """
    # ── The plan ───────────────────────────────────────────────────────────────────────────────────────────────────
    manifest = read_manifest(start.data)
    examples = manifest.examples("train")
    per_epoch, total = config.steps_per_epoch(examples), config.total_steps(examples)
    warmup, watch_every = config.warmup_steps(examples), config.watch_steps(examples)
    peak = lr_peak(config.optim.base_lr, config.train.batch_size, config.optim.scaling)
    per_rank = config.images_per_rank(world_size())
    watched = bool(manifest.classes) and "test" in manifest.splits
    device, dtype = start.device, _DTYPES[config.train.precision]
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bfloat16")

    # ── Model and optimizer, fresh or from a checkpoint ────────────────────────────────────────────────────────────
    model = build_model(config).to(device, dtype).to(memory_format=torch.channels_last)
    optimizer = build_optimizer(model, config.optim)
    step = first = 0
    if start.checkpoint is not None:
        state = checkpoint.read(start.checkpoint)
        checkpoint.restore(state, model, optimizer)
        step = first = state.step
    model.train()
    network: torch.nn.Module = model
    if world_size() > 1:
        # Statistics are global already, so DDP has no buffers to send. Its average of gradients is the second half of
        # the exact gradient; the first is the sum in `collectives.all_gather`.
        network = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    if config.train.compile:
        network.compile()

    # ── Steps ──────────────────────────────────────────────────────────────────────────────────────────────────────
    batches = loader.batches(config, start.data, step, rank(), world_size(), start.threads)
    summed = torch.zeros((), device=device, dtype=torch.float64)
    since = _Clock(step)
    try:
        while step < total:
            waited = time.perf_counter()
            batch = next(batches)
            since.waiting_s += time.perf_counter() - waited

            views = two_views(batch.images, batch.ids, batch.epoch, config.views, config.seed, device)
            with autocast:
                h, z = network(views.to(dtype, memory_format=torch.channels_last))
            loss = nt_xent(z, config.loss.temperature)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            lr = warmup_cosine(step, peak, warmup, total)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()

            summed += loss.detach()
            step += 1
            last = step == total
            watch = watched and (last or (watch_every > 0 and step % watch_every == 0))
            save = last or step % config.train.checkpoint_every_steps == 0
            alive = step == first + 1  # the first step reports too: whoever waits sees that it works
            if not (last or watch or save or alive or step % config.train.report_every_steps == 0):
                continue

            # ── A report: the only place where the host waits for the device ───────────────────────────────────────
            metrics = _measure(summed / (step - since.step), h, z, config, step)
            metrics |= {"epoch": step / per_epoch, "train/lr": lr}
            metrics |= since.speed(step, per_rank * world_size())
            if device.type == "cuda":
                metrics["memory/peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
            if watch:
                metrics |= watch_knn(model, config, start)
            yield Report(step, total, metrics, checkpoint.capture(step, config.to_dict(), model, optimizer) if save else None)
            summed.zero_()
            since = _Clock(step)
    finally:
        batches.close()  # stops the loader's thread also when the caller stops iterating


def watch_knn(model: SimCLR, config: Config, start: Start) -> dict[str, float]:
    """kNN accuracy of the encoder as it stands, and the effective rank of its features: {"eval/knn_top1", …}."""
    watch = config.watch
    dtype = next(model.parameters()).dtype
    began = time.perf_counter()
    bank, queries = (
        evaluate.embed_split(model.encoder, start.data, split, config.views, limit, start.device, dtype, threads=start.threads)
        for split, limit in (("train", watch.bank), ("test", watch.queries))
    )
    measured = {"health/rankme": float(diagnostics.rankme(queries.h[:2048])), "eval/seconds": time.perf_counter() - began}
    bank, queries = bank.labelled(), queries.labelled()
    if len(bank.y) and len(queries.y):
        measured["eval/knn_top1"] = evaluate.knn(bank.h, bank.y, queries.h, queries.y, watch.k, watch.temperature)["top1"]
    return measured


def _measure(loss: Tensor, h: Tensor, z: Tensor, config: Config, step: int) -> dict[str, float]:
    """Metrics of the last step (the loss: mean since the last report), averaged over ranks in one collective."""
    z = z.detach()
    values = {
        "train/loss": loss,
        "train/contrastive_top1": diagnostics.contrastive_top1(z),
        "train/contrastive_entropy": diagnostics.contrastive_entropy(z, config.loss.temperature),
        "health/alignment": diagnostics.alignment(z),
        "health/uniformity": diagnostics.uniformity(z[:4096]),
    }
    # Whose loss is not finite travels with the means: every rank raises the same, none is left waiting for another.
    lost = torch.arange(world_size(), device=loss.device).eq(rank()) & ~loss.isfinite()
    means = mean_over_ranks(torch.cat([torch.stack([v.double() for v in values.values()]), lost.double()])).tolist()
    ranks = [str(r) for r, share in enumerate(means[len(values) :]) if share > 0]
    if ranks:
        raise FloatingPointError(
            f"the loss is not finite at step {step} on rank {', '.join(ranks)}; the last checkpoint is still good: "
            "train with a lower --optim.base-lr or more --optim.warmup-epochs"
        )
    return dict(zip(values, means, strict=False))


class _Clock:
    """Time since the last report, and how much of it went into waiting for data."""

    def __init__(self, step: int) -> None:
        self.step, self.began, self.waiting_s = step, time.perf_counter(), 0.0

    def speed(self, step: int, images_per_step: int) -> dict[str, float]:
        elapsed = time.perf_counter() - self.began
        return {
            "speed/images_per_s": (step - self.step) * images_per_step / elapsed,
            "speed/data_wait_pct": 100 * self.waiting_s / elapsed,
            "speed/step_s": elapsed / (step - self.step),
        }
