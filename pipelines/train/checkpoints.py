"""When and how a run's checkpoints are written: a thread of rank 0 writes a copy while training goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipelines.runs import sync
from pipelines.train.messages import Reported, Saved, Tell
from simclr import checkpoint
from simclr.config import Train
from simclr.data.s3.uri import Unreachable
from simclr.telemetry import progress
from simclr.train import Report

# By the clock: at least 60 s between two checkpoints, at most 2 % of the time spent on them, at most 300 s of work lost.
_LEAST_S, _MOST_S, _SHARE = 60.0, 300.0, 0.02
_REPORTS = 1000  # newest, in every checkpoint: about 1 MB
SCORES = ("eval/knn_top1", "eval/top1")


class Saver:
    """The checkpoints of one training, on rank 0.

    Training pauses only while the tensors are copied to this machine's memory. The copy waits until the previous checkpoint is
    written, so at most one is being written. A full disk ends the training at the next checkpoint, with a sentence. If S3 is
    unreachable, training goes on: checkpoints stay on this disk, and the newest is sent when S3 answers again.
    """

    def __init__(self, home: sync.Home, train: Train, since: Path | None, tell: Tell, trial: str = "") -> None:
        """`since` is the checkpoint that the training goes on from, `trial` the sweep's trial that it is. `tell` gets every report and,
        from another thread, a message for each checkpoint that is on the disk."""
        self.home, self.train, self.tell, self.trial = home, train, tell, trial
        self.folder = home.path / "checkpoints"
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.writing: Future[None] | None = None
        self.sending = ""
        self.held_s = 0.0
        self.saved_at = self.reported_at = time.monotonic()
        self.reports = deque(checkpoint.reports(since) if since else [], _REPORTS)

    @property
    def every_s(self) -> float:
        """Seconds between two checkpoints, if the config states no steps."""
        return min(max(_LEAST_S, self.held_s / _SHARE), _MOST_S)

    def hear(self, report: Reported) -> Any:
        """Send a report to the driver, and keep it for the next checkpoints: if the driver dies before the report arrives, the next
        driver finds it there. Returns what `tell` returned."""
        of_trial = {"mark": report.trial} if report.trial else {}  # a trial may go on from another one's checkpoint
        self.reports.append({"time": round(time.time(), 3), **report.line(), **of_trial})
        return self.tell(report)

    def due(self, report: Report) -> bool:
        """Whether to save this report's state: the config asks for it, or it has a score (scoring took longer than saving will, and it
        may be the best), or it is time."""
        now = time.monotonic()
        between, self.reported_at = now - self.reported_at, now
        if report.due or _score(report) is not None:
            return True
        # The next chance is the next report.
        return self.train.checkpoint_every_steps is None and now + between - self.saved_at >= self.every_s

    def save(self, report: Report) -> None:
        """Start writing this report's state. Raises the error of the previous write, if it failed (OSError, say)."""
        began = time.monotonic()
        self.wait()
        state, score = dataclasses.replace(_copied(report.state), reports=list(self.reports)), _score(report)
        self.saved_at = time.monotonic()
        self.held_s = self.saved_at - began
        self.writing = self.writer.submit(self._write, state, score, self.held_s)

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is on the disk."""
        if self.writing is not None:
            writing, self.writing = self.writing, None
            writing.result()

    def close(self) -> None:
        """Wait until the newest checkpoint is in the run's directory or S3. Raises Unreachable if S3 does not answer."""
        self.wait()
        self.home.wait()
        self.home.sync_checkpoints()

    def leave(self) -> None:
        """As `close`, but an unreachable S3 is ignored: the node is about to go and cannot wait."""
        with contextlib.suppress(Unreachable):
            self.close()

    def _write(self, state: checkpoint.State, score: float | None, held_s: float) -> None:
        began, keep = time.monotonic(), self.train.keep_checkpoints
        written = checkpoint.write(self.folder, state, keep, score, self.sending if self.home.busy() else "", self.home.token)
        progress.saved(state.step)
        written_s = time.monotonic() - began
        self.tell(Saved(step=state.step, held_s=held_s, written_s=written_s, every_s=self.every_s, trial=self.trial))
        if not self.home.busy():  # else the last upload still runs: skip this one, the next checkpoint is sent
            self.sending = written.name
            self.home.later(lambda: self.home.send_checkpoint(written, keep))


def _score(report: Report) -> float | None:
    return next((report.metrics[name] for name in SCORES if name in report.metrics), None)


def _copied(state: checkpoint.State) -> checkpoint.State:
    """A copy of `state` in this machine's memory: training changes the tensors in place."""
    tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.tensors.items()}
    return dataclasses.replace(state, tensors=tensors)
