"""The main job, cut small, under Ray: the demo from end to end, an interrupted run that goes on, a run that cannot go on."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from pipelines.commands import demo, pretrain
from pipelines.runs import status
from pipelines.tracking.uri import default_uri
from pipelines.train import ray_train
from simclr import checkpoint
from simclr.errors import UserError
from simclr.recipes import recipe

_RESULTS = {"metrics.jsonl", "evaluation.json", "checkpoint.json"}


def test_the_demo_from_rendering_to_the_report(shared_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = demo.Args(train=1200, test=400, epochs=7)
    result = demo.demo(arguments)
    raw, untrained, trained = result.scores
    assert [raw["name"], untrained["name"], trained["name"]] == ["raw pixels", "untrained encoder", "trained encoder"]
    # Measured before initial weights were keyed: kNN 27, 25 and 63 %, probe 15, 37 and 70 %. By kNN raw pixels and an untrained encoder
    # are about alike.
    assert trained["probe_top1"] > untrained["probe_top1"] + 0.15 and untrained["probe_top1"] > raw["probe_top1"]
    assert trained["knn_top1"] > max(untrained["knn_top1"], raw["knn_top1"]) + 0.15

    assert result.registered == "registered as patterns/1, the champion"
    assert result.pulled.startswith("pulled as patterns@champion in a fresh process: features equal to ")
    assert float(result.pulled.rsplit(" ", 1)[1]) <= 1e-5
    page = result.report.read_text()
    assert result.report == Path("runs/demo/report.html") and "patterns/1" in page and "<svg" in page and "http" not in _loaded(page)
    for name in ("run.json", "metrics.jsonl", "timings.json", "evaluation.json", "encoder/encoder.safetensors", "pulled/config.json"):
        assert (tmp_path / "runs" / "demo" / name).is_file()
    history = result.run.history()
    assert history[-1]["step"] == 1200 * 7 // 128 + 1
    assert history[-1]["train/loss"] < history[0]["train/loss"]

    # MLflow has the values of the reports.
    from pipelines.tracking import client

    server = client.connect(default_uri(tmp_path / "runs"))
    logged = server.get_metric_history(result.run.tracking_run, "train/loss")
    assert [(m.step, m.value) for m in logged] == [(row["step"], row["train/loss"]) for row in history]
    found = server.get_run(result.run.tracking_run)
    assert found.info.status == "FINISHED" and found.data.params["optim.base_lr"] == "4.0"

    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs" / "demo").rglob("*") if path.name in _RESULTS}
    assert {path.name for path in written} == _RESULTS
    again = demo.demo(arguments)  # the same command again has nothing left to train, score or register
    assert again.scores == result.scores and again.registered == result.registered
    assert {path: path.stat().st_mtime_ns for path in written} == written


def _loaded(page: str) -> str:
    """The values of src and href, which the page would load."""
    return " ".join(value for value in re.findall(r'(?:src|href)="([^"]*)"', page) if not value.startswith("data:"))


STUCK = """
import sys, time
from pipelines import cli
from pipelines.train.ray_train import Running
stop = Running.stop
Running.stop = lambda self: (stop(self), time.sleep(60))
cli.main(sys.argv[1:])
"""


@pytest.mark.cluster  # a second whole demo, for a minute: the second half of .ci/run has it
def test_interrupted_it_ends_soon_and_the_same_command_goes_on(
    shared_ray: None, tmp_path: Path, patterns: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though Ray does not let go of it: its own way to stop then takes a minute."""
    import ray

    words = ["pretrain", "patterns_tiny", "--data", str(patterns), "--run", "run"]
    words += ["--train.batch-size", "60", "--train.steps", "36", "--train.checkpoint-every-steps", "9"]
    words += ["--train.report-every-steps", "1"]
    words += ["--workers", "1", "--address", ray.get_runtime_context().gcs_address]
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # else a driver that joins replaces 127.0.0.1 by the machine's address
    run = tmp_path / "run"
    with (tmp_path / "log").open("w") as log:
        heeded = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # else SIGINT is ignored if a shell's background job runs the tests
        first = subprocess.Popen([sys.executable, "-c", STUCK, *words], cwd=tmp_path, stderr=log, stdout=log, preexec_fn=heeded)
        deadline = time.monotonic() + 100
        while not list(run.glob("checkpoints/step-*")):
            assert first.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.2)
        first.send_signal(signal.SIGINT)
        assert first.wait(10) == 130  # it ends itself after 4 s; busy cores may need longer
    assert "interrupted; run the same command again to go on" in (tmp_path / "log").read_text()
    noted = status.read((run / status.FILE).read_text())
    assert noted is not None and noted.state == "interrupted"
    newest = checkpoint.latest(run / "checkpoints", print)
    assert newest is not None and 0 < checkpoint.read(newest).step < 36

    second = subprocess.run([sys.executable, "-m", "pipelines.cli", *words], cwd=tmp_path, capture_output=True, text=True, timeout=150)
    assert second.returncode == 0, second.stderr
    assert f"going on with run after step {checkpoint_step(newest)} of 36" in second.stderr
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert set(steps) == set(range(1, 37)) and steps[-1] == 36
    assert (run / "encoder" / "encoder.safetensors").is_file()


def checkpoint_step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def test_a_diverging_run_is_not_tried_again(
    shared_ray: None, tmp_path: Path, patterns: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = recipe("patterns_tiny")
    often = replace(config.train, batch_size=60, steps=40, report_every_steps=1)
    config = replace(config, optim=replace(config.optim, name="sgd", base_lr=1e30, warmup_epochs=0), train=often)
    resources = ray_train.Resources(workers=2, max_failures=3)
    said = r"(loss is not finite at step \d+ on rank|weights are not finite after step) .*; there is no checkpoint yet"
    with pytest.raises(UserError, match=said):
        pretrain.pretrain(pretrain.Args(data=patterns, config=config, recipe="patterns_tiny", run=Path("run"), resources=resources))
    assert capfd.readouterr().err.count("failed: ") == 1
    assert not (tmp_path / "run" / "encoder").exists()
    assert not (tmp_path / "run" / "ray").exists()
