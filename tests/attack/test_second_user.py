"""Another user of the machine, while a training runs on a private Ray: no token, no file, no answer; and nothing is left of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT
from tests.support.processes import alive, children

pytestmark = pytest.mark.attack
_SECOND_UID = 65534
_PATIENCE_S = 120


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder with a short name, for Ray's sockets; whatever lies in it at the end, fails the test."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def environment(short: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "GLOO_", "NCCL_"))}
    return {**kept, "PYTHONPATH": str(ROOT), "RAY_TMPDIR": str(short), **more}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be a second user as well")
def test_a_second_user_gets_nothing_while_a_training_runs(tmp_path: Path, short: Path) -> None:
    home = short / "home"
    home.mkdir(mode=0o755)
    env = environment(short, HOME=str(home))
    victim = subprocess.Popen([sys.executable, "-m", "tests.attack.victim", tmp_path], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    try:
        assert victim.stdout is not None
        told: dict[str, Any] = json.loads(victim.stdout.readline())
        second = [sys.executable, "-m", "tests.attack.second_user", str(_SECOND_UID)]
        given = json.dumps(told | {"home": str(home)})
        done = subprocess.run(second, cwd=ROOT, env=environment(short), input=given, capture_output=True, text=True, timeout=_PATIENCE_S)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        works = found.pop("right token")
        assert found == {"tokens": [], "files": [], "memory": [], "pages": [], "cluster": "", "wrong token": ""}
        assert works == "1 nodes, written: b'code'", "the attack itself does not work"
        assert {host for host, _ in told["listens"]} == {"127.0.0.1"}
    finally:
        (tmp_path / "over").touch()
        assert victim.wait(_PATIENCE_S) == 0
    assert {path.name for path in short.iterdir()} == {"home"} and not list(home.iterdir())


@pytest.mark.parametrize(("ended", "by"), [("while Ray starts", signal.SIGTERM), ("at a step", signal.SIGINT)])
def test_an_ended_command_leaves_no_folder_and_no_process(short: Path, tmp_path: Path, patterns: Path, ended: str, by: int) -> None:
    words = ["pretrain", "patterns_tiny", "--data", str(patterns), "--run", str(tmp_path / "run")]
    words += ["--train.batch-size", "60", "--train.steps", "100000", "--train.report-every-steps", "1"]
    heeds = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  a shell's background job would ignore it
    with (tmp_path / "log").open("w") as log:
        command = subprocess.Popen(
            [sys.executable, "-m", "pipelines.cli", *words], cwd=tmp_path, env=environment(short), stderr=log, stdout=log, preexec_fn=heeds
        )
    until = time.monotonic() + _PATIENCE_S
    while not (list(short.glob(".simclr-ray-*/r/session_*")) if ended == "while Ray starts" else (tmp_path / "run/metrics.jsonl").exists()):
        assert command.poll() is None and time.monotonic() < until, (tmp_path / "log").read_text()
        time.sleep(0.05)
    processes = children(command.pid)
    until = time.monotonic() + 15
    while command.poll() is None and time.monotonic() < until:
        command.send_signal(by)  # once is not enough where Ray forks: Python ignores the exception of a signal just then
        time.sleep(5)
    assert command.poll() == 130, (tmp_path / "log").read_text()
    until = time.monotonic() + 10
    while (living := [pid for pid in processes if alive(pid)]) and time.monotonic() < until:
        time.sleep(0.1)
    assert not living and processes
    assert not list(short.iterdir())
