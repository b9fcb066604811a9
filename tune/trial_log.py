"""The reports of all trials on their way to where they are kept: each trial's metrics.jsonl, and MLflow, a parent run and one below it
for each trial. In the sweep's driver, so that MLflow is imported once and not by every trial.

Who writes the lines never waits for MLflow, which is opened, and closed, in threads of its own: with a server that was away, trials
that ended held up the lines of those that ran, and those still queued at the sweep's end were lost.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any

from pipelines.runs.directory import Run, load_run
from pipelines.terminal import say
from pipelines.tracking import client
from pipelines.tracking import uri as mlflow_uri
from pipelines.tracking.outbox import Tracked, catch_up
from pipelines.train import messages
from simclr.errors import UserError
from tune import sweep_dir
from tune.sweep_dir import Sweep

_LOOK_S = 0.5
_DRAIN_S = 30.0  # for what is queued when the sweep ends: a line takes a millisecond
_MLFLOW_S, _KILLED_S = 100.0, 4.0  # for MLflow then: more than a trial's `Tracked.close` takes; for an interrupted sweep's


class Ledger:
    """Takes what comes through `inbox`, an `inbox.make()`, until it is closed."""

    def __init__(self, sweep: Sweep, inbox: Any, uri: str) -> None:
        self.sweep, self.inbox, self.uri = sweep, inbox, uri
        self.parent: client.Tracker | None = None
        self.opening = threading.Lock()  # the parent, by the first trial whose own MLflow run opens
        self.closing: list[threading.Thread] = []
        self.runs: dict[str, Run] = {}
        self.tracked: dict[str, Tracked] = {}
        self.over = threading.Event()
        self.bug: Exception | None = None
        self.thread = threading.Thread(target=self._work, name="ledger", daemon=True)
        self.thread.start()

    def ended(self, name: str, status: str) -> None:
        """Say that trial `name` is over, behind all that it reported."""
        self.inbox.put({"mark": name, "end": status})

    def close(self, status: str, artifacts: list[Path], metrics: dict[str, float]) -> Sweep:
        """Write down what waits; then end the trials' MLflow runs, log what MLflow lacks of trials that are over, and end the parent run
        with `artifacts` and `metrics`. Returns the sweep with the parent's id. Raises what has ended the thread that writes down."""
        self.over.set()
        self.thread.join(_DRAIN_S)
        if self.bug is not None and status != "KILLED":
            raise self.bug
        for name in list(self.tracked):
            self._close(name, status)
        until = time.monotonic() + (_KILLED_S if status == "KILLED" else _MLFLOW_S)
        for thread in self.closing:
            thread.join(max(until - time.monotonic(), 0.0))
        if status != "KILLED":
            self._catch_up()
        if self.parent is not None:
            self.parent.log(1, metrics)
            for path in artifacts:
                if path.is_file():
                    self.parent.artifact(path)
            self.parent.close(status)
        return self.sweep

    def _work(self) -> None:
        """The thread. A bug in it is told at once, and ends the sweep when its trials are over: they keep their own records."""
        try:
            self._take()
        except Exception as error:
            traceback.print_exception(error)
            self.bug = error

    def _take(self) -> None:
        while True:
            last = self.over.is_set()  # asked before looking, so that nothing put before the end is missed
            try:
                message = messages.take(self.inbox, _LOOK_S)
            except EOFError:  # Ray was shut down
                return
            if not message and last:
                return
            name = message.get("mark")
            try:
                if message:
                    self._enter(message)
            except (UserError, OSError) as error:  # one trial's book must not close the others'
                say(f"trial {name}: {error}")

    def _enter(self, message: dict[str, Any]) -> None:
        name = str(message.pop("mark"))
        if "checkpoint" in message:
            return
        if bug := message.get("bug"):
            print(bug.rstrip(), file=sys.stderr, flush=True)
        if text := message.get("say"):
            say(f"trial {name}: {text}")
        elif reason := message.get("failed"):
            say(f"trial {name} failed: {reason}")
        elif reason := message.get("again"):
            say(f"trial {name} failed: {reason}; it begins again on another seed")
            self._close(name, "FAILED")
        elif status := message.get("end"):
            self._close(name, status)
        else:
            if name not in self.runs:
                self.runs[name] = load_run(self.sweep.path / "trials" / name)
            run = self.runs[name]
            run.append(message)
            if name not in self.tracked:
                self.tracked[name] = Tracked(run, self.uri, partial(self._tags, name))
                self.tracked[name].open()
            self.tracked[name].log(message)

    def _close(self, name: str, status: str) -> None:
        self.runs.pop(name, None)
        tracked = self.tracked.pop(name, None)
        if tracked is not None:
            self.closing.append(threading.Thread(target=tracked.close, args=(status,), name=f"end of {name}", daemon=True))
            self.closing[-1].start()

    def _catch_up(self) -> None:
        """Log what MLflow has not taken of trials that are over, now or under a driver that was killed."""
        over = [(t, self.sweep.path / "trials" / t.name) for t in sweep_dir.trials(self.sweep.path) if t.status != "running"]
        begun = [(t, load_run(folder)) for t, folder in over if (folder / "run.json").is_file()]  # one may fail before it has a run
        lacking = [(t, run) for t, run in begun if run.unlogged]
        try:
            if lacking:
                mlflow_uri.check(self.uri)  # within seconds; to open runs at a server that is silent takes minutes
            for trial, run in lacking:
                catch_up(run, self.uri, self._tags(trial.name), "FAILED" if trial.status == "failed" else "FINISHED")
        except (UserError, OSError) as error:
            say(f"{error}; the same command again logs what MLflow has not taken")

    def _tags(self, name: str) -> dict[str, str]:
        """Of a trial's MLflow run, below the parent, which is opened if need be. Raises UserError where MLflow refuses."""
        with self.opening:
            self.parent = self.parent or self._open_parent()
        return {"mlflow.parentRunId": self.parent.run_id, "sweep": self.sweep.path.name, "trial": name}

    def _open_parent(self) -> client.Tracker:
        sweep = self.sweep
        params: dict[str, object] = {k: getattr(sweep, k) for k in ("space", "recipe", "data", "search", "scheduler", "metric", "seeds")}
        same = sweep.tracking_run if sweep.tracking_uri == mlflow_uri.redacted(self.uri) else ""
        tags = {"sweep_directory": str(sweep.path.absolute()), "command": sweep.command}

        def known(run_id: str) -> None:
            self.sweep = sweep.noted(tracking_uri=mlflow_uri.redacted(self.uri), tracking_run=run_id)

        parent = client.Tracker(self.uri, sweep.recipe, sweep.path.name, params, tags, same or None, known)
        parent.artifact(sweep.path / "space.json")
        return parent
