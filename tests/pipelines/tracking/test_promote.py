"""A run that was logged in one place is published in another, and says where it came from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipelines.runs.directory import Run as RunDirectory
from pipelines.runs.directory import load_run
from pipelines.tracking import client, outbox
from pipelines.tracking.uri import default_uri
from simclr.errors import UserError
from tests.pipelines.tracking.conftest import Database
from tests.pipelines.tracking.test_trust import a_run, an_encoder
from tests.support.command import Run, refused


@pytest.fixture
def trained(tmp_path: Path, patterns: Path, database: Database) -> RunDirectory:
    """An evaluated run of 20 steps, logged in the database beside it."""
    run = load_run(a_run(tmp_path / "local" / "run", patterns, "", ""))
    for step in [*range(15), *range(10, 20)]:  # it was resumed at step 10
        run.append({"step": step, "train/loss": step / 8})
    an_encoder(run.encoder)
    return outbox.catch_up(run, database("local"))


def test_a_run_of_the_local_database_is_published_at_another_address(
    simclr: Run, trained: RunDirectory, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    team = database("team")
    code, out, said = simclr("publish", trained.path, "--name", "main.vision.photos", "--tracking-uri", team)
    assert (code, out) == (0, "main.vision.photos/1 @champion\n"), said
    assert f"was logged at {trained.tracking_uri}; logging it at {team}, too" in said
    monkeypatch.setenv("MLFLOW_TRACKING_URI", team)
    code, out, said = simclr("publish", trained.path, "--name", "main.vision.photos")
    assert (code, out) == (0, "main.vision.photos/2\n") and "logging it" not in said

    there = client.connect(team)
    (run,) = there.search_runs([there.get_experiment_by_name("patterns_tiny").experiment_id])
    assert {there.get_model_version("main.vision.photos", v).run_id for v in "12"} == {run.info.run_id} != {trained.tracking_run}
    assert (run.data.tags["simclr.copy_of"], run.data.tags["simclr.copied_from"]) == (trained.tracking_run, trained.tracking_uri)
    assert run.data.tags["run_directory"] == str(trained.path) and run.info.status == "FINISHED"
    ours = client.connect(trained.tracking_uri)
    assert run.data.params == ours.get_run(trained.tracking_run).data.params and run.data.params["optim.name"] == "lars"
    found = [
        [(m.step, m.value, m.timestamp) for m in at.get_metric_history(i, "train/loss")]
        for at, i in ((ours, trained.tracking_run), (there, run.info.run_id))
    ]
    assert found[0] == found[1] and [row[:2] for row in found[1]] == [(step, step / 8) for step in range(20)]
    # Its own database stays what run.json names, so training goes on there.
    assert load_run(trained.path).tracking_run == trained.tracking_run and load_run(trained.path).tracking_uri == trained.tracking_uri


def test_nothing_is_logged_for_a_run_that_cannot_be_published(simclr: Run, trained: RunDirectory, tmp_path: Path) -> None:
    (trained.encoder / "encoder.safetensors").unlink()
    refused(simclr("publish", trained.path, "--tracking-uri", default_uri(tmp_path / "team")), "is no published encoder")
    assert not (tmp_path / "team").exists()


def test_an_id_from_a_file_is_no_query(trained: RunDirectory, tmp_path: Path) -> None:
    text = json.loads((trained.path / "run.json").read_text())
    (trained.path / "run.json").write_text(json.dumps(text | {"tracking_run": "x' OR tags.a != 'b"}))
    with pytest.raises(UserError, match=r"run\.json is damaged: tracking_run is .* expected a run's id"):
        outbox.logged_at(load_run(trained.path), default_uri(tmp_path / "team"))


def test_a_registry_elsewhere_is_where_the_environment_has_it(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow's own variable: runs in one place, models in another."""
    runs, models = database("runs"), database("models")
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", models)
    client.connect(runs).create_registered_model("photos")
    monkeypatch.delenv("MLFLOW_REGISTRY_URI")
    assert [m.name for m in client.connect(models).search_registered_models()] == ["photos"]
    assert not client.connect(runs).search_registered_models()
