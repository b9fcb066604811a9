"""Checks of a sweep before anything starts: every config, the data, the metric, the scheduler and the search."""

from __future__ import annotations

import stat

from pipelines.terminal import say
from pipelines.train import ray_train
from pipelines.train.resources import Resources
from simclr import extras, sense
from simclr.data.manifest import Manifest
from simclr.errors import UserError
from tune import resolve
from tune.resolve import Coded
from tune.sweep_dir import Sweep

MID_RUN = ("optim.base_lr", "optim.weight_decay", "loss.temperature", "temperature", "ema", "views.colour_strength")
"""Fields that may change during a run."""
_DURING = {"eval/knn_top1", "health/rankme", "health/align_uniform"}


def check(asked: Sweep, manifest: Manifest, under_way: bool = False) -> list[Coded]:
    """The codes of each trial ([] if the search draws them later), after checking that every config fits data and workers. A sweep
    `under_way` goes on as it began.

    Raises UserError for a space, metric, scheduler or search that cannot work.
    """
    space, base = asked.restricted, asked.base
    if asked.metric.startswith("eval/") and not manifest.classes:
        raise UserError(f"--metric {asked.metric} needs labels, and {asked.data} has none; use health/rankme or health/align_uniform")
    watched = bool(manifest.classes) and "test" in manifest.splits
    if asked.scheduler != "none" and (asked.metric not in _DURING or (asked.metric != "health/align_uniform" and not watched)):
        other = "eval/knn_top1" if watched else "health/align_uniform"
        raise UserError(f"--scheduler {asked.scheduler} decides while trials run, and {asked.metric} is known at their end; use {other}")
    varied = [axis for axis in space.axes if set(axis.paths) <= set(MID_RUN)]
    if asked.scheduler == "pbt" and asked.at:
        raise UserError(f"--scheduler pbt copies checkpoints between trials on a disk, and {asked.at} is in S3; use asha, or a shared disk")
    if asked.scheduler == "pbt" and not varied:
        raise UserError(f"--scheduler pbt changes a run that goes on: {', '.join(MID_RUN)}; {space.name} varies none of them")
    if asked.scheduler == "pbt" and (others := sorted({path for axis in space.axes for path in axis.paths} - set(MID_RUN))):
        raise UserError(f"--scheduler pbt copies weights between trials, which differ in {others[0]} for good in {space.name}; use asha")
    if asked.search == "optuna":
        if not extras.has("optuna"):
            raise UserError(f"--search optuna needs Optuna, which is not installed here: {extras.command('optuna')}")
        if asked.seeds > 1 or asked.scheduler == "pbt":
            raise UserError("--search optuna chooses each trial by those before it: it goes with one seed and without pbt")
    every = resolve.tried(space, asked.search, asked.trials, base.seed)
    notes: list[str] = []
    for combination in every:
        config = resolve.point(space, base, combination, asked.seeds - 1).config
        examples, workers = manifest.examples("train", config.train.shard_groups), Resources(**asked.resources).counts(config)
        config.steps_per_epoch(examples)
        notes += sense.notes(config, manifest, examples, workers, under_way)
    for note in dict.fromkeys(notes):  # often all trials share one
        say(note if (trials := notes.count(note)) == len(every) else f"{trials} of {len(every)} trials: {note}")
    if asked.search == "optuna":
        return []
    coded = [{axis.key: resolve.code(axis, combination[axis.key]) for axis in space.axes} for combination in every]
    many = len(str(len(coded) - 1))
    return [
        Coded(axes=axes, seed=seed, name=f"{i:0{max(many, 3)}d}-s{seed}") for seed in range(asked.seeds) for i, axes in enumerate(coded)
    ]


def require_closed(asked: Sweep) -> None:
    """Raise UserError for pbt on a cluster in a directory where every user may exchange what others have: Ray Tune's own folder lies there
    meanwhile (`ray_tune._storage`). The members of a group who share one trust each other with the trials' weights, too."""
    mode = asked.path.stat().st_mode
    shared = asked.scheduler == "pbt" and ray_train.address_of(asked.resources["address"]) != "local"
    if shared and mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        raise UserError(
            f"every user may write in {asked.path}, where pbt on a cluster keeps Ray Tune's state; `chmod o-w {asked.path}`, "
            "or use another --out"
        )
