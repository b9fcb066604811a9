"""What a list of runs says of each, from the texts of its files: a run's state, step and rate, a sweep's trials and best score.

Sweeps are made by a room above this one. Only the few fields that a list needs are read here, and a file that has them otherwise is a note
in its line, not an error: it must not hide the others.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from pipelines.runs import status
from pipelines.runs.directory import LATEST_S, SCHEMA
from simclr import fields, files
from simclr.errors import UserError
from simclr.family import method_name
from simclr.papers import named
from simclr.stages import STAGES, read_config

SILENT_S = 600.0
"""A run without a report for longer has stopped, if nothing else is known; reports come every few seconds."""
NAMES = {
    "eval/top1": "top-1",
    "eval/knn_top1": "kNN",
    "eval/probe_top1": "probe",
    "health/rankme": "RankMe",
    "health/align_uniform": "alignment + uniformity",
}
"""Scores by the names that a list has for them."""
_OF_RUN = ("eval/top1", "eval/knn_top1")  # those of a run; the others are a sweep's
_LOWER = "health/align_uniform"  # is better the lower it is
_INSTEAD = "bring it back from a copy"


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One run, sweep or trial of the list."""

    run: str
    """Its name below the directory asked for."""
    kind: Literal["run", "sweep", "trial"] = "run"
    recipe: str
    method: str = ""
    """Of a run: what people call its method, or its stage after pretraining; "" = not known."""
    varied: str = ""
    """Of a trial: the values that it does not share with all others."""
    state: str
    """new (no step yet), running, interrupted (by a signal, or its process is gone), failed, stopped (incomplete, and without a report for
    ten minutes; of a trial: by the sweep's scheduler), complete."""
    step: int
    """Of a sweep: trials that are over."""
    total_steps: int | None
    """Of a sweep: trials."""
    images_per_s: float | None = None
    """As last reported."""
    checkpoint: int | None = None
    """Step of the last whole checkpoint."""
    loss: float | None = None
    metric: str = ""
    """What `score` is; "" without one."""
    score: float | None = None
    """The newest of a run or a trial, the best of a sweep."""
    updated: float
    """Unix time of the last report, else of the run's beginning."""
    note: str = ""
    """What is wrong with it, or ""."""


# ── Runs ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def line(name: str, run_json: str, metrics: str, checkpoints: list[str], state_json: str | None = None, silent: bool | None = None) -> Line:
    """A run's line, from the text of run.json, the (end of the) text of metrics.jsonl, names of its whole checkpoints, and the text of
    state.json. `silent`: see `Status.now`."""
    last, scored = _last(metrics)
    numbers = (name.removeprefix("step-").partition(".")[0] for name in checkpoints)  # a writer's token may follow: see simclr.checkpoint
    steps = [int(number) for number in numbers if number.isdigit()]
    note, recipe, method, total, began = "", "?", "", None, 0.0
    try:
        about = files.json_in(run_json, "run.json", _INSTEAD)
        fields.require(about, {"recipe": str, "created": float, "schema": int}, "run.json", _INSTEAD)
        recipe, began = about["recipe"], about["created"]
        if about["schema"] != SCHEMA:
            note = f"of another schema than {SCHEMA}"
        else:
            about.setdefault("stage", "pretrain")
            fields.require(about, {"config": dict[str, Any], "stage": Literal[tuple(STAGES)]}, "run.json", _INSTEAD)
            config = read_config(about["stage"], about["config"])
            total = config.train.steps
            method = named(method_name(config)).title if about["stage"] == "pretrain" else about["stage"]
    except UserError as error:
        note = f"run.json cannot be read: {error}"
    step, total = last.get("step", max(steps, default=0)), last.get("total_steps", total)
    updated = last.get("time", began)
    if not 0 <= updated < LATEST_S:
        updated, note = 0.0, note or "its times are no Unix times"
    noted = status.read(state_json)
    known, reason = noted.now(updated, silent) if noted is not None else (None, "")
    if total is not None and step >= total:
        state, reason = "complete", ""
    elif known is not None and known != "complete" and (step or known != "running"):
        state = known
    else:
        state = "new" if not step else "running" if time.time() - updated < SILENT_S else "stopped"
    metric = next((metric for metric in _OF_RUN if metric in scored), "")
    return Line(
        run=name,
        recipe=recipe,
        method=method,
        state=state,
        step=step,
        total_steps=total,
        images_per_s=last.get("speed/images_per_s"),
        checkpoint=max(steps, default=None),
        loss=last.get("train/loss"),
        metric=metric,
        score=scored.get(metric),
        updated=updated,
        note=note or reason,
    )


def last_time(metrics: str) -> float:
    """Unix time of the newest report; 0 without one."""
    at = float(_last(metrics)[0].get("time", 0.0))
    return at if 0 <= at < LATEST_S else 0.0


def _last(metrics: str) -> tuple[dict[str, Any], dict[str, float]]:
    """(the newest report, the newest scores)."""
    last: dict[str, Any] = {}
    for row in reversed(metrics.splitlines()):
        if last and not any(f'"{metric}"' in row for metric in _OF_RUN):
            continue
        with contextlib.suppress(UserError):  # half a line of a machine that crashed
            found = {name: value for name, value in files.json_in(row, "a report", "").items() if fields.fits(value, float)}
            last = last or found
            if scored := {metric: found[metric] for metric in _OF_RUN if metric in found}:
                return last, scored
    return last, {}


# ── Sweeps ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def sweep(name: str, own: Mapping[str, str], trials: Mapping[str, tuple[str, float]]) -> list[Line]:
    """A sweep's line and those of its trials, the best first, from the texts of its `own` files by their names (sweep.json, plan.json,
    state.json) and, by the names of the trials, their trial.json and its Unix time."""
    note, recipe, metric, began, planned = "", "?", "", 0.0, None
    try:
        about = files.json_in(own["sweep.json"], "sweep.json", _INSTEAD)
        fields.require(about, {"recipe": str, "metric": str, "created": float, "space": str}, "sweep.json", _INSTEAD)
        recipe, metric, began = about["recipe"], about["metric"], about["created"]
        planned = about.get("trials") if fields.fits(about.get("trials"), int) else None
        if "plan.json" in own:
            plan = files.json_in(own["plan.json"], "plan.json", _INSTEAD)
            fields.require(plan, {"trials": list[dict[str, Any]]}, "plan.json", _INSTEAD)
            planned = len(plan["trials"])
    except UserError as error:
        note = f"{error}"
    found = [_trial(f"{name}/trials/{trial}", recipe, metric, text, at) for trial, (text, at) in sorted(trials.items())]
    found.sort(key=lambda one: (one.score is None, (one.score or 0.0) * (1 if metric == _LOWER else -1)))
    over = sum(one.state != "running" for one in found)
    noted = status.read(own.get(status.FILE))
    updated = max([began, *(one.updated for one in found), noted.time if noted is not None else 0.0])
    if not 0 <= updated < LATEST_S:
        updated, note = 0.0, note or "its times are no Unix times"
    known, reason = noted.now(updated) if noted is not None else (None, "")
    if planned is not None and over >= planned:
        state, reason = "complete", ""
    elif known is not None and known != "complete":
        state = known
    else:
        state = "new" if not found else "running" if time.time() - updated < SILENT_S else "stopped"
    if state != "running":  # its trials' drivers end with it
        found = [replace(one, state="interrupted") if one.state == "running" else one for one in found]
    best = next((one for one in found if one.score is not None and one.state != "failed"), None)
    failed = sum(one.state == "failed" for one in found)
    reason = reason or (f"{failed} failed" if failed else "")
    whole = Line(
        run=name,
        kind="sweep",
        recipe=recipe,
        state=state,
        step=over,
        total_steps=planned,
        metric=metric if best is not None else "",
        score=best.score if best is not None else None,
        updated=updated,
        note=note or reason,
    )
    return [whole, *found]


def _trial(name: str, recipe: str, metric: str, text: str, at: float) -> Line:
    """A trial's line, from its trial.json."""
    states = {"running": "running", "finished": "complete", "stopped": "stopped", "failed": "failed"}
    try:
        about = files.json_in(text, "trial.json", _INSTEAD)
        hints: dict[str, Any] = {
            "status": Literal[tuple(states)],
            "step": int,
            "total_steps": int,
            "scores": dict[str, float],
            "reason": str,
        }
        hints["values"] = dict[str, Any]
        fields.require(about, hints, "trial.json", _INSTEAD)
    except UserError as error:
        return Line(run=name, kind="trial", recipe=recipe, state="?", step=0, total_steps=None, updated=at, note=str(error))
    scores, failed = about["scores"], about["status"] == "failed"
    return Line(
        run=name,
        kind="trial",
        recipe=recipe,
        varied=", ".join(f"{path} {_value(value)}" for path, value in about["values"].items()),
        state=states[about["status"]],
        step=about["step"],
        total_steps=about["total_steps"] or None,
        images_per_s=scores.get("speed/images_per_s"),
        loss=scores.get("train/loss"),
        metric=metric if metric in scores and not failed else "",
        score=scores.get(metric) if not failed else None,
        updated=at,
        note=about["reason"] if failed else "",
    )


def _value(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(_value, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
