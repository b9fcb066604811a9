"""A sweep's trials under Ray Tune: concurrency, search, scheduler, and the work at each trial's end. Its imports take seconds.

A sweep that goes on is a new experiment of the trials that are left: see tune.plan.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import pipelines.train.ray_train  # noqa: F401  sets variables that Ray reads once, on import
from simclr.errors import UserError

# Read when Ray Tune is imported. They switch off its result files and bars; trial.json and our bar replace these.
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")  # a trial that failed has no score
os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule

from pipelines.terminal import Bar
from pipelines.train import capacity, messages, own_ray, ray_train
from pipelines.train.resources import Resources
from simclr.data.manifest import Manifest
from tune import plan, resolve, sweep_dir
from tune.mirror import Mirror
from tune.resolve import Coded
from tune.schedulers import Population, Remembering
from tune.spaces import Axis, Between, PeakBetween, WholeBetween
from tune.sweep_dir import METRICS, Sweep
from tune.trial import drive
from tune.trial_log import Ledger
from tune.validate import MID_RUN

_LOOK_S = 60.0  # for a node's first process to say what it sees
_UNBOUNDED = 4  # trials at a time on a cluster that grows to an unknown size, without --max-concurrent


def room(asked: Sweep) -> int:
    """How many trials fit on the cluster at a time, at most --max-concurrent.

    A trial's driver holds no core, so every core can serve a worker. A worker runs on one node, which exists or which the autoscaler
    would add. Raises UserError if no trial fits, or fewer than asked for: the others would wait for cores that these hold.
    """
    resources = Resources(**asked.resources)
    gpus = ray_train.require(resources)
    slots = capacity.slots(not own_ray.begun(), resources.cpus_per_worker, gpus)
    if math.isinf(slots):
        return asked.max_concurrent or _UNBOUNDED
    fits = int(slots) // resources.workers
    if asked.max_concurrent > fits:
        each = f"{resources.workers} workers with {resources.cpus_per_worker} CPUs{' and a GPU' if gpus else ''} each"
        raise UserError(f"--max-concurrent {asked.max_concurrent} trials of {each} never run together: there is room for {fits}; use that")
    return asked.max_concurrent or fits


def require_seen(asked: Sweep) -> None:
    """Raise UserError if the sweep lies on a disk that a node of the cluster does not see: its trials may run there."""
    here = ray.get_runtime_context().get_node_id()
    others = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != here}
    if own_ray.begun() or asked.at or not others:
        return
    look: Any = ray.remote(num_cpus=0)(os.path.isfile)
    with tempfile.NamedTemporaryFile(prefix=".seen-", dir=asked.path) as mark:
        answers = {look.options(label_selector={"ray.io/node-id": node}).remote(mark.name): host for node, host in others.items()}
        for answer in ray.wait(list(answers), num_returns=len(answers), timeout=_LOOK_S)[0]:
            with contextlib.suppress(ray.exceptions.RayError):  # the node is gone
                if not ray.get(answer):
                    raise UserError(
                        f"{answers[answer]}, a node of the cluster, does not see {asked.path}, where trials on it would write; "
                        "use --out s3://bucket/prefix, or a directory on a disk that all nodes share"
                    )


def trials(asked: Sweep, codes: list[Coded], concurrent: int, manifest: Manifest, uri: str, mirror: Mirror | None = None) -> Sweep:
    """Run the trials that are not over under Ray Tune. `mirror` keeps the sweep in S3."""
    codes = plan.settled(asked, codes)
    before = plan.records(asked, codes)
    if before:
        plan.say_what_stays(asked)
    names = {code.name for code in codes} | before.keys()
    scheduler = _scheduler(asked, manifest, names, {name for name, trial in before.items() if trial.status != "running"})
    reports = messages.make()
    ledger = Ledger(asked, reports, uri)
    private = own_ray.begun()
    count = len(codes) or asked.trials or resolve.DRAWS
    status = "FAILED"
    with Bar("sweep", count, "trials", "trials/s") as bar:
        bar.resume_at(sweep_dir.progress(asked)[0])
        Follow.followed, Follow.mirror = (asked, ledger, bar), mirror
        for name in scheduler.ended if isinstance(scheduler, Remembering) else ():
            if name in before and before[name].status == "running":  # the sweep was killed before it recorded the decision
                Follow().over(name, "stopped", "")
        left = plan.left(asked, codes)
        try:
            if left or sweep_dir.progress(asked)[0] < count:
                _fit(asked, left, bool(codes), concurrent, scheduler, reports, private)
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


def _fit(asked: Sweep, left: list[Coded], coded: bool, concurrent: int, scheduler: Any, reports: Any, private: bool) -> None:
    """One experiment of Ray Tune's: the trials that are `left` and, if the sweep is not `coded`, those that its search draws."""

    heard = scheduler.heard if isinstance(scheduler, Remembering) else {}

    def trial(config: dict[str, Any]) -> None:
        drive(Coded(**config["trial"]), asked, reports, private, heard)

    # A driver only waits, so it reserves a little memory and no core. A driver with the last core, whose worker needs it, would be
    # a deadlock.
    # In S3 they run beside the sweep's driver, whose copy of the records they share; their workers run anywhere.
    where: dict[str, Any] = {"bundle_label_selector": [{"ray.io/node-id": ray.get_runtime_context().get_node_id()}]} if asked.at else {}
    light = tune.with_resources(trial, tune.PlacementGroupFactory([{"memory": float(1 << 20)}], **where))
    name = _naming(left)
    with _storage(asked, private) as storage:
        tune.Tuner(
            light,
            param_space={"trial": tune.grid_search([dataclasses.asdict(code) for code in left]) if coded else {"seed": 0}},
            tune_config=tune.TuneConfig(
                metric=asked.metric,
                mode=METRICS[asked.metric],
                search_alg=None if coded else _search(asked, left),
                scheduler=scheduler,
                num_samples=1 if coded else (asked.trials or resolve.DRAWS) - sweep_dir.progress(asked)[0],
                max_concurrent_trials=concurrent,
                reuse_actors=True,
                trial_name_creator=name,
                trial_dirname_creator=name,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(storage),
                verbose=0,
                callbacks=[Follow()],
                failure_config=tune.FailureConfig(max_failures=2),  # retries for a driver that was lost with its node
            ),
        ).fit()


@contextlib.contextmanager
def _storage(asked: Sweep, private: bool) -> Iterator[Path]:
    """A new folder that only this user can enter, for what Ray Tune writes. It is removed at the end, and no other command reads it.

    Ray Tune keeps its state there as pickles. It reads none of them back but a trial's last error, see `Follow`. Trials on other nodes
    need the folder only for checkpoints, which only pbt asks of them: then it lies in the sweep's directory, which all nodes share.
    """
    shared = asked.scheduler == "pbt" and not private
    for old in asked.path.glob(".tune-*"):  # of a sweep that was killed
        shutil.rmtree(old, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".tune-", dir=asked.path if shared else None, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _naming(left: list[Coded]) -> Callable[[Any], str]:
    """A function from Ray Tune's trials to their names, which are their directories', too.

    Of trials that a search has drawn, the first one with the codes of a trial that is `left` takes its name; a later one with the same
    codes is another trial. The function is asked more than once for a trial."""
    waiting, given = list(left), dict[str, str]()

    def name(trial: Any) -> str:
        asked = trial.config["trial"]
        if trial.trial_id not in given:
            own = None if asked.get("name") else next((code for code in waiting if code.axes == asked["axes"]), None)
            if own is not None:
                waiting.remove(own)
            given[trial.trial_id] = asked.get("name") or (own.name if own is not None else trial.trial_id)
        return given[trial.trial_id]

    return name


class Follow(tune.Callback):
    """The work of the sweep's driver at each trial's end. It has no state of its own, because Ray Tune pickles its callbacks; the state is
    in `followed`."""

    followed: ClassVar[tuple[Sweep, Ledger, Bar] | None] = None
    mirror: ClassVar[Mirror | None] = None

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.over(str(trial), "stopped", "")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        trial.run_metadata.pickled_error_filename = None  # else Ray Tune unpickles the error from its folder at the end
        self.over(str(trial), "failed", "its driver was lost too often")

    def over(self, name: str, status: Literal["stopped", "failed"], reason: str) -> None:
        assert Follow.followed is not None
        asked, ledger, bar = Follow.followed
        directory = asked.path / "trials" / name
        record = sweep_dir.trial_in(directory)
        if record is not None and record.status == "running":  # else its driver has recorded its end
            record = dataclasses.replace(record, status=status, reason=reason or record.reason)
            record.save(directory)
        ledger.ended(name, "FAILED" if record is not None and record.status == "failed" else "FINISHED")
        losers = sweep_dir.prune(asked.path, asked.metric, asked.keep)
        if Follow.mirror is not None:
            Follow.mirror.ended(losers)
        bar.update(*sweep_dir.progress(asked))


def _domain(axis: Axis) -> Any:
    match axis.values:
        case tuple():
            return tune.choice(range(len(axis.values)))
        case WholeBetween(low, high, log):
            return tune.lograndint(low, high + 1) if log else tune.randint(low, high + 1)
        case Between(low, high, log):
            return tune.loguniform(low, high) if log else tune.uniform(low, high)
        case PeakBetween(low, high):
            return tune.loguniform(low, high)


def _scheduler(asked: Sweep, manifest: Manifest, names: set[str], over: set[str]) -> Any:
    """The scheduler of a sweep with trials of these `names`, None without one; of the trials `over` it has heard the end."""
    if asked.scheduler == "none":
        return None
    base, space = asked.base, asked.restricted
    examples = manifest.examples("train", base.train.shard_groups)
    clock = asked.clock
    total = base.total_steps(examples) * (base.train.batch_size if clock == "images" else 1)
    if clock == "step":
        every = resolve.tried(space, asked.search, asked.trials, base.seed)
        total = max(resolve.point(space, base, c, 0).config.total_steps(examples) for c in every)
    quarter = max(total // 4, 1)
    if asked.scheduler == "pbt":
        changing = {axis.key: _mutation(axis) for axis in space.axes if set(axis.paths) <= set(MID_RUN)}
        mutations = {"trial": {"axes": changing}}
        return Population(asked, time_attr=clock, perturbation_interval=quarter, hyperparam_mutations=mutations)
    about: dict[str, Any] = {"time_attr": clock, "metric": asked.metric, "mode": METRICS[asked.metric], "grace_period": quarter}
    if asked.scheduler == "asha":  # its limit is beyond the last step: at that step it would end a trial before its score
        return Remembering(ASHAScheduler(**about, max_t=100 * total, reduction_factor=3), asked, clock, names, over)
    return Remembering(MedianStoppingRule(**about, min_samples_required=3), asked, clock, names, over)


def _search(asked: Sweep, left: list[Coded]) -> Any:
    """Optuna, which has learned from the trials that are over, and begins with those that are `left`."""
    from ray.tune.search.optuna import OptunaSearch

    about: dict[str, Any] = {"metric": asked.metric, "mode": METRICS[asked.metric]}
    domain = {"trial": {"axes": {axis.key: _domain(axis) for axis in asked.restricted.axes}}}
    over = plan.scored(asked)
    search: Any = OptunaSearch(
        space=OptunaSearch.convert_search_space(domain),
        points_to_evaluate=[_flat(code.axes) for code in left],
        seed=asked.base.seed + len(over),  # the same seed would draw the first trials again
        **about,
    )
    for axes, score in over:
        search.add_evaluated_point(_flat(axes), score, pruned=score is None)
    return search


def _flat(axes: dict[str, int | float]) -> dict[str, int | float]:
    """The codes under Ray Tune's flat names."""
    return {f"trial/axes/{key}": value for key, value in axes.items()}


def _mutation(axis: Axis) -> Any:
    return list(range(len(axis.values))) if isinstance(axis.values, tuple) else _domain(axis)
