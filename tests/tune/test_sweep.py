"""Sweeps: refusals before anything starts, the trials' records, Ray Tune on objectives that cost nothing, and on one real job."""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from pipelines import cli, terminal
from pipelines.runs.directory import load_run
from pipelines.train import retry
from pipelines.train.messages import Reported, TrialFailed
from simclr.data.manifest import read_manifest
from simclr.errors import Diverged, UserError
from tests.support.command import Run, refused
from tests.support.sweeps import a_sweep, trained
from tests.support.traps import Trap
from tune import resolve, spaces, sweep_dir, trial_log, validate
from tune.sweep_dir import Trial
from tune.trial import why

BASE = ("sweep", "smoke", "--recipe", "patterns_tiny", "--set", "train.batch_size=60", "--data")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("sweep",), "which space"),
        (("sweep", "smokes", "--recipe", "patterns_tiny", "--data", "DATA"), "unknown space 'smokes'; nearest: smoke"),
        (("sweep", "smoke", "--data", "DATA"), r"which recipe\?"),
        (("sweep", "smoke", "--recipe", "patterns_tiny"), r"which data\?"),
        ((*BASE, "DATA", "--only", "head.layers=1"), "does not vary head.layers"),
        ((*BASE, "DATA", "--only", "loss.temperature"), "is no assignment; expected FIELD=VALUE"),
        (("sweep", "smoke", "--recipe", "patterns_tiny", "--data", "DATA", "--set", "train.epoch=3"), "nearest: train.epochs"),
        (("sweep", "smoke", "--recipe", "patterns_tiny", "--data", "DATA", "--set", "train.batch_size=many"), "expected int"),
        ((*BASE, "DATA", "--workers-per-trial", "61"), "batch_size 60 has no image for each of 61 workers"),
        (("sweep", "batch-epochs", *BASE[2:], "DATA", "--set", "train.batch_size=200"), r"batch_size 400 is larger than the training"),
        ((*BASE, "DATA", "--scheduler", "asha", "--metric", "eval/probe_top1"), "asha decides while trials run"),
        (("sweep", "losses", *BASE[2:], "DATA", "--scheduler", "pbt"), "losses varies none of them"),
        (("sweep", "temperature-lr", *BASE[2:], "DATA", "--scheduler", "pbt"), "use asha"),
        (("sweep", "search", *BASE[2:], "DATA", "--search", "grid"), "no grid covers"),
        ((*BASE, "DATA", "--seeds", "0"), "--seeds is 0"),
        (("sweep", "report", "nothing"), "nothing is no sweep"),
        (("sweep", "report"), r"which sweep\?"),
        (("sweep", "--resume", "nothing"), "nothing is no sweep"),
    ],
)
def test_a_sweep_that_cannot_work_is_refused(simclr: Run, patterns: Path, words: tuple[str, ...], sentence: str) -> None:
    refused(simclr(*(patterns if word == "DATA" else word for word in words)), sentence)


def test_two_commands_do_not_run_one_sweep(simclr: Run, tmp_path: Path, patterns: Path) -> None:
    """Each would train the same trials in the same directories. What is refused leaves nothing behind."""
    sweep = a_sweep(tmp_path / "s", "smoke", data=str(patterns), changes={"train.batch_size": 60})
    trained(sweep, lambda point: 0.5)
    before = sorted(path.name for path in sweep.path.iterdir())
    with sweep.alone():
        refused(simclr("sweep", "--resume", str(sweep.path)), "another process is running .*/s; wait for it, end it, or use another --out")
    with pytest.raises(UserError, match="another process has just begun a sweep in"), a_sweep(sweep.path, "smoke", created=1.0).alone():
        pass
    with pytest.raises(UserError, match="do not fit"), a_sweep(tmp_path / "runs" / "new", "smoke").alone():
        raise UserError("its workers do not fit")
    assert not (tmp_path / "runs").exists()
    assert sorted(path.name for path in sweep.path.iterdir()) == [sweep_dir.LOCK, *before]


def test_spaces_are_listed(simclr: Run) -> None:
    code, out, _ = simclr("sweep", "--list")
    assert code == 0 and all(space.why in out and space.repeats in out for space in spaces.SPACES.values())


def test_unlabelled_data_has_its_own_metrics(tmp_path: Path, photographs: Path) -> None:
    manifest = read_manifest(photographs)
    changes = {"train.batch_size": 60}
    with pytest.raises(UserError, match="needs labels"):
        validate.check(a_sweep(tmp_path, "smoke", changes=changes), manifest)
    with pytest.raises(UserError, match=r"health/rankme is known at their end; use health/align_uniform"):
        validate.check(a_sweep(tmp_path, "smoke", changes=changes, metric="health/rankme", scheduler="asha"), manifest)
    assert len(validate.check(a_sweep(tmp_path, "smoke", changes=changes, metric="health/rankme", seeds=2), manifest)) == 16


def test_what_ray_tune_gets_comes_back_as_the_same_config(tmp_path: Path, patterns: Path) -> None:
    for name in ("temperature-lr", "search", "augmentation-pairs"):
        sweep = a_sweep(tmp_path, name, search="random", trials=5, changes={"train.batch_size": 60}, seeds=2)
        codes = validate.check(sweep, read_manifest(patterns))
        assert len(codes) == 10 and len({code.name for code in codes}) == 10
        assert [resolve.Coded(**json.loads(json.dumps(dataclasses.asdict(code)))) for code in codes] == codes
        drawn = resolve.samples(sweep.restricted, 5, 0)
        for code, combination in zip(codes, drawn, strict=False):
            back = {axis.key: resolve.chosen(axis, code.axes[axis.key]) for axis in sweep.restricted.axes}
            one, other = (resolve.point(sweep.restricted, sweep.base, given, 0) for given in (back, combination))
            assert one == other


def test_a_failure_is_tried_again_only_where_another_seed_may_help() -> None:
    class Group(Exception):
        def __init__(self, error: Exception) -> None:
            self.worker_failures = {0: error}

    oom = type("OutOfMemoryError", (RuntimeError,), {"__module__": "torch"})
    assert why(Group(Diverged("not finite at step 3 on rank 0")), "") == ("not finite at step 3 on rank 0", True)
    assert why(Group(UserError("a shard is damaged")), "") == ("a shard is damaged", False)
    assert why(Group(oom("tried to allocate 3 GiB")), "") == ("out of memory on the device: tried to allocate 3 GiB", False)
    reason, again = why(Group(RuntimeError("the actor died")), "")
    assert again and reason == "RuntimeError: the actor died"
    assert "out of memory" in retry.non_retryable(Group(oom("tried to allocate 3 GiB")))  # given up at once, not three times


def test_a_shard_that_shrank_under_a_trial_is_explained(tmp_path: Path, patterns: Path) -> None:
    """The other worker's error looks like a bug, and the lost one's says nothing; another seed would not help."""
    from ray.exceptions import RayActorError

    class Group(Exception):
        worker_failures: ClassVar = {0: RuntimeError("connection closed by peer"), 1: RayActorError()}

    shutil.copytree(patterns, out := tmp_path / "shards")
    reason, again = why(Group(), str(out))
    assert again and reason.startswith("workers failed more often in a row than --max-failures allows, the last time so: ")
    assert "run the same command" not in reason and retry.bug(Group()) == ""
    os.truncate(out / "train-00000.beton", 5000)
    reason, again = why(Group(), str(out))
    assert not again and reason.startswith(f"workers died as shard train-00000.beton of {out} has 5,000 bytes, the manifest says ")


def test_the_best_keep_their_checkpoints(tmp_path: Path) -> None:
    sweep = a_sweep(tmp_path / "s", "smoke", keep=2)
    found = trained(sweep, lambda point: resolve.value_of(point.config, "loss.temperature") / 2 + 0.01 * point.config.optim.base_lr)
    for trial in found:
        (sweep.path / "trials" / trial.name / "checkpoints" / "step-9").mkdir(parents=True)
    dataclasses.replace(found[-1], status="failed", reason="the loss is not finite").save(sweep.path / "trials" / found[-1].name)
    dataclasses.replace(found[0], status="running").save(sweep.path / "trials" / found[0].name)
    sweep_dir.prune(sweep.path, sweep.metric, sweep.keep)
    kept = sorted(p.parent.name for p in sweep.path.glob("trials/*/checkpoints"))
    assert kept == ["000-s0", "005-s0", "006-s0"]  # the running trial, and the best two that did not fail
    order = sweep_dir.write_results(sweep)
    assert [trial.name for trial in order][:2] == ["006-s0", "005-s0"] and found[-1].name not in [trial.name for trial in order]
    best = json.loads((sweep.path / "best_config.json").read_text())
    assert best["trial"] == "006-s0" and best["config"]["loss"]["temperature"] == 1.0
    lowest = sweep_dir.ranked(found, "health/align_uniform")
    assert lowest[0].name == "007-s0"  # − score: lower is better


def test_one_parent_run_and_one_below_it_for_each_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[str, dict[str, str]]] = []
    logged: dict[str, list[int]] = {}
    ended: dict[str, str] = {}

    class MLflowRun:
        def __init__(self, uri: str, experiment: str, name: str, params: Any, tags: dict[str, str], run_id: Any, known: Any) -> None:
            self.run_id = f"id of {name}"
            known(self.run_id)
            opened.append((name, tags))

        def log(self, reports: list[dict[str, Any]]) -> None:
            logged.setdefault(self.run_id, []).extend(report["step"] for report in reports)

        def artifact(self, path: Path) -> None: ...

        def end(self, status: str = "FINISHED") -> None:
            ended[self.run_id] = status

    monkeypatch.setattr("pipelines.tracking.client.MLflowRun", MLflowRun)
    sweep = a_sweep(tmp_path / "s", "smoke")
    names = [trial.name for trial in trained(sweep, lambda point: 0.5)[:2]]
    inbox: Any = queue.Queue()
    kept = trial_log.Ledger(sweep, inbox, "sqlite:///x.db")
    for step in (1, 2):
        for name in names:
            inbox.put(Reported(step=step, total_steps=2, metrics={"train/loss": 1.0, "epoch": 0.5}, trial=name))
    inbox.put(TrialFailed(trial=names[1], reason="the loss is not finite"))
    kept.ended(names[0], "FINISHED")
    kept.ended(names[1], "FAILED")
    sweep = kept.close("FINISHED", [], {"eval/knn_top1": 0.5})
    assert opened[0][0] == "s" and sorted(name for name, _ in opened[1:]) == names
    assert all(tags["mlflow.parentRunId"] == "id of s" for _, tags in opened[1:]) and sweep.tracking_run == "id of s"
    assert [logged[f"id of {name}"] for name in names] == [[1, 2], [1, 2]]
    assert ended == {f"id of {names[0]}": "FINISHED", f"id of {names[1]}": "FAILED", "id of s": "FINISHED"}
    assert [row["step"] for row in load_run(sweep.path / "trials" / names[0]).history()] == [1, 2]


# ── Under Ray Tune ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def no_tracking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.tracking.outbox.Outbox.start", lambda self: None)


@pytest.mark.usefixtures("shared_ray", "no_tracking")
def test_asha_stops_the_worse_and_a_failed_trial_is_no_candidate(tmp_path: Path, patterns: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best trial's driver is lost in mid-run, and is started again."""
    from tune import ray_tune

    def pretend(asked: Any, sweep: Any, inbox: Any, private: bool, heard: Any) -> None:
        import dataclasses
        import os
        import signal

        from ray import tune

        from tune.sweep_dir import Trial

        name = str(tune.get_context().get_trial_name())
        directory, quality = sweep.path / "trials" / name, asked.axes["loss.temperature"]
        trial = Trial(name=name, values={"loss.temperature": (0.1, 0.2, 0.5, 1.0)[quality], "optim.base_lr": 1.0}, seed=0, total_steps=80)
        trial.save(directory)
        if quality == 0:
            dataclasses.replace(trial, status="failed", reason="the loss is not finite at step 3").save(directory)
            return
        for step in range(20, 81, 20):
            if quality == 3 and step == 40 and not (directory / "lost").exists():
                (directory / "lost").touch()
                os.kill(os.getpid(), signal.SIGKILL)  # as if its node had gone
            trial = dataclasses.replace(trial, step=step, scores={"eval/knn_top1": 0.2 * quality + step / 1000})
            trial.save(directory)
            tune.report({**trial.scores, "step": step})
        dataclasses.replace(trial, status="finished").save(directory)

    monkeypatch.setattr(ray_tune, "drive", pretend)
    only = {"optim.base_lr": [1], "loss.temperature": [1.0, 0.5, 0.2, 0.1]}
    sweep = a_sweep(tmp_path / "s", "smoke", scheduler="asha", only=only, changes={"train.steps": 80, "train.batch_size": 60})
    sweep.save()
    manifest = read_manifest(patterns)
    codes = sorted(validate.check(sweep, manifest), key=lambda code: -int(code.axes["loss.temperature"]))
    for trial in trained(sweep, lambda point: 0.0):  # the run directories, which a real driver would have made
        (sweep.path / "trials" / trial.name / "trial.json").unlink()
    ray_tune.trials(sweep, codes, 1, manifest, "sqlite:///x.db")
    found = {trial.values["loss.temperature"]: trial for trial in sweep_dir.trials(sweep.path)}
    assert (sweep.path / "trials" / found[1.0].name / "lost").exists()
    assert found[1.0].status == "finished" and found[0.1].status == "failed" and "not finite" in found[0.1].reason
    assert {found[0.5].status, found[0.2].status} == {"stopped"} and found[0.2].step < 80
    assert sweep_dir.ranked(list(found.values()), sweep.metric)[0].values["loss.temperature"] == 1.0
    # A finished sweep is not trained again: the records decide, whatever the objective would do.
    monkeypatch.setattr(ray_tune, "drive", lambda *_: (_ for _ in ()).throw(RuntimeError("trained again")))
    ray_tune.trials(sweep, codes, 1, manifest, "sqlite:///x.db")
    assert {t.name: t.status for t in sweep_dir.trials(sweep.path)} == {t.name: t.status for t in found.values()}


@pytest.mark.usefixtures("shared_ray", "no_tracking")
def test_a_sweep_that_was_interrupted_trains_what_is_left_and_reads_no_pickle(
    tmp_path: Path, patterns: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """Three trials: one is over, one in its midst, one has not begun. What Ray Tune kept is a trap, and it keeps nothing here again."""
    from tune import ray_tune

    def pretend(asked: Any, sweep: Any, inbox: Any, private: bool, heard: Any) -> None:
        import dataclasses

        from ray import tune

        from tune.sweep_dir import Trial, trial_in

        name = str(tune.get_context().get_trial_name())
        directory = sweep.path / "trials" / name
        trial = trial_in(directory) or Trial(name=name, values={"loss.temperature": asked.axes["loss.temperature"]}, seed=asked.seed)
        trial = dataclasses.replace(trial, start_s=trial.start_s | {f"began at {trial.step}": 0.0})
        for step in range(trial.step + 1, 5):
            trial = dataclasses.replace(trial, step=step, scores={"eval/knn_top1": asked.axes["loss.temperature"] / 10 + step / 100})
            trial.save(directory)
            tune.report({**trial.scores, "step": step})
            if (sweep.path / "interrupt").exists() and name == "001-s0" and step == 2:
                return
        dataclasses.replace(trial, status="finished").save(directory)

    monkeypatch.setattr(ray_tune, "drive", pretend)
    monkeypatch.setattr(terminal, "_QUIET", False)
    over = ray_tune.Follow.over

    def interrupted(self: Any, name: str, status: Any, reason: str) -> None:
        if name == "001-s0":
            raise KeyboardInterrupt
        over(self, name, status, reason)

    only = {"optim.base_lr": [1], "loss.temperature": [0.1, 0.2, 0.5]}
    sweep, manifest = a_sweep(tmp_path / "s", "smoke", only=only, changes={"train.batch_size": 60}), read_manifest(patterns)
    trained(sweep, lambda point: 0.0)
    for folder in (sweep.path / "trials").iterdir():
        (folder / "trial.json").unlink()
    codes = validate.check(sweep, manifest)
    (sweep.path / "interrupt").touch()
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(ray_tune.Follow, "over", interrupted)
        ray_tune.trials(sweep, codes, 1, manifest, "sqlite:///x.db")
    (sweep.path / "interrupt").unlink()
    assert [(t.status, t.step) for t in sweep_dir.trials(sweep.path)] == [("finished", 4), ("running", 2)]
    kept = "tuner.pkl", "experiment_state-2026-11-22_00-00-00.json", "searcher-state-2026-11-22_00-00-00.pkl", "000-s0/error.pkl"
    marker = Trap(tmp_path / "marker").planted(sweep.path / "tune", *kept)
    ray_tune.trials(sweep, codes, 1, manifest, "sqlite:///x.db")
    assert not marker.exists() and "is not read: the trials go on from their own records" in capfd.readouterr().err
    found = sweep_dir.trials(sweep.path)
    assert [(t.name, t.status, t.step, t.scores["eval/knn_top1"]) for t in found] == [
        (f"{i:03}-s0", "finished", 4, i / 10 + 4 / 100) for i in range(3)
    ]
    assert [list(t.start_s) for t in found] == [["began at 0"], ["began at 0", "began at 2"], ["began at 0"]]
    there = {"best_config.json", "plan.json", "results.csv", "sweep.json", "trials"}
    assert {p.name for p in sweep.path.iterdir()} == there | {"tune"}  # Ray Tune leaves nothing of its own


@pytest.mark.usefixtures("shared_ray")
def test_ray_tune_reads_no_pickle_of_a_failed_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would at the end, from its folder; on a cluster pbt's lies in the sweep's directory, whose owner can exchange it."""
    from ray.train._internal.storage import StorageContext
    from ray.tune.experiment import Trial as Tuned

    from tune import ray_tune

    sweep = a_sweep(tmp_path / "s", "smoke")
    monkeypatch.setattr(ray_tune.Follow, "followed", (sweep, SimpleNamespace(ended=print), SimpleNamespace(update=print)))
    failed = Tuned("x", stub=True, storage=StorageContext(str(tmp_path), "tune", trial_dir_name="000-s0"))
    marker = Trap(tmp_path / "marker").planted(Path(failed.storage.trial_fs_path), "error.pkl")
    failed.run_metadata.pickled_error_filename = "error.pkl"
    failed.get_pickled_error()
    assert marker.exists()
    marker.unlink()
    ray_tune.Follow().on_trial_error(0, [failed], failed)
    assert failed.get_pickled_error() is None and not marker.exists()


@pytest.mark.usefixtures("shared_ray")
def test_a_sweep_that_could_never_be_scheduled_is_refused(tmp_path: Path) -> None:
    from tune import ray_tune

    one = a_sweep(tmp_path, "smoke").resources
    assert ray_tune.room(a_sweep(tmp_path, "smoke")) == 2
    assert ray_tune.room(a_sweep(tmp_path, "smoke", resources=one | {"workers": 2})) == 1
    assert ray_tune.room(a_sweep(tmp_path, "smoke", max_concurrent=1)) == 1
    with pytest.raises(UserError, match=r"--max-concurrent 3 trials .* there is room for 2"):
        ray_tune.room(a_sweep(tmp_path, "smoke", max_concurrent=3))
    with pytest.raises(UserError, match=r"3 workers with 1 CPUs each do not fit: .* have room for 2"):
        ray_tune.room(a_sweep(tmp_path, "smoke", resources=one | {"workers": 3}))


@pytest.mark.usefixtures("shared_ray", "no_tracking")
def test_a_trial_is_the_job_of_pretrain(tmp_path: Path, patterns: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """It leaves a run directory as `simclr pretrain` does, with scores, and the sweep a report."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(terminal, "_QUIET", False)
    words = ["sweep", "smoke", "--recipe", "patterns_tiny", "--data", str(patterns), "--only", "loss.temperature=0.2", "optim.base_lr=1"]
    words += ["--set", "train.batch_size=60", "train.steps=3", "train.linear_eval=false", "--out", "s"]
    cli.main(words)
    (trial,) = sweep_dir.trials(tmp_path / "s")
    assert trial.status == "finished" and trial.step == 3 and 0 < trial.scores["eval/probe_top1"] <= 1
    run = load_run(tmp_path / "s" / "trials" / trial.name)
    assert [row["step"] for row in run.history()] == [1, 3] and (run.encoder / "encoder.safetensors").is_file()
    assert "--loss.temperature" not in run.command and "--train.steps=3" in run.command  # 0.2 is the recipe's own
    assert (tmp_path / "s" / "report.html").is_file() and "best: trial 000-s0" in capfd.readouterr().err


def test_trial_records_keep_what_they_were_given(tmp_path: Path) -> None:
    trial = Trial(name="x", values={"views.operations": ("crop", "colour")}, seed=1, scores={"eval/knn_top1": 0.5})
    (tmp_path / "x").mkdir()
    trial.save(tmp_path / "x")
    assert sweep_dir.trial_in(tmp_path / "x") == trial and sweep_dir.trial_in(tmp_path / "nothing") is None


def test_a_share_of_the_labels_is_of_each_class() -> None:
    import torch

    from pipelines.evaluation.quick import _share
    from simclr.evaluation.features import Features

    y = torch.tensor([0] * 50 + [1] * 20 + [2] * 3)
    features = Features(torch.arange(73.0)[:, None], y, torch.arange(73))
    some = _share(features, 0.1)
    assert some.y.bincount().tolist() == [5, 2, 1]  # a tenth of each, at least one
    assert torch.equal(some.h, _share(features, 0.1).h) and (some.h[:, 0].long() == some.ids).all()
    assert torch.equal(_share(features, 1.0).ids, features.ids)


def test_the_start_up_is_said_as_it_was_measured() -> None:
    found = [Trial(name=str(s), values={}, seed=0, start_s={"workers": s / 2, "first_step": s}) for s in (40.0, 10.0, 12.0)]
    assert (
        sweep_dir.start_up(found) == "a trial's first step came after 12 s (median of 3, 10 … 40 s), of which its workers took 6 s to begin"
    )
    assert sweep_dir.start_up([Trial(name="x", values={}, seed=0)]) == ""
