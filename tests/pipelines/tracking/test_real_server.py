"""A run of the local database is published on a real server, behind a proxy that may lose what it passes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.runs.directory import Run as RunDirectory
from pipelines.runs.directory import load_run
from pipelines.tracking import client, outbox, registry
from pipelines.tracking import uri as mlflow_uri
from simclr.errors import UserError
from tests.pipelines.tracking.conftest import Database
from tests.pipelines.tracking.test_trust import a_run, an_encoder
from tests.support.command import Run, refused
from tests.support.mlflow_server import Between, started

pytestmark = pytest.mark.cluster  # the server takes 15 s to start
TEAM = "http://team:5000"


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    # As cluster/mlflow.md starts it.
    with started(tmp_path_factory.mktemp("server"), "--allowed-hosts", "team:*,localhost:*,127.0.0.1:*") as port:
        yield port


@pytest.fixture
def between(port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Between]:
    between = Between(port)
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{between.server_port}")
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("NO_PROXY", "")
    yield between
    between.stop()


@pytest.fixture
def trained(tmp_path: Path, patterns: Path, database: Database) -> RunDirectory:
    run = load_run(a_run(tmp_path / "local" / "run", patterns, "", ""))
    for step in range(5):
        run.append({"step": step, "train/loss": step / 8})
    an_encoder(run.encoder)
    return outbox.catch_up(run, database("local"))


def test_a_name_outside_the_list_is_named(between: Between) -> None:
    mlflow_uri.check(TEAM)
    with pytest.raises(UserError, match=r"http://mlflow:5000 \(it refuses requests under the name mlflow:5000 .*-hosts 'mlflow:5000,"):
        mlflow_uri.check("http://mlflow:5000")


def test_promoted_pulled_and_promoted_again(simclr: Run, between: Between, trained: RunDirectory, tmp_path: Path) -> None:
    for version, champion in ((1, " @champion"), (2, "")):
        code, out, said = simclr("publish", trained.path, "--name", "main.vision.photos", "--tracking-uri", TEAM)
        assert (code, out) == (0, f"main.vision.photos/{version}{champion}\n"), said
    registry.pull(TEAM, "main.vision.photos@champion", tmp_path / "pulled")
    assert {p.name: p.read_bytes() for p in (tmp_path / "pulled").iterdir()} == {p.name: p.read_bytes() for p in trained.encoder.iterdir()}
    there = client.connect(TEAM)
    (run,) = there.search_runs([there.get_experiment_by_name("patterns_tiny").experiment_id])
    assert run.data.tags["simclr.copy_of"] == trained.tracking_run
    assert [(m.step, m.value) for m in there.get_metric_history(run.info.run_id, "train/loss")] == [(step, step / 8) for step in range(5)]


def test_what_is_lost_on_the_way(simclr: Run, between: Between, trained: RunDirectory, tmp_path: Path) -> None:
    """The answer to the version; then half of the weights."""
    between.loses = "/model-versions/create"
    code, out, said = simclr("publish", trained.path, "--name", "lost", "--tracking-uri", TEAM)
    assert (code, out) == (0, "lost/1 @champion\n"), said
    there = client.connect(TEAM)
    assert [int(v.version) for v in there.search_model_versions("name='lost'")] == [1]
    registry.pull(TEAM, "lost/1", tmp_path / "pulled")

    run_id = there.get_model_version("lost", "1").run_id
    before = sorted(f.path for f in there.list_artifacts(run_id))
    between.loses, between.cuts = "", "/encoder.safetensors"
    refused(simclr("publish", trained.path, "--name", "cut", "--tracking-uri", TEAM), "MLflow at http://team:5000 refused")
    assert [m.name for m in there.search_registered_models("name='cut'")] == []
    assert sorted(f.path for f in there.list_artifacts(run_id)) == before
