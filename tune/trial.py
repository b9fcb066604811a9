"""One trial of a sweep: the job of `simclr pretrain`, started by a driver that reserves no core while its workers train.

The driver runs in a process that Ray Tune keeps for many trials. It records the trial in its run directory and reports to Tune the
metrics that a scheduler decides by. A failure ends the trial, never the sweep.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shlex
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from pipelines.runs import sync
from pipelines.runs.directory import Run, load_run, open_run
from pipelines.terminal import say
from pipelines.train import ray_private, ray_train, retry
from pipelines.train.messages import Task, TrialBeganAgain, TrialFailed
from pipelines.train.resources import Resources
from simclr import fields, files, sense
from simclr.config import Config
from simclr.data.manifest import read_manifest
from simclr.data.s3.store import Store
from simclr.data.s3.uri import Address, address
from simclr.errors import Diverged, UserError
from tune import inherit, mirror, resolve, sweep_dir
from tune.plan import OTHER_SEED
from tune.sweep_dir import METRICS, Sweep, Trial, trial_in

# How often Train's controller polls its workers, instead of 2 s: each report waits for it, and so does the next trial.
os.environ.setdefault(ray_private.HEALTH_INTERVAL, "0.5")
# A trial that a scheduler stops ends its workers within this time; then its driver's process serves the next one.
os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", "20")


def drive(asked: resolve.Coded, sweep: Sweep, inbox: Any, private: bool, heard: dict[str, float]) -> None:
    """Train and score the trial that Ray Tune `asked` for. Runs in an actor of Tune's. `heard` has the time of each trial's last report
    that the scheduler heard before this command.

    A final failure is recorded in trial.json and not raised: a trial without a score is no candidate.
    """
    from ray import tune

    name = str(tune.get_context().get_trial_name())
    try:
        _drive(name, asked, sweep, inbox, private, heard.get(name, 0))
    except Exception as error:  # before the training started, or while recording it
        directory, trial = sweep.path / "trials" / name, Trial(name=name, values={}, seed=asked.seed)
        _failed(directory, trial, why(error, sweep.data)[0], retry.bug(error), inbox)


def _drive(name: str, asked: resolve.Coded, sweep: Sweep, inbox: Any, private: bool, heard: float) -> None:
    from ray import tune

    began = time.time()
    space = sweep.restricted
    codes = {axis.key: resolve.chosen(axis, asked.axes[axis.key]) for axis in space.axes}
    point = resolve.point(space, sweep.base, codes, asked.seed)
    directory = sweep.path / "trials" / name
    before = trial_in(directory)
    if before is not None and before.status in ("finished", "failed"):  # its driver was lost after the trial's end
        if before.score(sweep.metric) is not None:
            tune.report({**_tune_metrics(before.scores), "step": before.step, "images": before.step * point.config.train.batch_size})
        return
    donor = _donor(tune.get_checkpoint(), name)
    taken = donor or inherit.settle(directory)  # also if it was killed before it recorded whose weights it took
    trial = Trial(name=name, values=point.values, seed=point.seed, donor=taken)
    if before is not None and not taken:  # a scheduler hears a score with every report until there is a newer one
        trial = dataclasses.replace(trial, donor=before.donor, scores=before.scores)
    if before is not None and before.reason:  # it had started again with another seed
        trial, point = _again(trial, point, before.reason)
    while True:
        try:
            run = _open(sweep, directory, point.config, donor)
            trial.save(directory)
            inherit.settle(directory)
            newest = _newest(sweep, run)
            if before is not None and not taken:
                trial = _caught_up(sweep, run, trial, newest, heard)
            trial = _train(sweep, run, trial, inbox, private, began)
            dataclasses.replace(trial, status="finished").save(directory)
            return
        except Exception as error:  # bugs too: the sweep goes on, and prints and stores the traceback
            (reason, again), bug = why(error, sweep.data), retry.bug(error)
            if trial.reason or not again:
                first = f" (seed {point.seed}; before, on seed {point.seed - OTHER_SEED}: {trial.reason})" if trial.reason else ""
                _failed(directory, trial_in(directory) or trial, reason + first, bug, inbox)
                return
            _set_aside(sweep, directory)
            inbox.actor.put.remote(TrialBeganAgain(trial=name, reason=reason, bug=bug))
            before, donor = None, ""
            trial, point = _again(dataclasses.replace(trial, scores={}, donor=""), point, reason)


def _failed(directory: Path, trial: Trial, reason: str, bug: str, inbox: Any) -> None:
    """Record that the trial has failed, and tell the sweep's driver."""
    directory.mkdir(parents=True, exist_ok=True)  # it may have failed before the directory existed
    dataclasses.replace(trial, status="failed", reason=reason, bug=bug).save(directory)
    inbox.actor.put.remote(TrialFailed(trial=trial.name, reason=reason, bug=bug))


def _set_aside(sweep: Sweep, directory: Path) -> None:
    """Keep the reports of a first try, since MLflow may lack some. The directory is renamed, because the ledger still writes in it."""
    to = sweep_dir.first_try(sweep.path, directory.name)
    if at := _address(sweep, directory.name):  # the next try must not go on from its checkpoints
        sync.retry_unreachable(lambda: mirror.remove(at, Store()), say)
    if directory.is_dir():
        to.parent.mkdir(exist_ok=True)
        shutil.rmtree(to, ignore_errors=True)
        directory.rename(to)
        shutil.rmtree(to / "checkpoints", ignore_errors=True)


def _tune_metrics(scores: dict[str, float]) -> dict[str, Any]:
    """The part of a trial's scores that Ray Tune gets."""
    return {name: scores[name] for name in METRICS if name in scores}


def _again(trial: Trial, point: resolve.Point, reason: str) -> tuple[Trial, resolve.Point]:
    """The same trial on another seed."""
    seed = point.seed + OTHER_SEED
    config = dataclasses.replace(point.config, seed=seed)
    return dataclasses.replace(trial, seed=seed, reason=reason), dataclasses.replace(point, seed=seed, config=config)


def why(failure: BaseException, data: str) -> tuple[str, bool]:
    """(reason in a sentence, whether another seed may help). `data` is the address of the shards.

    A loss that is not finite follows from seed and config: the same seed would repeat it, another may not. Wrong input and too little
    memory on the device fail with every seed. After lost processes and nodes, Ray Train has retried from the last checkpoint as often
    as --max-failures says; the last try then starts from the beginning.
    """
    error = retry.causes(failure)[0]
    text = " ".join(str(error).split())[:400] or type(error).__name__
    if type(error).__name__ == "OutOfMemoryError" and type(error).__module__.startswith("torch"):
        return f"out of memory on the device: {text}", False
    if isinstance(error, Diverged):
        return text.partition(";")[0], True  # the rest is advice for a single run
    if lost := retry.given_up(failure):
        if shrunk := retry.resized(data):
            return shrunk, False
        if not isinstance(error, UserError):
            return lost.partition("; run the same command again")[0], True  # the same
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}", not isinstance(error, UserError | OSError)


def _donor(note: Any, name: str) -> str:
    """The trial whose weights pbt gives to trial `name`; "" if these are its own. `note` is Ray Tune's checkpoint, see `_forward`."""
    if note is None:
        return ""
    with note.as_directory() as folder:
        text = files.read_json(Path(folder) / "from.json", "give the command again")
    fields.require(text, {"trial": str}, "a note of pbt", "give the command again")
    if not sweep_dir.plain(text["trial"]):
        raise UserError(f"a note of pbt names the trial {text['trial']!r}, which is no name; give the command again")
    return "" if text["trial"] == name else str(text["trial"])


def _open(sweep: Sweep, directory: Path, config: Config, donor: str) -> Run:
    """The trial's run directory; under PBT with the weights of the trial `donor` and with its own new config."""
    at = address(sweep.data)
    data, manifest = sync.retry_unreachable(lambda: sync.manifest(sweep.data, look=False, by=str(directory)), say)
    if (directory / "run.json").is_file() and donor:
        inherit.take(load_run(directory), config, sweep.path / "trials" / donor)
    run = open_run(directory, sweep.recipe, config, data, str(at or ""))
    paths = [key for key in config.flat() if key != "method"]  # a method is its recipe's, and no flag
    flags = [word for key in paths if _differs(sweep, config, key) for word in _flag(key, resolve.value_of(config, key))]
    workers = Resources(**sweep.resources).counts(config)
    notes = sense.notes(config, manifest, manifest.examples("train", config.train.shard_groups), workers, run.under_way)
    run = dataclasses.replace(run, command=shlex.join(["simclr", "pretrain", sweep.recipe, "--data", sweep.data, *flags]), notes=notes)
    run.save()
    return run


def _address(sweep: Sweep, name: str) -> Address | None:
    """The address of trial `name`'s run, for a sweep in S3."""
    return address(f"{sweep.at}/trials/{name}") if sweep.at else None


def _newest(sweep: Sweep, run: Run) -> int:
    """The step of the checkpoint that the run goes on from, 0 without one. Its reports that a killed sweep missed are added to the run's.
    Those of another trial, which a checkpoint may have too, are left out."""
    from simclr import checkpoint

    home = sync.Home(str(_address(sweep, run.path.name) or run.path))
    home.belongs_to(run.created)
    sync.retry_unreachable(home.sync_checkpoints, say)
    folder = home.path / "checkpoints"
    newest = checkpoint.latest(folder, say) if folder.exists() else None
    if newest is None:
        return 0
    run.fill([report for report in checkpoint.reports(newest) if report.pop("mark", "") == run.path.name])
    return checkpoint.order(newest.name)[1]  # `latest` has read all of it: the name is true


def _caught_up(sweep: Sweep, run: Run, trial: Trial, newest: int, heard: float) -> Trial:
    """The record with the score of the checkpoint, of step `newest`, that the trial goes on from. asha and median are told the reports up
    to it that they have not `heard`: a driver that was killed has not heard the last of them, and they do not come again."""
    from ray import tune

    for _, step, score in sweep_dir.told(run, sweep.metric):
        if step <= newest:
            trial = dataclasses.replace(trial, scores=trial.scores | {sweep.metric: score})
            report = {sweep.metric: score, "step": step, "images": step * run.config.train.batch_size}
            if sweep.scheduler in ("asha", "median") and report[sweep.clock] > heard:
                tune.report(report)
    return trial


def _flag(key: str, value: Any) -> list[str]:
    """The words with which `simclr pretrain` gets `value` for field `key`."""
    group, dot, name = key.replace("_", "-").rpartition(".")
    if isinstance(value, bool):
        return [f"--{group}{dot}{'' if value else 'no-'}{name}"]
    if isinstance(value, tuple):
        return [f"--{group}{dot}{name}", *map(str, value)]
    return [f"--{group}{dot}{name}={value}"]


def _differs(sweep: Sweep, config: Config, key: str) -> bool:
    from simclr.recipes import recipe

    return bool(resolve.value_of(config, key) != resolve.value_of(recipe(sweep.recipe), key))


def _train(sweep: Sweep, run: Run, trial: Trial, inbox: Any, private: bool, began: float) -> Trial:
    """Run the trial's workers to their end and return its record. Raises Ray Train's errors."""
    resources = Resources(**sweep.resources)
    shares = sweep.restricted.label_shares
    data = sweep.data if address(sweep.data) else str(run.data.absolute())
    task = Task(
        stage=run.stage,
        config=run.config,
        data=data,
        run=str(_address(sweep, trial.name) or run.path.absolute()),
        created=run.created,
        trial=trial.name,
        inbox=inbox,
    )
    forward = _forward(sweep, run, trial, began)
    try:
        ray_train.fit(partial(train_and_score, run=run, shares=shares), task, resources, run.path / "ray", [forward], private)
    finally:
        shutil.rmtree(run.path / "ray", ignore_errors=True)
    found: Trial = forward.trial
    return found


def _forward(sweep: Sweep, run: Run, trial: Trial, began: float) -> Any:
    """Ray Train's callback for the reports: into trial.json, and on to Ray Tune.

    `ray.tune.integration.ray_train.TuneReportCallback` needs a queue for the second, an actor and so one more process for each trial,
    because Train's controller runs elsewhere. Ours runs in Tune's process, and can also tell a checkpoint's place.
    """
    from ray import tune
    from ray.train import UserCallback

    class Forward(UserCallback):
        def __init__(self) -> None:
            self.trial = trial

        def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
            new = dict(metrics[0])
            if "at/workers" in new and (rows := [row for row in run.history() if row["time"] > new["at/workers"]]):  # of the last group
                new["at/first_step"] = rows[0]["time"]
            starts = {key: new.pop(key) - began for key in list(new) if key.startswith("at/")}
            if "health/alignment" in new:
                new["health/align_uniform"] = new["health/alignment"] + new["health/uniformity"]
            scores = self.trial.scores | {k: float(v) for k, v in new.items() if "/" in k and math.isfinite(v)}
            self.trial = dataclasses.replace(
                self.trial,
                step=int(new["step"]),
                total_steps=int(new["total_steps"]),
                scores=scores,
                start_s=self.trial.start_s | {key.removeprefix("at/"): round(value, 2) for key, value in starts.items()},
            )
            self.trial.save(run.path)
            if sweep.metric not in scores:
                return
            told = _tune_metrics(scores) | {"step": self.trial.step, "images": self.trial.step * run.config.train.batch_size}
            if sweep.scheduler != "pbt":
                tune.report(told)
                return
            with tempfile.TemporaryDirectory() as folder:  # only a note of its owner: the checkpoint itself stays in the run
                (Path(folder) / "from.json").write_text(json.dumps({"trial": trial.name}))
                tune.report(told, checkpoint=tune.Checkpoint.from_directory(folder))

    return Forward()


def train_and_score(task: Task, run: Run, shares: tuple[float, ...]) -> None:
    """The function of each worker of a trial, of the run that `task` names: `train_worker`, then rank 0 scores the encoder, also with
    `shares` of the labels, and all ranks report once more."""
    times = {"at/workers": time.time()}
    import ray.train
    import ray.train.torch

    from pipelines.commands.pretrain import publish_newest
    from pipelines.evaluation.quick import score
    from pipelines.train.worker import train_worker

    train_worker(task)
    home, context = sync.Home(task.run), ray.train.get_context()
    run = dataclasses.replace(run, path=home.path)
    groups = run.config.train.shard_groups
    for group in run.config.groups_of(context.get_world_rank(), context.get_world_size()):
        data = sync.shards(task.data, groups, group, task.run)
        manifest = read_manifest(data, groups=groups, group=group)
    total = run.config.total_steps(manifest.examples("train", groups))
    scores: dict[str, float] = {}
    if context.get_world_rank() == 0:
        publish_newest(run, manifest.classes)
        found = score(run, data, ray.train.torch.get_device(), shares)
        scores = {f"health/{k}" if k == "rankme" else f"eval/{k}": v for k, v in found.items()}
        sync.retry_unreachable(home.send, say)
        if home.at is not None:
            shutil.rmtree(run.checkpoints)  # they are in S3, and a node sees many trials
    ray.train.report({**scores, **times, "step": total, "total_steps": total})
