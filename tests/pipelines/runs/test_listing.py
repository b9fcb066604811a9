"""`simclr runs`: processes that are gone, and sweeps with their trials, on disk and in S3."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines import cli
from pipelines.runs import status
from pipelines.runs.directory import open_run
from pipelines.runs.listing import line
from pipelines.runs.status import Status
from pipelines.train import driver, ray_train
from simclr import processes
from simclr.errors import UserError
from simclr.stages import STAGES
from tests.pipelines.runs.test_runs import run
from tests.pipelines.tracking.test_unlogged import a_run
from tests.support.paths import ROOT
from tests.support.s3 import Proxy
from tests.support.sweeps import a_sweep, trained
from tune import plan, sweep_dir
from tune.resolve import Coded

ELSEWHERE = "another-boot pid:[1] 7 7"


def listed(at: object, capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    cli.main(["runs", str(at), "--json"])
    return {row["run"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}


def said(path: Path, **fields: Any) -> None:
    (path / status.FILE).write_text(
        json.dumps({"state": "running", "process": ELSEWHERE, "host": "h", "pid": 7, "time": time.time()} | fields)
    )


def gone() -> str:
    """A process of this machine that was killed, as `this_process` has it."""
    tells = "from simclr import processes; print(processes.this_process(), flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", tells], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        found = process.stdout.readline().strip()
        assert processes.lives(found) is True
        process.kill()
    assert processes.lives(found) is False
    return found


def test_a_run_whose_process_has_ended_is_not_called_running(tmp_path: Path, patterns: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each has reported a second ago."""
    cases: dict[str, tuple[dict[str, Any], tuple[str, str]]] = {
        "alive": ({"process": processes.this_process()}, ("running", "")),
        "killed": ({"process": gone(), "pid": 7, "host": "h"}, ("interrupted", "its process 7 on h is gone")),
        "ended": ({"state": "interrupted"}, ("interrupted", "")),
        "failed": ({"state": "failed", "reason": "the loss is\nnot finite"}, ("failed", "the loss is\nnot finite")),
        "elsewhere": ({}, ("running", "")),
        "damaged": ({"state": 7}, ("running", "")),
        "older": ({"state": "interrupted", "time": time.time() - 200}, ("running", "")),  # goes on under a version that leaves no note
    }
    for name, (fields, _) in cases.items():
        run(tmp_path, patterns, name, [5, 10], 1, [])
        said(tmp_path / name, **fields)
    run(tmp_path, patterns, "complete", [40], 1, [])
    said(tmp_path / "complete", state="interrupted")  # while it was published
    run(tmp_path, patterns, "quiet", [5], 3000, [])
    said(tmp_path / "quiet", process=processes.this_process())  # a long evaluation
    found = listed(tmp_path, capsys)
    assert {name: (found[name]["state"], found[name]["note"]) for name in cases} == {
        name: expected for name, (_, expected) in cases.items()
    }
    assert found["complete"]["state"] == "complete" and found["quiet"]["state"] == "running"
    cli.main(["runs", str(tmp_path)])
    out = capsys.readouterr().out
    assert re.search(r"killed +patterns_tiny +interrupted +10 / 40", out) and r"the loss is\nnot finite" in out


def test_of_a_run_in_s3_the_lease_tells(tmp_path: Path, patterns: Path, s3: Proxy, capsys: pytest.CaptureFixture[str]) -> None:
    from simclr.data.s3.lease import Lease, Register
    from simclr.data.s3.store import Store
    from simclr.data.s3.uri import address

    store = Store()
    for name in ("held", "released", "unheld"):
        run(tmp_path, patterns, name, [5], 1, [])
        said(tmp_path / name)
        for path in (tmp_path / name).rglob("*.json*"):
            store.client.put_object(Bucket="photos", Key=f"leases/{path.relative_to(tmp_path)}", Body=path.read_bytes())
    leases = {}
    for name in ("held", "released"):
        place = address(f"s3://photos/leases/{name}/lease.json")
        assert place is not None
        leases[name] = Lease(Register(store, place), name, process=ELSEWHERE)
        leases[name].take("", print)
    leases["released"].release()
    found = listed("s3://photos/leases", capsys)
    leases["held"].release()
    assert {name: found[name]["state"] for name in found} == {"held": "running", "released": "interrupted", "unheld": "running"}


@pytest.mark.parametrize(
    ("raised", "state", "reason"),
    [
        (KeyboardInterrupt(), "interrupted", ""),
        (UserError("no room"), "failed", "no room"),
        (None, "complete", ""),
    ],
)
def test_a_job_says_how_it_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: BaseException | None, state: str, reason: str
) -> None:
    """SIGTERM and Ctrl-C come as KeyboardInterrupt. While it trains, the note names this process."""
    from pipelines.runs import sync

    found = a_run(tmp_path)
    meanwhile: list[Status | None] = []

    def follow(*given: object) -> tuple[float, None]:
        meanwhile.append(status.read((found.path / status.FILE).read_text()))
        if raised is not None:
            raise raised
        return time.monotonic(), None

    monkeypatch.setattr(driver, "_require_space", lambda *given: None)  # with little room it would look at the images, which are nowhere
    monkeypatch.setattr(ray_train, "connect", lambda *given: False)
    monkeypatch.setattr(ray_train, "require", lambda *given: False)
    monkeypatch.setattr(driver, "_launch", lambda job: type("Running", (), {"stop": lambda self: None})())
    monkeypatch.setattr(driver, "_follow", follow)
    monkeypatch.setattr("pipelines.tracking.outbox.Outbox.start", lambda self: None)
    job = driver.Job(
        run=found,
        home=sync.Home(found.path),
        asked=found.path,
        total=3,
        uri="sqlite:///x.db",
        resources=ray_train.Resources(workers=1),
        publish=lambda run, method: None,
    )
    try:
        driver.train(job, time.monotonic())
    except (KeyboardInterrupt, UserError) as error:
        assert error is raised
    assert meanwhile[0] is not None and (meanwhile[0].state, meanwhile[0].process) == ("running", processes.this_process())
    ended = status.read((found.path / status.FILE).read_text())
    assert ended is not None and (ended.state, ended.reason, ended.pid) == (state, reason, os.getpid())


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_runs_of_every_stage_are_read(tmp_path: Path, patterns: Path, stage: str) -> None:
    """Each has fields of its own: a fine-tuned run's tap is no unknown field."""
    made = open_run(tmp_path / stage, "x", STAGES[stage](), patterns, stage=stage)
    made.save()
    found = line(stage, (made.path / "run.json").read_text(), '{"step": 3, "eval/top1": 0.5}\n{"step": 4}\n', [])
    assert (found.note, found.recipe, found.step, found.metric, found.score) == ("", "x", 4, "eval/top1", 0.5)


def some_sweeps(folder: Path, data: Path) -> None:
    """One is complete, with a failed trial; one was killed with a trial in its midst and one that has not begun; a run lies beside."""
    run(folder, data, "alone", [40], 10, [])
    for name in ("done", "killed"):
        only = {"optim.base_lr": [1], "loss.temperature": [0.1, 0.2, 0.5]}
        sweep = a_sweep(folder / name, "smoke", only=only)
        trials = trained(sweep, lambda point: point.config.loss.temperature)
        codes = [Coded(axes={"loss.temperature": i, "optim.base_lr": 0}, seed=0, name=trial.name) for i, trial in enumerate(trials)]
        plan.settled(sweep, codes)
        if name == "done":
            replace(trials[2], status="failed", reason="out of memory").save(sweep.path / "trials" / trials[2].name)
            status.note(sweep.path, "complete")
        else:
            replace(trials[1], status="running", step=4).save(sweep.path / "trials" / trials[1].name)
            (sweep.path / "trials" / trials[2].name / "trial.json").unlink()
            said(sweep.path, process=gone())


def check(found: dict[str, dict[str, Any]]) -> None:
    assert {name: (row["kind"], row["state"], row["step"], row["total_steps"]) for name, row in found.items()} == {
        "alone": ("run", "complete", 40, 40),
        "done": ("sweep", "complete", 3, 3),
        "done/trials/000-s0": ("trial", "complete", 9, 9),
        "done/trials/001-s0": ("trial", "complete", 9, 9),
        "done/trials/002-s0": ("trial", "failed", 9, 9),
        "killed": ("sweep", "interrupted", 1, 3),
        "killed/trials/000-s0": ("trial", "complete", 9, 9),
        "killed/trials/001-s0": ("trial", "interrupted", 4, 9),
    }
    # kNN is nine tenths of the temperature, see `trained`; the failed trial's is no score.
    assert (found["done"]["metric"], found["done"]["score"]) == ("eval/knn_top1", pytest.approx(0.18))
    assert found["done/trials/002-s0"]["score"] is None and found["done/trials/002-s0"]["note"] == "out of memory"
    assert found["done"]["note"] == "1 failed" and found["killed/trials/000-s0"]["varied"] == "loss.temperature 0.1, optim.base_lr 4"
    below_done = [name for name in found if name.startswith("done/")]
    assert below_done == [f"done/trials/{n}-s0" for n in ("001", "000", "002")]  # the best first


def test_sweeps_and_their_trials_on_disk(tmp_path: Path, patterns: Path, capsys: pytest.CaptureFixture[str]) -> None:
    some_sweeps(tmp_path, patterns)
    check(listed(tmp_path, capsys))
    alone = listed(tmp_path / "done", capsys)
    assert list(alone) == ["done", *(f"done/trials/{n}-s0" for n in ("001", "000", "002"))]
    cli.main(["runs", str(tmp_path)])
    rows = capsys.readouterr().out.splitlines()
    at = next(number for number, row in enumerate(rows) if row.startswith("done"))
    assert re.match(r"done +patterns_tiny +complete +3 / 3 trials .* kNN 18\.0 %", rows[at])
    assert re.match(r"  trials/001-s0  loss\.temperature 0\.2, optim\.base_lr 4 +complete +9 / 9 .* kNN 18\.0 %", rows[at + 1])


def test_sweeps_and_their_trials_in_s3(tmp_path: Path, patterns: Path, s3: Proxy, capsys: pytest.CaptureFixture[str]) -> None:
    from simclr.data.s3.store import Store

    some_sweeps(tmp_path, patterns)
    store = Store()
    for path in tmp_path.rglob("*"):
        if path.is_file():
            store.client.put_object(Bucket="photos", Key=f"sweeps/{path.relative_to(tmp_path)}", Body=path.read_bytes())
    check(listed("s3://photos/sweeps", capsys))
    assert next(iter(listed("s3://photos/sweeps/killed", capsys))) == "killed"


def test_a_long_sweep_shows_its_best_trials_and_says_so(tmp_path: Path, patterns: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, patterns, "alone", [40], 10, [])
    sweep = a_sweep(tmp_path / "long", "temperature-lr")
    trained(sweep, lambda point: point.config.loss.temperature)
    cli.main(["runs", str(tmp_path)])
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1 + 1 + 1 + 10 and "the best 10 of 72 trials; `simclr runs` of it alone lists all" in out
    cli.main(["runs", str(sweep.path)])
    assert len(capsys.readouterr().out.splitlines()) == 1 + 1 + 72


def test_a_sweeps_file_that_cannot_be_read_does_not_hide_the_others(
    tmp_path: Path, patterns: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    some_sweeps(tmp_path, patterns)
    (tmp_path / "killed/sweep.json").write_text("{")
    (tmp_path / "done/trials/001-s0/trial.json").write_text('{"status": "won"}')
    found = listed(tmp_path, capsys)
    assert found["killed"]["note"] and found["done/trials/001-s0"]["state"] == "?" and found["done"]["score"] == pytest.approx(0.09)


def test_a_sweep_says_how_it_has_ended(tmp_path: Path) -> None:
    from tune.sweep import _noted

    asked = a_sweep(tmp_path / "s", "smoke")
    asked.save()

    def interrupted() -> sweep_dir.Sweep:
        raise KeyboardInterrupt

    for work, state in ((interrupted, "interrupted"), (lambda: asked, "complete")):
        with contextlib.suppress(KeyboardInterrupt):
            _noted(asked, work)
        found = status.read((asked.path / status.FILE).read_text())
        assert found is not None and found.state == state
