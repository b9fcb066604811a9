"""A sweep's trials under Ray Tune: concurrency, search, scheduler, and the work at each trial's end. Its imports take seconds."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any, ClassVar, Literal

import pipelines.train.ray_train  # noqa: F401  sets variables that Ray reads once, on import
from simclr.errors import UserError

# Read when Ray Tune is imported. They switch off its result files and bars; trial.json and our bar replace these.
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")  # a trial that failed has no score
os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")

from ray import tune
from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule, PopulationBasedTraining

from pipelines.terminal import Bar
from pipelines.train import capacity, messages, ray_train
from simclr.data.manifest import Manifest
from tune import resolve, sweep_dir
from tune.resolve import Coded
from tune.spaces import Axis, Between, PeakBetween
from tune.sweep_dir import METRICS, Sweep
from tune.trial import drive
from tune.trial_log import Ledger
from tune.validate import MID_RUN

_UNBOUNDED = 4  # trials at a time on a cluster that grows to an unknown size, without --max-concurrent


def room(asked: Sweep) -> int:
    """How many trials fit on the cluster at a time, at most --max-concurrent.

    A trial's driver holds no core, so every core can serve a worker. A worker runs on one node, which exists or which the autoscaler
    would add. Raises UserError if no trial fits, or fewer than asked for: the others would wait for cores that these hold.
    """
    resources = ray_train.Resources(**asked.resources)
    gpus = ray_train.require(resources)
    slots = capacity.slots(ray_train.joins_a_cluster(resources.address), resources.cpus_per_worker, gpus)
    if math.isinf(slots):
        return asked.max_concurrent or _UNBOUNDED
    fits = int(slots) // resources.workers
    if asked.max_concurrent > fits:
        each = f"{resources.workers} workers with {resources.cpus_per_worker} CPUs{' and a GPU' if gpus else ''} each"
        raise UserError(f"--max-concurrent {asked.max_concurrent} trials of {each} never run together: there is room for {fits}; use that")
    return asked.max_concurrent or fits


def trials(asked: Sweep, codes: list[Coded], concurrent: int, manifest: Manifest, uri: str) -> Sweep:
    """Run the unfinished trials under Ray Tune."""
    reports = messages.make()
    ledger = Ledger(asked, reports, uri)
    private = not ray_train.joins_a_cluster(asked.resources["address"])

    def trial(config: dict[str, Any]) -> None:
        drive(Coded(**config["trial"]), asked, reports, private)

    # A driver only waits, so it reserves a little memory and no core. A driver with the last core, whose worker needs it, would be
    # a deadlock.
    light = tune.with_resources(trial, tune.PlacementGroupFactory([{"memory": float(1 << 20)}]))
    count = len(codes) or asked.trials or 16
    status = "FAILED"
    with Bar("sweep", count, "trials", "trials/s") as bar:
        Follow.followed = (asked, ledger, bar)
        if tune.Tuner.can_restore(str(asked.path / "tune")):
            tuner = tune.Tuner.restore(str(asked.path / "tune"), light, resume_unfinished=True, restart_errored=True)
        else:
            tuner = tune.Tuner(
                light,
                param_space=_parameters(asked, codes),
                tune_config=_tuning(asked, len(codes), concurrent, manifest),
                run_config=tune.RunConfig(
                    name="tune",
                    storage_path=str(asked.path),
                    verbose=0,
                    callbacks=[Follow()],
                    failure_config=tune.FailureConfig(max_failures=2),  # retries for a driver that was lost with its node
                ),
            )
        try:
            tuner.fit()
            over = sweep_dir.progress(asked)[0]
            status = "FINISHED" if over >= count else "KILLED"
        finally:
            sweep_dir.write_results(asked)
            kept = [asked.path / name for name in ("results.csv", "best_config.json", "sweep.json")]
            best = sweep_dir.ranked(sweep_dir.trials(asked.path), asked.metric)
            asked = ledger.close(status, kept, {asked.metric: best[0].scores[asked.metric]} if best else {})
    if status == "KILLED":
        raise KeyboardInterrupt
    return asked


class Follow(tune.Callback):
    """The work of the sweep's driver at each trial's end. It has no state of its own, because Ray Tune pickles its callbacks and restores
    the copies when a sweep is resumed; the state is in `followed`."""

    followed: ClassVar[tuple[Sweep, Ledger, Bar] | None] = None

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._over(str(trial), "stopped", "")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._over(str(trial), "failed", "its driver was lost too often")

    def _over(self, name: str, status: Literal["stopped", "failed"], reason: str) -> None:
        assert Follow.followed is not None
        asked, ledger, bar = Follow.followed
        directory = asked.path / "trials" / name
        record = sweep_dir.trial_in(directory)
        if record is not None and record.status == "running":  # else its driver has recorded its end
            record = dataclasses.replace(record, status=status, reason=reason or record.reason)
            record.save(directory)
        ledger.ended(name, "FAILED" if record is not None and record.status == "failed" else "FINISHED")
        sweep_dir.prune(asked.path, asked.metric, asked.keep)
        bar.update(*sweep_dir.progress(asked))


def _parameters(asked: Sweep, codes: list[Coded]) -> dict[str, Any]:
    """Ray Tune's search space: the fields of a `Coded`, as a dict, because Tune and its schedulers change values in dicts."""
    if codes:
        return {"trial": tune.grid_search([dataclasses.asdict(code) for code in codes])}
    return {"trial": {"axes": {axis.key: _domain(axis) for axis in asked.restricted.axes}, "seed": 0}}


def _domain(axis: Axis) -> Any:
    match axis.values:
        case tuple():
            return tune.choice(range(len(axis.values)))
        case Between(low, high, log):
            return tune.loguniform(low, high) if log else tune.uniform(low, high)
        case PeakBetween(low, high):
            return tune.loguniform(low, high)


def _tuning(asked: Sweep, coded: int, concurrent: int, manifest: Manifest) -> Any:
    """Tune's config: search, scheduler and names."""
    base, space = asked.base, asked.restricted
    examples = manifest.examples("train", base.train.shard_groups)
    by_images = any("train.batch_size" in axis.paths for axis in space.axes)  # then steps are unequal work
    total = base.total_steps(examples) * (base.train.batch_size if by_images else 1)
    if not by_images:
        every = resolve.combinations(space) if asked.search == "grid" else resolve.samples(space, asked.trials or 16, base.seed)
        total = max(resolve.point(space, base, c, 0).config.total_steps(examples) for c in every)
    clock: dict[str, Any] = {"time_attr": "images" if by_images else "step"}
    scheduler: Any = None
    if asked.scheduler == "asha":  # its limit is beyond the last step: at that step it would end a trial before its score
        scheduler = ASHAScheduler(**clock, max_t=100 * total, grace_period=max(total // 4, 1), reduction_factor=3)
    elif asked.scheduler == "median":
        scheduler = MedianStoppingRule(**clock, grace_period=max(total // 4, 1), min_samples_required=3)
    elif asked.scheduler == "pbt":
        changing = {axis.key: _mutation(axis) for axis in space.axes if set(axis.paths) <= set(MID_RUN)}
        scheduler = PopulationBasedTraining(
            **clock, perturbation_interval=max(total // 4, 1), hyperparam_mutations={"trial": {"axes": changing}}
        )
    algorithm: Any = None
    if asked.search == "optuna":
        from ray.tune.search.optuna import OptunaSearch

        algorithm = OptunaSearch(seed=base.seed)
    return tune.TuneConfig(
        metric=asked.metric,
        mode=METRICS[asked.metric],
        search_alg=algorithm,
        scheduler=scheduler,
        num_samples=1 if coded else asked.trials or 16,
        max_concurrent_trials=concurrent,
        reuse_actors=True,
        trial_name_creator=_name,
        trial_dirname_creator=_name,
    )


def _mutation(axis: Axis) -> Any:
    return list(range(len(axis.values))) if isinstance(axis.values, tuple) else _domain(axis)


def _name(trial: Any) -> str:
    """The trial's name, and its directory's."""
    return str(trial.config["trial"].get("name") or trial.trial_id)
