"""`simclr bench cifar`: a whole short pretraining by the loop alone, and its encoder's scores on all images."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from pipelines.allocator import keep_freed_memory
from pipelines.bench.result import Row
from pipelines.evaluation.whole import scores_of
from simclr.config import Config, SimCLR
from simclr.data.manifest import read_manifest
from simclr.errors import UserError
from simclr.methods.method import Start
from simclr.train import train

_EVERY = 97  # steps between two reports: an epoch of CIFAR-10 at N = 512
_BASE_LR = 0.12  # 0.24 at N = 512, four times the recipe's, for a short run
_K = 200  # of the kNN


def cifar(name: str, config: Config, data: Path, epochs: int, threads: int, device: torch.device) -> list[Row]:
    """Print and return images/s, loss and seconds of `epochs` epochs of `config`, and accuracies of kNN and of a linear probe on all images
    of the shards in `data`. It needs no Ray: it times the loop's generator. n = 1.

    Raises UserError, before anything is trained, for shards without classes or without a test split.
    """
    if epochs < 1:
        raise UserError(f"--epochs is {epochs}; expected at least 1")
    manifest = read_manifest(data)
    if not manifest.classes or "test" not in manifest.splits:
        splits = " and ".join(manifest.splits)
        raise UserError(f"{data} has {len(manifest.classes)} classes and {splits}; expected labelled images, also to test: use others")
    torch.set_num_threads(threads)
    keep_freed_memory()
    settings = replace(config.train, epochs=float(epochs), steps=None, report_every_steps=_EVERY, checkpoint_every_steps=None)
    config = replace(config, train=settings, watch=replace(config.watch, every_epochs=0, bank=512, queries=256))
    if config.optim.name == "sgd" and isinstance(config, SimCLR):
        config = replace(config, optim=replace(config.optim, base_lr=_BASE_LR))
    total, began, speeds = config.total_steps(manifest.examples("train")), time.perf_counter(), []
    for report in train(config, Start(data, device, threads=threads)):
        speeds.append(report.metrics["speed/images_per_s"])
        print(f"step {report.step:,} of {total:,}: loss {report.metrics['train/loss']:.4f}, {speeds[-1]:,.0f} images/s", flush=True)
        last = report
    trained_s = time.perf_counter() - began
    prefix = "model.encoder."
    encoder = {key.removeprefix(prefix): tensor for key, tensor in last.state.tensors.items() if key.startswith(prefix)}
    scores = scores_of(encoder, config, data, device, _K)
    bank, queries = int(scores["train_images"]), int(scores["test_images"])
    voted, probe = scores["knn_top1"], scores["probe_top1"]
    row: Row = {"name": name, "epochs": epochs, "train_images": bank, "test_images": queries, "train_s": trained_s}
    row |= {"all_s": time.perf_counter() - began, "images_per_s": statistics.median(speeds[1:] or speeds)}
    row |= {"data_wait_pct": last.metrics["speed/data_wait_pct"], "base_lr": config.optim.base_lr}
    row |= {"loss": last.metrics["train/loss"], "knn_top1": voted, "probe_top1": probe}
    print(
        f"{name}, N = {config.train.batch_size}, {config.train.precision}, {'compiled' if config.train.compile else 'not compiled'}, "
        f"{device.type}, {threads} threads: {epochs} epochs of {bank:,} images in {trained_s:.1f} s, "
        f"median {row['images_per_s']:,.0f} images/s, {row['data_wait_pct']:.1f} % of the end waiting for data, loss {row['loss']:.4f}"
    )
    print(f"kNN {100 * voted:.1f} %, linear probe {100 * probe:.1f} % of {queries:,} test images; {row['all_s']:.1f} s in all")
    return [row]
