"""Undelivered reports: run.json marks them from the start, lines are written without MLflow, and the same command logs the rest."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.runs import sync
from pipelines.runs.directory import Run, load_run
from pipelines.tracking import outbox
from pipelines.tracking import uri as mlflow_uri
from pipelines.train import driver, ray_train
from pipelines.train.messages import Reported, TrialBeganAgain, TrialFailed
from simclr.errors import UserError
from tests.support.mlflow_server import Answer, Server
from tests.support.sweeps import a_sweep, trained
from tune import sweep, trial, trial_log
from tune.sweep_dir import Sweep


class MLflow:
    """A server in memory: runs by id, `refuse(name)` is called before a run of that name is opened."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.steps: dict[str, list[int]] = {}
        self.tags: dict[str, dict[str, str]] = {}
        self.ended: dict[str, str] = {}
        self.heard: list[int] = []
        self.refuse: Callable[[str], object] = lambda name: None
        server = self

        class MLflowRun:
            def __init__(self, uri: str, experiment: str, name: str, params: Any, tags: Any, run_id: Any, known: Any) -> None:
                server.refuse(name)
                self.run_id = run_id or f"{len(server.steps)}: {name}"
                known(self.run_id)
                self.steps = server.steps.setdefault(self.run_id, [])
                server.tags[self.run_id] = tags

            def log(self, reports: list[dict[str, Any]]) -> None:
                for report in reports:
                    server.heard.append(report["step"])
                    if not self.steps or report["step"] > self.steps[-1]:  # as the real one
                        self.steps.append(report["step"])

            def trained_on(self, data: str, manifest_sha256: str) -> None: ...

            def artifact(self, path: Path) -> None: ...

            def end(self, status: str = "FINISHED") -> None:
                server.ended[self.run_id] = status

        patch.setattr("pipelines.tracking.client.MLflowRun", MLflowRun)
        patch.setattr(outbox, "_EVERY_S", 0.01)


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> MLflow:
    return MLflow(monkeypatch)


def away(name: str) -> None:
    raise UserError("MLflow is away")


def until(true: Callable[[], bool]) -> None:
    began = time.monotonic()
    while not true():
        assert time.monotonic() < began + 10
        time.sleep(0.005)


def a_run(path: Path) -> Run:
    trial = trained(a_sweep(path, "smoke"), lambda point: 0.5)[0]
    return load_run(path / "trials" / trial.name)


def reported(name: str, step: int) -> Reported:
    return Reported(step=step, total_steps=9, metrics={"train/loss": 1.0}, trial=name)


def lines(found: Sweep, name: str) -> list[float]:
    return [row["step"] for row in load_run(found.path / "trials" / name).history()]


# ── One run ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_driver_killed_after_the_last_checkpoint_leaves_the_rest_to_the_same_command(
    mlflow: MLflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, uri = a_run(tmp_path), mlflow_uri.default_uri(tmp_path)
    box = outbox.Outbox(uri)
    box.follow(run)
    for step in (1, 2):
        run.append({"step": step, "train/loss": 1.0})
    box.start()
    until(lambda: list(mlflow.steps.values()) == [[1, 2]])
    box.over.set()  # the driver is killed here: 1 and 2 arrive, 3, which the last checkpoint has, does not
    box.thread.join(10)
    (logged,) = mlflow.steps.values()
    run.append({"step": 3, "train/loss": 1.0})

    def again() -> Run:
        now = driver.Job(
            run=load_run(run.path),
            home=sync.Home(run.path),
            asked=run.path,
            total=3,
            uri=uri,
            resources=ray_train.Resources(workers=1),
            publish=lambda run, method: None,
        )
        return driver.train(now, time.monotonic())

    monkeypatch.setattr(driver, "_steps_done", lambda run, whole=False: 3)
    mlflow.refuse = away
    assert again().unlogged == "yes"  # a run that is complete needs no server
    assert "MLflow is away; the same command again logs the rest" in capsys.readouterr().err
    mlflow.refuse = lambda name: None
    assert again().unlogged == load_run(run.path).unlogged == ""
    assert logged == [1, 2, 3] and len(mlflow.steps) == 1 and list(mlflow.ended.values()) == ["FINISHED"]


def test_a_job_interrupted_while_mlflow_opens_is_unlogged(mlflow: MLflow, tmp_path: Path) -> None:
    run, back = a_run(tmp_path), threading.Event()
    mlflow.refuse = lambda name: back.wait(10)
    run.append({"step": 1, "train/loss": 1.0})
    box = outbox.Outbox("sqlite:///x.db")
    posted = box.follow(run)
    box.start()
    began = time.monotonic()
    box.close("KILLED")
    assert posted.run.unlogged == load_run(run.path).unlogged == "yes" and time.monotonic() < began + 5
    back.set()
    box.thread.join(10)
    assert not box.thread.is_alive() and list(mlflow.steps.values()) == [[]] and not mlflow.ended


def test_an_opening_that_fails_half_way_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(outbox, "_EVERY_S", 0.01)
    post, failing = Answer.do_POST, [True, True, True]
    info = {"run_id": "ab12", "run_uuid": "ab12", "experiment_id": "1", "status": "RUNNING", "lifecycle_stage": "active"}
    experiment = {"experiment_id": "1", "name": "e", "lifecycle_stage": "active"}
    monkeypatch.setattr(Answer, "do_GET", lambda self: self.reply({"experiment": experiment, "run": {"info": info, "data": {}}}))

    def flaky(self: Answer) -> None:
        if self.path.endswith("log-batch") and failing:
            failing.pop()
            self.send_error(500)
        else:
            post(self)

    monkeypatch.setattr(Answer, "do_POST", flaky)
    server = Server()
    try:
        run = a_run(tmp_path)
        run.append({"step": 1, "train/loss": 1.0})
        box = outbox.Outbox(server.uri)
        posted = box.follow(run)
        box.start()
        until(lambda: bool(server.metrics))
        box.close("FINISHED")
        run = posted.run
    finally:
        server.stop()
    assert not failing and server.calls.count("runs/create") == 1
    assert run.tracking_run == load_run(run.path).tracking_run == "ab12" and not run.unlogged


def test_two_writers_of_run_json_keep_each_others_fields(tmp_path: Path) -> None:
    run, other = a_run(tmp_path), a_run(tmp_path)
    run.noted(tracking_run="ab12")
    assert other.noted(unlogged="yes").tracking_run == ""  # of its own copy; on disk both fields are set
    found = load_run(run.path)
    assert (found.tracking_run, found.unlogged) == ("ab12", "yes")
    replace(run, created=run.created + 1).save()  # a trial that starts again, in the same directory
    assert run.noted(tracking_run="cd34").tracking_run == "cd34" and load_run(run.path).tracking_run == ""


@pytest.mark.parametrize("noted", [True, False])
def test_the_next_driver_begins_where_mlflow_has_taken_the_lines(mlflow: MLflow, tmp_path: Path, noted: bool) -> None:
    """An older run has no stored offset: then MLflow's own steps decide."""
    run, uri = a_run(tmp_path), mlflow_uri.default_uri(tmp_path)
    for steps in ((1, 2), (2, 3)):  # 2 is repeated after the last checkpoint
        box = outbox.Outbox(uri)
        before, posted = set(threading.enumerate()), box.follow(load_run(run.path))
        box.start()
        assert [thread.name for thread in set(threading.enumerate()) - before] == ["outbox"]  # one thread, and no queue
        for step in steps:
            run.append({"step": step, "train/loss": 1.0})
        box.close("FINISHED")
        if not noted:
            (run.path / "outbox.json").unlink()
    assert list(mlflow.steps.values()) == [[1, 2, 3]]
    assert mlflow.heard == ([1, 2, 2, 3] if noted else [1, 2, 1, 2, 2, 3])
    assert posted.delivered and load_run(run.path).unlogged == ""


def test_what_broke_off_on_its_way_is_noted_as_taken_by_nobody(mlflow: MLflow, tmp_path: Path) -> None:
    """The note comes behind the answer: neither the next try nor the next driver goes on behind lines that never arrived."""
    run, uri = a_run(tmp_path), mlflow_uri.default_uri(tmp_path)
    run.append({"step": 1, "train/loss": 1.0})
    run = outbox.catch_up(run, uri)
    note = (run.path / "outbox.json").read_text()
    run.append({"step": 2, "train/loss": 1.0})
    posted = outbox.Posted(run, uri)
    next(posted.deliver())  # it is open
    assert posted.mlflow is not None
    good = posted.mlflow.log

    def broken(reports: list[dict[str, Any]]) -> None:
        raise OSError("no answer")

    posted.mlflow.log = broken  # type: ignore[method-assign]
    with pytest.raises(OSError, match="no answer"):
        list(posted.deliver())
    assert (run.path / "outbox.json").read_text() == note and outbox.Posted(posted.run, uri).lost() == posted.lost() == 1
    posted.mlflow.log = good  # type: ignore[method-assign]
    list(posted.deliver())
    assert list(mlflow.steps.values()) == [[1, 2]] and posted.lost() == 0


def test_other_lines_in_the_place_of_those_that_mlflow_has_are_read_from_the_first(mlflow: MLflow, tmp_path: Path) -> None:
    """Like lines fetched from S3, after another machine went on."""
    run, uri = a_run(tmp_path), mlflow_uri.default_uri(tmp_path)
    run.append({"step": 1, "train/loss": 1.0})
    run = outbox.catch_up(run, uri)
    (run.path / "metrics.jsonl").write_text("".join(f'{{"step": {step}, "train/loss": 0.{"3" * step}}}\n' for step in range(1, 9)))
    assert outbox.catch_up(run, uri).unlogged == "" and list(mlflow.steps.values()) == [list(range(1, 9))]
    elsewhere = outbox.Posted(replace(run, tracking_run="cd34"), uri)
    assert outbox.Posted(run, uri).lost() == 0 and elsewhere.lost() == 8  # the note is of one MLflow run


def test_half_a_line_waits_until_it_is_whole(mlflow: MLflow, tmp_path: Path) -> None:
    run = a_run(tmp_path)
    run.append({"step": 1, "train/loss": 1.0})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "train/lo')
    run = outbox.catch_up(run, mlflow_uri.default_uri(tmp_path))
    assert list(mlflow.steps.values()) == [[1]]
    run.append({"step": 2, "train/loss": 1.0})  # its machine had crashed
    outbox.catch_up(run, mlflow_uri.default_uri(tmp_path))
    assert list(mlflow.steps.values()) == [[1, 2]]


def test_a_bug_in_the_thread_is_a_traceback_and_the_training_goes_on(
    mlflow: MLflow, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, bugs = a_run(tmp_path), [1, 2, 3]

    def bug(name: str) -> None:
        if bugs:
            raise KeyError(bugs.pop())

    mlflow.refuse = bug
    box = outbox.Outbox(mlflow_uri.default_uri(tmp_path))
    box.follow(run)
    run.append({"step": 1, "train/loss": 1.0})
    box.start()
    until(lambda: list(mlflow.steps.values()) == [[1]])
    box.close("FINISHED")
    said = capsys.readouterr().err
    assert said.count("Traceback") == 1 and "in bug" in said and list(mlflow.ended.values()) == ["FINISHED"]


# ── A sweep ────────────────────────────────────────────────────────────────────────────────────────────────────────


def begin(path: Path) -> tuple[Sweep, list[str], trial_log.Ledger]:
    found = a_sweep(path / "s", "smoke")
    names = [trial.name for trial in trained(found, lambda point: 0.5)[:3]]
    return found, names, trial_log.Ledger(found, queue.Queue(), mlflow_uri.default_uri(path))


def test_lines_are_written_while_mlflow_hangs_and_trials_end(mlflow: MLflow, tmp_path: Path) -> None:
    found, names, kept = begin(tmp_path)
    back = threading.Event()
    mlflow.refuse = lambda name: back.wait(10)
    for name in names:
        for step in (1, 2):
            kept.inbox.put(reported(name, step))
        kept.ended(name, "FINISHED")
    kept.inbox.put(TrialFailed(trial=names[0], reason="said behind all the others"))
    until(lambda: all(lines(found, name) == [1, 2] for name in names) and not kept.posted)
    assert not mlflow.steps
    back.set()
    found = kept.close("FINISHED", [], {"eval/knn_top1": 0.5})
    below = {tags["trial"]: run_id for run_id, tags in mlflow.tags.items() if tags.get("mlflow.parentRunId") == found.tracking_run}
    assert sorted(below) == names and all(mlflow.steps[run_id] == [1, 2] for run_id in below.values())
    assert len(mlflow.steps) == 4 and set(mlflow.ended.values()) == {"FINISHED"}


def test_what_a_sweep_could_not_log_the_same_command_logs(mlflow: MLflow, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, names, kept = begin(tmp_path)
    mlflow.refuse = away
    for name in names:
        kept.inbox.put(reported(name, 1))
    kept.ended(names[0], "FINISHED")
    found = kept.close("FINISHED", [], {})
    assert not mlflow.steps and [lines(found, name) for name in names] == [[1]] * 3
    assert "the same command again logs the undelivered reports" in capsys.readouterr().err
    mlflow.refuse = lambda name: None
    kept = trial_log.Ledger(found, queue.Queue(), kept.uri)  # all are over: nothing comes
    found = kept.close("FINISHED", [], {})
    assert [tags.get("trial") for tags in mlflow.tags.values()] == [None, *names]
    assert all(mlflow.tags[run_id]["mlflow.parentRunId"] == found.tracking_run for run_id in list(mlflow.tags)[1:])
    assert [mlflow.steps[run_id] for run_id in list(mlflow.tags)[1:]] == [[1]] * 3
    assert not any(load_run(found.path / "trials" / name).unlogged for name in names)


def test_what_a_trial_reported_before_it_began_again_is_not_lost(mlflow: MLflow, tmp_path: Path) -> None:
    """MLflow opens only during the trial's second try, in the same directory."""
    found, names, kept = begin(tmp_path)
    directory, back = found.path / "trials" / names[0], threading.Event()
    mlflow.refuse = lambda name: back.wait(10)
    for step in (1, 2, 3):
        kept.inbox.put(reported(names[0], step))
    until(lambda: lines(found, names[0]) == [1, 2, 3])
    run = load_run(directory)
    trial._set_aside(found, directory)
    kept.inbox.put(TrialBeganAgain(trial=names[0], reason="the loss is not finite"))
    replace(run, created=run.created + 1, tracking_run="", unlogged="").save()
    kept.inbox.put(reported(names[0], 1))
    kept.ended(names[0], "FINISHED")
    until(lambda: not kept.posted and lines(found, names[0]) == [1])
    back.set()
    kept.close("FINISHED", [], {})
    tries = [run_id for run_id, tags in mlflow.tags.items() if tags.get("trial") == names[0]]
    assert [(mlflow.steps[run_id], mlflow.ended[run_id]) for run_id in tries] == [([1, 2, 3], "FAILED"), ([1], "FINISHED")]
    assert load_run(directory).tracking_run == tries[1] and not load_run(directory).unlogged


def test_a_parent_that_did_not_open_is_tried_again(mlflow: MLflow, tmp_path: Path) -> None:
    found, names, kept = begin(tmp_path)
    refusals = [1, 2]

    def flaky(name: str) -> None:
        if name == "s" and refusals:
            refusals.pop()
            raise UserError("no answer")

    mlflow.refuse = flaky
    kept.inbox.put(reported(names[0], 1))
    until(lambda: len(mlflow.steps) == 2)
    found = kept.close("FINISHED", [], {})
    assert not refusals and list(mlflow.steps) == [found.tracking_run, f"1: {names[0]}"]


def test_a_sweep_that_goes_on_does_not_need_the_server_and_a_new_one_does(tmp_path: Path) -> None:
    nobody = "http://127.0.0.1:9"  # the discard port: nothing listens
    found = a_sweep(tmp_path / "s", "smoke")
    found.save()
    with pytest.raises(UserError, match="no MLflow server at"):
        sweep.sweep(sweep.Args(resume=found.path, tracking_uri=nobody))
    trained(found, lambda point: 0.5)
    with pytest.raises(UserError, match="/data/patterns"):  # one check later: there is no data
        sweep.sweep(sweep.Args(resume=found.path, tracking_uri=nobody))


@pytest.mark.parametrize(
    "damage", ["", "[]", '{"mlflow_run": "ab', '{"mlflow_run": "RUN", "bytes": "many"}', '{"mlflow_run": "RUN", "bytes": -3}']
)
def test_a_damaged_note_is_no_note(mlflow: MLflow, tmp_path: Path, damage: str) -> None:
    """MLflow itself says which steps it has: nothing is logged twice."""
    run, uri = a_run(tmp_path), mlflow_uri.default_uri(tmp_path)
    run.append({"step": 1, "train/loss": 1.0})
    run = outbox.catch_up(run, uri)
    (run.path / "outbox.json").write_text(damage.replace("RUN", run.tracking_run))
    run.append({"step": 2, "train/loss": 1.0})
    run = outbox.catch_up(run, uri)
    assert list(mlflow.steps.values()) == [[1, 2]] and run.unlogged == ""


def test_lines_that_are_no_reports_are_passed_over(mlflow: MLflow, tmp_path: Path) -> None:
    run, uri = a_run(tmp_path), mlflow_uri.default_uri(tmp_path)
    with (run.path / "metrics.jsonl").open("a") as lines:
        lines.write('[1]\n"text"\n{"train/loss": 1.0}\n{"step": 1, "train/loss": "much"}\n{"step": 1, "train/lo{"step": 1}\n')
    run.append({"step": 2, "train/loss": 1.0})
    run = outbox.catch_up(run, uri)
    assert list(mlflow.steps.values()) == [[2]] and run.unlogged == ""
