"""Reports on their way to MLflow, which may be slow, away or full: the training never waits for it.

A run's metrics.jsonl is the queue. One thread reads it from where MLflow has taken it, which is noted beside it in outbox.json; so what
did not arrive when a job ended, or its driver was killed, is sent from there the next time. MLflow itself knows which steps it has:
where the note is older than that, or gone, nothing is logged twice.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from pipelines.runs.directory import Run
from pipelines.terminal import say
from pipelines.tracking import client
from pipelines.tracking import uri as mlflow_uri
from simclr import files
from simclr.errors import UserError

_EVERY_S, _AWAY_S = 0.5, 30.0  # between two looks; while a server is away, it doubles up to the second
_FLUSH_S, _KILLED_S = 30.0, 3.0  # a finished job waits as long while MLflow takes nothing; an interrupted one has to end within 5 s


def require(uri: str, begun: bool) -> None:
    """Raise UserError where no MLflow answers at `uri`. Of what has `begun` it may be away: that is said, and it is waited for."""
    try:
        mlflow_uri.check(uri)
    except UserError as error:
        if not begun:
            raise
        say(f"{error}; the training goes on without it, and what it misses is logged when it is back")


def open_run(run: Run, uri: str, tags: dict[str, str], known: Callable[[str], object]) -> client.MLflowRun:
    """The MLflow run of `run` at `uri`, with more `tags`: the one it has there, or a new one, whose id `known` gets at once."""
    from simclr.optim import lr_peak

    mlflow_uri.check(uri)  # a silent server is found out in seconds; MLflow's own first request takes minutes
    lr = lr_peak(run.config.optim.base_lr, run.config.train.batch_size, run.config.optim.scaling)
    params: dict[str, object] = {**run.config.flat(), "recipe": run.recipe, "data": run.origin, "lr": lr}
    tags = {"run_directory": str(run.path.absolute()), "command": run.command, **tags}
    same = run.tracking_run if run.tracking_uri == mlflow_uri.redacted(uri) else ""
    return client.MLflowRun(uri, run.recipe, run.path.name, params, tags, same or None, known)


class Posted:
    """A run that is sent to MLflow. run.json calls it unlogged until all of it is there, since a driver that is killed says nothing any
    more."""

    def __init__(self, run: Run, uri: str, tags: Callable[[], dict[str, str]] = dict) -> None:
        """`tags` of its MLflow run are asked for when it is opened, and may fail as that may."""
        self.run, self.uri, self.tags = run.noted(unlogged="yes"), uri, tags
        self.path = run.path  # may change while it is sent
        self.status, self.delivered = "", False  # how the run ended, once nothing is appended any more; whether MLflow has that too
        self.mlflow: client.MLflowRun | None = None

    def deliver(self) -> Iterator[None]:
        """Open the MLflow run, send what it does not have, and end it where the run ended: a request at each step."""
        status = self.status  # asked before reading, so that nothing appended before the end is missed
        if self.delivered:
            return
        if self.mlflow is None:
            self.mlflow = open_run(self.run, self.uri, self.tags(), self._known)
            yield
        for batch, note in self.batches():
            self.mlflow.log(batch)
            files.write_text(self.path / "outbox.json", json.dumps(note) + "\n")
            yield
        if status:
            self.mlflow.end(status)
            self._noted(unlogged="")
            self.delivered = True

    def batches(self) -> Iterator[tuple[list[dict[str, Any]], dict[str, Any]]]:
        """Reports that MLflow does not have, as many as go out at a time, and the note once it has these too."""
        note, batch, values = self._note(), list[dict[str, Any]](), 0
        with contextlib.suppress(FileNotFoundError), (self.path / "metrics.jsonl").open("rb") as lines:
            lines.seek(max(note["bytes"] - 1, 0))
            if note["bytes"] and lines.read(1) != b"\n":  # other lines are there now, fetched from S3
                note["bytes"] = lines.seek(0)
            for line in lines:
                if not line.endswith(b"\n"):  # it is being written, or its machine has died
                    break
                with contextlib.suppress(ValueError):  # half a line, once another one was appended
                    batch.append(json.loads(line))
                    values += len(client.metrics_of(batch[-1]))
                note["bytes"] += len(line)
                if values > client.MOST - 100:  # a report has fewer than 100
                    yield batch, note
                    batch, values = [], 0
        if batch:
            yield batch, note

    def lost(self) -> int:
        """How many values MLflow does not have."""
        return sum(len(client.metrics_of(report)) for batch, _ in self.batches() for report in batch)

    def _note(self) -> dict[str, Any]:
        """How many bytes of metrics.jsonl this very MLflow run has."""
        path = self.path / "outbox.json"
        noted: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        return noted if noted.get("mlflow_run") == self.run.tracking_run else {"mlflow_run": self.run.tracking_run, "bytes": 0}

    def _known(self, run_id: str) -> None:
        """A job that is killed, or an opening that fails half-way, goes on in the same MLflow run."""
        self._noted(tracking_uri=mlflow_uri.redacted(self.uri), tracking_run=run_id)

    def _noted(self, **fields: str) -> None:
        self.run = replace(self.run, path=self.path).noted(**fields)


def catch_up(run: Run, uri: str) -> Run:
    """Log what MLflow has not taken of a run that is over. Raises UserError where MLflow refuses, or is away still."""
    say(f"not all of {run.path} was logged to MLflow; logging it at {mlflow_uri.redacted(uri)}")
    posted = Posted(run, uri)
    posted.status = "FINISHED"
    list(posted.deliver())
    return posted.run


class Outbox:
    """The thread that sends runs to MLflow at `uri`, and tries until it succeeds."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.posted: list[Posted] = []
        self.trouble: Exception | None = None
        self.last: Callable[[], object] = lambda: None
        self.moved = 0.0  # when MLflow took something
        self.closing, self.over = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._work, name="outbox", daemon=True)

    def follow(self, run: Run, tags: Callable[[], dict[str, str]] = dict) -> Posted:
        """Send what is and will be in the metrics.jsonl of `run`, until its `status` says that it ended."""
        self.posted.append(Posted(run, self.uri, tags))
        return self.posted[-1]

    def start(self) -> None:
        """Begin, if it has not."""
        if self.thread.ident is None:
            self.thread.start()

    def close(self, status: str, last: Callable[[], object] = lambda: None) -> None:
        """Send what there is, end the MLflow runs that go on with `status`, and call `last` when that is done. Says what is lost."""
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
            say(f"{why}; metrics.jsonl has every report, and the same command again logs what MLflow has not taken")

    def _work(self) -> None:
        pause = _EVERY_S
        while not self.over.is_set():
            closing = self.closing.is_set()  # asked before looking, as above
            failed = [posted for posted in list(self.posted) if not self._tried(partial(self._serve, posted))]
            # Where one does not open even now, the next try would be no better.
            if closing and not self.over.is_set() and not any(posted.mlflow for posted in failed) and self._tried(self.last):
                return
            self.trouble = self.trouble if failed or closing else None
            pause = min(2 * pause, _AWAY_S) if failed and not closing else _EVERY_S
            (self.over if closing else self.closing).wait(pause)

    def _serve(self, posted: Posted) -> None:
        for _ in posted.deliver():
            self.moved = time.monotonic()
            if self.over.is_set():  # who catches up logs the rest
                return

    def _tried(self, work: Callable[[], object]) -> bool:
        """Whether `work` succeeds. Whatever the trouble is, the training must not be lost to it, and later may be better: it is told
        once, a bug with its traceback."""
        try:
            work()
            return True
        except Exception as error:
            if not isinstance(error, UserError | OSError) and type(error) is not type(self.trouble):
                traceback.print_exception(error)
            elif self.trouble is None and not self.closing.is_set():
                say(f"MLflow does not take the reports ({error}); the training goes on, and so does the trying")
            self.trouble = error
            return False
