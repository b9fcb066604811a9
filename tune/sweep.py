"""`simclr sweep`: many runs of `simclr pretrain` under Ray Tune, and the paper's figures from them."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from pipelines.runs import config_file, status, sync
from pipelines.terminal import say, show
from pipelines.tracking import tensorboard as scalars
from pipelines.tracking import uri as mlflow_uri
from pipelines.tracking.outbox import require
from pipelines.train import ray_train
from pipelines.train.resources import Resources
from simclr import files
from simclr.config import Config
from simclr.cores import cores
from simclr.data.manifest import Manifest
from simclr.data.s3 import uri as s3_uri
from simclr.errors import UserError
from simclr.recipes import recipe
from tune import mirror, plan, resolve, spaces, sweep_dir, words
from tune.resolve import Coded
from tune.sweep_dir import Sweep
from tune.validate import check, require_closed


@dataclass(frozen=True)
class Args:
    """Train a recipe many times over a space of its fields, and draw figures of the results.

    `simclr sweep --list` describes the spaces; `simclr sweep --vary FIELD=VALUES …` makes one of any fields. `simclr sweep report DIR`
    draws the figures of a sweep, `simclr sweep --resume DIR` goes on with a sweep; so does the same command again.
    """

    space: Annotated[str, tyro.conf.Positional] = ""
    """A space's name, or `report`."""
    directory: Annotated[Path | None, tyro.conf.Positional] = None
    """For `report`: the sweep's directory."""
    vary: tuple[str, ...] = ()
    """FIELD=VALUES …, in place of a space: head.layers=2,3 tries each value, optim.base_lr=log:0.1:3 and uniform:0.1:3 draw from a range,
    train.batch_size=x0.5,x1 are multiples of the recipe's; of optim.base_lr, of the learning rate under the trial's scaling rule."""
    space_file: Annotated[Path | None, tyro.conf.arg(name="space")] = None
    """A space of your own in YAML: `vary:` and below it FIELD: VALUES as for --vary, and perhaps `set:` with FIELD: VALUE as for --set."""
    recipe: str = ""
    """The recipe that every trial changes."""
    config_file: Annotated[Path | None, tyro.conf.arg(name="config")] = None
    """A file with the config that every trial changes, in place of --recipe: YAML as `simclr recipes NAME` writes it, or a run's run.json.
    It is kept as its recipe, with --set of the fields that differ."""
    data: Path | None = None
    """Directory or s3://bucket/prefix of prepared shards."""
    out: Path | None = None
    """The sweep's directory; on a cluster s3://bucket/prefix, or one on a disk that all nodes share. Default: runs/sweep-SPACE-DIGEST, the
    same for the same command."""
    resume: Path | None = None
    """A sweep's directory: go on with the same settings. Finished trials stay, the others go on from their last checkpoint."""
    trials: int | None = None
    """How many combinations; where ranges meet lists of values, how many draws of the ranges, each tried with all combinations of the
    lists. Default: all; of a space with ranges, 16."""
    seeds: int = 1
    """Trials of each combination, on seeds one apart."""
    search: Literal["auto", "grid", "random", "mixed", "optuna"] = "auto"
    """grid: all combinations; random: --trials of them; mixed: --trials draws of the ranges, each with all combinations of the lists;
    optuna: each chosen by the scores of earlier trials (an extra: `pip install 'simclr-cluster[optuna]'`). auto: grid, or random with
    --trials or a range; mixed for ranges and lists of your own."""
    scheduler: Literal["none", "asha", "median", "pbt"] = "none"
    """asha: of the trials that reach a step, the worse two thirds stop there. median: those below the median of the running means
    stop. pbt: the worst quarter goes on with the weights of the best and a changed lr, τ or colour strength. Time is counted in
    steps, or in images if the batch size varies."""
    metric: Literal["eval/knn_top1", "eval/probe_top1", "health/rankme", "health/align_uniform"] = "eval/knn_top1"
    """The metric to optimise: kNN or linear-probe accuracy; without labels the effective rank of the features, or alignment +
    uniformity of the projections (lower is better)."""
    only: tuple[str, ...] = ()
    """FIELD=VALUE,VALUE … : only these values of an axis. For views.operations: operations made of these parts; for
    optim.base_lr: multiples of the recipe's."""
    set: tuple[str, ...] = ()
    """FIELD=VALUE … : fields that differ from the recipe in every trial, as train.epochs=6."""
    workers_per_trial: int = 1
    """Ray Train workers of each trial; with GPUs, one GPU each."""
    cpus_per_worker: int = 1
    """CPU cores of each worker."""
    max_concurrent: int | None = None
    """Trials at a time. Default: as many as the cluster has room for."""
    device: str = "auto"
    """auto (GPUs if the cluster has one for each worker), cpu or cuda."""
    address: str | None = None
    """Ray cluster to join: 'auto' on a cluster's node; nothing = a private Ray on this machine."""
    max_failures: int = 3
    """How many failures in a row of a trial's workers are retried, from its last checkpoint."""
    keep: int = 3
    """How many of the best trials keep their checkpoints and encoders; the others keep only their scores."""
    publish: str | None = None
    """Register the best trial's encoder in the registry under this name; champion if it is the best there."""
    tracking_uri: str | None = None
    """MLflow address. Default: $MLFLOW_TRACKING_URI, else a database under runs/, without a server."""
    tensorboard: tuple[Path, ...] | None = None
    """Write TensorBoard's scalars of each trial, too (the extra tensorboard): into DIR/SWEEP/TRIAL of --tensorboard DIR, or
    into the trial's own folder tensorboard of --tensorboard alone."""
    list: bool = False
    """Describe the spaces."""


def main(args: Args) -> None:
    if args.list:
        show(spaces.listing())
    elif args.space == "report":
        from tune.report import report

        if args.directory is None:
            raise UserError("which sweep? `simclr sweep report DIR`")
        show(str(report(args.directory)))
    else:
        if args.directory is not None:
            raise UserError(f"{args.directory} is one word too many; a directory goes with `simclr sweep report`, --data or --out")
        show(sweep(args))


def sweep(args: Args) -> str:
    """Check everything, run the trials, draw the report. Returns the sweep's directory or address.

    Raises UserError, before any trial starts, for errors that the user can mend.
    """
    uri = mlflow_uri.tracking_address(args.tracking_uri)
    asked = _asked(args)
    asked = dataclasses.replace(asked, path=asked.path.absolute())  # the trials' processes have another current folder
    begun = bool(sweep_dir.trials(asked.path))
    require(uri, begun=begun)
    _, manifest = sync.manifest(asked.data)
    asked = dataclasses.replace(asked, labelled=bool(manifest.classes))
    codes = check(asked, manifest, begun)
    if asked.vary and codes:
        said = "; ".join(f"{axis.label} {spaces.text_of(axis)}" for axis in asked.restricted.axes)
        say(f"{len(codes)} trials over {said}")
    if (asked.path / "sweep.json").is_file():
        asked = _same(sweep_dir.load(asked.path, asked.at), asked)
        say(f"going on with {asked.shown}: {sweep_dir.progress(asked)[0]} trials are over")
    elif asked.path.exists() and (not asked.path.is_dir() or {p.name for p in asked.path.iterdir()} - {sweep_dir.LOCK}):
        raise UserError(f"{asked.path} exists and is no sweep (it has no sweep.json); use another --out")
    if asked.tensorboard is not None:
        scalars.require()
        if asked.at and not asked.tensorboard:
            raise UserError(f"--tensorboard alone writes into the trials' own directories, and {asked.at} is in S3; give a DIR on a disk")
    files.require_writable(asked.path)
    with asked.alone():
        require_closed(asked)
        asked = _run(asked, codes, manifest, uri)
    return _finish(asked, args.publish, uri)


def _run(asked: Sweep, codes: list[Coded], manifest: Manifest, uri: str) -> Sweep:
    """Connect to Ray and run the trials that are left."""
    resources = Resources(**asked.resources)
    at_once = cores() // (resources.workers * resources.cpus_per_worker) or 1
    ours = ray_train.connect(resources, asked.max_concurrent or at_once)
    try:
        from tune import ray_tune  # Ray Tune's imports take seconds

        concurrent = ray_tune.room(asked)
        ray_tune.require_seen(asked)
        asked.save()
        plan.keep_space(asked)
        at = s3_uri.address(asked.at) if asked.at else None
        copy = mirror.Mirror(at) if at is not None else None
        status.note(asked.path, "running")
        with copy.kept() if copy is not None else contextlib.nullcontext():
            return _noted(asked, lambda: ray_tune.trials(asked, codes, concurrent, manifest, uri, copy))
    finally:
        if ours:
            ray_train.disconnect()


def _noted(asked: Sweep, work: Callable[[], Sweep]) -> Sweep:
    """`work()`, whose end state.json in the sweep's directory says."""
    try:
        found = work()
    except KeyboardInterrupt:
        status.note(asked.path, "interrupted")
        raise
    except Exception as error:
        status.note(asked.path, "failed", str(error) if isinstance(error, UserError) else type(error).__name__)
        raise
    status.note(asked.path, "complete")
    return found


def _asked(args: Args) -> Sweep:
    """The sweep that the flags describe, or that --resume names."""
    if args.resume is not None:
        if args.space or args.recipe or args.data or args.vary or args.space_file or args.config_file:
            raise UserError(f"--resume {args.resume} goes on as the sweep was begun; leave out the space, --recipe, --config and --data")
        return _resumed(sweep_dir.load(*mirror.opened(args.resume)), args)
    args = _of_file(args)
    own, fixed = _own(args)
    if not args.space and not own:
        raise UserError(
            "which space? `simclr sweep SPACE --recipe NAME --data DIR`; `simclr sweep --list` describes them, and --vary "
            "optim.base_lr=0.1,0.3 makes one of any fields"
        )
    if not args.recipe or args.data is None:
        given = args.space or ("--vary …" if args.vary else f"--space {args.space_file}")
        raise UserError(f"which {'data' if args.recipe else 'recipe'}? `simclr sweep {given} --recipe NAME --data DIR`")
    base = recipe(args.recipe)
    for flag in ("trials", "seeds", "keep", "max_concurrent"):
        if (value := getattr(args, flag)) is not None and value < 1:
            raise UserError(f"--{flag.replace('_', '-')} is {value}; expected at least 1")
    changes = {path: value for path, value in _differing(args, base).items() if path not in own}
    changes |= {path: words.value(base, path, given) for path, given in fixed.items()}
    changes |= {path: resolve.read(base, path, text) for path, text in resolve.assignments(args.set, "--set")}
    if twice := sorted(own.keys() & changes.keys()):
        raise UserError(f"{twice[0]} is both varied and set; leave out one of them")
    name = args.space or (args.space_file.stem if args.space_file is not None else "vary")
    base = resolve.changed(base, changes)
    space = words.space(name, own, base) if own else spaces.space(name)
    words.require_ends(base, space)
    only = {path: [resolve.read(base, path, t) for t in text.split(",")] for path, text in resolve.assignments(args.only, "--only")}
    left = [axis for axis in space.axes if not set(axis.paths) & set(only)]
    free = [axis for axis in left if not isinstance(axis.values, tuple)]
    usual: Literal["grid", "random", "mixed"] = (
        "mixed" if own and free and len(free) < len(space.axes) else "random" if args.trials or free else "grid"
    )
    search = args.search if args.search != "auto" else usual
    resources = Resources(
        workers=args.workers_per_trial,
        cpus_per_worker=args.cpus_per_worker,
        device=args.device,
        address=args.address,
        max_failures=args.max_failures,
    )
    at = s3_uri.address(args.data)
    found = Sweep(
        path=Path(),
        space=name,
        vary=own,
        recipe=args.recipe,
        data=str(at or args.data.absolute()),
        only=only,
        changes=changes,
        search=search,
        scheduler=args.scheduler,
        metric=args.metric,
        trials=args.trials or (resolve.DRAWS if free and search != "grid" else None),
        seeds=args.seeds,
        keep=args.keep,
        resources=dataclasses.asdict(resources),
        max_concurrent=args.max_concurrent or 0,
        tensorboard=None if (place := scalars.asked(args.tensorboard)) is None else "" if place == Path() else str(place),
        command=shlex.join(["simclr", *(mlflow_uri.redacted(word) for word in sys.argv[1:])]),
        created=time.time(),
    )
    if args.out is None:
        digest = hashlib.sha256(json.dumps(_key(found), sort_keys=True).encode()).hexdigest()[:8]
        return dataclasses.replace(found, path=Path("runs") / f"sweep-{name}-{digest}")
    path, at_out = mirror.opened(args.out)
    return dataclasses.replace(found, path=path, at=at_out)


def _of_file(args: Args) -> Args:
    """The flags with the recipe that the file of --config is of."""
    if args.config_file is None:
        return args
    if args.recipe:
        raise UserError(f"--recipe {args.recipe} and --config {args.config_file} each have a whole config; leave out one of them")
    name = config_file.read(args.config_file).recipe
    recipe(name)  # a sweep's trials are told by what differs from a recipe
    return dataclasses.replace(args, recipe=name)


def _differing(args: Args, base: Config) -> dict[str, Any]:
    """Fields of the file of --config that differ from its recipe, `base`."""
    if args.config_file is None:
        return {}
    ours = config_file.read(args.config_file).config
    paths = [path for path in ours.flat() if path != "method"]  # a file's method is its recipe's
    return {path: resolve.value_of(ours, path) for path in paths if resolve.value_of(ours, path) != resolve.value_of(base, path)}


def _own(args: Args) -> tuple[dict[str, Any], dict[str, Any]]:
    """(fields that the command varies by itself and their values in words, fields that its file sets)."""
    given = [*resolve.assignments(args.vary, "--vary")]
    if args.space and (given or args.space_file is not None):
        raise UserError(f"--vary and --space make a space of their own; leave out {args.space}, or take a part of it with --only")
    if twice := [path for number, (path, _) in enumerate(given) if path in dict(given[:number])]:
        raise UserError(f"--vary has {twice[0]} twice; give all of its values at once, with commas")
    vary, fixed = words.read(args.space_file) if args.space_file is not None else ({}, {})
    if args.space_file is not None and (args.space_file.stem in spaces.SPACES or not sweep_dir.plain(args.space_file.stem)):
        raise UserError(f"{args.space_file} gives the sweep its name: use one of letters and digits, and none of `simclr sweep --list`")
    return vary | dict(given), fixed


def _resumed(there: Sweep, args: Args) -> Sweep:
    """The sweep that --resume names. Raises UserError if it ran on a cluster that the user does not name.

    Whoever wrote sweep.json would else choose the cluster: a driver trusts the one that it joins with its environment and its code.
    """
    address = there.resources["address"]
    if args.address is None and address not in (None, "auto"):
        raise UserError(f"{there.shown} was begun on the Ray cluster at {address}; to go on there, add --address {address}")
    place = scalars.asked(args.tensorboard)
    tensorboard = there.tensorboard if place is None else "" if place == Path() else str(place)
    return dataclasses.replace(there, resources=there.resources | {"address": args.address or address}, tensorboard=tensorboard)


def _key(found: Sweep) -> dict[str, Any]:
    """The fields that two equal sweeps share."""
    names = ("space", "recipe", "data", "only", "changes", "search", "scheduler", "metric", "trials", "seeds")
    own = {"vary": found.vary} if found.vary else {}  # nothing without: the default directories of older sweeps stay
    plain: dict[str, Any] = json.loads(json.dumps({name: getattr(found, name) for name in names} | own))
    return plain


def _same(there: Sweep, asked: Sweep) -> Sweep:
    """The existing sweep, with the resources asked for now. Raises UserError if it is another sweep."""
    theirs, ours = _key(there), _key(asked)
    names = [name for name in dict.fromkeys([*ours, *theirs]) if theirs.get(name) != ours.get(name)]
    different = [f"{name} {theirs.get(name, 'nothing')} there, {ours.get(name, 'nothing')} here" for name in names]
    if different:
        raise UserError(f"{asked.shown} belongs to another sweep: {'; '.join(different[:3])}; use another --out")
    now = {name: getattr(asked, name) for name in ("path", "resources", "max_concurrent", "keep", "tensorboard")}
    return dataclasses.replace(there, **now)


def _finish(asked: Sweep, publish: str | None, uri: str) -> str:
    """Print the best trial, draw the report, and publish the best trial if asked."""
    order = sweep_dir.write_results(asked)
    if not order:
        failed = [trial for trial in sweep_dir.trials(asked.path) if trial.reason]
        if bugs := [trial for trial in failed if trial.bug]:
            raise RuntimeError(f"no trial of {asked.shown} has a score; trial {bugs[0].name} failed by a bug:\n\n{bugs[0].bug}")
        raise UserError(f"no trial of {asked.shown} has a score in {asked.metric}; {failed[0].reason if failed else 'none finished'}")
    best = order[0]
    if took := sweep_dir.start_up(sweep_dir.trials(asked.path)):
        say(took)
    values = ", ".join(f"{path} {value}" for path, value in best.values.items())
    say(f"best: trial {best.name} with {sweep_dir.shown(asked.metric, best.score(asked.metric))}: {values}, seed {best.seed}")
    from tune.report import report

    report(Path(asked.shown))
    if publish:
        from pipelines.commands.publish import Args as PublishArgs
        from pipelines.commands.publish import publish as register

        result = register(PublishArgs(Path(asked.shown) / "trials" / best.name, name=publish, tracking_uri=uri))
        say(f"published as {result['name']}/{result['version']}{' @champion' if result['champion'] else ''}")
    return asked.at or os.path.relpath(asked.path)
