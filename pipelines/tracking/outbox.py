"""Sends reports to MLflow, which may be slow, unreachable or full: training never waits for it.

A run's metrics.jsonl is the queue. One thread reads it from the first byte that MLflow lacks; outbox.json beside it stores that offset.
So the next job sends the undelivered reports of a job that ended, or whose driver was killed. MLflow itself knows its steps: if the
stored offset is too old or lost, no step is logged twice.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pipelines.runs.directory import Run
from pipelines.terminal import bug, say
from pipelines.tracking import client, evaluated
from pipelines.tracking import uri as mlflow_uri
from simclr import fields, files
from simclr.errors import UserError
from simclr.family import method_name
from simclr.recipes import changed_from

_EVERY_S, _AWAY_S = 0.5, 30.0  # between two looks; doubles up to the second while the server does not answer
_SCORES_S = 30.0  # that an evaluation waits for MLflow
SCORES = "scores"
"""`Run.unlogged` where MLflow has all reports and lacks an evaluation."""
_FLUSH_S, _KILLED_S = 30.0, 3.0  # a finished job waits so long without progress; an interrupted job ends within 5 s


def require(uri: str, begun: bool) -> None:
    """Raise UserError if no MLflow answers at `uri`. If the run has `begun`, only say so: it goes on, and the outbox retries."""
    try:
        mlflow_uri.check(uri)
    except UserError as error:
        if not begun:
            raise
        say(f"{error}; the training goes on without it, and the outbox sends the undelivered reports when it answers")


def open_run(
    run: Run, uri: str, tags: dict[str, str], known: Callable[[str], object] = lambda run_id: None, copy: str | None = None
) -> client.MLflowRun:
    """The MLflow run of `run` at `uri`, with more `tags`: the existing one, or a new one. `known` gets its id at once. `copy` is the id of
    one that is no copy of run.json's."""
    from simclr.optim import lr_peak

    mlflow_uri.check(uri)  # finds a silent server in seconds; MLflow's own first request takes minutes
    lr = lr_peak(run.config.optim.base_lr, run.config.train.batch_size, run.config.optim.scaling)
    method = method_name(run.config) if run.stage == "pretrain" else run.stage
    params: dict[str, object] = {**run.config.flat(), "method": method, "recipe": run.recipe, "data": run.origin, "lr": lr}
    given = {"start": run.start, "subset": run.subset}
    tags = {f"{kind}_{key}": str(v) for kind, about in given.items() for key, v in about.items() if v is not None} | tags
    tags = {
        "run_directory": str(run.path.absolute()),
        "command": run.command,
        "mlflow.note.content": changed_from(run.recipe, run.config),  # the description at the head of MLflow's page
        **({"notes": "; ".join(run.notes)} if run.notes else {}),
        "method": method,  # a column to sort by
        **_origin(run),
        **tags,
    }
    same = run.tracking_run if mlflow_uri.same_server(run.tracking_uri, uri) else copy
    return client.MLflowRun(uri, run.recipe, run.path.name, params, tags, same or None, known)


def _batches(path: Path, note: dict[str, Any]) -> Iterator[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """The reports in the run directory `path` from the offset in `note`, one request at a time, each with the note behind it."""
    batch, values = list[dict[str, Any]](), 0
    with contextlib.suppress(FileNotFoundError), (path / "metrics.jsonl").open("rb") as lines:
        lines.seek(max(note["bytes"] - 1, 0))
        if note["bytes"] and lines.read(1) != b"\n":  # the file was replaced by one fetched from S3
            note["bytes"] = lines.seek(0)
        for line in lines:
            if not line.endswith(b"\n"):  # it is being written, or its machine crashed
                break
            # Half a line of a crash with another line behind it, and what somebody wrote into the file, are no reports.
            with contextlib.suppress(ValueError, TypeError, AttributeError, KeyError):
                report = json.loads(line)
                values += len(client.metrics_of(report)) + 0 * int(report["step"])
                batch.append(report)
            note["bytes"] += len(line)
            if values > client.MOST - 100:  # a report has fewer than 100
                yield batch, note
                batch, values = [], 0
    if batch:
        yield batch, note


def _origin(run: Run) -> dict[str, str]:
    """Code, host, versions and data of a run as tags, some by the names that MLflow's pages have columns for."""
    words, commit = run.command.split()[:2], run.environment.get("commit", "")
    tags = {"mlflow.source.name": " ".join(words), "mlflow.source.type": "LOCAL", "data_sha256": run.data_digest}
    tags |= {"git_commit": commit, "mlflow.source.git.commit": commit.removesuffix("-dirty")} if commit else {}
    tags |= {name: run.environment[name] for name in ("host", "machine") if name in run.environment}
    versions = (entry.rpartition(" ") for entry in run.environment.get("versions", "").split(", "))
    return tags | {f"version.{name.lower()}": version for name, _, version in versions if name}


class Posted:
    """A run that is sent to MLflow. run.json calls it unlogged until MLflow has all of it, since a killed driver cannot write that."""

    def __init__(self, run: Run, uri: str, tags: Callable[[], dict[str, str]] = dict) -> None:
        """`tags` is called when the MLflow run is opened, and may raise UserError like that request."""
        self.run, self.uri, self.tags = run.noted(unlogged="yes"), uri, tags
        self.path = run.path  # the run's directory may move while it is sent
        self.status, self.delivered = "", False  # the run's end status, once it is over; whether MLflow has that status
        self.mlflow: client.MLflowRun | None = None

    def deliver(self) -> Iterator[None]:
        """Open the MLflow run, send the undelivered reports, and end it if the run is over. Yields after each request."""
        status = self.status  # read before the lines, so that no line appended before the end is missed
        if self.delivered:
            return
        if self.mlflow is None:
            self.mlflow = open_run(self.run, self.uri, self.tags(), self._known)
            yield
            self.mlflow.trained_on(self.run.origin, self.run.data_digest)
            yield
        for batch, note in self.batches():
            self.mlflow.log(batch)
            files.write_text(self.path / "outbox.json", json.dumps(note) + "\n")
            yield
        if status:
            evaluated.log(self.uri, replace(self.run, path=self.path))
            yield
            self.mlflow.end(status)
            self._noted(unlogged="")
            self.delivered = True

    def batches(self) -> Iterator[tuple[list[dict[str, Any]], dict[str, Any]]]:
        """Undelivered reports, one request at a time, each with the note to store once MLflow has them."""
        yield from _batches(self.path, self._note())

    def lost(self) -> int:
        """How many values are undelivered."""
        return sum(len(client.metrics_of(report)) for batch, _ in self.batches() for report in batch)

    def _note(self) -> dict[str, Any]:
        """The stored offset: how many bytes of metrics.jsonl this MLflow run has."""
        noted: dict[str, Any] = {}
        with contextlib.suppress(UserError, FileNotFoundError):  # a damaged note: MLflow itself says which steps it has
            noted = files.read_json(self.path / "outbox.json", "")
        whole = noted.get("mlflow_run") == self.run.tracking_run and fields.fits(noted.get("bytes"), int) and noted["bytes"] >= 0
        return noted if whole else {"mlflow_run": self.run.tracking_run, "bytes": 0}

    def _known(self, run_id: str) -> None:
        """Store the run's id, so that a killed job, or an opening that failed half-way, goes on in the same MLflow run."""
        self._noted(tracking_uri=mlflow_uri.redacted(self.uri), tracking_run=run_id)

    def _noted(self, **fields: str) -> None:
        self.run = replace(self.run, path=self.path).noted(**fields)


def catch_up(run: Run, uri: str) -> Run:
    """Log the undelivered reports and scores of a run that is over. Raises UserError if MLflow refuses, or still does not answer."""
    if run.unlogged == SCORES and mlflow_uri.same_server(run.tracking_uri, uri):
        mlflow_uri.check(uri)
        evaluated.log(uri, run)
        return run.noted(unlogged="")
    say(f"not all of {run.path} was logged to MLflow; logging it at {mlflow_uri.redacted(uri)}")
    posted = Posted(run, uri)
    posted.status = "FINISHED"
    list(posted.deliver())
    return posted.run


def logged_at(run: Run, uri: str) -> tuple[Run, str]:
    """(the run, which is over, its id at MLflow `uri`) with all of its reports there. The address is one that the user names, or that
    `trust.address_for` lets a run name.

    Where MLflow there knows the run, the server has moved, and run.json gets the address. Where it does not, the run is logged there, too,
    from its directory, with tags that say where it came from: once, however often it is published.
    """
    if run.tracking_run and not mlflow_uri.same_server(uri, run.tracking_uri):
        if not client.has_run(uri, run.tracking_run):
            return run, _copied(run, uri)
        run = run.noted(tracking_uri=mlflow_uri.redacted(uri))
    if run.unlogged or not run.tracking_run:
        run = catch_up(run, uri)
    return run, run.tracking_run


def _copied(run: Run, uri: str) -> str:
    there = client.copy_of(uri, run.recipe, run.tracking_run)
    if there is None:
        say(f"{run.path} was logged at {run.tracking_uri}; logging it at {mlflow_uri.redacted(uri)}, too")
    copy = open_run(run, uri, {client.COPY_OF: run.tracking_run, client.COPIED_FROM: run.tracking_uri}, copy=there)
    copy.trained_on(run.origin, run.data_digest)
    for reports, _ in _batches(run.path, {"bytes": 0}):
        copy.log(reports)
    copy.end("FINISHED")
    return copy.run_id


def log_scores(run: Run, uri: str) -> Run:
    """Send what `simclr evaluate` found of a run that MLflow at `uri` knows, within half a minute. Where that fails, it is said, and the
    next evaluation, the same training command and `simclr publish` try again."""
    run = run.noted(unlogged=run.unlogged or SCORES)
    done, trouble = list[Run](), list[str]()

    def work() -> None:
        try:
            if not mlflow_uri.same_server(uri, run.tracking_uri) and not client.has_run(uri, run.tracking_run):
                raise UserError("it does not know this run, which `simclr publish` takes there")
            done.append(logged_at(run, uri)[0])
        except (UserError, OSError) as error:
            trouble.append(str(error))
        except Exception as error:  # no error may end the evaluation
            bug(error)
            trouble.append("a bug")

    thread = threading.Thread(target=work, name="scores", daemon=True)
    thread.start()
    thread.join(_SCORES_S)
    if done:
        say(f"the scores are in MLflow at {mlflow_uri.redacted(uri)}, run {run.tracking_run}")
        return done[0]
    why = trouble[0] if trouble else f"no answer within {_SCORES_S:.0f} s"
    again = "they are on disk, and the next `simclr evaluate` or `simclr publish` of this run sends them"
    say(f"the scores did not reach MLflow at {mlflow_uri.redacted(uri)} ({why}); {again}")
    return run


class Outbox:
    """The thread that sends runs to MLflow at `uri`, and retries until it succeeds."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.posted: list[Posted] = []
        self.trouble: Exception | None = None
        self.last: Callable[[], object] = lambda: None
        self.moved = 0.0  # time at which MLflow last took a request
        self.closing, self.over = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._work, name="outbox", daemon=True)

    def follow(self, run: Run, tags: Callable[[], dict[str, str]] = dict) -> Posted:
        """Send the lines of the metrics.jsonl of `run`, also those appended later, until its `status` says that it ended."""
        self.posted.append(Posted(run, self.uri, tags))
        return self.posted[-1]

    def start(self) -> None:
        """Start the thread, if it does not run."""
        if self.thread.ident is None:
            self.thread.start()

    def close(self, status: str, last: Callable[[], object] = lambda: None) -> None:
        """Send the undelivered reports, end the open MLflow runs with `status`, then call `last`. Says what could not be delivered."""
        for posted in self.posted:
            posted.status = posted.status or status
        self.last, began = last, time.monotonic()
        self.moved = began
        self.closing.set()
        while self.thread.is_alive() and time.monotonic() < (began + _KILLED_S if status == "KILLED" else self.moved + _FLUSH_S):
            self.thread.join(0.05)
        self.over.set()
        late = [posted for posted in self.posted if not posted.delivered]
        if self.thread.ident is not None and (late or self.thread.is_alive()):
            lost = sum(posted.lost() for posted in late)
            what = f"{lost:,} metrics" if lost else "the end of the run"
            why = f"{what} did not reach MLflow at {mlflow_uri.redacted(self.uri)} ({self.trouble or 'no answer'})"
            say(f"{why}; metrics.jsonl has every report, and the same command again logs the undelivered reports")

    def abandon(self) -> None:
        """Send nothing more: another driver sends these runs now."""
        self.over.set()

    def _work(self) -> None:
        pause = _EVERY_S
        while not self.over.is_set():
            closing = self.closing.is_set()  # read before the runs, as above
            failed = [posted for posted in list(self.posted) if not self._tried(partial(self._serve, posted))]
            # A run that does not open even now would not open at the next try.
            if closing and not self.over.is_set() and not any(posted.mlflow for posted in failed) and self._tried(self.last):
                return
            self.trouble = self.trouble if failed or closing else None
            pause = min(2 * pause, _AWAY_S) if failed and not closing else _EVERY_S
            (self.over if closing else self.closing).wait(pause)

    def _serve(self, posted: Posted) -> None:
        for _ in posted.deliver():
            self.moved = time.monotonic()
            if self.over.is_set():  # `catch_up` logs the rest
                return

    def _tried(self, work: Callable[[], object]) -> bool:
        """Whether `work` succeeds. No error may end the training, and a later try may succeed: it is said once, a bug with its
        traceback."""
        try:
            work()
            return True
        except Exception as error:
            if not isinstance(error, UserError | OSError) and type(error) is not type(self.trouble):
                bug(error)
            elif self.trouble is None and not self.closing.is_set():
                say(f"MLflow does not take the reports ({error}); the training goes on, and the outbox retries")
            self.trouble = error
            return False
