"""TensorBoard's scalars, read by TensorBoard's own reader: names, steps, and nothing twice after failures and kills."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import math
import os
import queue
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.runs.directory import Run, load_run
from pipelines.tracking import tensorboard
from pipelines.tracking.client import metrics_of
from pipelines.tracking.tensorboard import Scalars
from pipelines.train.messages import Reported, TrialBeganAgain
from simclr.errors import UserError
from tests.pipelines.tracking.test_unlogged import MLflow, a_run, mlflow
from tests.support.command import Run as Command
from tests.support.command import refused
from tests.support.sweeps import a_sweep, trained
from tune import sweep_dir, trial_log

__all__ = ["mlflow"]  # the fixture
there = pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="the package tensorboard is not installed")


@pytest.fixture(autouse=True)
def _a_second_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader takes event files in the order of their names, which have the second; processes begin seconds apart."""
    if importlib.util.find_spec("tensorboard") is not None:
        from tensorboard.summary.writer import event_file_writer

        seconds = itertools.count(int(time.time()))
        monkeypatch.setattr(event_file_writer, "time", SimpleNamespace(time=lambda: next(seconds)))


def shown(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Name → (step, value) of each scalar, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return {name: [(event.step, event.value) for event in found.Scalars(name)] for name in found.Tags()["scalars"]}


def report(run: Run, scalars: Scalars, step: int, loss: float) -> None:
    """A report, as the driver takes it."""
    row = {"step": step, "total_steps": 9, "train/loss": loss, "epoch": step / 3, "speed/images_per_s": 10.0}
    run.append(row)
    scalars.write(row)


@there
def test_names_steps_values_and_times_are_those_of_the_reports(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    scalars = Scalars(run.path / "tensorboard", run)
    for step, loss in ((1, 3.0), (2, math.nan), (3, 2.5)):
        report(run, scalars, step, loss)
        assert [at for at, _ in shown(scalars.folder)["train/loss"]] == list(range(1, step + 1))  # at once: a killed process leaves them
    scalars.close()
    found = shown(scalars.folder)
    assert found.keys() == metrics_of(run.history()[0]).keys() == {"train/loss", "epoch", "speed/images_per_s"}
    assert found["train/loss"][::2] == [(1, 3.0), (3, 2.5)] and math.isnan(found["train/loss"][1][1])
    assert found["epoch"] == [(step, pytest.approx(step / 3)) for step in (1, 2, 3)]


@there
@pytest.mark.parametrize("killed", [False, True])
def test_a_run_that_goes_on_shows_no_step_twice_and_none_that_it_has_not(tmp_path: Path, killed: bool) -> None:
    """Reports 1 … 5, the last checkpoint at 3: the next process begins at 4, with other values and another pace. Report 3 reached
    metrics.jsonl alone, with the checkpoint."""
    run = a_run(tmp_path)
    scalars = Scalars(tmp_path / "board", run)
    for step in (1, 2):
        report(run, scalars, step, float(step))
    if killed:
        run.append({"step": 3, "train/loss": 3.0, "epoch": 1.0})
    else:
        for step in (3, 4, 5):
            report(run, scalars, step, float(step))
        assert [step for step, _ in shown(scalars.folder)["train/loss"]] == [1, 2, 3, 4, 5]
        scalars.close()
    again = Scalars(tmp_path / "board", load_run(run.path))
    for step in (4, 7):
        report(run, again, step, 10.0 * step)
    again.close()
    assert shown(scalars.folder)["train/loss"] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0), (7, 70.0)]


@there
def test_workers_that_failed_repeat_their_steps(tmp_path: Path) -> None:
    """The driver lives, and hears steps again from the last checkpoint on."""
    run = a_run(tmp_path)
    scalars = Scalars(tmp_path / "board", run)
    for step, loss in ((1, 1.0), (2, 2.0), (4, 4.0), (3, 30.0), (5, 50.0)):
        report(run, scalars, step, loss)
    scalars.close()
    assert shown(scalars.folder)["train/loss"] == [(1, 1.0), (2, 2.0), (3, 30.0), (5, 50.0)]


@there
def test_a_run_that_is_over_is_written_whole_and_once(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    for step in (1, 2, 3):
        run.append({"step": step, "train/loss": float(step)})
    for _ in range(2):
        Scalars(tmp_path / "board", run).catch_up()
    assert shown(tmp_path / "board")["train/loss"] == [(1, 1.0), (2, 2.0), (3, 3.0)]


@there
def test_the_folder_is_of_one_run(tmp_path: Path) -> None:
    run, other = a_run(tmp_path / "a"), a_run(tmp_path / "b")
    scalars = Scalars(tmp_path / "board", run)
    report(run, scalars, 5, 1.0)
    scalars.close()
    with pytest.raises(UserError, match=r"board has the scalars of .*a/trials/000-s0; remove .*board, or use another --tensorboard"):
        Scalars(tmp_path / "board", other)
    (tmp_path / "board/scalars.json").unlink()
    with pytest.raises(UserError, match="event files, and nothing says of which run"):
        Scalars(tmp_path / "board", run)
    # A run that began anew in the same directory.
    (tmp_path / "board/scalars.json").write_text(json.dumps({"run": str(run.path), "created": 1.0, "step": 5}))
    anew = Scalars(tmp_path / "board", run)
    (run.path / "metrics.jsonl").unlink()
    report(run, anew, 2, 7.0)
    anew.close()
    assert shown(tmp_path / "board")["train/loss"] == [(2, 7.0)]


@there
def test_a_disk_that_refuses_ends_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    from pipelines import terminal

    monkeypatch.setattr(terminal, "_QUIET", False)
    run = a_run(tmp_path)
    scalars = Scalars(tmp_path / "board", run)

    def full(self: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Scalars, "_note", full)
    for step in (1, 2):
        scalars.write({"step": step, "train/loss": 1.0})
    scalars.catch_up()
    assert capfd.readouterr().err.count("cannot be written (No space left on device); the training goes on without them") == 1


@there
@pytest.mark.parametrize("place", ["", "board"])
def test_trials_of_a_sweep_have_a_folder_each(mlflow: MLflow, tmp_path: Path, place: str) -> None:
    """The sweep's driver writes them. A trial that begins again with another seed shows nothing of its first try."""
    sweep = dataclasses.replace(a_sweep(tmp_path / "s", "smoke"), tensorboard=str(tmp_path / place) if place else "")
    names = [trial.name for trial in trained(sweep, lambda point: 0.5)[:2]]
    assert sweep_dir.load(sweep.path).tensorboard == sweep.tensorboard
    inbox: Any = queue.Queue()
    kept = trial_log.Ledger(sweep, inbox, "sqlite:///x.db")
    for step in (1, 2, 3):
        for name in names:
            inbox.put(Reported(step=step, total_steps=3, metrics={"train/loss": float(step)}, trial=name))
    while not inbox.empty():
        pass
    for name in names:
        kept.ended(name, "FINISHED")
    kept.close("FINISHED", [], {})
    at = {name: tmp_path / "board/s" / name if place else sweep.path / "trials" / name / "tensorboard" for name in names}
    assert all(shown(at[name])["train/loss"] == [(1, 1.0), (2, 2.0), (3, 3.0)] for name in names)
    first = sweep_dir.first_try(sweep.path, names[0])
    first.parent.mkdir()
    (sweep.path / "trials" / names[0]).rename(first)
    dataclasses.replace(load_run(first), path=sweep.path / "trials" / names[0], created=5.0).save()
    again = trial_log.Ledger(sweep, inbox := queue.Queue(), "sqlite:///x.db")
    inbox.put(TrialBeganAgain(trial=names[0], reason="the loss is not finite"))
    inbox.put(Reported(step=1, total_steps=3, metrics={"train/loss": 9.0}, trial=names[0]))
    again.close("FINISHED", [], {})
    assert shown(at[names[0]])["train/loss"] == [(1, 9.0)]


@pytest.mark.parametrize(
    "command", [("pretrain", "patterns_tiny"), ("finetune", "ENCODER"), ("sweep", "smoke", "--recipe", "patterns_tiny")]
)
def test_a_missing_package_is_said_before_anything_starts(
    simclr: Command, patterns: Path, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *given: None if name == "tensorboard" else find(name, *given))
    words = (published if word == "ENCODER" else word for word in command)
    small = ("--set", "train.batch_size=60") if command[0] == "sweep" else ("--train.batch-size", "60") if command[0] == "pretrain" else ()
    result = simclr(*words, "--data", patterns, *small, "--tensorboard")
    refused(result, "--tensorboard needs the package tensorboard, which is not installed: `pip install 'simclr-cluster\\[tensorboard\\]'`")
    assert not list((tmp_path / "runs").glob("*/run.json")) and not list((tmp_path / "runs").glob("*/sweep.json"))


def test_places_that_have_no_event_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorboard, "require", lambda: None)
    run = a_run(tmp_path)
    assert tensorboard.scalars(None, run, None) is None
    own, given = tensorboard.scalars((), run, None), tensorboard.scalars((tmp_path / "board",), run, "s3://photos/run")
    assert own is not None and own.folder == run.path / "tensorboard"
    assert given is not None and given.folder == tmp_path / "board" / run.path.name
    with pytest.raises(UserError, match=r"--tensorboard alone writes into the run's own directory, and s3://photos/run is in S3"):
        tensorboard.scalars((), run, "s3://photos/run")
    with pytest.raises(UserError, match=r"--tensorboard s3://photos/board is in S3"):
        tensorboard.scalars((Path("s3://photos/board"),), run, None)
    with pytest.raises(UserError, match="--tensorboard has 2 directories; give one"):
        tensorboard.scalars((Path("a"), Path("b")), run, None)
