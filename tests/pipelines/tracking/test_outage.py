"""MLflow is unreachable or full, and the driver starts again: every report arrives, once and in order. Corrupt shards on one machine."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from pipelines.runs import sync
from pipelines.runs.directory import Run, load_run, open_run
from pipelines.tracking import client, outbox
from pipelines.tracking.uri import redacted
from pipelines.train import driver
from simclr.config import Train, Views
from simclr.data.loader import batches
from simclr.data.manifest import read_manifest
from simclr.data.s3 import remote
from simclr.data.s3.store import Store
from simclr.data.s3.uri import Address, Corrupt, Refetched
from simclr.errors import UserError
from simclr.recipes import patterns_tiny
from tests.support.s3 import Proxy


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory, database_in: Callable[[Path], str]) -> str:
    return database_in(tmp_path_factory.mktemp("mlflow"))


def begin(path: Path, patterns: Path) -> Run:
    run = open_run(path, "patterns_tiny", patterns_tiny(), patterns)
    run.save()
    return run


def trained(run: Run, uri: str, steps: range, status: str) -> Run:
    """The work of a driver that gets the reports of `steps`."""
    box = outbox.Outbox(uri)
    posted = box.follow(run)
    box.start()
    for step in steps:
        run.append({"step": step, "train/loss": step / 8})
    box.close(status)
    return posted.run


def logged(run: Run, uri: str) -> list[tuple[int, float]]:
    """In the order in which they arrived."""
    found = client.connect(uri).get_metric_history(run.tracking_run, "train/loss")
    return [(m.step, m.value) for m in found]


def test_what_a_killed_driver_could_not_log_its_successor_logs(
    uri: str, patterns: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begin(tmp_path / "run", patterns)
    trained(run, uri, range(3), "FINISHED")  # logged
    run = load_run(run.path)

    def away(*_: Any) -> Any:
        raise UserError("MLflow is away")

    with monkeypatch.context() as patch:
        patch.setattr(outbox, "open_run", away)
        trained(run, uri, range(3, 7), "KILLED")
    assert len(logged(load_run(run.path), uri)) == 3
    began = int(time.time() * 1000)
    run = trained(load_run(run.path), uri, range(5, 10), "FINISHED")  # 5 and 6 are repeated after the last checkpoint
    assert logged(run, uri) == [(step, step / 8) for step in range(10)] and not run.unlogged
    times = {m.step: m.timestamp for m in client.connect(uri).get_metric_history(run.tracking_run, "train/loss")}
    assert times[4] <= began < times[9] + 1000  # each with the time of its report


def test_what_the_end_of_a_run_could_not_wait_for_the_same_command_logs(
    uri: str, patterns: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = begin(tmp_path / "run", patterns)
    log = client.MLflowRun.log

    def full(self: client.MLflowRun, reports: Any) -> None:
        if reports[0]["step"] >= 2:
            raise OSError("no answer")
        log(self, reports)

    with monkeypatch.context() as patch:
        patch.setattr(client, "MOST", 1)
        patch.setattr(outbox, "_FLUSH_S", 1.0)
        patch.setattr(outbox, "_AWAY_S", 0.1)
        patch.setattr(client.MLflowRun, "log", full)
        run = trained(run, uri, range(6), "FINISHED")
    assert run.unlogged == "yes" and logged(run, uri) == [(0, 0.0), (1, 0.125)]
    assert "4 metrics did not reach MLflow" in capsys.readouterr().err
    run = outbox.catch_up(load_run(run.path), uri)
    assert logged(run, uri) == [(step, step / 8) for step in range(6)]
    assert load_run(run.path).unlogged == ""


def test_a_run_that_goes_on_does_not_need_the_server_and_a_new_one_does(
    patterns: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nobody = "http://127.0.0.1:9"  # the discard port: nothing listens
    with pytest.raises(UserError, match="no MLflow server at"):
        driver.home_of(tmp_path / "run", "patterns_tiny", patterns_tiny(), patterns, patterns, nobody, alone=ExitStack())
    run = begin(tmp_path / "run", patterns)
    with pytest.raises(UserError, match="no MLflow server at"):  # it has not begun
        driver.home_of(run.path, "patterns_tiny", patterns_tiny(), patterns, patterns, nobody, alone=ExitStack())
    (run.checkpoints / "step-000000003").mkdir(parents=True)  # its driver was killed before MLflow opened
    driver.home_of(run.path, "patterns_tiny", patterns_tiny(), patterns, patterns, nobody, alone=ExitStack())
    shutil.rmtree(run.checkpoints)
    run.noted(tracking_uri=redacted(nobody), tracking_run="ab12")
    capsys.readouterr()
    run, _, uri = driver.home_of(tmp_path / "run", "patterns_tiny", patterns_tiny(), patterns, patterns, nobody, alone=ExitStack())
    assert uri == nobody and run.tracking_run == "ab12"
    assert "the training goes on without it" in capsys.readouterr().err
    driver.home_of(
        tmp_path / "run", "patterns_tiny", patterns_tiny(), patterns, patterns, f"{nobody}/", alone=ExitStack()
    )  # the same address
    assert "the training goes on without it" in capsys.readouterr().err


def test_another_spelling_of_the_address_goes_on_in_the_same_mlflow_run(
    patterns: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, opened = begin(tmp_path / "run", patterns).noted(tracking_uri="http://host:5000", tracking_run="ab12"), list[object]()
    monkeypatch.setattr(outbox.mlflow_uri, "check", lambda uri: None)
    monkeypatch.setattr(outbox.client, "MLflowRun", lambda *words: opened.append(words[5]))
    for uri in ("http://host:5000", "http://me:secret@Host:5000/", "http://host:5001"):
        outbox.open_run(run, uri, {}, lambda run_id: None)
    assert opened == ["ab12", "ab12", None]


def test_a_shard_that_is_corrupt_on_a_machine_is_fetched_once_more_else_refused(
    s3: Proxy, photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A header is overwritten, then an image, which only its read finds; then S3's own bytes are corrupt too."""
    place = Address("photos", "some/photographs")
    monkeypatch.setattr("simclr.data.s3.store.Store", partial(Store, attempts=2, pause_s=0))
    remote.push(photographs, place, lambda done, of: None, Store())
    copy = sync.shards(str(place))
    shard = copy / read_manifest(copy).shards[0].name
    whole = shard.read_bytes()
    config = replace(patterns_tiny(), train=Train(batch_size=24, steps=12), views=Views(size_px=16))

    def steps() -> Iterator[int]:
        yield from (batch.step for batch in islice(batches(config, copy, 0, 0, 1), 10))

    def train() -> int:
        return len(list(sync.repaired(steps(), str(place))))

    for at in (8, whole.rindex(b"\xff\xd8\xff")):  # the count of fields; an image's first bytes
        shard.write_bytes(whole[:at] + b"\x00" * 64 + whole[at + 64 :])
        with pytest.raises(Refetched, match=rf"{shard.name} was corrupt on this machine and was fetched again from s3://photos/some"):
            train()
        assert shard.read_bytes() == whole
        assert train() == 10
    at = whole.rindex(b"\xff\xd8\xff")
    s3.quiet()
    spoilt = whole[:at] + b"\x00" * 64 + whole[at + 64 :]
    Store().client.put_object(Bucket="photos", Key=f"some/photographs/{shard.name}", Body=spoilt)
    shard.write_bytes(spoilt)
    with pytest.raises(UserError, match=f"{shard.name} failed"):
        train()
    with pytest.raises(Corrupt, match=r"is missing|is damaged"):
        shard.write_bytes(spoilt)
        list(sync.repaired(steps(), copy))  # on disk: refused
