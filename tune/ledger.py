"""The reports of all trials on their way to where they are kept: each trial's metrics.jsonl, and MLflow, a parent run and one below it
for each trial. In the sweep's driver, so that MLflow is imported once and not by every trial."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from pipelines import address, inbox, tracking
from pipelines.rundir import Run, load_run
from pipelines.terminal import say
from pipelines.tracked import Tracked
from tune.book import Sweep

_LOOK_S = 0.5


class Ledger:
    """Takes what comes through `inbox`, an `inbox.make()`, until it is closed."""

    def __init__(self, sweep: Sweep, inbox: Any, uri: str) -> None:
        self.sweep, self.inbox, self.uri = sweep, inbox, uri
        self.parent: tracking.Tracker | None = None
        self.runs: dict[str, Run] = {}
        self.tracked: dict[str, Tracked] = {}
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._take, name="ledger", daemon=True)
        self.thread.start()

    def ended(self, name: str, status: str) -> None:
        """Say that trial `name` is over, behind all that it reported."""
        self.inbox.put({"mark": name, "end": status})

    def close(self, status: str, artifacts: list[Path], metrics: dict[str, float]) -> Sweep:
        """Take what waits, and end the parent run with `artifacts` and `metrics`. Returns the sweep with the parent's id."""
        self.over.set()
        self.thread.join(30.0)
        for tracked in self.tracked.values():
            tracked.close(status)
        if self.parent is not None:
            self.parent.log(1, metrics)
            for path in artifacts:
                if path.is_file():
                    self.parent.artifact(path)
            self.parent.close(status)
        return self.sweep

    def _take(self) -> None:
        while True:
            last = self.over.is_set()  # asked before looking, so that nothing put before the end is missed
            try:
                message = inbox.take(self.inbox, _LOOK_S)
            except EOFError:  # Ray was shut down
                return
            if not message and last:
                return
            try:
                if message:
                    self._enter(message)
            except (ValueError, OSError) as error:  # one trial's book must not close the others'
                say(f"trial {message.get('mark')}: {error}")

    def _enter(self, message: dict[str, Any]) -> None:
        name = str(message.pop("mark"))
        if "checkpoint" in message:
            return
        if reason := message.get("failed"):
            say(f"trial {name} failed: {reason}")
        elif reason := message.get("again"):
            say(f"trial {name} failed: {reason}; it begins again on another seed")
            self._close(name, "FAILED")
        elif status := message.get("end"):
            self._close(name, status)
        else:
            run = self.runs.setdefault(name, load_run(self.sweep.path / "trials" / name))
            run.append(message)
            if name not in self.tracked:
                self._open_parent()
                below = {"mlflow.parentRunId": self.parent.run_id} if self.parent else {}
                self.tracked[name] = Tracked(run, self.uri, below | {"sweep": self.sweep.path.name, "trial": name})
                self.tracked[name].open()
            self.tracked[name].log(message)

    def _close(self, name: str, status: str) -> None:
        self.runs.pop(name, None)
        tracked = self.tracked.pop(name, None)
        if tracked is not None:
            tracked.close(status)

    def _open_parent(self) -> None:
        if self.parent is not None or self.tracked:
            return
        sweep = self.sweep
        params: dict[str, object] = {k: getattr(sweep, k) for k in ("space", "recipe", "data", "search", "scheduler", "metric", "seeds")}
        same = sweep.tracking_run if sweep.tracking_uri == address.redacted(self.uri) else ""
        tags = {"sweep_directory": str(sweep.path.absolute()), "command": sweep.command}
        try:
            self.parent = tracking.Tracker(self.uri, sweep.recipe, sweep.path.name, params, tags, same or None)
        except ValueError as error:  # the trials' own runs are still tried, as those of `simclr pretrain`
            say(f"no MLflow run for the sweep: {error}")
            return
        self.parent.artifact(sweep.path / "space.json")
        self.sweep = sweep.noted(tracking_uri=address.redacted(self.uri), tracking_run=self.parent.run_id)
