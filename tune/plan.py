"""The trials of a sweep: which they are, which of them are left, and how the unfinished ones go on.

plan.json has the codes of all trials, drawn before the first one starts. What has become of each is in its own directory: trial.json, and
run.json with its present config. A sweep that goes on is a new experiment of Ray Tune's with the trials that are left. Tune would keep all
of this itself, but in pickles, and then whoever can write the sweep's directory runs code as the user who goes on with it. So Tune's
state is never read. Everything here is JSON, and checked.
"""

from __future__ import annotations

import dataclasses
import json
import math
from itertools import zip_longest
from typing import Any

from pipelines.runs.directory import load_run
from pipelines.terminal import say
from simclr import fields, files
from simclr.errors import UserError
from tune import resolve, sweep_dir
from tune.resolve import Coded
from tune.spaces import Axis
from tune.sweep_dir import INSTEAD, Sweep, Trial

SCHEMA = 1
OTHER_SEED = 1000
"""What a second try of a trial adds to its seed."""


def settled(sweep: Sweep, codes: list[Coded]) -> list[Coded]:
    """The codes of all trials, by plan.json; the first time it is written from `codes`. [] if the search draws them while the sweep runs.

    Raises UserError for a plan whose names are paths, or whose codes are none of the space.
    """
    path = sweep.path / "plan.json"
    if not codes:
        return []
    if not path.is_file():
        rows = [dataclasses.asdict(code) for code in codes]
        files.write_text(path, json.dumps({"schema": SCHEMA, "trials": rows}, indent=1) + "\n")
        return codes
    text = files.read_json(path, INSTEAD)
    fields.require(text, {"schema": int, "trials": list[dict[str, Any]]}, path, INSTEAD)
    if text["schema"] != SCHEMA:
        raise UserError(f"{path} has schema {text['schema']}, this version reads {SCHEMA}; go on with the version that wrote it")
    axes = sweep.restricted.axes
    found = [fields.build(Coded, row, path, INSTEAD) for row in text["trials"]]
    for code in found:
        fits = code.axes.keys() == {axis.key for axis in axes} and all(_known(axis, code.axes[axis.key]) for axis in axes)
        if not fits or not sweep_dir.plain(code.name) or not 0 <= code.seed < sweep.seeds:
            raise UserError(f"{path} is damaged: no trial of {sweep.space} is {json.dumps(dataclasses.asdict(code))[:200]}; {INSTEAD}")
    if len({code.name for code in found}) != len(found) or len(found) != len(codes):
        raise UserError(f"{path} is damaged: it has {len(found)} trials, the sweep has {len(codes)} of different names; {INSTEAD}")
    return found


def keep_space(sweep: Sweep) -> None:
    """Write space.json. Raises UserError if it is there with other values: a code is the number of a value, and would mean another one."""
    path, here = sweep.path / "space.json", json.loads(json.dumps(dataclasses.asdict(sweep.restricted)))
    if path.is_file():
        there = files.read_json(path, INSTEAD)
        fields.require(there, {"axes": list[dict[str, Any]], "fixed": dict[str, Any]}, path, INSTEAD)
        none: dict[str, Any] = {}
        for ours, theirs in zip_longest(here["axes"], there["axes"], fillvalue=none):
            if any(ours.get(name) != theirs.get(name) for name in ("paths", "values")):
                said = f"{theirs.get('values')} there, {ours.get('values')} here"
                raise UserError(
                    f"{path} has another space than this version's {sweep.space} ({said}); go on with the version that wrote it"
                )
        if here["fixed"] != there["fixed"]:
            raise UserError(
                f"{path} fixes {there['fixed']}, this version's {sweep.space} {here['fixed']}; go on with the version that wrote it"
            )
    files.write_text(path, json.dumps(here, indent=1) + "\n")


def _known(axis: Axis, code: float) -> bool:
    if isinstance(axis.values, tuple):
        return isinstance(code, int) and 0 <= code < len(axis.values)
    return axis.values.low <= code <= axis.values.high


def records(sweep: Sweep, codes: list[Coded]) -> dict[str, Trial]:
    """Name → record of the trials that have begun. Raises UserError for a record of no trial of this sweep."""
    names, paths = {code.name for code in codes}, {path for axis in sweep.restricted.axes for path in axis.paths}
    found = {trial.name: trial for trial in sweep_dir.trials(sweep.path)}
    for name, trial in found.items():
        folder = sweep.path / "trials" / name
        if (codes and name not in names) or not sweep_dir.plain(name):
            raise UserError(f"{folder} is no trial of this sweep; move it away")
        if unknown := sorted(trial.values.keys() - paths):
            raise UserError(f"{folder}/trial.json has a value of {unknown[0]}, which {sweep.space} does not vary; move {folder} away")
    return found


def left(sweep: Sweep, codes: list[Coded]) -> list[Coded]:
    """The trials that are not over, each under its own name. What a search drew, and what pbt changed, is as the trial's run has it."""
    known = records(sweep, codes)
    if not codes:
        return [coded for trial in known.values() if trial.status == "running" and (coded := _of_run(sweep, trial)) is not None]
    found = [code for code in codes if code.name not in known or known[code.name].status == "running"]
    if sweep.scheduler == "pbt":
        found = [(code.name in known and _of_run(sweep, known[code.name])) or code for code in found]
    return found


def scored(sweep: Sweep) -> list[tuple[dict[str, int | float], float | None]]:
    """(codes, score) of the trials that are over, for a search to learn from; a trial that failed has no score."""
    found = []
    for trial in records(sweep, []).values():
        coded = None if trial.status == "running" else _of_run(sweep, trial)
        if coded is not None:
            score = trial.scores.get(sweep.metric)
            found.append((coded.axes, score if score is not None and math.isfinite(score) else None))
    return found


def _of_run(sweep: Sweep, trial: Trial) -> Coded | None:
    """The trial's codes by the config in its run.json; None, with a sentence, if it has none that fits."""
    folder = sweep.path / "trials" / trial.name
    if not (folder / "run.json").is_file():  # it failed before its run began
        return None
    config = load_run(folder).config
    axes = resolve.codes_of(sweep.restricted, sweep.base, config)
    if axes is None:
        say(f"{folder}/run.json has values that are none of {sweep.space}; the sweep goes on without them")
        return None
    return Coded(axes=axes, seed=config.seed - sweep.base.seed - (OTHER_SEED if trial.reason else 0), name=trial.name)


def say_what_stays(sweep: Sweep) -> None:
    """A sentence on what a sweep that goes on does not have again."""
    if (sweep.path / "tune").exists():
        say(f"{sweep.path}/tune is Ray Tune's, from an earlier version; it is not read: the trials go on from their own records")
    if sweep.search == "optuna":
        say("Optuna gets the codes and scores of the trials that are over; its sampler's random state begins anew")
    if sweep.scheduler == "pbt":
        say("pbt goes on with each trial's present values, weights, last score and last change; its random choices begin anew")
