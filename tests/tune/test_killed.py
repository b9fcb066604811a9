"""Whole sweeps whose driver is killed with SIGKILL, and the same command again: each trial is the job of `simclr pretrain`."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.runs.directory import load_run
from simclr import checkpoint
from tests.support.processes import alive, children
from tests.support.traps import Trap
from tune import sweep_dir

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parents[2]
STEPS, EVERY = 16, 2


def command(out: Path, patterns: Path, *more: str) -> list[str]:
    words = [
        sys.executable,
        "-m",
        "pipelines.cli",
        "sweep",
        "smoke",
        "--recipe",
        "patterns_tiny",
        "--data",
        str(patterns),
        "--out",
        str(out),
    ]
    words += ["--tracking-uri", f"sqlite:///{out.parent / 'mlflow.db'}", "--max-concurrent", "1", *more]
    settings = ["train.batch_size=60", f"train.steps={STEPS}", f"train.checkpoint_every_steps={EVERY}", "train.linear_eval=false"]
    return [*words, "--set", *settings, "train.report_every_steps=1"]


def started(words: list[str], log: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with log.open("w") as out:
        return subprocess.Popen(words, cwd=log.parent, env=environment, stdout=out, stderr=out, start_new_session=True)


def finish(words: list[str], log: Path) -> None:
    assert started(words, log).wait(600) == 0, log.read_text()


def killed(words: list[str], log: Path, when: Callable[[], bool]) -> None:
    """Run the sweep until `when`, then kill its driver, and wait for the end of its Ray."""
    process, until = started(words, log), time.monotonic() + 300
    while not when():
        assert process.poll() is None and time.monotonic() < until, log.read_text()
        time.sleep(0.02)
    below = children(process.pid)
    process.kill()
    process.wait()
    while any(alive(pid) for pid in below):
        assert time.monotonic() < until, [pid for pid in below if alive(pid)]
        time.sleep(0.2)


def saved(out: Path, name: str) -> int:
    """The step of the newest checkpoint of trial `name`."""
    return max((int(path.name[5:]) for path in checkpoint.list_checkpoints(out / "trials" / name / "checkpoints")), default=0)


def in_its_midst(out: Path, name: str) -> bool:
    record = sweep_dir.trial_in(out / "trials" / name)
    return record is not None and record.status == "running" and EVERY <= saved(out, name) < STEPS


def rows(out: Path) -> list[dict[str, str]]:
    """results.csv without the time that the evaluation took."""
    with (out / "results.csv").open() as file:
        return [{name: cell for name, cell in row.items() if name != "eval/seconds"} for row in csv.DictReader(file)]


@pytest.mark.parametrize("scheduler", ["none", "asha"])
def test_a_killed_sweep_has_the_results_of_an_uninterrupted_one(tmp_path: Path, patterns: Path, scheduler: str) -> None:
    taus = "0.2,0.5" if scheduler == "none" else "0.2,0.5,1.0"
    more = ("--only", "optim.base_lr=1", f"loss.temperature={taus}", "--scheduler", scheduler)
    finish(command(tmp_path / "whole", patterns, *more), tmp_path / "log")
    out, log = tmp_path / "broken", tmp_path / "log"
    killed(command(out, patterns, *more), log, lambda: in_its_midst(out, "001-s0"))
    assert [(t.name, t.status) for t in sweep_dir.trials(out)] == [("000-s0", "finished"), ("001-s0", "running")]
    marker = Trap(tmp_path / "marker").planted(
        out / "tune", "tuner.pkl", "experiment_state-1.json", "searcher-state-1.pkl", "trainable.pkl"
    )
    at = saved(out, "001-s0")
    finish(command(out, patterns, *more), log)
    first = [row["step"] for row in load_run(out / "trials" / "001-s0").history()]
    assert at and first == list(range(1, len(first) + 1))
    assert not marker.exists() and "it is not read" in log.read_text()
    assert rows(out) == rows(tmp_path / "whole")  # as text: each score to its last bit
    if scheduler == "asha":  # Train's controller leaves out a report now and then, of any trial: of the others the scores are the same
        lines = [[json.loads(line) for line in (path / "reports.jsonl").read_text().splitlines()] for path in (out, tmp_path / "whole")]
        ours, theirs = ({(line["trial"], line["time"]): line["score"] for line in heard if "score" in line} for heard in lines)
        both = ours.keys() & theirs.keys()
        assert {name for name, _ in both} == {"000-s0", "001-s0", "002-s0"} and all(ours[key] == theirs[key] for key in both)
    assert ("stopped" in {row["status"] for row in rows(out)}) == (scheduler == "asha")


def test_a_killed_population_goes_on(tmp_path: Path, patterns: Path) -> None:
    """Its members keep their values, weights and the time of their last change; then it changes them on."""
    out, log = tmp_path / "s", tmp_path / "log"
    words = command(out, patterns, "--only", "optim.base_lr=0.5,1", "loss.temperature=0.2,1.0", "--scheduler", "pbt")

    def compared() -> bool:
        path = out / "population.json"
        return path.is_file() and sum(m["changed"] >= STEPS // 4 for m in json.loads(path.read_text()).values()) >= 3

    killed(words, log, compared)
    before, there = json.loads((out / "population.json").read_text()), {t.name: t for t in sweep_dir.trials(out)}
    values = {name: load_run(out / "trials" / name).config.loss.temperature for name, t in there.items() if t.status == "running"}
    assert values and not [path for path in out.iterdir() if path.name.startswith(("tune", ".tune"))]
    finish(words, log)
    assert "pbt goes on with each trial's present values" in log.read_text()
    after = json.loads((out / "population.json").read_text())
    assert all(after[name]["scored"] >= member["scored"] for name, member in before.items())
    found = sweep_dir.trials(out)
    assert [(t.status, t.step) for t in found] == [("finished", STEPS)] * 4, log.read_text()
    for record in found:
        run = load_run(out / "trials" / record.name)
        assert run.config.loss.temperature == record.values["loss.temperature"]
        assert not record.donor or record.donor in there
