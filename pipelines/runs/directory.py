"""A run's directory: its files, the run that it belongs to, and how the same command finds it again.

run.json        recipe, config, data, command, environment, tracking address and run id, registered version
subset.txt      the only images that it sees, where there are such; labels.txt: those whose labels a later stage sees
state.json      what has become of the process that trains it (see pipelines.runs.status)
metrics.jsonl   one line per report; outbox.json: how many of its bytes MLflow has (see pipelines.tracking.outbox)
checkpoints/    step-…/ (see simclr.checkpoint); heads/: of a run in S3, the newest without its weights
encoder/        the published form of the newest checkpoint's encoder
compiled/       compiled code of torch.compile (see pipelines.train.compile_cache)
timings.json    seconds of each command so far
evaluation.json scores; evaluation-limited.json: of some of the images; pictures.npz: the report's pictures; report.html
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

from pipelines.runs.environment import environment, place
from pipelines.runs.home import HEADS
from pipelines.tracking.uri import redacted
from simclr import fields, files
from simclr.config import ADDED, RENAMED, Config
from simclr.data.manifest import digest_of
from simclr.data.s3.uri import address, copy_of
from simclr.errors import UserError
from simclr.family import method_name
from simclr.stages import STAGES, read_config

SCHEMA = 1
_INSTEAD = "bring it back from a copy, or begin a new run with another --run"
_LOCK = ".training"
_MOST_METRICS = 1 << 30  # bytes of metrics.jsonl; a million reports
LATEST_S = 1e11
"""A Unix time beyond it, thousands of years ahead, has no date on some systems."""
_PHASES = ("render and shard", "start", "pretrain", "finetune", "distill", "evaluate", "publish", "pull and compare")
# These fields change how often a run reports, not its numbers: a resumed run may change them.
_OPERATIONAL = (
    *("train.report_every_steps", "train.checkpoint_every_steps", "train.keep_checkpoints", "train.compile", "train.cache"),
    "watch.",
)
_SUBSET = {"from": str, "images": int, "sha256": str}
_START = {"from": str, "step": int | None, "sha256": str, "extends": bool, "taken": str}
_NOTING = threading.Lock()  # one thread at a time reads run.json, changes a field and writes it


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One run: its directory and the content of run.json."""

    path: Path
    recipe: str
    config: Config
    data: Path
    data_digest: str
    """sha256 of the data's manifest: the same name over other shards is another run."""
    command: str
    created: float
    """Unix time."""
    data_at: str = ""
    """s3://bucket/prefix, if `data` is this machine's copy of it; else ""."""
    environment: dict[str, str]
    """Machine and versions of the driver that began it."""
    tracking_uri: str = ""
    """MLflow address, without credentials."""
    tracking_run: str = ""
    unlogged: str = ""
    """"yes" until MLflow has all of metrics.jsonl, also while a job runs, since it may be killed; "scores" where it lacks an evaluation
    alone. The same command again logs the rest."""
    registered: str = ""
    """NAME/VERSION in the registry, once published."""
    stage: str = "pretrain"
    """The command that makes it: pretrain, finetune or distill."""
    notes: tuple[str, ...] = ()
    """What it does otherwise than its settings say (`simclr.sense`)."""
    start: dict[str, Any] = field(default_factory=dict)
    """The weights that a pretraining began with, {} = those of its seed: `from`, `step` (null = unknown), `sha256`, `extends` (whether it
    extends that run), `taken` (which parts, in a sentence)."""

    subset: dict[str, Any] = field(default_factory=dict)
    """The only images that a pretraining sees, {} = all: the list that they come `from`, which the run keeps as subset.txt, their number
    `images`, and the `sha256` of their sample ids."""

    @property
    def began_with(self) -> str:
        """`start` in a sentence, "" if it is empty."""
        return described(self.start) if self.start else ""

    @property
    def begun(self) -> bool:
        """Whether a command gave it weights, as the checkpoint of step 0: then no worker may begin without a checkpoint."""
        return bool(self.start) or bool(getattr(self.config, "encoder_sha256", ""))

    @property
    def under_way(self) -> bool:
        """Whether it has a checkpoint."""
        return bool(self.heads)

    @property
    def heads(self) -> list[Path]:
        """Its checkpoints, of one in S3 also those of which this machine has the head alone (see `Home.look_at_newest`)."""
        return [path for folder in (self.checkpoints, self.path / HEADS) for path in folder.glob("step-*") if path.is_dir()]

    @property
    def origin(self) -> str:
        """The data's address, for people and for a command on another machine."""
        return self.data_at or str(self.data)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def encoder(self) -> Path:
        return self.path / "encoder"

    def save(self) -> None:
        """Write run.json, atomically."""
        self.path.mkdir(parents=True, exist_ok=True)
        # A relative path is stored relative to the run: the next command may start in another folder.
        data = self.data if self.data.is_absolute() else os.path.relpath(self.data, self.path)
        text = asdict(self) | {"schema": SCHEMA, "config": self.config.to_dict(), "data": self.data_at or str(data)}
        del text["path"], text["data_at"]
        for name in ("start", "subset"):
            if not text[name]:
                del text[name]
        if not self.notes:
            del text["notes"]  # earlier versions do not know it
        files.write_text(self.path / "run.json", json.dumps(text, indent=1) + "\n")

    def noted(self, **fields: str) -> Self:
        """The same run with `fields` changed. In run.json only these fields change: others may have changed since it was read.

        If another run has taken the directory meanwhile (a trial that starts again), its run.json stays.
        """
        path = self.path / "run.json"
        with _NOTING:
            there = files.read_json(path, _INSTEAD) if path.is_file() else {}
            if there.get("created") == self.created:
                files.write_text(path, json.dumps(there | fields, indent=1) + "\n")
        return replace(self, **fields)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """A lock: inside, no other process begins or trains this run, since two would remove each other's checkpoints. It holds on one
        machine, and on shared disks with locks; it ends with its process. Raises UserError if another process holds it, or has begun a
        run here since this one was opened."""
        made = [folder for folder in self.path.parents if not folder.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(files.locked(self.path / _LOCK, wait=False))
            except BlockingIOError:
                raise UserError(f"another process is training {self.path}; wait for it, end it, or use another --run") from None
            try:
                if (self.path / "run.json").is_file() and load_run(self.path).created != self.created:
                    raise UserError(f"another process has just begun a run in {self.path}; give the command again, or use another --run")
                yield
            finally:
                if {p.name for p in self.path.iterdir()} == {_LOCK}:  # the run was refused: no folder stays
                    (self.path / _LOCK).unlink()
                    with contextlib.suppress(OSError):  # other files came meanwhile
                        for folder in (self.path, *made):
                            folder.rmdir()

    def took(self, phase: str, seconds: float) -> None:
        """Note the seconds that `phase` took. A resumed training adds to its earlier seconds; other phases replace them."""
        assert phase in _PHASES
        path = self.path / "timings.json"
        timings = self.timings()
        before = timings.get(phase, 0.0) if phase in ("start", *STAGES) else 0.0
        files.write_text(path, json.dumps(timings | {phase: round(before + seconds, 2)}) + "\n")

    def timings(self) -> dict[str, float]:
        """Phase → seconds, in the order of the job."""
        path = self.path / "timings.json"
        seconds = files.read_json(path, f"remove {path}") if path.is_file() else {}
        fields.require(seconds, {phase: float for phase in _PHASES if phase in seconds}, path, f"remove {path}")
        return {phase: seconds[phase] for phase in _PHASES if phase in seconds}

    def append(self, metrics: dict[str, Any]) -> None:
        """One report, as a line of metrics.jsonl."""
        line = json.dumps({"time": round(time.time(), 3), **metrics}).encode() + b"\n"
        with open(self.path / "metrics.jsonl", "ab+", opener=files.plain) as file:
            if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                line = b"\n" + line  # a machine that crashed left half a line
            file.write(line)

    def fill(self, reports: list[dict[str, Any]]) -> None:
        """Append those `reports`, from the checkpoint that training goes on from, that metrics.jsonl lacks: after a driver's death its
        workers write checkpoints for some more seconds, and a run in S3 may have lost its newest lines with the driver."""
        known = {row["step"] for row in self.history()}
        for report in reports:
            if report["step"] not in known:
                self.append({name: value for name, value in report.items() if name != "mark"})  # a sweep's, on whose trial it is of

    def history(self) -> list[dict[str, float]]:
        """All reports in order of steps. Of a step that was repeated after a failure, the last report counts."""
        path = self.path / "metrics.jsonl"
        rows: dict[int, dict[str, float]] = {}
        if not path.exists():
            return []
        files.require_small(path, "remove its first lines", _MOST_METRICS)
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            with contextlib.suppress(json.JSONDecodeError):  # half a line of a machine that crashed
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    raise
                except (ValueError, RecursionError):  # a number of thousands of digits, or brackets
                    row = None
                if not isinstance(row, dict) or not fields.fits(row.get("step"), int):
                    raise UserError(f"{path}, line {number}, is no report: it has no step; remove that line")
                if odd := [name for name, value in row.items() if not _is_reported(name, value)]:
                    raise UserError(f"{path}, line {number}, is no report: {odd[0]!r} is no number; remove that line")
                rows[row["step"]] = row
        return [rows[step] for step in sorted(rows)]

    def evaluation_file(self, limited: bool = False) -> Path:
        return self.path / ("evaluation-limited.json" if limited else "evaluation.json")

    def evaluation(self, limited: bool = False) -> dict[str, Any] | None:
        """The JSON of `pipelines.runs.scores.write`: `scores`, a row per method with its name and numbers, weakest first, and their
        settings. None if the run was not evaluated yet."""
        path, instead = self.evaluation_file(limited), f"evaluate the run again: `simclr evaluate {self.path}`"
        if not path.is_file():
            return None
        text = files.read_json(path, instead)
        fields.require(text, {"scores": list[dict[str, Any]]}, path, instead)
        if not text["scores"]:
            raise UserError(f"{path} is damaged: it has no scores; {instead}")
        for row in text["scores"]:
            fields.require(row, {"name": str, **{key: float for key in row if key != "name"}}, f"a score in {path}", instead)
        return text


def _is_reported(name: str, value: Any) -> bool:
    """Whether a report may say this: a number, NaN too, or a text about stragglers."""
    if name == "stragglers":
        return isinstance(value, str)
    return isinstance(value, float) or fields.fits(value, float)  # of whole numbers those that a float can hold


def manifest_digest(data: Path) -> str:
    """sha256 of `data`/manifest.json, but for the modification times in it."""
    return digest_of((data / "manifest.json").read_bytes())


def described(start: dict[str, Any]) -> str:
    """The origin of a run's first weights, from its `start`."""
    at = f", step {start['step']:,}" if start["step"] is not None else ""
    return f"{start['from']}{at} (sha256 {start['sha256'][:12]}…)"


def subset_described(subset: dict[str, Any]) -> str:
    """The images that a run sees, from its `subset`."""
    if not subset:
        return "all of the training split"
    return f"{subset['images']:,} of {subset['from']} (sha256 {subset['sha256'][:12]}…)"


def ways_on(run: object) -> str:
    """How a user trains on from the weights of a pretraining `run` beyond its config, for messages."""
    return (
        f"to train on from its weights in a new run: `simclr pretrain --extend {run} --train.epochs N` (its config and data), "
        f"or a recipe with --start {run}"
    )


def open_run(
    path: Path | None,
    recipe: str,
    config: Config,
    data: Path,
    data_at: str = "",
    stage: str = "pretrain",
    start: dict[str, Any] | None = None,
    asked: object = None,
    subset: dict[str, Any] | None = None,
) -> Run:
    """The run of this config and data (`data` may be a copy of `data_at`), or of a `subset` of its images, that began with the weights
    `start`: a new one, or the one to go on with. `path` may be a copy of the directory that was `asked` for.

    Without `path` the directory is runs/RECIPE-DIGEST, so the same command finds its run again. Raises UserError if `path` holds a
    run of another config, data, subset or start, with the first differences, or no run.
    """
    start, subset = start or {}, subset or {}
    digest = manifest_digest(data)
    if path is None:
        old = {new: name for name, new in RENAMED.items()}  # old field names in the key, so that the same command finds older runs
        known = {k: v for k, v in config.flat().items() if k not in ADDED or v != ADDED[k]}
        key = {old.get(k, k): v for k, v in known.items() if not k.startswith(_OPERATIONAL)}
        # No entries without: such runs stay where they were.
        given = [*([start["sha256"]] if start else []), *([f"subset {subset['sha256']}"] if subset else [])]
        name = hashlib.sha256(json.dumps([key, digest, *given], sort_keys=True).encode()).hexdigest()[:8]
        path = Path("runs") / f"{recipe}-{name}"
    if (path / "run.json").exists():
        run = load_run(path)
        if run.stage != stage:
            raise UserError(f"run directory {path} was made by `simclr {run.stage}`, this is `simclr {stage}`; use another --run")
        theirs, ours = run.config.flat(), config.flat()
        same = [k for k in ours if k in theirs and k != "method" and not k.startswith(_OPERATIONAL)]
        different = [f"{k} {theirs[k]} there, {ours[k]} here" for k in same if theirs[k] != ours[k]]
        if type(run.config) is not type(config):
            different.insert(0, f"method {method_name(run.config)} there, {method_name(config)} here")
        if run.data_digest != digest:
            different.append(f"data {run.origin} there, {data_at or data} here")
        if run.start.get("sha256") != start.get("sha256"):
            there, here = (described(given) if given else "those of its seed" for given in (run.start, start))
            different.insert(0, f"first weights {there} there, {here} here")
        if run.subset.get("sha256") != subset.get("sha256"):
            different.insert(0, f"images {subset_described(run.subset)} there, {subset_described(subset)} here")
        if different:
            more = f" and {len(different) - 3} more" if len(different) > 3 else ""
            further = f"; {ways_on(asked or path)}" if stage == "pretrain" else ""
            raise UserError(f"run directory {path} belongs to another config: {'; '.join(different[:3])}{more}; use another --run{further}")
        run = replace(run, config=config, data=data, data_at=data_at)
    elif path.exists() and (not path.is_dir() or {p.name for p in path.iterdir()} - {_LOCK}):
        raise UserError(f"{path} exists and is no run (it has no run.json); use another --run")
    else:
        command = shlex.join(["simclr", *(redacted(word) for word in sys.argv[1:])])
        run = Run(
            path=path,
            recipe=recipe,
            config=config,
            data=data,
            data_at=data_at,
            data_digest=digest,
            command=command,
            created=time.time(),
            environment=environment() | place(),
            stage=stage,
            start=start,
            subset=subset,
        )
    files.require_writable(path)
    return run


def load_run(path: Path) -> Run:
    """The run in directory `path`. Raises UserError if there is none, or one of another schema."""
    if not (path / "run.json").is_file():
        raise UserError(f"{path} is no run directory (it has no run.json); `simclr pretrain RECIPE --data DIR` makes one")
    return _run_of(path, files.read_json(path / "run.json", _INSTEAD))


def _run_of(path: Path, text: dict[str, Any]) -> Run:
    """The run in directory `path` whose run.json is `text`."""
    where = path / "run.json"
    if text.pop("schema", None) != SCHEMA:
        raise UserError(f"{where} has another schema than {SCHEMA}; go on with the version that wrote it")
    fields.require(text, {"data": str, "config": dict[str, Any]}, where, _INSTEAD)
    stage = text.setdefault("stage", "pretrain")
    fields.require(text, {"stage": Literal[tuple(STAGES)]}, where, _INSTEAD)
    for name, hints in (("start", _START), ("subset", _SUBSET)):
        if name in text:
            fields.require(text, {name: dict[str, Any]}, where, _INSTEAD)
            fields.require(text[name], hints, f"{name} in {where}", _INSTEAD)
    try:
        config = read_config(stage, text.pop("config"))
    except UserError as error:
        raise UserError(f"{where} is damaged: {error}; {_INSTEAD}") from None
    at, data = address(text["data"]), Path(text.pop("data"))
    if at is not None:
        text["data_at"], data = str(at), copy_of(at, "shards")
    elif not data.is_absolute():
        data = Path(os.path.relpath(path / data))
    run = fields.build(Run, text, where, _INSTEAD, path=path, config=config, data=data)
    if not 0 <= run.created < LATEST_S:
        raise UserError(f"{where} is damaged: created is {run.created:g}, expected a Unix time; {_INSTEAD}")
    # What an earlier version wrote, or another hand, may have credentials in it.
    return replace(run, tracking_uri=redacted(run.tracking_uri), command=redacted(run.command))
