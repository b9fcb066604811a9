"""A sweep on nodes that share no directory: it lies in S3. And one on a disk that a node does not see."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines import cli
from simclr.data.s3.answers import Missing
from simclr.data.s3.store import Store
from simclr.data.s3.uri import Address
from tests.support.nodes import Nodes
from tests.support.paths import ROOT
from tests.support.s3 import Proxy
from tests.tune.test_killed import EVERY, STEPS, command, finish, rows

pytestmark = pytest.mark.cluster
HOME = Address("photos", "over-nodes/sweep")
TAUS = ("--only", "optim.base_lr=1", "loss.temperature=0.2,0.5,1.0")


@pytest.fixture
def nodes(tmp_path_factory: pytest.TempPathFactory, s3: Proxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    """A head without cores and two nodes of one core, each with a cache of its own."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    folder = tmp_path_factory.mktemp("n")
    found = Nodes(folder)
    try:
        for name in ("a", "b"):
            found.add(environment={"SIMCLR_CACHE": str(folder / f"cache-{name}"), "OMP_NUM_THREADS": "1"})
        yield found
    finally:
        found.close()


def started(words: list[str], machine: Path, log: Path) -> subprocess.Popen[bytes]:
    """The sweep's driver on a machine whose home and cache are new."""
    machine.mkdir()
    environment = os.environ | {"HOME": str(machine), "SIMCLR_CACHE": str(machine / "cache"), "OMP_NUM_THREADS": "1"}
    with log.open("w") as out:
        return subprocess.Popen(words, cwd=machine, env=environment, stdout=out, stderr=out)


def text(name: str) -> str:
    return Store().read(HOME / name).decode()


def status(name: str) -> str:
    try:
        return str(json.loads(text(f"trials/{name}/trial.json"))["status"])
    except Missing:
        return ""


def saved(name: str) -> int:
    """The step of the newest checkpoint of trial `name` in S3."""
    there = [found.name for found in Store().listing(HOME / "trials" / name / "checkpoints")]
    return max((int(key.split("/")[0].split("-")[1]) for key in there if key.endswith("/checkpoint.json")), default=0)


def reports(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text(f"trials/{name}/metrics.jsonl").splitlines()]


def test_a_killed_sweep_in_s3_goes_on_on_another_machine(
    tmp_path: Path, patterns: Path, nodes: Nodes, capsys: pytest.CaptureFixture[str]
) -> None:
    finish(command(tmp_path / "whole", patterns, *TAUS), tmp_path / "log")
    for path in patterns.iterdir():
        Store().upload(path, Address("photos", f"over-nodes/data/{path.name}"))

    def words(machine: str) -> list[str]:
        more = ["--data", "s3://photos/over-nodes/data", "--out", str(HOME), "--address", nodes.address, "--keep", "1"]
        tracking = ["--tracking-uri", f"sqlite:///{tmp_path / machine / 'mlflow.db'}", "--max-concurrent", "2"]
        settings = ["train.batch_size=60", f"train.steps={STEPS}", f"train.checkpoint_every_steps={EVERY}", "train.linear_eval=false"]
        begin = [sys.executable, "-m", "pipelines.cli", "sweep", "smoke", "--recipe", "patterns_tiny"]
        return [*begin, *more, *tracking, *TAUS, "--set", *settings, "train.report_every_steps=1"]

    first, names = started(words("one"), tmp_path / "one", tmp_path / "log"), [f"{i:03}-s0" for i in range(3)]
    until = time.monotonic() + 400
    while not (
        any(status(name) == "finished" for name in names)
        and (midst := [name for name in names if status(name) == "running" and EVERY <= saved(name) < STEPS])
    ):
        assert first.poll() is None and time.monotonic() < until, (tmp_path / "log").read_text()
        time.sleep(0.1)
    first.kill()
    first.wait()
    over = [name for name in names if status(name) == "finished"]
    at, before = {name: saved(name) for name in midst}, {name: Store().look(HOME / f"trials/{name}/trial.json").etag for name in over}
    both = [(nodes.folder / f"cache-{name}/shards").is_dir() for name in ("a", "b")]
    assert both == [True, True]  # trials have run on both nodes
    shutil.rmtree(tmp_path / "one")
    time.sleep(5)  # its trials' processes end with it
    for name in ("a", "b"):
        shutil.rmtree(nodes.folder / f"cache-{name}")

    again = time.time()
    second = started(words("two"), tmp_path / "two", tmp_path / "log")
    assert second.wait(600) == 0, (tmp_path / "log").read_text()
    log = (tmp_path / "log").read_text()
    assert f"going on with {HOME}: {len(over)} trials are over" in log and log.splitlines()[-1] == str(HOME)
    assert [status(name) for name in names] == ["finished"] * 3
    assert {name: Store().look(HOME / f"trials/{name}/trial.json").etag for name in over} == before  # not repeated
    for name in midst:
        assert sorted({row["step"] for row in reports(name)}) == list(range(1, STEPS + 1))
        assert min(row["step"] for row in reports(name) if row["time"] > again) > at[name] > 0
    table = [{k: v for k, v in row.items() if k != "eval/seconds"} for row in csv.DictReader(io.StringIO(text("results.csv")))]
    assert table == rows(tmp_path / "whole")  # as text: each score to its last bit
    best = json.loads(text("best_config.json"))["trial"]
    assert {name for name in names if saved(name)} == {best}
    assert Store().look(HOME / f"trials/{best}/encoder/encoder.safetensors").bytes
    page = text("report.html")
    assert all(name in page for name in names)
    Store().delete(HOME / "report.html")
    cli.main(["sweep", "report", str(HOME)])  # from a third machine
    assert text("report.html") == page and capsys.readouterr().out


def test_a_directory_that_a_node_does_not_see_is_refused(tmp_path: Path, patterns: Path, nodes: Nodes) -> None:
    (tmp_path / "log").touch()
    words = command(Path("/proc/self/cwd/sweep"), patterns, *TAUS, "--address", nodes.address)  # another folder for each process
    words[words.index("--tracking-uri") + 1] = f"sqlite:///{tmp_path}/mlflow.db"
    assert started(words, tmp_path / "machine", tmp_path / "log").wait(300) == 2
    said = (tmp_path / "log").read_text().splitlines()[-1]
    assert "a node of the cluster, does not see /proc/self/cwd/sweep" in said and "use --out s3://bucket/prefix" in said
    assert not (tmp_path / "machine/sweep").exists()
