"""Training a classifier: fine-tuning a pretrained network on labels (arXiv:2002.05709, App. B.5; arXiv:2006.10029, Sec. 2), and the
loop that distillation shares. Like `pretrain` a generator that knows no Ray and no argv, with the step as its only clock.

As the papers: crops and flips are the only augmentation, one crop an image; BatchNorm takes the batch's statistics while it
trains, over all ranks; the classifier begins at zero (the official command's zero_init_logits_layer), so that the first
gradient does not disturb the encoder. Test images are scored with running statistics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from simclr import checkpoint
from simclr.collectives import data_parallel, rank, world_size
from simclr.config import Config
from simclr.data import loader
from simclr.data.manifest import read_manifest
from simclr.encoder.directory import read_encoder, read_head
from simclr.evaluation import features
from simclr.evaluation.metrics import accuracy
from simclr.networks.heads import Classifier, build_head
from simclr.networks.initial import unfilled
from simclr.networks.resnet import build_encoder
from simclr.optim import build_optimizer, lr_peak, warmup_cosine
from simclr.precision import autocast, set_backends, weights_dtype
from simclr.stages import FineTune
from simclr.telemetry.guards import Health, over_labelled
from simclr.telemetry.timing import Clock
from simclr.to_device import to_device
from simclr.train import Report, Start
from simclr.views.two_views import crop_and_flip

Objective = Callable[[Tensor, Tensor, loader.Batch], Tensor]
"""(views (n, 3, H, W), class scores (n, classes), their batch) → the loss, a mean over these rows."""


def finetune(config: FineTune, start: Start, ids: NDArray[np.int64]) -> Iterator[Report]:
    """Train encoder, head up to the tap and classifier on the labels of the training images `ids`, ascending.

    Without a checkpoint in `start` it begins from scratch; the checkpoint of step 0 that `first_state` makes of a published
    encoder begins with that. Reports and errors as `pretrain`'s; metrics are train/loss, train/top1, and of the test split
    eval/top1 and eval/top5.
    """
    classes = len(read_manifest(start.data).classes)

    def objective(views: Tensor, scores: Tensor, batch: loader.Batch) -> Tensor:
        return F.cross_entropy(scores, to_device(batch.labels, scores.device))

    model = build_classifier(config, classes, config.tap, config.linear, drawn=start.checkpoint is None)
    yield from train_classifier(config, start, model, objective, ids, config.linear)


def build_classifier(config: Config, classes: int, tap: int, linear: bool = False, drawn: bool = True) -> Classifier:
    """Encoder and the head's first `tap` layers as pretraining with `config.seed` would begin, and a classifier that begins at zero;
    on the CPU, the same on every rank and machine. With `linear` only the classifier asks for gradients. Where it is not to be
    `drawn`, its memory holds nothing yet, for who restores a checkpoint."""
    if not drawn:
        return unfilled(lambda: build_classifier(config, classes, tap, linear))
    encoder = build_encoder(config.encoder, config.seed)
    model = Classifier(encoder, build_head(config, encoder.d_h) if tap else None, tap, classes, config.seed)
    nn.init.zeros_(model.classifier.weight)
    if linear:
        model.encoder.requires_grad_(False)
        model.head.requires_grad_(False)
    return model


def first_state(config: FineTune, published: Path, classes: int) -> checkpoint.State:
    """The state after no step, of the encoder and head in the directory `published`: where fine-tuning begins.

    Raises UserError where its head has fewer layers than the tap asks for.
    """
    model = Classifier(read_encoder(published).encoder, read_head(published), config.tap, classes)
    nn.init.zeros_(model.classifier.weight)
    return checkpoint.State(0, config.to_dict(), {f"model.{name}": t for name, t in model.state_dict().items()})


def train_classifier(
    config: Config, start: Start, model: Classifier, objective: Objective, ids: NDArray[np.int64] | None = None, linear: bool = False
) -> Iterator[Report]:
    """Train `model` on the training images `ids` (all where None) for `objective`, yielding reports as `pretrain` does."""
    # ── The plan ───────────────────────────────────────────────────────────────────────────────────────────────────
    manifest = read_manifest(start.data)
    examples = manifest.examples("train") if ids is None else len(ids)
    per_epoch, total = config.steps_per_epoch(examples), config.total_steps(examples)
    warmup, watch_every = config.warmup_steps(examples), config.watch_steps(examples)
    peak = lr_peak(config.optim.base_lr, config.train.batch_size, config.optim.scaling)
    per_rank = config.images_per_rank(world_size())
    device, precision = start.device, config.train.precision
    dtype = weights_dtype(precision)
    set_backends(precision, device)

    # ── Model and optimizer, fresh or from a checkpoint ────────────────────────────────────────────────────────────
    model = model.to(device, dtype).to(memory_format=torch.channels_last)
    optimizer = build_optimizer(model, config.optim)
    step = first = 0
    if start.checkpoint is not None:
        state = checkpoint.read(start.checkpoint)
        checkpoint.restore(state, model, optimizer)
        step = first = state.step
    _train_mode(model, linear)
    network = data_parallel(model, config.train.bucket_mib, config.train.compress_gradients, config.train.compile)

    # ── Steps ──────────────────────────────────────────────────────────────────────────────────────────────────────
    stream = loader.batches(config, start.data, step, rank(), world_size(), start.loader_threads, ids, crops=1)
    batches = loader.on_device(stream, device)
    summed = torch.zeros(3, device=device, dtype=torch.float64)  # since the last report: loss, hits, labelled
    guessing = math.log(max(len(manifest.classes), 2))
    health = Health(model, device, per_rank, start.data, guessing, "train with a lower --optim.base-lr")
    since = Clock(step, device, config.train.compile)
    try:
        while step < total:
            batch = since.next(batches)
            views = crop_and_flip(batch.images, batch.ids, batch.epoch, config.views, config.seed, device)
            views = views.to(dtype, memory_format=torch.channels_last)
            since.enters()
            with autocast(precision, device):
                scores = network(views)
            loss = objective(views, scores.float() if scores.dtype == torch.bfloat16 else scores, batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            since.leaves()
            lr = warmup_cosine(step, peak, warmup, total)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()

            labels = to_device(batch.labels, device)
            summed += torch.stack([loss.detach(), (scores.detach().argmax(1) == labels).sum(), (labels >= 0).sum()])
            step += 1
            health.see(step, batch.ids, scores, loss)
            since.step_over()
            last = step == total
            watch = "test" in manifest.splits and (last or (watch_every > 0 and step % watch_every == 0))
            due = config.checkpoint_due(step, total)
            alive = step == first + 1
            if not (due or watch or alive or step % config.train.report_every_steps == 0):
                continue

            # ── A report: the only place where the host waits for the device ───────────────────────────────────────
            pace, means = since.pace(), summed / (step - since.step)
            metrics, ranks = health.report(step, dict(zip(("train/loss", "train/top1", "labelled"), means, strict=True)), pace)
            metrics = over_labelled(metrics, "train/top1") | {"epoch": step / per_epoch, "train/lr": lr}
            metrics |= since.speed(step, per_rank * world_size())
            if watch:
                metrics |= test_scores(model, config, start)
                _train_mode(model, linear)
            state = checkpoint.capture(step, config.to_dict(), model, optimizer)
            yield Report(step, total, metrics, state, due, ranks, tuple(health.stragglers.named()))
            summed.zero_()
            since.restart(step)
    finally:
        batches.close()


def _train_mode(model: Classifier, linear: bool) -> None:
    """Training mode; what is frozen keeps its running statistics too."""
    model.train()
    if linear:
        model.encoder.eval()
        model.head.eval()


def test_scores(model: Classifier, config: Config, start: Start) -> dict[str, float]:
    """{"eval/top1", "eval/top5"} of the test split's labelled images; {} where there are none."""
    with autocast(config.train.precision, start.device):
        found = features.embed_split(
            model, start.data, "test", config.views, None, start.device, next(model.parameters()).dtype, threads=start.loader_threads
        ).labelled()
    return {f"eval/{name}": value for name, value in accuracy(found.h, found.y).items()} if len(found.y) else {}
