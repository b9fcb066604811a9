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

_EVERY_S, _AWAY_S = 0.5, 30.0  # between two looks; between two tries, while a server is away, it doubles up to the second
_FLUSH_S, _OPEN_S = 30.0, 60.0  # a finished job waits as long while MLflow takes nothing; where it is not open yet
_KILLED_S = 3.0  # an interrupted one has to end within 5 s


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
    mlflow_uri.check(uri)  # a silent server is found out in seconds; MLflow's own first request takes minutes
    params: dict[str, object] = dict(run.config.flat())
    params |= {"recipe": run.recipe, "data": run.origin, "lr": _lr(run)}
    tags = {"run_directory": str(run.path.absolute()), "command": run.command, **tags}
    same = run.tracking_run if run.tracking_uri == mlflow_uri.redacted(uri) else ""
    return client.MLflowRun(uri, run.recipe, run.path.name, params, tags, same or None, known)


def _lr(run: Run) -> float:
    from simclr.optim import lr_peak

    return lr_peak(run.config.optim.base_lr, run.config.train.batch_size, run.config.optim.scaling)


class Posted:
    """One run and how far MLflow has taken it. run.json calls it unlogged until that is all, since a driver that is killed says nothing
    any more."""

    def __init__(self, run: Run, uri: str, tags: Callable[[], dict[str, str]] = dict) -> None:
        """`tags` of its MLflow run are asked for when it is opened, and may fail as that may."""
        self.run, self.uri, self.tags = run.noted(unlogged="yes"), uri, tags
        self.path = run.path
        """Where the run lies. It may be moved while it is sent."""
        self.status = ""
        """How the run ended, once nothing is appended any more."""
        self.mlflow: client.MLflowRun | None = None
        self.taken, self.refused = self._taken(run.tracking_run), 0
        """Bytes of metrics.jsonl that MLflow has; values that it will never take."""

    def open(self) -> None:
        """Open its MLflow run. As soon as there is one its id is in run.json: a job that is killed, or an opening that fails half-way,
        goes on in the same one."""
        self.mlflow = open_run(self.run, self.uri, self.tags(), self._known)

    def _known(self, run_id: str) -> None:
        self._noted(tracking_uri=mlflow_uri.redacted(self.uri), tracking_run=run_id)
        self.taken = self._taken(run_id)

    def _noted(self, **fields: str) -> None:
        self.run = replace(self.run, path=self.path).noted(**fields)

    def _taken(self, run_id: str) -> int:
        """What outbox.json says of the MLflow run `run_id`; 0 for another one, of an older run, which has none, and where the lines
        are others now, fetched from S3."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            noted = json.loads((self.path / "outbox.json").read_text())
            with (self.path / "metrics.jsonl").open("rb") as lines:
                lines.seek(noted["bytes"] - 1)
                if noted["mlflow_run"] == run_id and lines.read(1) == b"\n":
                    return int(noted["bytes"])
        return 0

    def batches(self) -> Iterator[tuple[list[dict[str, Any]], int]]:
        """Reports that MLflow does not have, as many as go out at a time, and the bytes that it has once it has these too."""
        batch, values, end = list[dict[str, Any]](), 0, self.taken
        with contextlib.suppress(FileNotFoundError), (self.path / "metrics.jsonl").open("rb") as lines:
            lines.seek(end)
            for line in lines:
                if not line.endswith(b"\n"):  # it is being written, or its machine has died
                    break
                report: dict[str, Any] = {}
                with contextlib.suppress(ValueError):  # half a line, once another one was appended
                    report = json.loads(line)
                more = len(client.metrics_of(report))
                if batch and values + more > client.MOST:
                    yield batch, end
                    batch, values = [], 0
                end, values = end + len(line), values + more
                batch += [report] if report else []
        if end > self.taken:
            yield batch, end

    def send(self, batch: list[dict[str, Any]], end: int) -> None:
        """Send one of `batches`, and note that it arrived."""
        assert self.mlflow is not None
        self.refused += self.mlflow.log(batch)
        self.taken = end
        if not self.refused:  # else the next driver tries again from there
            files.write_text(self.path / "outbox.json", json.dumps({"mlflow_run": self.mlflow.run_id, "bytes": end}) + "\n")

    def end(self) -> None:
        """End its MLflow run, which has everything now."""
        assert self.mlflow is not None
        self.mlflow.end(self.status)
        self._noted(unlogged="yes" if self.refused else "")

    def lost(self) -> int:
        """How many values MLflow does not have."""
        return self.refused + sum(len(client.metrics_of(report)) for batch, _ in self.batches() for report in batch)


def catch_up(run: Run, uri: str) -> Run:
    """Log what MLflow has not taken of a run that is over. Raises UserError where MLflow refuses, or is away still."""
    say(f"not all of {run.path} was logged to MLflow; logging it at {mlflow_uri.redacted(uri)}")
    posted = Posted(run, uri)
    posted.status = "FINISHED"
    posted.open()
    for batch, end in posted.batches():
        posted.send(batch, end)
    posted.end()
    _say_lost(posted.refused, uri, "it refuses them")
    return posted.run


def _say_lost(values: int, uri: str, why: object) -> None:
    if values:
        lost = f"{values:,} metrics did not reach MLflow at {mlflow_uri.redacted(uri)} ({why})"
        say(f"{lost}; metrics.jsonl has every report, and the same command again logs what MLflow has not taken")


class Outbox:
    """The thread that sends the reports of runs to MLflow at `uri`, and tries until it succeeds.

    `follow` and `start` take no time; `close` waits for what is on its way, and not for ever.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.posted: list[Posted] = []  # those that go on or have not arrived whole
        self.refused = 0
        self.trouble: Exception | None = None
        self.last: Callable[[], object] = lambda: None
        self.moved = time.monotonic()  # when MLflow took something
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
        if self.thread.ident is None:
            return
        for posted in self.posted:
            posted.status = posted.status or status
        self.last = last
        began = self.moved = time.monotonic()
        self.closing.set()
        while self.thread.is_alive():
            opened = [posted.mlflow is not None for posted in self.posted]
            if status == "KILLED":
                until = began + (_KILLED_S if any(opened) or not opened else 0.0)
            else:
                until = self.moved + (_FLUSH_S if all(opened) else _OPEN_S)
            if time.monotonic() >= until:
                break
            self.thread.join(0.05)
        self.over.set()
        lost, why = self.refused + sum(posted.lost() for posted in self.posted), self.trouble or "no answer"
        if (self.posted or self.thread.is_alive()) and not lost:
            say(f"the end of the run did not reach MLflow at {mlflow_uri.redacted(self.uri)} ({why})")
        _say_lost(lost, self.uri, why)

    def _work(self) -> None:
        """The thread."""
        pause = _EVERY_S
        while not self.over.is_set():
            closing = self.closing.is_set()  # asked before looking, so that nothing appended before the end is missed
            failed = [posted for posted in list(self.posted) if not self._tried(partial(self._serve, posted))]
            if closing and not self.over.is_set():
                # Where one does not open even now, the next try would be no better.
                if all(posted.mlflow is None for posted in failed) and self._tried(self.last):
                    return
                self.over.wait(_EVERY_S)
                continue
            if not failed:
                self.trouble = None
            pause = min(2 * pause, _AWAY_S) if failed else _EVERY_S
            self.closing.wait(pause)

    def _tried(self, work: Callable[[], object]) -> bool:
        """Whether `work` succeeds. Whatever the trouble is, the training must not be lost to it, and later may be better: it is told
        once, a bug with its traceback."""
        try:
            work()
            return True
        except Exception as error:
            if type(error) is not type(self.trouble):
                if not isinstance(error, UserError | OSError):
                    traceback.print_exception(error)
                elif not self.closing.is_set():
                    say(f"MLflow does not take the reports ({error}); the training goes on, and so does the trying")
            self.trouble = error
            return False

    def _serve(self, posted: Posted) -> None:
        status = posted.status  # asked before reading, as above
        if posted.mlflow is None:
            posted.open()
            self.moved = time.monotonic()
        for batch, end in posted.batches():
            if self.over.is_set():  # who catches up logs these too
                return
            posted.send(batch, end)
            self.moved = time.monotonic()
        if status and not self.over.is_set():
            posted.end()
            self.refused += posted.refused
            self.posted.remove(posted)
