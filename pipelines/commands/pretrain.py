"""`simclr pretrain`: shards → a pretrained encoder, on Ray Train workers; the same command again goes on where it stopped."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from pipelines.runs import sync
from pipelines.runs.directory import Run
from pipelines.train import driver, ray_train
from simclr.config import Config
from simclr.data.manifest import read_manifest

if TYPE_CHECKING:
    from simclr.methods.method import Method


@dataclass(frozen=True)
class Args:
    """Pretrain an encoder by a recipe; every field of the recipe is a flag."""

    data: Path
    """Directory or s3://bucket/prefix of prepared shards (`simclr prepare`); each node fetches those of S3 once."""
    config: Annotated[Config, tyro.conf.arg(name="")]
    recipe: Annotated[str, tyro.conf.Suppress] = ""
    run: Path | None = None
    """Run directory or s3://bucket/prefix, for checkpoints too; a run there goes on, on any machine.
    Default: runs/RECIPE-DIGEST, the same for the same config and data."""
    resources: Annotated[ray_train.Resources, tyro.conf.arg(name="")] = field(default_factory=ray_train.Resources)
    tracking_uri: str | None = None
    """MLflow address. Default: $MLFLOW_TRACKING_URI, else a database under runs/, without a server."""


def main(args: Args) -> None:
    run = pretrain(args)
    print(sync.shown(args.run or run.path))


def pretrain(args: Args) -> Run:
    """Check everything, train, and leave a run directory with its encoder. Returns the run.

    Raises UserError, before any worker starts, for errors that the user can mend.
    """
    began = time.monotonic()
    config = args.config
    groups = config.train.shard_groups
    data = sync.shards(args.data, groups, 0 if groups == 1 else -1)  # with groups it fetches none: all may not fit here
    manifest = read_manifest(data, look=groups == 1)
    examples, classes = manifest.examples("train", groups), manifest.classes
    notes = driver.checked(config, manifest, examples, args.resources)
    run, home, uri = driver.home_of(args.run, args.recipe, config, data, args.data, args.tracking_uri)

    job = driver.Job(
        run=replace(run, notes=notes),
        home=home,
        asked=args.run or run.path,
        total=config.total_steps(examples),
        uri=uri,
        resources=args.resources,
        publish=lambda run, method: publish_newest(run, classes, method),
    )
    return driver.train(job, began)


def publish_newest(run: Run, classes: Sequence[str], method: Method | None = None) -> None:
    """Write the newest checkpoint's encoder, head and linear classifier to run/encoder."""
    from simclr.encoder.directory import write_encoder

    step, parts = driver.newest_tensors(run, method)
    published = {"recipe": run.recipe, "step": step, "data": run.data.name}
    write_encoder(
        parts["encoder"],
        run.config,
        run.encoder,
        published,
        head=parts["head"],
        classifier=parts.get("classifier"),
        classes=list(classes),
    )
