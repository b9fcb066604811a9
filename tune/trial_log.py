"""Writes the messages of all trials to each trial's metrics.jsonl; the outbox sends them from there to MLflow, to a parent run with a run
below it for each trial. It runs in the sweep's driver, so that MLflow is imported once and not by every trial.

The thread that writes never waits for MLflow. When it did, an unreachable server blocked the lines of running trials at each trial's
end, and lines still queued at the sweep's end were lost.
"""

from __future__ import annotations

import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

from pipelines.runs.directory import load_run
from pipelines.terminal import bug, say
from pipelines.tracking import client
from pipelines.tracking import uri as mlflow_uri
from pipelines.tracking.outbox import Outbox, Posted
from pipelines.tracking.tensorboard import FOLDER, Scalars
from pipelines.train import messages
from simclr.errors import UserError
from tune import sweep_dir
from tune.sweep_dir import Sweep

_LOOK_S = 0.5
_DRAIN_S = 30.0  # for the lines that are queued at the sweep's end; a line takes a millisecond


class Ledger:
    """Takes messages from the queue `inbox` (see `messages.make`) until it is closed."""

    def __init__(self, sweep: Sweep, inbox: Any, uri: str) -> None:
        self.sweep, self.inbox, self.uri, self.outbox = sweep, inbox, uri, Outbox(uri)
        self.parent: client.MLflowRun | None = None
        self.posted: dict[str, Posted] = {}  # of running trials
        self.scalars: dict[str, Scalars] = {}  # TensorBoard's, of the same
        self.over = threading.Event()
        self.bug: Exception | None = None
        self.thread = threading.Thread(target=self._work, name="ledger", daemon=True)
        self.thread.start()

    def ended(self, name: str, status: str) -> None:
        """Queue the end of trial `name` after all of its reports."""
        self.inbox.put(messages.TrialOver(trial=name, status=status))

    def close(self, status: str, artifacts: list[Path], metrics: dict[str, float]) -> Sweep:
        """Write the queued messages; then end the trials' MLflow runs, send the undelivered reports of trials that are over, and end the
        parent run with `artifacts` and `metrics`. Returns the sweep with the parent's id. Raises the bug that has ended the thread."""
        self.over.set()
        self.thread.join(_DRAIN_S)
        for name in list(self.scalars):
            self._close_scalars(name)
        if self.bug is not None and status != "KILLED":
            raise self.bug
        if status != "KILLED":
            self._follow_unlogged()
        self.outbox.close(status, partial(self._end_parent, status, artifacts, metrics))
        return self.sweep

    def _work(self) -> None:
        """The thread. A bug in it is printed at once, and ends the sweep after its trials: these keep their own records."""
        try:
            self._take()
        except Exception as error:
            bug(error)
            self.bug = error

    def _take(self) -> None:
        while True:
            last = self.over.is_set()  # asked before taking, so that no message put before the end is missed
            try:
                message: messages.OfTrial | None = messages.take(self.inbox, _LOOK_S)
            except EOFError:  # Ray was shut down
                return
            if message is None and last:
                return
            try:
                if message is not None:
                    self._enter(message)
            except (UserError, OSError) as error:  # an error in one trial's records must not stop the others'
                say(f"trial {message.trial if message is not None else ''}: {error}")

    def _enter(self, message: messages.OfTrial) -> None:
        name = message.trial
        match message:
            case messages.Said(text):
                say(f"trial {name}: {text}")
            case messages.TrialFailed(reason=reason, bug=trace):
                if trace:
                    bug(trace)
                say(f"trial {name} failed: {reason}")
            case messages.TrialBeganAgain(reason=reason, bug=trace):
                if trace:
                    bug(trace)
                say(f"trial {name} failed: {reason}; it starts again with another seed")
                self._close_scalars(name)
                if posted := self.posted.pop(name, None):
                    posted.path, posted.status = sweep_dir.first_try(self.sweep.path, name), "FAILED"
            case messages.TrialOver(status=status):
                self._close_scalars(name)
                if posted := self.posted.pop(name, None):
                    posted.status = status
            case messages.Reported():
                if name not in self.posted:
                    self.posted[name] = self._follow(self.sweep.path / "trials" / name)
                self.posted[name].run.append(message.line())
                if self.sweep.tensorboard is not None:
                    if name not in self.scalars:
                        self.scalars[name] = self._scalars_of(name)
                    self.scalars[name].write(message.line())

    def _scalars_of(self, name: str) -> Scalars:
        """The scalars of a trial, which go on where an earlier driver or its first try left them."""
        folder, place = self.sweep.path / "trials" / name, self.sweep.tensorboard
        return Scalars(Path(place) / self.sweep.path.name / name if place else folder / FOLDER, load_run(folder))

    def _close_scalars(self, name: str) -> None:
        if scalars := self.scalars.pop(name, None):
            scalars.close()

    def _follow(self, folder: Path) -> Posted:
        posted = self.outbox.follow(load_run(folder), partial(self._tags, folder.name))
        self.outbox.start()
        return posted

    def _follow_unlogged(self) -> None:
        """Send the undelivered reports of trials that ended under a driver that was killed."""
        over = {self.sweep.path / "trials" / t.name: t.status for t in sweep_dir.trials(self.sweep.path) if t.status != "running"}
        over |= dict.fromkeys(sweep_dir.first_tries(self.sweep.path), "failed")
        sent = {posted.path for posted in list(self.outbox.posted)}
        for folder, status in over.items():
            # A trial may fail before it has a run.
            if folder not in sent and (folder / "run.json").is_file() and load_run(folder).unlogged:
                self._follow(folder).status = "FAILED" if status == "failed" else "FINISHED"

    def _tags(self, name: str) -> dict[str, str]:
        """The tags that put a trial's MLflow run below the parent; opens the parent if needed. Raises UserError if MLflow refuses."""
        self.parent = self.parent or self._open_parent()
        place = {"run_directory": f"{self.sweep.at}/trials/{name}"} if self.sweep.at else {}
        return {"mlflow.parentRunId": self.parent.run_id, "sweep": self.sweep.path.name, "trial": name, **place}

    def _open_parent(self) -> client.MLflowRun:
        sweep = self.sweep
        params: dict[str, object] = {k: getattr(sweep, k) for k in ("space", "recipe", "data", "search", "scheduler", "metric", "seeds")}
        same = sweep.tracking_run if mlflow_uri.same_server(sweep.tracking_uri, self.uri) else ""
        tags = {"sweep_directory": sweep.at or str(sweep.path.absolute()), "command": sweep.command}

        def known(run_id: str) -> None:
            self.sweep = sweep.noted(tracking_uri=mlflow_uri.redacted(self.uri), tracking_run=run_id)

        parent = client.MLflowRun(self.uri, sweep.recipe, sweep.path.name, params, tags, same or None, known)
        parent.artifact(sweep.path / "space.json")
        return parent

    def _end_parent(self, status: str, artifacts: list[Path], metrics: dict[str, float]) -> None:
        if self.parent is None:
            return
        self.parent.log([{"step": 1, "time": time.time(), **metrics}])
        for path in artifacts:
            self.parent.artifact(path)
        self.parent.end(status)
