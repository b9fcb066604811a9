"""The run and the registry, on one embedded database and on a server that comes and goes."""

from __future__ import annotations

import importlib
import math
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.runs.directory import Run, load_run
from pipelines.runs.scores import WHOLE, Measured
from pipelines.tracking import champion, client, outbox, registry
from pipelines.tracking import uri as mlflow_uri
from pipelines.tracking.client import MLflowRun
from pipelines.tracking.record import Record
from simclr.errors import UserError
from tests.support.mlflow_server import Answer, Server
from tests.support.sweeps import a_sweep, trained


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return mlflow_uri.default_uri(tmp_path_factory.mktemp("runs of 50 %"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published encoder with its initial weights."""
    from simclr.encoder.directory import write_encoder
    from simclr.methods.simclr import build_model
    from simclr.recipes import recipe

    config = recipe("patterns_tiny")
    directory = tmp_path_factory.mktemp("published") / "any name"
    write_encoder(build_model(config).encoder.state_dict(), config, directory, {"recipe": "patterns_tiny", "step": 0, "data": "patterns"})
    return directory


def history(run: MLflowRun, name: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in run._mlflow.get_metric_history(run.run_id, name)]


def a_run(path: Path) -> Run:
    trial = trained(a_sweep(path, "smoke"), lambda point: 0.5)[0]
    return load_run(path / "trials" / trial.name)


def until(true: Callable[[], bool]) -> None:
    began = time.monotonic()
    while not true():
        assert time.monotonic() < began + 30
        time.sleep(0.01)


# ── One run per job ────────────────────────────────────────────────────────────────────────────────────────────────


def test_import_is_light() -> None:
    code = "import sys, pipelines.tracking.client; print(sorted({'mlflow', 'requests', 'pandas', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_metrics_parameters_and_files_arrive(uri: str, tmp_path: Path) -> None:
    params: dict[str, object] = {f"field.{i}": i for i in range(250)}  # more than MLflow takes at a time
    run = MLflowRun(uri, "patterns", "a run", params, {"command": "simclr pretrain"})
    reports = [{"step": step, "time": 1e9 + step, "train/loss": step / 8, "eval/knn_top1": math.nan} for step in range(400)]
    run.log(reports[:200])
    run.log(reports[100:])  # some reports are repeats
    (tmp_path / "report.html").write_text("<p>")
    run.artifact(tmp_path / "report.html")
    run.artifact(tmp_path / "absent.html")
    run.end()

    assert history(run, "train/loss") == [(step, step / 8) for step in range(400)]
    scores = history(run, "eval/knn_top1")
    assert [step for step, _ in scores] == list(range(400)) and all(math.isnan(value) for _, value in scores)
    assert [m.timestamp for m in run._mlflow.get_metric_history(run.run_id, "train/loss")][:2] == [10**12, 10**12 + 1000]
    found = run._mlflow.get_run(run.run_id)
    assert (found.info.status, found.info.run_name, found.data.tags["command"]) == ("FINISHED", "a run", "simclr pretrain")
    assert found.data.params == {f"field.{i}": str(i) for i in range(250)}
    folder = Path(uri.removeprefix("sqlite:///")).parent / "artifacts" / run.run_id / "artifacts"
    assert [str(p.relative_to(folder)) for p in folder.rglob("*.html")] == ["report.html"]


def test_resumed_run_repeats_no_step(uri: str) -> None:
    first = MLflowRun(uri, "patterns", "stopped", {"seed": 0}, {})
    first.log([{"step": step, "train/loss": 10.0 - step} | ({"eval/knn_top1": 0.5} if step == 3 else {}) for step in range(8)])
    first.end("KILLED")
    again = MLflowRun(uri, "patterns", "stopped", {"seed": 0, "workers": 2}, {}, first.run_id)
    assert again._mlflow.get_run(again.run_id).info.status == "RUNNING"
    since = range(5, 12)  # the checkpoint
    again.log([{"step": step, "train/loss": 10.0 - step} | ({"eval/knn_top1": 0.75} if step == 7 else {}) for step in since])
    again.end()
    assert again.run_id == first.run_id
    assert history(again, "train/loss") == [(step, 10.0 - step) for step in range(12)]
    assert history(again, "eval/knn_top1") == [(3, 0.5), (7, 0.75)]


def test_deleted_run_and_experiment_are_replaced(uri: str) -> None:
    first = MLflowRun(uri, "thrown away", "r", {}, {})
    first.end()
    first._mlflow.delete_run(first.run_id)
    first._mlflow.delete_experiment(first._mlflow.get_experiment_by_name("thrown away").experiment_id)
    for old in (first.run_id, "0" * 32):
        again = MLflowRun(uri, "thrown away", "r", {}, {}, old)
        again.log([{"step": 0, "train/loss": 1.0}])
        assert history(again, "train/loss") == [(0, 1.0)] and again.run_id != old


def test_what_mlflow_refuses_is_counted_and_the_rest_arrives(uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, box = a_run(tmp_path), outbox.Outbox(uri)
    posted = box.follow(run)
    for step, metrics in enumerate(({"train/loss": 1.0}, {"train/loss?": 1.0, "lr/?": 2.0}, {"train/loss": 3.0})):
        run.append({"step": step, **metrics})  # all in one batch
    box.start()
    box.close("FINISHED")
    box.close("FAILED")  # the first status counts
    assert posted.mlflow is not None and history(posted.mlflow, "train/loss") == [(0, 1.0), (2, 3.0)]
    assert posted.mlflow._mlflow.get_run(posted.mlflow.run_id).info.status == "FINISHED"
    assert "2 metrics did not reach MLflow" in capsys.readouterr().err
    assert load_run(run.path).unlogged == "" and outbox.Posted(posted.run, uri).lost() == 0  # a retry would not help


def test_jobs_that_start_at_once_share_a_new_database(tmp_path: Path) -> None:
    uri = mlflow_uri.default_uri(tmp_path / "runs")

    def job(number: int) -> list[tuple[int, float]]:
        run = MLflowRun(uri, "sweep", f"trial {number}", {}, {})
        run.log([{"step": step, "train/loss": float(number)} for step in range(100)])
        return history(run, "train/loss")

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(job, range(4))) == [[(step, float(number)) for step in range(100)] for number in range(4)]


def test_another_process_at_the_database_is_waited_for(uri: str) -> None:
    opened: list[MLflowRun] = []
    job = threading.Thread(target=lambda: opened.append(MLflowRun(uri, "sweep", "second", {}, {})))
    with client.locked(uri):
        job.start()
        job.join(0.3)
        assert not opened
    job.join()
    assert opened[0].run_id


def test_a_link_in_place_of_the_databases_lock_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / ".mlflow.lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match=r"\.mlflow\.lock"), client.locked(f"sqlite:///{tmp_path}/mlflow.db"):
        pass
    assert (tmp_path / "victim").read_text() == "precious"


# ── Servers ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(outbox, "_EVERY_S", 0.02)
    monkeypatch.setattr(outbox, "_AWAY_S", 0.1)
    server = Server()
    yield server
    server.stop()


def test_metrics_survive_an_outage_complete_and_in_order(server: Server, tmp_path: Path) -> None:
    run, box = a_run(tmp_path), outbox.Outbox(server.uri)
    posted = box.follow(run)
    box.start()
    run.append({"step": 0, "train/loss": 0.0})
    until(lambda: bool(server.metrics) and posted.lost() == 0)
    server.stop()
    for step in range(1, 1500):
        run.append({"step": step, "train/loss": step / 2})
    until(lambda: bool(box.trouble))
    assert posted.lost() == 1499
    back = Server(server.server_port)
    box.close("FINISHED")
    back.stop()
    assert back.metrics == [("train/loss", step, step / 2) for step in range(1, 1500)]
    assert back.calls == ["runs/log-batch", "runs/log-batch", "runs/update"]
    assert load_run(run.path).unlogged == ""


def test_close_gives_up_in_time_and_says_what_is_missing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert outbox._KILLED_S <= 3 and outbox._FLUSH_S <= 30
    monkeypatch.setattr(outbox, "_KILLED_S", 0.2)
    run, box = a_run(tmp_path), outbox.Outbox(server.uri)
    posted = box.follow(run)
    box.start()
    until(lambda: posted.mlflow is not None)
    server.stop()
    for step in range(7):
        run.append({"step": step, "train/loss": 0.0})
    began = time.monotonic()
    box.close("KILLED")
    assert time.monotonic() - began < 1
    said = capsys.readouterr().err
    assert "7 metrics" in said and "metrics.jsonl" in said and "secret" not in said


def test_check_accepts_a_server_and_a_database(server: Server, uri: str, published: list[int]) -> None:
    mlflow_uri.check(server.uri)
    mlflow_uri.check(uri)


def test_check_refuses_a_closed_port_and_a_silent_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert mlflow_uri._ANSWER_S + 0.5 < 10
    with pytest.raises(UserError, match=r"no MLflow server at http://h:99999 \(that is no valid address\)"):
        mlflow_uri.check("http://h:99999")
    monkeypatch.setattr(mlflow_uri, "_ANSWER_S", 0.5)
    with socket.socket() as silent, socket.socket() as closed:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        closed.bind(("127.0.0.1", 0))  # bound and not listening: no other process gets the port
        for port, reason in ((silent.getsockname()[1], "no answer .*"), (closed.getsockname()[1], "nothing listens there")):
            began = time.monotonic()
            with pytest.raises(UserError, match=rf"no MLflow server at http://…@127.0.0.1:{port} \({reason}\); start it") as error:
                mlflow_uri.check(f"http://user:secret@127.0.0.1:{port}")
            assert "secret" not in str(error.value)
            assert time.monotonic() - began < 2


def test_check_refuses_what_answers_but_is_no_mlflow(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for status, reason in ((404, "something else answers, with status 404"), (401, "refuses the credentials with status 401")):
        monkeypatch.setattr(Answer, "do_GET", lambda self, status=status: self.send_error(status))
        with pytest.raises(UserError, match=reason):
            mlflow_uri.check(server.uri)


@pytest.mark.parametrize("uri", ["localhost:5000", "host", "http://", "ftp://user:secret@h", "sqlite://x", "/a/folder", ""])
def test_check_refuses_what_is_no_address(uri: str) -> None:
    with pytest.raises(UserError, match="is no MLflow address; expected") as error:
        mlflow_uri.check(uri)
    assert "secret" not in str(error.value)


def test_check_of_a_database_writes_nothing(tmp_path: Path) -> None:
    mlflow_uri.check(mlflow_uri.default_uri(tmp_path / "new" / "runs"))
    assert not any(tmp_path.iterdir())
    (tmp_path / "notes.txt").write_text("no database, but long enough to have a header")
    for path, reason in (
        ("notes.txt", "no usable tracking database .file is not a database"),
        (".", "names no file"),
        ("notes.txt/mlflow.db", "cannot be written"),
    ):
        with pytest.raises(UserError, match=reason):
            mlflow_uri.check(f"sqlite:///{tmp_path / path}")
    (tmp_path / "torn.db").write_bytes(b"SQLite format 3\0" + bytes(range(256)) * 16)
    for uri, reason in ((f"sqlite:///{tmp_path}/torn.db", "not a database"), ("sqlite:///", "names no file")):
        with pytest.raises(UserError, match=reason):
            mlflow_uri.check(uri)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", "torn.db"]


# ── Registry ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def published(uri: str, encoder: Path) -> list[int]:
    """Three versions of model `tiny`, with kNN 0.5, 0.75 and 0.75."""
    run = MLflowRun(uri, "patterns", "published", {}, {})
    run.end()
    return [registry.register(uri, run.run_id, encoder, "tiny", of({"knn_top1": s, "probe_top1": 1 - s})) for s in (0.5, 0.75, 0.75)]


def of(scores: dict[str, float], metric: str = "knn_top1", **measured: Any) -> Record:
    """A version's record: scores of all images, unless `measured` says otherwise."""
    about = {"data": "runs/p", "manifest_sha256": "m" * 64, "shards_sha256": "5" * 64, "split": "the test split", "limit": WHOLE, "step": 7}
    return Record(scores=scores, metric=metric, measured=Measured(**{**about, "time": 1e9, **measured}))


@pytest.fixture(scope="module")
def promoted(uri: str, published: list[int]) -> list[tuple[bool, float | None]]:
    found = [champion.promote(uri, "tiny", version, "knn_top1") for version in published]
    return [(verdict.moved, verdict.before) for verdict in found]


def test_champion_moves_only_to_a_better_version(published: list[int], promoted: list[tuple[bool, float | None]]) -> None:
    assert published == [1, 2, 3]
    assert promoted == [(True, None), (True, 0.5), (False, 0.75)]


def test_a_version_without_a_score_is_never_champion(uri: str, encoder: Path) -> None:
    run = MLflowRun(uri, "patterns", "broken", {}, {})
    run.end("FAILED")
    version = registry.register(uri, run.run_id, encoder, "broken", of({"knn_top1": math.nan, "probe_top1": 0.1}))
    with pytest.raises(UserError, match="broken/1 has no score 'knn_top1'; its scores: probe_top1"):
        champion.promote(uri, "broken", version, "knn_top1")
    assert champion.promote(uri, "broken", version, "probe_top1").moved


def test_a_name_that_the_registry_cannot_hold_is_refused(uri: str, encoder: Path) -> None:
    for name in ("a/b", "a:b", "a@b", "", " ", "..", "it's"):
        with pytest.raises(UserError, match="cannot be registered"):
            registry.register(uri, "0" * 32, encoder, name, Record())
    with pytest.raises(UserError, match=r"refused: Run with id=0+ not found"):
        registry.register(uri, "0" * 32, encoder, "never made", Record())
    with pytest.raises(UserError, match="is no published encoder; expected"):
        registry.register(uri, "0" * 32, encoder.parent, "tiny", Record())


@pytest.mark.parametrize(("spec", "version"), [("tiny@champion", 2), ("tiny/1", 1)])
def test_pull_gives_the_files_byte_for_byte(uri: str, encoder: Path, promoted: list[Any], tmp_path: Path, spec: str, version: int) -> None:
    if version == 1:
        (tmp_path / "new").mkdir()
    got = registry.pull(uri, spec, tmp_path / "new")
    assert (got["name"], got["version"], got["scores"]["knn_top1"]) == ("tiny", version, {1: 0.5, 2: 0.75}[version])
    assert {p.name: p.read_bytes() for p in (tmp_path / "new").iterdir()} == {p.name: p.read_bytes() for p in encoder.iterdir()}
    assert [p.name for p in tmp_path.iterdir()] == ["new"]


def test_a_run_published_again_keeps_the_files_of_its_first_version(uri: str, encoder: Path, tmp_path: Path) -> None:
    run = MLflowRun(uri, "patterns", "trained on", {}, {})
    run.end()
    (tmp_path / "encoder").mkdir()
    for step in (1, 2):
        (tmp_path / "encoder" / "config.json").write_text(f'{{"step": {step}}}')
        (tmp_path / "encoder" / "encoder.safetensors").write_bytes(bytes([step]) * 1000)
        assert registry.register(uri, run.run_id, tmp_path / "encoder", "again", Record()) == step
    for step in (1, 2):
        registry.pull(uri, f"again/{step}", tmp_path / str(step))
        assert (tmp_path / str(step) / "encoder.safetensors").read_bytes() == bytes([step]) * 1000


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tny@champion", "no model 'tny' at sqlite:.*; models there: .*tiny"),
        ("tiny@campion", "model 'tiny' has no alias 'campion'; aliases there: champion"),
        ("tiny/9", "model 'tiny' has no version 9; versions there: 1, 2, 3"),
        ("tiny", "'tiny' names no model version; expected NAME@alias"),
        ("tiny@", "names no model version"),
    ],
)
def test_pull_of_what_does_not_exist_names_what_does(uri: str, promoted: list[Any], tmp_path: Path, spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        registry.pull(uri, spec, tmp_path / "new")
    assert not any(tmp_path.iterdir())


def test_pull_touches_no_directory_with_something_in_it(uri: str, promoted: list[Any], tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for to in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(UserError, match="exists and is not empty"):
            registry.pull(uri, "tiny@champion", to)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"] and (tmp_path / "mine.txt").read_text() == "mine"


def test_pull_of_a_version_whose_files_are_gone(uri: str, encoder: Path, tmp_path: Path) -> None:
    run = MLflowRun(uri, "patterns", "cleaned", {}, {})
    run.end()
    registry.register(uri, run.run_id, encoder, "cleaned", Record())
    place = client.connect(uri).get_model_version("cleaned", "1").source
    (Path(place.removeprefix("file://").replace("%20", " ").replace("%25", "%")) / "encoder/encoder.safetensors").unlink()
    with pytest.raises(UserError, match=r"cleaned/1 has lost its files at .*; publish the run again"):
        registry.pull(uri, "cleaned/1", tmp_path / "new")
    assert not any(tmp_path.iterdir())


def test_mlflow_loads_the_champion_and_predicts(
    uri: str, encoder: Path, promoted: list[Any], monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    import simclr

    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    model = importlib.import_module("mlflow.pyfunc").load_model("models:/tiny@champion")
    example = model.metadata.load_input_example("models:/tiny@champion")
    assert model.predict(example).shape == (1, 64) and model.metadata.metadata["scores"]["knn_top1"] == 0.75
    images = np.arange(5 * 40 * 36 * 3, dtype=np.uint64).astype(np.uint8).reshape(5, 40, 36, 3)
    features = model.predict(images)
    assert features.dtype == np.float32 and model.predict(images[:0]).shape == (0, features.shape[1])
    np.testing.assert_allclose(features, simclr.load_encoder(encoder).embed(images).numpy(), atol=1e-5)
    images.flags.writeable = False
    np.testing.assert_array_equal(model.predict(images), features)
    assert not [str(w.message) for w in recwarn if "mlflow" in w.filename or "pyfunc" in w.filename]
    assert not [*Path(uri.removeprefix("sqlite:///")).parent.rglob("artifacts/**/*.pkl")]
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
