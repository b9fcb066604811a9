"""Faults of a cluster, injected into small trainings: each goes on, and ends with the numbers of the undisturbed one.

A step takes a quarter of a second longer than it needs, so that faults hit a known step. Each figure is of one run, on this machine.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pipelines import cli
from pipelines.commands import pretrain
from pipelines.runs.directory import load_run
from pipelines.train import ray_train, worker
from simclr import checkpoint, files
from simclr.config import Config
from simclr.errors import UserError
from simclr.recipes import recipe
from tests.conftest import Figures, Within
from tests.support import faults
from tests.support.nodes import Nodes, clock
from tests.support.paths import ROOT
from tests.support.processes import alive, children
from tune import sweep_dir

pytestmark = pytest.mark.cluster
STEPS, EVERY = 24, 4
# For commands with a Ray of their own. Where other work fills the machine's memory, Ray's monitor would end workers at no planned step.
ALONE = {"PYTHONPATH": str(ROOT), "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5", "RAY_memory_monitor_refresh_ms": "0"}
Reference = tuple[dict[int, float], dict[str, Any]]


def small() -> Config:
    config = recipe("patterns_tiny")
    train = replace(config.train, batch_size=60, steps=STEPS, report_every_steps=1, checkpoint_every_steps=EVERY, precision="float64")
    return replace(config, train=train, watch=replace(config.watch, every_epochs=0))


@pytest.fixture(scope="module")
def reference(patterns: Path) -> Reference:
    """The undisturbed training, in this process alone."""
    return faults.undisturbed(small(), patterns)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """A head and two nodes of one core each."""
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    patch.setenv("PYTHONPATH", str(ROOT))  # for workers
    patch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.5")
    patch.setattr(ray_train, "_RESIZE_S", 2.0)
    patch.setattr(worker, "train_worker", faults.faulty_worker)
    found = Nodes(tmp_path_factory.mktemp("n"))
    try:
        found.add()
        found.add()
        ray_train.connect(ray_train.Resources(address=found.address))
        yield found
        ray_train.disconnect()
    finally:
        found.close()
        patch.undo()


@dataclass
class Story:
    """A training, and the sentences that its driver printed."""

    run: Path
    said: list[tuple[float, str]]

    def rows(self) -> list[dict[str, Any]]:
        lines = (self.run / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines if line.endswith("}")]  # a full disk leaves half a line

    def new(self, since: float) -> list[dict[str, Any]]:
        return [row for row in self.rows() if row["time"] > since] if (self.run / "metrics.jsonl").exists() else []

    def at_step(self, step: int, training: Future[None]) -> None:
        """Wait until that step is reported."""
        wait_for(lambda: self.new(0) and self.rows()[-1]["step"] >= step, training)

    def is_past_a_checkpoint(self, since: float) -> bool:
        """Whether the group that began after `since` has done enough steps to have written a checkpoint."""
        steps = [row["step"] for row in self.new(since)]
        return bool(steps) and steps[-1] > steps[0] + EVERY

    def first_said(self, part: str, since: float = 0.0) -> float:
        """When `part` was said, Unix time."""
        return next(at for at, text in self.said if part in text and at >= since)

    def went_on(self, since: float) -> float:
        """Time of the first report from the group that began after `since`."""
        again = self.first_said("starting again", since)
        return next(float(row["time"]) for row in self.rows() if row["time"] > again)

    def repeated(self, since: float) -> int:
        """Number of steps that were repeated after the fault at `since`."""
        before = max(row["step"] for row in self.rows() if row["time"] < self.went_on(since))
        again = next(row["step"] for row in self.rows() if row["time"] >= self.went_on(since))
        return int(before - again + 1)

    def equals(self, reference: Reference, within: Within, bound: float = 1e-9) -> None:
        """All reports, also of repeated steps, and the encoder equal those of the undisturbed training."""
        losses, tensors = reference
        rows = self.rows()
        assert {row["step"] for row in rows} == set(losses)
        within("loss of a step", max(abs(row["train/loss"] / losses[row["step"]] - 1) for row in rows), bound)
        newest = checkpoint.latest(self.run / "checkpoints", print)
        assert newest is not None
        state = checkpoint.read(newest)
        assert state.step == STEPS
        within("weights", max(float((state.tensors[name] - t).abs().max()) for name, t in tensors.items() if t.is_floating_point()), bound)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, str]]:
    heard: list[tuple[float, str]] = []

    def say(text: str) -> None:
        heard.append((time.time(), text))
        print(text)

    monkeypatch.setattr(ray_train, "say", say)
    return heard


def wait_for(what: Callable[[], Any], training: Future[None] | subprocess.Popen[bytes] | None, log: Path | None = None) -> None:
    """Until `what()`, while `training` goes on."""
    deadline = time.monotonic() + 600
    while not what():
        if isinstance(training, Future) and training.done():
            training.result()
        over = training.poll() is not None if isinstance(training, subprocess.Popen) else training is not None and training.done()
        assert not over and time.monotonic() < deadline, log.read_text() if log else "it takes too long"
        time.sleep(0.05)


def train(run: Path, patterns: Path, **resources: Any) -> None:
    config, told = small(), ray_train.Resources(**{"workers": 2, **resources})
    pretrain.pretrain(pretrain.Args(data=patterns, config=config, recipe="patterns_tiny", run=run, resources=told))


def test_a_worker_that_is_killed_hangs_or_stops(
    nodes: Nodes, reference: Reference, patterns: Path, tmp_path: Path, said: list[tuple[float, str]], within: Within, figures: Figures
) -> None:
    story = Story(tmp_path / "run", said)
    faults.plan(tmp_path / "run-faults", (7, 1, "kill"), (14, 1, "hang"), (19, 0, "stop"), step_s=0.25)
    train(story.run, patterns, address=nodes.address, hang_timeout_s=6.0, max_failures=9)
    came = faults.happened(tmp_path / "run-faults")
    assert set(came) == {7, 14, 19}
    named = {7: "a worker is killed (SIGKILL)", 14: "a worker's training thread hangs", 19: "a worker is stopped (SIGSTOP)"}
    for step, what in named.items():
        noticed, again = story.first_said("failed: ", came[step]), story.went_on(came[step])
        figures(what, noticed - came[step], again - came[step], story.repeated(came[step]))
    texts = [text for _, text in said]
    assert any("rank 1 failed: no progress for" in text and "at step 14 (" in text and "pid" in text for text in texts), texts
    assert any("rank 0 failed: no answer for" in text and "at step" in text for text in texts), texts
    story.equals(reference, within)


def test_nodes_go_and_come_back(
    nodes: Nodes, reference: Reference, patterns: Path, tmp_path: Path, said: list[tuple[float, str]], within: Within, figures: Figures
) -> None:
    """2 → 1 → 2 → 1 workers: a node dies, one comes in its place, one is taken back with notice."""
    story, pace = Story(tmp_path / "run", said), partial(faults.plan, tmp_path / "run-faults")
    pace(step_s=0.5)
    came: dict[str, float] = {}

    with ThreadPoolExecutor(1) as aside:  # Ray starts nodes from a main thread only
        training = aside.submit(train, story.run, patterns, address=nodes.address, min_workers=1)
        story.at_step(6, training)
        came["lost"] = time.time()
        nodes.kill(nodes.others[1])
        story.at_step(8, training)
        pace(step_s=4.0)  # a node takes its time to start
        node = nodes.add()
        came["back"] = time.time()
        wait_for(lambda: any("there is room for 2 workers" in text for _, text in said), training)
        pace(step_s=1.0)
        story.at_step(max(row["step"] for row in story.rows()) + 3, training)
        came["notice"] = time.time()
        nodes.notice(node, 60.0)
        training.result()
    named = {"lost": "a node dies, 2 → 1 workers", "back": "a node comes, 1 → 2 workers", "notice": "a node gives notice, 2 → 1 workers"}
    for what, part in (("lost", "failed: "), ("back", "there is room for 2"), ("notice", "loses its node in")):
        noticed, again = story.first_said(part, came[what]), story.went_on(came[what])
        figures(named[what], noticed - came[what], again - came[what], story.repeated(came[what]))
    assert [text for _, text in said if text.startswith("starting again")] == [
        "starting again with 1 workers, 2 before",
        "starting again with 2 workers, 1 before",
        "starting again with 1 workers, 2 before",
    ]
    # A group that leaves with a checkpoint repeats no step.
    assert story.repeated(came["back"]) == 0 and story.repeated(came["notice"]) == 0
    story.equals(reference, within)


def test_a_disk_fills_up_and_a_clock_is_ten_minutes_fast(
    nodes: Nodes, reference: Reference, patterns: Path, tmp_path: Path, said: list[tuple[float, str]], within: Within, figures: Figures
) -> None:
    fast = clock(tmp_path, 600)
    small_disk = tmp_path / "small"
    small_disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(small_disk)]
    if fast is None or os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs a C compiler, and to mount a file system")
    story, filler = Story(small_disk / "run", said), small_disk / "filler"
    while len(nodes.others) > 1:
        nodes.kill(nodes.others[-1])
    nodes.add(environment=fast)
    faults.plan(small_disk / "run-faults", (1, 0, "nothing"), (2, 1, "nothing"), step_s=0.25)
    filled: list[float] = []

    def fill() -> None:
        while checkpoint.latest(story.run / "checkpoints", print) is None:
            time.sleep(0.05)
        filled.append(time.time())
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 16))

    try:
        threading.Thread(target=fill, daemon=True).start()
        with pytest.raises((UserError, OSError)) as ended:
            train(story.run, patterns, address=nodes.address)
        noticed = time.time()
        sentence = files.trouble(ended.value) or str(ended.value)
        assert "no space left on the disk that holds" in sentence and "run the same command again" in sentence
        newest = checkpoint.latest(story.run / "checkpoints", print)
        assert newest is not None and 0 < checkpoint.read(newest).step < STEPS
        assert not list(story.run.glob("checkpoints/.writing-*"))
        filler.unlink()
        again = time.time()
        train(story.run, patterns, address=nodes.address)
        resumed = next(row for row in story.rows() if row["time"] > again)
        before = max(row["step"] for row in story.rows() if row["time"] < again)
        figures("the disk is full; run again", noticed - filled[0], resumed["time"] - again, before - resumed["step"] + 1)
        times = faults.happened(small_disk / "run-faults")
        assert 590 < max(times.values()) - min(times.values()) < 660  # the two ranks' own clocks
        story.equals(reference, within)
    finally:
        subprocess.run(["umount", "-l", str(small_disk)], check=True)


def test_a_node_dies_under_a_sweep(nodes: Nodes, patterns: Path, tmp_path: Path, within: Within, figures: Figures) -> None:
    """The node of its trial's worker dies: the trial goes on on the other node."""
    while len(nodes.others) < 2:
        nodes.add()
    out, died = tmp_path / "s", []
    words = ["sweep", "smoke", "--recipe", "patterns_tiny", "--data", str(patterns), "--out", str(out), "--address", nodes.address]
    words += ["--only", "loss.temperature=0.2", "optim.base_lr=1", "--set", "train.batch_size=60", f"train.steps={STEPS}"]
    words += ["train.report_every_steps=1", f"train.checkpoint_every_steps={EVERY}", "train.precision=float64"]

    def has_the_worker(node: Any) -> bool:
        (raylet,) = node.all_processes["raylet"]
        return any(b"RayTrainWorker" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children(raylet.process.pid) if alive(pid))

    def kill() -> None:
        wait_for(lambda: [path for run in out.glob("trials/*") for path in checkpoint.list_checkpoints(run / "checkpoints")], None)
        (node,) = filter(has_the_worker, nodes.others)
        died.append(time.time())
        nodes.kill(node)

    with ThreadPoolExecutor(1) as aside:
        killing = aside.submit(kill)
        cli.main(words)
        killing.result()
    (trial,) = sweep_dir.trials(out)
    assert trial.status == "finished" and "eval/knn_top1" in trial.scores
    run = load_run(out / "trials" / trial.name)
    losses, _ = faults.undisturbed(run.config, patterns)
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows} == set(losses)
    within("loss of a step", max(abs(row["train/loss"] / losses[row["step"]] - 1) for row in rows), 1e-9)
    pauses = [(after["time"] - before["time"], before, after) for before, after in pairwise(rows) if after["time"] > died[0]]
    _, before, after = max(pauses, key=lambda pause: pause[0])
    figures("a node dies under a sweep", math.nan, after["time"] - died[0], before["step"] - after["step"] + 1)
    assert after["step"] % EVERY == 1 and 0 <= before["step"] - after["step"] + 1 <= EVERY


def arguments(patterns: Path, *more: str) -> list[str]:
    """`small` as a command, for faults in its workers."""
    found = [sys.executable, "-c", "from tests.support import faults; faults.command()", "pretrain", "patterns_tiny"]
    found += ["--data", str(patterns)]
    found += ["--run", "run", "--train.batch-size", "60", "--train.steps", str(STEPS), "--train.report-every-steps", "1"]
    found += ["--train.checkpoint-every-steps", str(EVERY), "--train.precision", "float64", "--watch.every-epochs", "0"]
    return [*found, *more]


def test_the_head_of_a_cluster_is_lost_and_another_begins(
    reference: Reference, patterns: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, within: Within, figures: Figures
) -> None:
    """The driver waits half a minute for the head while workers go on, then ends with a sentence. The command goes on at another head."""
    story, log = Story(tmp_path / "run", []), tmp_path / "log"
    faults.plan(tmp_path / "run-faults", step_s=1.0)
    environment = os.environ | ALONE
    last: list[float] = []
    for _ in range(2):
        found = Nodes(tmp_path_factory.mktemp("h"))
        try:
            found.add(2)
            began = time.time()
            with log.open("w") as out:
                command = arguments(patterns, "--address", found.address)
                process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=out, stderr=out)
            if last:
                faults.plan(tmp_path / "run-faults", step_s=0.25)
                assert process.wait(600) == 0, log.read_text()
                break
            wait_for(partial(story.is_past_a_checkpoint, began), process, log)
            at = time.time()
            os.kill(found.head.all_processes["gcs_server"][0].process.pid, signal.SIGKILL)
            assert process.wait(180) == 2, log.read_text()
            last += [time.time() - at, story.rows()[-1]["step"]]
            assert f"simclr: the head of the Ray cluster at {found.address} has not answered for 3" in log.read_text()
            assert "Traceback" not in log.read_text()
        finally:
            found.close()
    first = story.new(began)[0]
    figures("the head of a cluster is killed; again on another", last[0], first["time"] - began, max(int(last[1]) - first["step"] + 1, 0))
    story.equals(reference, within)


def test_the_head_the_whole_group_and_the_driver_are_killed(
    reference: Reference, patterns: Path, tmp_path: Path, within: Within, figures: Figures
) -> None:
    """The same command four times, on a private Ray: each goes on where the previous one was ended."""
    story = Story(tmp_path / "run", [])
    faults.plan(tmp_path / "run-faults", step_s=0.25)
    command = arguments(patterns)
    log = tmp_path / "log"
    environment = os.environ | ALONE
    ends = {"the head (GCS) is killed": 2, "SIGTERM to all its processes": 130, "the driver is killed (SIGKILL)": -9, "": 0}
    last, took, before = "", 0.0, 0
    for what, code in ends.items():
        began = time.time()
        with log.open("w") as out:
            process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=out, stderr=out, start_new_session=True)
        wait_for(partial(story.is_past_a_checkpoint, began), process, log)
        first = story.new(began)[0]
        if before:
            figures(f"{last}; run again", took, first["time"] - began, max(before - first["step"] + 1, 0))
        if not what:
            assert process.wait(600) == 0, log.read_text()
            break
        below, at = children(process.pid), time.time()
        if code == 2:
            (head,) = [pid for pid in below if "gcs_server" in Path(f"/proc/{pid}/cmdline").read_text().split("\0")[0]]
            os.kill(head, signal.SIGKILL)
        elif code == 130:
            os.killpg(process.pid, signal.SIGTERM)
        else:
            process.kill()
        assert process.wait(180) == code, log.read_text()
        last, took, before = what, time.time() - at, story.rows()[-1]["step"]
        look = [sys.executable, "-m", "pipelines.cli", "runs", "run", "--json"]
        listed = subprocess.run(look, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        assert json.loads(listed.stdout)["state"] == ("failed" if code == 2 else "interrupted"), listed.stdout
        assert took < 60 and "Traceback" not in log.read_text()
        if code == 2:
            assert "simclr: Ray's head process on this machine is gone; run the same command again" in log.read_text()
        wait_for(lambda below=below: not any(alive(pid) for pid in below), None, log)
    story.equals(reference, within)
