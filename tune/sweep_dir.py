"""A sweep's directory: its files, and how they are read again.

sweep.json      the command's settings: space, recipe, data, flags; the MLflow parent run
space.json      the space, with all values resolved
plan.json       the trials: name, codes and seed of each (see tune.plan); none if the search draws them while the sweep runs
state.json      what has become of the process that runs it (see pipelines.runs.status)
trials/NAME/    a run directory each, as `simclr pretrain` makes one, with trial.json: its values, status and scores
first_tries/    run directories of trials that started again with another seed
reports.jsonl   with asha or median: what the scheduler has heard, in order; population.json: what pbt knows (see tune.schedulers)
results.csv, best_config.json, report.html; .sweep: the lock of the process that runs it
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

from pipelines.runs.directory import Run, load_run
from pipelines.tracking.uri import redacted
from pipelines.train.resources import Resources
from simclr import fields, files
from simclr.config import Config
from simclr.errors import UserError
from simclr.recipes import recipe
from simclr.text import cell
from tune import resolve, words
from tune.spaces import Space, space

SCHEMA = 1
INSTEAD = "bring it back from a copy, or begin a new sweep with another --out"
LOCK = ".sweep"
_PARTS = ("checkpoints", "encoder", "compiled", "ray")  # folders of a trial, which a sweep empties or removes
METRICS: dict[str, Literal["max", "min"]] = {
    "eval/knn_top1": "max",
    "eval/probe_top1": "max",
    "health/rankme": "max",
    "health/align_uniform": "min",
}
"""The metrics of a sweep. The last two need no label: RankMe (arXiv:2210.02885), and alignment + uniformity (arXiv:2005.10242)."""

NAMES = {
    "eval/knn_top1": "kNN",
    "eval/probe_top1": "probe",
    "health/rankme": "RankMe",
    "health/align_uniform": "alignment + uniformity",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """The settings of a sweep: sweep.json."""

    path: Path
    space: str
    recipe: str
    data: str
    """Directory, absolute, or s3://bucket/prefix."""
    only: dict[str, list[Any]]
    changes: dict[str, Any]
    """Fields that differ from the recipe in every trial (--set)."""
    search: Literal["grid", "random", "mixed", "optuna"]
    scheduler: Literal["none", "asha", "median", "pbt"]
    metric: str
    trials: int | None
    seeds: int
    keep: int
    resources: dict[str, Any]
    """The resources of each trial: fields of `Resources`."""
    max_concurrent: int
    command: str
    created: float
    labelled: bool = True
    vary: dict[str, Any] = field(default_factory=dict)
    """The fields of a space of the user's own, and their values in his words (see `tune.words`); {} = `space` is one of ours."""
    tensorboard: str | None = None
    """Where trials write TensorBoard's scalars: a directory, or "" = each in its own; None = nowhere."""
    tracking_uri: str = ""
    tracking_run: str = ""
    at: str = ""
    """s3://bucket/prefix, if `path` is this machine's copy of it (see tune.mirror); else "". Not in sweep.json, like `path`."""

    def __post_init__(self) -> None:
        for name, least in (("trials", 1), ("seeds", 1), ("keep", 1), ("max_concurrent", 0)):
            if (value := getattr(self, name)) is not None and not least <= value <= resolve.MOST:
                raise UserError(f"{name} of {self.path} is {value}; expected {least} to {resolve.MOST:,}")

    @property
    def shown(self) -> str:
        """The sweep's place, for people."""
        return self.at or str(self.path)

    @property
    def base(self) -> Config:
        """The recipe with --set applied."""
        return resolve.changed(recipe(self.recipe), self.changes)

    @property
    def restricted(self) -> Space:
        """The space with --only applied."""
        base = self.base
        return resolve.restricted(words.space(self.space, self.vary, base) if self.vary else space(self.space), base, self.only)

    @property
    def clock(self) -> Literal["step", "images"]:
        """A scheduler's time: images where trials have several batch sizes, since steps are then unequal work."""
        return "images" if any("train.batch_size" in axis.paths for axis in self.restricted.axes) else "step"

    @property
    def best_is(self) -> Literal["max", "min"]:
        return METRICS[self.metric]

    def save(self) -> None:
        text = asdict(self) | {"schema": SCHEMA}
        del text["path"], text["at"]
        for name in ("vary", "tensorboard"):  # earlier versions do not know them
            if text[name] in ({}, None):
                del text[name]
        self.path.mkdir(parents=True, exist_ok=True)
        files.write_text(self.path / "sweep.json", json.dumps(text, indent=1) + "\n")

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """A lock: inside, no other process runs this sweep, since two would train the same trials in the same directories. It holds on one
        machine, and on shared disks with locks; it ends with its process. Raises UserError if another process holds it, or has begun a
        sweep here since this one was described."""
        made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(files.locked(self.path / LOCK, wait=False))
            except BlockingIOError:
                raise UserError(f"another process is running {self.path}; wait for it, end it, or use another --out") from None
            try:
                if (self.path / "sweep.json").is_file() and load(self.path).created != self.created:
                    raise UserError(f"another process has just begun a sweep in {self.path}; give the command again, or use another --out")
                yield
            finally:
                if {p.name for p in self.path.iterdir()} == {LOCK}:  # the sweep was refused: no folder stays
                    (self.path / LOCK).unlink()
                    with contextlib.suppress(OSError):  # other files came meanwhile
                        for folder in made:
                            folder.rmdir()

    def noted(self, **fields: str) -> Self:
        sweep = replace(self, **fields)  # type: ignore[arg-type]
        sweep.save()
        return sweep


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """The record of one trial: trial.json in its run directory."""

    name: str
    values: dict[str, Any]
    """Field path → value, for the fields that the space varies."""
    seed: int
    status: Literal["running", "finished", "stopped", "failed"] = "running"
    """stopped: by the scheduler, before its end."""
    donor: str = ""
    """With pbt: the trial whose weights it took over last."""
    reason: str = ""
    """The reason of a failure; of a finished trial, the failure before it started again with another seed."""
    bug: str = ""
    """The traceback of a failure that is a bug."""
    step: int = 0
    total_steps: int = 0
    scores: dict[str, float] = field(default_factory=dict)
    """The newest value of each metric."""
    start_s: dict[str, float] = field(default_factory=dict)
    """Seconds from the trial's start to the start of its workers, to the end of their imports, to their first step."""

    def save(self, directory: Path) -> None:
        files.write_text(directory / "trial.json", json.dumps(asdict(self)) + "\n")

    def score(self, metric: str) -> float | None:
        value = self.scores.get(metric)
        return value if value is not None and math.isfinite(value) and self.status != "failed" else None


def load(path: Path, at: str = "") -> Sweep:
    """The sweep in directory `path`, which may be a copy of the one `at` s3://…, and which somebody else may have written. Raises UserError
    if there is none, or its fields do not fit."""
    if not (path / "sweep.json").is_file():
        raise UserError(f"{at or path} is no sweep (it has no sweep.json); `simclr sweep SPACE --recipe NAME --data DIR` makes one")
    text = files.read_json(path / "sweep.json", INSTEAD)
    if text.pop("schema", None) != SCHEMA:
        raise UserError(f"{path}/sweep.json has another schema than {SCHEMA}; go on with the version that wrote it")
    if text.get("metric") not in METRICS:
        raise UserError(f"{path}/sweep.json is damaged: its metric is {text.get('metric')!r}; {INSTEAD}")
    found = fields.build(Sweep, text, path / "sweep.json", INSTEAD, path=path, at=at)
    resources = fields.build(Resources, found.resources, f"resources in {path}/sweep.json", INSTEAD)
    found = replace(found, resources=asdict(resources))
    require_here(path / "trials")
    first_tries(path)
    # What an earlier version wrote, or another hand, may have credentials in it.
    return replace(found, command=redacted(found.command), tracking_uri=redacted(found.tracking_uri))


def trial_in(directory: Path) -> Trial | None:
    """The record in a trial's directory, if there is one. Raises UserError for a record of another name, since files are removed by it,
    and for a directory that leads out of the sweep's."""
    path = directory / "trial.json"
    for folder in (directory, *(directory / part for part in _PARTS)):
        require_here(folder)
    if not path.is_file():
        return None
    instead = f"remove {directory}, and the trial is done again"
    text = files.read_json(path, instead)
    fields.require(text, {"values": dict[str, Any]}, path, instead)
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in text.pop("values").items()}
    trial = fields.build(Trial, text, path, instead, values=values)
    if trial.name != directory.name:
        raise UserError(f"{path} is damaged: it is of trial {trial.name!r}; {instead}")
    return trial


def require_here(folder: Path) -> None:
    """Raise UserError for a symbolic link: whoever made the sweep could have another user's files removed or changed through it."""
    if folder.is_symlink():
        raise UserError(
            f"{folder} is a symbolic link, to {folder.readlink()}; a sweep keeps its files in its own directory: move them here"
        )


def plain(name: str) -> bool:
    """Whether `name` may be a trial's: a file's name, and no way to another folder."""
    return bool(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", name))


def told(run: Run, metric: str) -> Iterator[tuple[float, int, float]]:
    """(Unix time, step, score) of the reports in metrics.jsonl: with each, a scheduler hears the newest score."""
    at, score = run.created, None
    for row in run.history():
        at = row["time"] if fields.fits(row.get("time"), float) else at
        if {"health/alignment", "health/uniformity"} <= row.keys():
            row["health/align_uniform"] = row["health/alignment"] + row["health/uniformity"]
        if fields.fits(row.get(metric), float):
            score = row[metric]
        if score is not None:
            yield at, int(row["step"]), score


def first_try(path: Path, name: str) -> Path:
    """The new place of trial `name`'s directory when it starts again with another seed."""
    return path / "first_tries" / name


def first_tries(path: Path) -> list[Path]:
    """The directories of all trials that started again. Raises UserError if one leads out of the sweep's."""
    require_here(path / "first_tries")
    found = sorted((path / "first_tries").glob("*"))
    for directory in found:
        require_here(directory)
    return found


def trials(path: Path) -> list[Trial]:
    """The records of all trials that have begun, by name."""
    found = (trial_in(directory) for directory in sorted((path / "trials").glob("*")))
    return [trial for trial in found if trial is not None]


def ranked(found: list[Trial], metric: str) -> list[Trial]:
    """The trials that have a score in `metric`, best first. A stopped trial counts with its last score."""
    sign = -1 if METRICS[metric] == "max" else 1
    scored = [(trial.score(metric), trial) for trial in found]
    return [trial for value, trial in sorted(((v, t) for v, t in scored if v is not None), key=lambda pair: (sign * pair[0], pair[1].name))]


def prune(path: Path, metric: str, keep: int) -> list[str]:
    """Remove the checkpoints and encoders of trials that are over, except for the best `keep`; returns their names."""
    over = [trial for trial in trials(path) if trial.status != "running"]
    best = {trial.name for trial in ranked(over, metric)[:keep]}
    losers = [trial.name for trial in over if trial.name not in best]
    for name in losers:
        for folder in ("checkpoints", "encoder"):
            shutil.rmtree(path / "trials" / name / folder, ignore_errors=True)
    return losers


def write_results(sweep: Sweep) -> list[Trial]:
    """Write results.csv, a row per trial, and best_config.json; returns the ranked trials."""
    found = trials(sweep.path)
    varied = list(dict.fromkeys(path for trial in found for path in trial.values))
    metrics = sorted({name for trial in found for name in trial.scores if name.startswith(("eval/", "health/", "train/"))})
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["trial", *varied, "seed", "status", "step", "total_steps", *metrics, "reason"])
    for trial in found:
        values = [_cell(trial.values.get(path, "")) for path in varied]
        scores = [_cell(trial.scores.get(name, "")) for name in metrics]
        row = [trial.name, *values, trial.seed, trial.status, trial.step, trial.total_steps, *scores, trial.reason]
        table.writerow(map(cell, row))
    files.write_text(sweep.path / "results.csv", text.getvalue())
    order = ranked(found, sweep.metric)
    if order:
        run = load_run(sweep.path / "trials" / order[0].name)
        best = {"trial": order[0].name, sweep.metric: order[0].score(sweep.metric), "command": run.command, "config": run.config.to_dict()}
        files.write_text(sweep.path / "best_config.json", json.dumps(best, indent=1) + "\n")
    return order


def _cell(value: Any) -> Any:
    return " ".join(map(str, value)) if isinstance(value, tuple | list) else value


def progress(sweep: Sweep) -> tuple[int, str]:
    """(trials that are over, the best so far in words)."""
    found = trials(sweep.path)
    best = ranked(found, sweep.metric)
    words = f"best {shown(sweep.metric, best[0].score(sweep.metric))}, trial {best[0].name}" if best else ""
    return sum(trial.status != "running" for trial in found), words


def start_up(found: list[Trial]) -> str:
    """A sentence on the time from a trial's start to its first step; "" if no time is known."""
    starts = sorted((t.start_s["first_step"], t.start_s["workers"]) for t in found if {"first_step", "workers"} <= t.start_s.keys())
    if not starts:
        return ""
    first, workers = starts[len(starts) // 2]
    spread = f"median of {len(starts)}, {starts[0][0]:.0f} … {starts[-1][0]:.0f} s"
    return f"a trial's first step came after {first:.0f} s ({spread}), of which its workers took {workers:.0f} s to begin"


def shown(metric: str, value: float | None) -> str:
    """A score for people: "kNN 91.3 %"."""
    if value is None:
        return "–"
    return f"{NAMES[metric]} {100 * value:.1f} %" if metric.startswith("eval/") else f"{NAMES[metric]} {value:.3g}"
