"""When a run's checkpoints are written, and by whom: a thread of rank 0, from a copy, while the training goes on."""

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

# By the clock: as often as is cheap, at most so much of the time spent on it, at most so much of the work lost.
_LEAST_S, _MOST_S, _SHARE = 60.0, 300.0, 0.02
_REPORTS = 1000  # newest, in every checkpoint: about 1 MB
SCORES = ("eval/knn_top1", "eval/top1")


class Saver:
    """The checkpoints of one training, on rank 0.

    Training stands still only while the tensors are copied to this machine's memory; copying waits for the checkpoint before it,
    so at most one is being written. A disk that is full ends the training, with the sentence, at the next checkpoint. S3 that
    is away does not: checkpoints are then kept here, and the newest is sent when it is back.
    """

    def __init__(self, home: sync.Home, train: Train, since: Path | None, tell: Tell, trial: str = "") -> None:
        """For a training, of a sweep's `trial`, that goes on from the checkpoint `since`. `tell` gets every report, and from another
        thread which checkpoints are safely on the disk."""
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
        """Seconds between two checkpoints, where the config states no steps."""
        return min(max(_LEAST_S, self.held_s / _SHARE), _MOST_S)

    def hear(self, report: Reported) -> Any:
        """Tell of a report, which the checkpoints to come have too: a driver that dies before it has heard it, and that is begun
        again, goes on behind it. Returns what telling did."""
        of_trial = {"mark": report.trial} if report.trial else {}  # a trial may go on from another one's checkpoint
        self.reports.append({"time": round(time.time(), 3), **report.line(), **of_trial})
        return self.tell(report)

    def due(self, report: Report) -> bool:
        """Whether this report's state is to be saved: the config asks for it, it was scored (which took longer than saving will,
        and it may be the best), or it is time."""
        now = time.monotonic()
        between, self.reported_at = now - self.reported_at, now
        if report.due or _score(report) is not None:
            return True
        # The next chance is the next report.
        return self.train.checkpoint_every_steps is None and now + between - self.saved_at >= self.every_s

    def save(self, report: Report) -> None:
        """Have this report's state written. Raises what writing the one before it raised (OSError, say)."""
        began = time.monotonic()
        self.wait()
        state, score = dataclasses.replace(_copied(report.state), reports=list(self.reports)), _score(report)
        self.saved_at = time.monotonic()
        self.held_s = self.saved_at - began
        self.writing = self.writer.submit(self._write, state, score, self.held_s)

    def wait(self) -> None:
        """Until the checkpoint that is being written is on the disk."""
        if self.writing is not None:
            writing, self.writing = self.writing, None
            writing.result()

    def close(self) -> None:
        """Until the newest checkpoint is where the run is. Raises Unreachable where S3 is away."""
        self.wait()
        self.home.wait()
        self.home.sync_checkpoints()

    def leave(self) -> None:
        """As `close`, but S3 may be away: the node is about to go, and waits for nothing."""
        with contextlib.suppress(Unreachable):
            self.close()

    def _write(self, state: checkpoint.State, score: float | None, held_s: float) -> None:
        began, keep = time.monotonic(), self.train.keep_checkpoints
        written = checkpoint.write(self.folder, state, keep, score, self.sending if self.home.busy() else "")
        progress.saved(state.step)
        written_s = time.monotonic() - began
        self.tell(Saved(step=state.step, held_s=held_s, written_s=written_s, every_s=self.every_s, trial=self.trial))
        if not self.home.busy():  # else the one that is under way is too slow for all to be sent; the next one is
            self.sending = written.name
            self.home.later(lambda: self.home.send_checkpoint(written, keep))


def _score(report: Report) -> float | None:
    return next((report.metrics[name] for name in SCORES if name in report.metrics), None)


def _copied(state: checkpoint.State) -> checkpoint.State:
    """`state` as it is now, in this machine's memory: the training changes its tensors in place."""
    tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.tensors.items()}
    return dataclasses.replace(state, tensors=tensors)
