"""When checkpoints are written, which ones stay, and the behaviour with a full disk or an unreachable S3."""

from __future__ import annotations

import errno
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.runs import sync
from pipelines.runs.directory import open_run
from pipelines.train import checkpoints
from pipelines.train.checkpoints import Saver
from pipelines.train.messages import Reported
from simclr import checkpoint
from simclr.config import Train
from simclr.data.s3.store import Store
from simclr.data.s3.uri import Unreachable
from simclr.recipes import recipe
from simclr.train import Report
from tests.support.s3 import Proxy


class Time:
    """A clock that a test turns on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(checkpoints.time, "monotonic", lambda: self.now)


def report(step: int, score: float | None = None, due: bool = False) -> Report:
    metrics = {"train/loss": 1.0} | ({} if score is None else {"eval/knn_top1": score})
    return Report(step, 100, metrics, checkpoint.State(step, {}, {"model.w": torch.full((3,), float(step))}), due)


def saver(folder: Path, **train: Any) -> tuple[Saver, list[Any]]:
    told: list[Any] = []
    return Saver(sync.Home(folder), Train(**train), None, told.append), told


def names(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in checkpoint.list_checkpoints(folder / "checkpoints")]


def test_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every minute, at the last report before the minute is over; less often if it blocks training long; at least every five minutes."""
    time = Time(monkeypatch)
    kept, told = saver(tmp_path)
    due = []
    for second in range(10, 400, 10):  # a report every 10 s
        time.now = 1000.0 + second
        if kept.due(report(second)):
            due.append(second)
            kept.save(report(second))
    kept.wait()
    assert due == [50, 100, 150, 200, 250, 300, 350]  # at 50, since at 60 the next report might be late
    assert [row.step for row in told] == due and names(tmp_path) == [300, 350]
    for held_s, every_s in ((0.5, 60), (2, 100), (5.9, 295), (60, 300)):
        kept.held_s = held_s
        assert kept.every_s == pytest.approx(every_s)


def test_by_steps_the_clock_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    time = Time(monkeypatch)
    kept, _ = saver(tmp_path, checkpoint_every_steps=50)
    time.now += 3600
    assert not kept.due(report(10)) and kept.due(report(50, due=True))


def test_the_best_stays_beside_the_newest(tmp_path: Path) -> None:
    kept, _ = saver(tmp_path, keep_checkpoints=2)
    for step, score in enumerate([0.3, 0.9, 0.5, None, 0.8, None, None], 1):
        said = report(step, score, due=step > 3)
        if kept.due(said):
            kept.save(said)
    kept.close()
    assert names(tmp_path) == [2, 6, 7]
    again, _ = saver(tmp_path, keep_checkpoints=1)  # a restarted worker
    for said in (report(8, 0.85), report(9, 0.95)):
        assert again.due(said)
        again.save(said)
        again.wait()
        assert names(tmp_path) == ([2, 8] if said.step == 8 else [9])
    again.close()
    about = json.loads((tmp_path / "checkpoints/step-000000009/checkpoint.json").read_text())
    assert about["score"] == 0.95


def test_what_is_written_is_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on while the thread writes: the next steps' weights must not get into the checkpoint."""
    go, write = threading.Event(), checkpoint.write

    def slowly(*args: Any) -> Path:
        assert go.wait(10)
        return write(*args)

    monkeypatch.setattr(checkpoint, "write", slowly)
    kept, _ = saver(tmp_path)
    said = report(1, due=True)
    kept.save(said)
    said.state.tensors["model.w"].add_(100)
    go.set()
    kept.close()
    found = checkpoint.read(tmp_path / "checkpoints/step-000000001")
    assert found.tensors["model.w"].tolist() == [1.0, 1.0, 1.0]


def test_a_checkpoint_has_the_reports_that_nobody_may_have_heard(tmp_path: Path, patterns: Path) -> None:
    """A dead driver's workers live on for seconds, and write checkpoints. The next driver finds their reports in the checkpoint."""
    run = open_run(tmp_path / "run", "patterns_tiny", recipe("patterns_tiny"), patterns)
    since = None
    for steps in (range(1, 4), range(4, 7)):  # the second range by restarted workers
        kept = Saver(sync.Home(run.path), Train(keep_checkpoints=1), since, lambda told: None)
        for step in steps:
            kept.hear(Reported(step=step, total_steps=6, metrics={"train/loss": step / 3}))
        kept.save(report(6, due=True))
        kept.close()
        since = run.checkpoints / "step-000000006"
    for row in ({"step": 1, "train/loss": 1 / 3}, {"step": 2, "train/loss": 0.5, "heard": 1}):  # and no more
        run.append(row)
    run.fill(checkpoint.read(since).reports)
    rows = run.history()
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6] and rows[1]["train/loss"] == 0.5 and rows[5]["train/loss"] == 2.0
    assert all(row["time"] > 1e9 for row in rows)
    run.fill(checkpoint.reports(since))
    assert len((run.path / "metrics.jsonl").read_text().splitlines()) == 6


def test_a_full_disk_ends_the_training_at_the_next_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, told = saver(tmp_path)
    kept.save(report(1))
    kept.wait()
    write: Callable[..., Any] = checkpoint.save_file

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    kept.save(report(2))
    with pytest.raises(OSError, match="No space left"):
        kept.save(report(3))
    assert names(tmp_path) == [1] and [row.step for row in told] == [1]
    monkeypatch.setattr(checkpoint, "save_file", write)
    kept.save(report(3))
    kept.close()
    assert names(tmp_path) == [1, 3]


def test_s3_that_is_away_holds_nothing_up(s3: Proxy, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints stay on disk meanwhile, the one that is being sent is not removed, and the newest is sent when S3 answers again."""
    home = sync.Home("s3://photos/runs/away")
    home.store = Store(attempts=1, pause_s=0)
    hold, send, sent = threading.Event(), home.send_checkpoint, []

    def slow(path: Path, keep: int) -> None:
        assert hold.wait(20) and path.is_dir()
        sent.append(path.name)
        send(path, keep)

    home.send_checkpoint = slow  # type: ignore[method-assign]
    told: list[Any] = []
    kept = Saver(home, Train(keep_checkpoints=1), None, told.append)
    for step in (1, 2, 3, 4):  # 1 is being sent meanwhile
        kept.save(report(step))
    kept.wait()
    assert names(home.path) == [1, 4] and len(told) == 4
    s3.rate, s3.kinds = 1.0, ("503",)
    hold.set()
    home.wait()
    assert "not sent" in capfd.readouterr().err and sent == ["step-000000001"]
    kept.leave()  # on a node that is about to go, it does not wait
    with pytest.raises(Unreachable):
        kept.close()
    told_of: list[str] = []

    def tell(text: str) -> None:
        told_of.append(text)
        s3.quiet()

    monkeypatch.setattr(sync, "_AGAIN_S", 0.0)
    sync.retry_unreachable(kept.close, tell)
    assert len(told_of) == 1 and told_of[0].startswith("waiting for S3, for 30 minutes at most: s3://photos/runs/away")
    assert sent == ["step-000000001", "step-000000004"]
    assert {found.name.split("/")[0] for found in home.store.listing(home.at / "checkpoints")} == {"step-000000004"}  # type: ignore[operator]
