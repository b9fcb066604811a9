"""A run's reports on their way to MLflow, which may be slow, away or full: the training never waits for it.

What it has not taken when the job ends, or its driver is killed, is in metrics.jsonl, and is logged from there the next time.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from pipelines.runs.directory import Run
from pipelines.terminal import say
from pipelines.tracking import client
from pipelines.tracking import uri as mlflow_uri
from simclr.errors import UserError

_AGAIN_S, _PAUSE_MOST_S = 2.0, 60.0  # pauses between tries to open double from the first to the second
_OPEN_S = 60.0  # what a finished job waits for an opening under way


def require(uri: str, begun: bool) -> None:
    """Raise UserError where no MLflow answers at `uri`. Of what has `begun` it may be away: that is said, and it is waited for."""
    try:
        mlflow_uri.check(uri)
    except UserError as error:
        if not begun:
            raise
        say(f"{error}; the training goes on without it, and what it misses is logged when it is back")


def open_tracker(
    run: Run, uri: str, tags: dict[str, str] | None = None, known: Callable[[Run], object] = lambda run: None
) -> client.Tracker:
    """The MLflow run of `run` at `uri`, with more `tags`: the one it has there, or a new one. Takes seconds. Raises UserError where
    MLflow refuses.

    As soon as there is one its id is in run.json, and `known` gets the run with it: a job that is killed, or an opening that fails
    half-way, goes on in the same MLflow run.
    """
    params: dict[str, object] = dict(run.config.flat())
    params |= {"recipe": run.recipe, "data": run.origin, "lr": _lr(run)}
    tags = {"run_directory": str(run.path.absolute()), "command": run.command, **(tags or {})}
    at = mlflow_uri.redacted(uri)
    same = run.tracking_run if run.tracking_uri == at else ""

    def note(run_id: str) -> None:
        known(run.noted(tracking_uri=at, tracking_run=run_id))

    return client.Tracker(uri, run.recipe, run.path.name, params, tags, same or None, note)


def log_report(tracker: client.Tracker, report: dict[str, Any]) -> None:
    """Queue a report's metrics, with the time of its line in metrics.jsonl, if it is one."""
    metrics = {k: float(v) for k, v in report.items() if "/" in k or k == "epoch"}
    tracker.log(int(report["step"]), metrics, report.get("time"))


def catch_up(run: Run, uri: str, tags: dict[str, str] | None = None, status: str = "FINISHED") -> Run:
    """Log what MLflow has not taken of a run that is over. Raises UserError where MLflow refuses, or is away still."""
    say(f"not all of {run.path} was logged to MLflow; logging it at {mlflow_uri.redacted(uri)}")
    tracker = open_tracker(run, uri, tags)
    for report in run.history():
        log_report(tracker, report)
    lost = tracker.close(status)
    return run.noted(tracking_uri=mlflow_uri.redacted(uri), tracking_run=tracker.run_id, unlogged="yes" if lost else "")


def _lr(run: Run) -> float:
    from simclr.optim import lr_peak

    return lr_peak(run.config.optim.base_lr, run.config.train.batch_size, run.config.optim.scaling)


class Tracked:
    """The MLflow run of a job, opened in a thread that tries until it succeeds: what is logged before it is open waits.

    run.json calls the run unlogged until `close` has delivered everything, since a driver that is killed says nothing any more.
    `tags` is called by that thread, at each try, and may fail as the opening may.
    """

    def __init__(self, run: Run, uri: str, tags: Callable[[], dict[str, str]] = dict) -> None:
        self.run, self.uri, self.tags = run.noted(unlogged="yes"), uri, tags
        self.tracker: client.Tracker | None = None
        self.error: BaseException | None = None
        self.waiting: list[dict[str, Any]] = []
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._open, name="tracking", daemon=True)

    def open(self) -> None:
        """Begin opening. Not before the workers run: its imports and tables take seconds that they need too."""
        self.thread.start()

    def _open(self) -> None:
        pause = _AGAIN_S
        while self.tracker is None:
            try:
                tracker = open_tracker(self.run, self.uri, self.tags(), self._known)
                if self.over.is_set():  # too late: nobody would end it, and who catches up logs these rows too
                    return
                for row in self.run.history():  # of a driver before this one; what MLflow has is left out
                    log_report(tracker, row)
                self.tracker, self.error = tracker, None
            except Exception as error:  # a tracker that fails must not lose the training: it is named at the end
                if self.error is None:
                    if not isinstance(error, UserError | OSError):
                        traceback.print_exception(error)  # a bug, whose place somebody should see
                    say(f"MLflow does not open yet ({error}); the training goes on, and so does the trying")
                self.error = error
                if self.over.wait(pause):
                    return
                pause = min(2 * pause, _PAUSE_MOST_S)

    def _known(self, run: Run) -> None:
        self.run = run

    def log(self, report: dict[str, Any]) -> None:
        """Queue a report's metrics; returns at once."""
        self.waiting.append(report)
        if self.tracker is not None:
            for row in self.waiting:
                log_report(self.tracker, row)
            self.waiting.clear()

    def close(self, status: str) -> Run:
        """Flush and end the MLflow run; returns the job's run with its id."""
        if self.thread.ident is None or (status == "KILLED" and self.thread.is_alive()):
            self.over.set()
            return self.run
        until = time.monotonic() + _OPEN_S
        while self.thread.is_alive() and self.error is None and time.monotonic() < until:
            self.thread.join(0.2)  # opening for the first time: it may well succeed
        self.over.set()
        if self.tracker is None:
            why = self.error or f"it did not open within {_OPEN_S:.0f} s"
            say(f"nothing was logged to MLflow: {why}; metrics.jsonl has every report, the same command again logs them")
            return self.run
        if self.waiting:
            self.log(self.waiting.pop())
        return self.run if self.tracker.close(status) else self.run.noted(unlogged="")
