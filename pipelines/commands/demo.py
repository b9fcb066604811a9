"""`simclr demo`: the whole job on this machine, from rendering its own dataset to a registered encoder and a report."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.commands import evaluate, prepare, pretrain, publish, report
from pipelines.evaluation import quick
from pipelines.runs.directory import Run, load_run
from pipelines.terminal import process_age_s, say, show
from pipelines.train.resources import Resources
from simclr import files
from simclr.cores import cores
from simclr.errors import UserError
from simclr.recipes import recipe

_CHECKED = 64  # images that compare the pulled encoder with the trained one
_CLOSE = 1e-4  # largest difference of features between two processes, relative to the largest feature


@dataclass(frozen=True)
class Args:
    """Render patterns, write shards, pretrain on two workers, evaluate, register, pull, report: three minutes on two cores."""

    seed: int = 0
    """Seed of the images and of the training."""
    out: Path | None = None
    """Run directory. Default: runs/demo, with -SEED for another seed than 0 and -coloured for those images."""
    workers: int = 2
    """Ray Train workers with one CPU core each."""
    epochs: float | None = None
    """Passes over the training images. Default: the recipe's."""
    train: int = 4_000
    """Training images to render."""
    test: int = 1_000
    """Test images to render."""
    coloured: bool = False
    """Render in two saturated colours: the shortcut that contrastive learning falls for."""


def main(args: Args) -> None:
    result = demo(args)
    spent = ", ".join(f"{phase} {seconds:.0f}" for phase, seconds in result.timings.items())
    show(quick.table(result.scores))
    show(f"\n{result.registered}; {result.pulled}")
    show(f"report: {result.report}")
    show(f"total: {process_age_s():.0f} s on {cores()} cores ({spent})")


@dataclass(frozen=True)
class Result:
    """The results of a demo."""

    run: Run
    scores: list[dict[str, Any]]
    registered: str
    """The registry's answer, in words."""
    pulled: str
    """The comparison with the pulled encoder, in words."""
    report: Path
    timings: dict[str, float]
    """Phase → seconds, in order."""


def demo(args: Args) -> Result:
    """Run every step as its own command would. Steps that an interrupted demo has finished are not repeated."""
    if args.test < 1:
        raise UserError(f"--test is {args.test}; expected at least 1")
    out = args.out or Path("runs") / ("demo" + (f"-{args.seed}" if args.seed else "") + ("-coloured" if args.coloured else ""))
    files.require_folder(out)
    config = replace(recipe("patterns_tiny"), seed=args.seed)
    if args.epochs is not None:
        config = replace(config, train=replace(config.train, epochs=args.epochs))
    resources = Resources(workers=args.workers)
    config.images_per_rank(args.workers)  # raises before anything is rendered
    if args.train < config.train.batch_size:
        raise UserError(f"--train is {args.train}; expected at least {config.train.batch_size} images, a batch")

    began = time.monotonic()
    kind = ",coloured" if args.coloured else ""
    data = out.with_name(f"patterns-{args.seed}-{args.train}-{args.test}{kind.replace(',', '-')}")
    say(f"rendering {args.train:,} + {args.test:,} images of ten patterns into {data}")
    prepare.prepare(prepare.Args(source=f"patterns:train={args.train},test={args.test},seed={args.seed}{kind}", out=data))
    rendered = time.monotonic() - began

    run = pretrain.pretrain(pretrain.Args(data=data, config=config, recipe="patterns_tiny", run=out, resources=resources))
    if "render and shard" not in run.timings():
        run.took("render and shard", rendered)
    if not (out / "evaluation.json").is_file():
        say("scoring raw pixels, the untrained and the trained encoder")
        evaluate.evaluate(evaluate.Args(encoder=out))
    if not load_run(out).registered:
        publish.publish(publish.Args(run=out, name="patterns"))
    run = load_run(out)
    began = time.monotonic()
    registered, pulled = _pull_and_compare(run)
    run.took("pull and compare", time.monotonic() - began)
    page = report.report(report.Args(run=out))
    return Result(run, quick.scores_of(out)[0], registered, pulled, page, run.timings())


def _pull_and_compare(run: Run) -> tuple[str, str]:
    """Pull the champion in a fresh process, embed images there and here: (what was registered, how the features compare).

    Raises RuntimeError if the features differ.
    """
    import torch

    import simclr
    from pipelines.tracking import registry
    from pipelines.tracking import uri as mlflow_uri
    from simclr.data.loader import in_order
    from simclr.views.preprocessing import Preprocessing

    uri = mlflow_uri.tracking_address(None)
    name, _, version = run.registered.partition("/")
    champion = str(registry.version_of(uri, name, "champion")) == version
    spec = f"{name}@champion" if champion else run.registered
    pulled, images, features = run.path / "pulled", run.path / "images.npy", run.path / "features.npz"
    shutil.rmtree(pulled, ignore_errors=True)
    first = next(in_order(run.data, "test", Preprocessing.of(run.config.views), _CHECKED))
    np.save(images, first.images[0].numpy())
    for command in (["pull", spec, "--to", str(pulled)], ["embed", str(pulled), str(images), "--out", str(features)]):
        done = subprocess.run([sys.executable, "-m", "pipelines.cli", *command, "--quiet"], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"simclr {' '.join(command)} failed:\n{done.stderr.strip()}")
    here = simclr.load_encoder(run.encoder).embed(np.load(images)).numpy()
    with np.load(features) as file:
        there = file["features"]
    difference = float(np.abs(here - there).max() / np.abs(here).max())
    if here.shape != there.shape or not difference <= _CLOSE:
        raise RuntimeError(f"the pulled encoder gives other features: they differ by {difference:.1e} of the largest")
    assert torch.isfinite(torch.from_numpy(there)).all()
    images.unlink()
    held = "the champion" if champion else "not the champion, an earlier version is better"
    return f"registered as {run.registered}, {held}", f"pulled as {spec} in a fresh process: features equal to {difference:.0e}"
