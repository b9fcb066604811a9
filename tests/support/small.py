"""Small runs for tests of the loop."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from simclr import checkpoint
from simclr.collectives import rank, world_size
from simclr.config import Config, Encoder, Head, Loss, Optim, SimCLR, Train, Views, Watch
from simclr.shares import share
from simclr.stages import FineTune
from simclr.train import Report, Start, train

TINY = SimCLR(
    encoder=Encoder(depth=8, cifar_stem=True),
    head=Head(d_out=16),
    views=Views(size_px=32, colour_strength=0.5, blur_p=0.5),
    loss=Loss(temperature=0.2),
    optim=Optim(base_lr=0.3, warmup_epochs=0.1),
    train=Train(batch_size=24, steps=20, precision="float64", report_every_steps=1, checkpoint_every_steps=20),
    watch=Watch(every_epochs=0, k=5),
)


TUNED = FineTune(
    encoder=TINY.encoder,
    head=dataclasses.replace(TINY.head, layers=3),
    views=TINY.views,
    optim=Optim(base_lr=0.1, scaling="sqrt", warmup_epochs=0, weight_decay=0.0),
    # A tenth of 240 patterns, balanced: 20 images (two of each class), 2 steps an epoch.
    train=Train(batch_size=10, steps=4, precision="float64", report_every_steps=1, checkpoint_every_steps=4),
    watch=Watch(every_epochs=0),
)


def mine(x: Tensor, views: int = 1) -> Tensor:
    """This rank's rows of x, which is a stack of `views` blocks."""
    return torch.cat([block[share(len(block), rank(), world_size())] for block in x.chunk(views)])


def resumed(config: Config, patterns: Path, folder: Path, until: int) -> dict[str, Tensor]:
    """The last checkpoint of a run in float32, after asserting that one which stopped behind step `until` and went on has it bit by bit."""
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, precision="float32", checkpoint_every_steps=1))
    last = max(run(config, patterns, folder / "whole"))
    run(config, patterns, folder / "parts", until=until)
    assert sorted(run(config, patterns, folder / "parts")) == list(range(until + 1, last + 1))
    a, b = (checkpoint.read(folder / part / f"step-{last:09d}").tensors for part in ("whole", "parts"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    return a


def run(config: Config, patterns: Path, folder: Path, until: int | None = None, resume: bool = True) -> dict[int, Report]:
    """Reports by step; checkpoints go to `folder`, as the worker writes them."""
    found = checkpoint.latest(folder, print) if resume and folder.exists() else None
    reports = {}
    for report in train(config, Start(patterns, checkpoint=found)):
        if report.due:
            checkpoint.write(folder, report.state, config.train.keep_checkpoints)
        reports[report.step] = report
        if report.step == until:
            break
    return reports
