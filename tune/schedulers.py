"""The schedulers of a sweep, with a memory in JSON: a sweep that goes on decides as if it had not stopped.

reports.jsonl     with asha or median: each report that the scheduler has heard, and each trial's end, in order. Both rules are functions of
                  these alone, so a new one that hears them again is in the state of the old.
population.json   with pbt: each trial's last score, and the times at which it was scored and changed. Its choices are random, so there is
                  nothing to repeat: its members' values and weights are in their own directories.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.tune.schedulers import FIFOScheduler, PopulationBasedTraining, TrialScheduler

from pipelines.runs.directory import load_run
from pipelines.terminal import say
from simclr import fields, files
from simclr.errors import UserError
from tune import sweep_dir
from tune.sweep_dir import METRICS, Sweep, Trial

_REPORT: dict[str, Any] = {"trial": str, "time": float, "score": float}


@dataclass(frozen=True, slots=True)
class _Named:
    """A trial, for a scheduler: Ray Tune gives it another id in each experiment, its name stays."""

    trial_id: str


class _Nobody:
    """The experiment, while old reports are heard again: no trial waits."""

    def get_live_trials(self) -> list[Any]:
        return []


class Remembering(FIFOScheduler):
    """`rule`, asha's or median's, over a sweep that may have stopped and gone on, with trials of these `names`, of which some are `over`.
    `clock` is the rule's time.

    A trial that goes on from its last checkpoint reports some steps again; the rule has heard these.
    """

    def __init__(self, rule: Any, sweep: Sweep, clock: str, names: set[str], over: set[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rule, self._sweep_metric, self._clock, self._path = rule, sweep.metric, clock, sweep.path / "reports.jsonl"
        self._at: dict[str, dict[str, Any]] = {}  # the newest report of each trial
        self.ended: set[str] = set()
        """The trials that the rule has stopped."""
        lines = _lines(self._path) if self._path.is_file() else _of_runs(sweep, clock)
        others = {line["trial"] for line in lines} - names
        if others:
            say(f"{self._path} has reports of trials that this sweep does not have, {len(others)}, as {min(others)[:99]!r}: left out")
            lines = [line for line in lines if line["trial"] in names]
        self._hear(lines, over)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        files.write_text(self._path, text)  # without the half line of a machine that crashed

    def _hear(self, lines: list[dict[str, Any]], over: set[str]) -> None:
        newest = {line["trial"]: number for number, line in enumerate(lines)}
        for number, line in enumerate(lines):
            name = line["trial"]
            if "score" in line:
                self._told(_Nobody(), name, line["time"], line["score"])
            elif name in over and newest[name] == number and name in self._at:
                self._rule.on_trial_complete(_Nobody(), _Named(name), self._at[name])

    def _told(self, controller: Any, name: str, time: float, score: float) -> str:
        if name not in self._at:
            self._rule.on_trial_add(controller, _Named(name))
        self._at[name] = {self._clock: time, self._sweep_metric: score}
        decision = str(self._rule.on_trial_result(controller, _Named(name), self._at[name]))
        if decision == TrialScheduler.STOP:
            self.ended.add(name)
        return decision

    @property
    def heard(self) -> dict[str, float]:
        """The time of each trial's newest report."""
        return {name: report[self._clock] for name, report in self._at.items()}

    def _note(self, line: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        name = str(trial)
        if name in self.ended:
            return str(TrialScheduler.STOP)
        if self._clock not in result or self._sweep_metric not in result:
            return str(TrialScheduler.CONTINUE)
        time, score = result[self._clock], result[self._sweep_metric]
        if name in self._at and time <= self._at[name][self._clock]:
            return str(TrialScheduler.CONTINUE)
        self._note({"trial": name, "time": time, "score": score})
        return self._told(tune_controller, name, time, score)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        name = str(trial)
        if name in self._at:
            self._note({"trial": name, "over": True})
            self._rule.on_trial_complete(tune_controller, _Named(name), self._at[name])

    def debug_string(self) -> str:
        return str(self._rule.debug_string())


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of reports.jsonl. Raises UserError for a line of another kind."""
    found = []
    files.require_small(path, instead := f"remove {path}, and the scheduler hears the trials' own reports")
    texts = files.read_text(path, instead).splitlines()
    for number, text in enumerate(texts, 1):
        try:
            line = files.json_in(text, f"{path}, line {number},", instead)
        except UserError:
            if number == len(texts):  # half a line of a machine that crashed
                break
            raise
        hints: dict[str, Any] = {"trial": str, "over": bool} if "over" in line else _REPORT
        fields.require(line, hints, f"{path}, line {number},", instead)
        found.append({name: line[name] for name in hints})
    return found


def _of_runs(sweep: Sweep, clock: str) -> list[dict[str, Any]]:
    """The lines of reports.jsonl by each trial's own records, for a sweep of an earlier version, in the order of their time."""
    found: list[tuple[float, dict[str, Any]]] = []
    for trial in sweep_dir.trials(sweep.path):
        if (sweep.path / "trials" / trial.name / "run.json").is_file():
            found += _of_run(sweep, trial, clock)
    return [line for _, line in sorted(found, key=lambda pair: pair[0])]


def _of_run(sweep: Sweep, trial: Trial, clock: str) -> list[tuple[float, dict[str, Any]]]:
    run = load_run(sweep.path / "trials" / trial.name)
    each = run.config.train.batch_size if clock == "images" else 1
    found: list[tuple[float, dict[str, Any]]] = [
        (at, {"trial": trial.name, "time": each * step, "score": score}) for at, step, score in sweep_dir.told(run, sweep.metric)
    ]
    if trial.status != "running" and found:
        found.append((found[-1][0], {"trial": trial.name, "over": True}))
    return found


class Population(PopulationBasedTraining):
    """Population-based training of a sweep that may have stopped and gone on."""

    def __init__(self, sweep: Sweep, **settings: Any) -> None:
        super().__init__(**settings)
        self._path, self._sign = sweep.path / "population.json", 1 if METRICS[sweep.metric] == "max" else -1
        self._known: dict[str, dict[str, float]] = {}
        if self._path.is_file():
            self._known = files.read_json(self._path, instead := f"remove {self._path}, and the population begins to compare anew")
            hint = dict[str, float]
            fields.require(self._known, dict.fromkeys(self._known, hint), self._path, instead)
            for name, member in self._known.items():
                fields.require(member, dict.fromkeys(("score", "scored", "changed"), float), f"{name} in {self._path}", instead)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        member = self._known.get(str(trial))
        if member is not None:
            # Private, because Ray's own way to bring a scheduler's state back is a pickle.
            state = self._trial_state[trial]
            state.last_score = self._sign * member["score"]
            state.last_train_time, state.last_perturbation_time = int(member["scored"]), int(member["changed"])

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = str(super().on_trial_result(tune_controller, trial, result))
        members = {
            str(other): {
                "score": self._sign * state.last_score,
                "scored": state.last_train_time,
                "changed": state.last_perturbation_time,
            }
            for other, state in self._trial_state.items()
            if state.last_score is not None and math.isfinite(state.last_score)
        }
        if self._known | members != self._known:
            self._known |= members
            files.write_text(self._path, json.dumps(self._known, indent=1) + "\n")
        return decision
