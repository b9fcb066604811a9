"""The champion moves among equals alone; what `simclr evaluate` found stands where people look for it in MLflow, once."""

from __future__ import annotations

import json
import socket
import stat
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.runs import scores
from pipelines.runs.directory import Run, load_run, open_run
from pipelines.runs.scores import WHOLE, Measured
from pipelines.tracking import champion, client, evaluated, outbox, record, registry
from pipelines.tracking.card import write_card
from pipelines.tracking.record import Record
from pipelines.tracking.uri import default_uri
from simclr.recipes import recipe
from tests.support.command import Run as Command

KNN = "weighted kNN, k 20, temperature 0.1, cosine"


def of(score: float, metric: str = "knn_top1", **measured: Any) -> Record:
    about = {
        "data": "runs/photos",
        "manifest_sha256": "a" * 64,
        "shards_sha256": "b" * 64,
        "split": "the test split",
        "limit": WHOLE,
        "step": 7,
    }
    about |= {
        "time": 1e9,
        "images": {metric: 1000},
        "protocols": {metric: KNN},
        "intervals": scores.intervals_of({metric: score}, {metric: 1000}),
    }
    return Record(scores={metric: score}, metric=metric, measured=Measured(**{**about, **measured}), trained_on="runs/photos")


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return default_uri(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def run(uri: str, patterns: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of seven steps that MLflow knows, with an encoder."""
    from simclr.encoder.directory import write_encoder
    from simclr.methods.simclr import build_model

    config = recipe("patterns_tiny")
    found = open_run(tmp_path_factory.mktemp("run") / "run", "patterns_tiny", config, patterns)
    found.save()
    found.append({"step": 7, "train/loss": 1.0, "eval/knn_top1": 0.25})
    write_encoder(
        build_model(config).encoder.state_dict(), config, found.encoder, {"recipe": "patterns_tiny", "step": 7, "data": "patterns"}
    )
    return outbox.catch_up(found, uri)


# ── Among equals ───────────────────────────────────────────────────────────────────────────────────────────────────


def verdict(ours: Record, held: Record | None, metric: str = "knn_top1", force: bool = False, no_score: str = "") -> champion.Verdict:
    return champion._verdict("m/2", ours, "m/1", held, metric, force, no_score)


def test_a_better_score_among_equals_moves_the_alias_and_says_where_intervals_overlap() -> None:
    near, far = verdict(of(0.37), of(0.36)), verdict(of(0.60), of(0.36))
    assert near.moved and near.before == 0.36 and "their 95 % intervals overlap" in near.said
    assert far.moved and "overlap" not in far.said and "1,000 images of the test split of runs/photos (sha256 bbbbbbbbbbbb…)" in far.said
    worse, equal = verdict(of(0.3), of(0.36)), verdict(of(0.36), of(0.36))
    assert not worse.moved and "m/1 stays champion with knn_top1 36.0 % (95 % interval 33.1 … 39.0)" in worse.said
    assert not equal.moved and equal.said.endswith("no less")
    assert verdict(of(0.1), None).moved


@pytest.mark.parametrize(
    ("held", "differs"),
    [
        (
            of(0.1, shards_sha256="c" * 64, data="runs/cats"),
            "its scores are on runs/cats (sha256 cccccccccccc…), these on runs/photos (sha256 b",
        ),
        (of(14.4, "rankme"), "it is champion by rankme 14.4, not by knn_top1"),
        (of(0.1, limit="at most 50 test images"), "its scores are of at most 50 test images"),
        (of(0.1, split=scores.HELD_BACK), "it was scored on a held-back tenth of the training split, this on the test split"),
        (of(0.1, protocols={"knn_top1": "weighted kNN, k 5"}), f"its knn_top1 is weighted kNN, k 5, this one's {KNN}"),
        (Record(scores={"knn_top1": 0.1}), "an earlier version registered it and did not record data, metric and images"),
    ],
    ids=["data", "metric", "limit", "split", "protocol", "earlier"],
)
def test_what_does_not_compare_is_named_and_needs_force(held: Record, differs: str) -> None:
    """`photos@champion` went from a model of photographs with RankMe 14.4 to one of patterns with kNN 37 %."""
    kept = verdict(of(0.9), held)
    assert not kept.moved and differs in kept.said and "m/1 stays champion" in kept.said and "--force moves the alias" in kept.said
    forced = verdict(of(0.05), held, force=True)
    assert forced.moved and differs in forced.said and "--force took the alias from m/1, although" in forced.said


def test_a_method_that_neighbours_do_not_score_is_no_champion_by_them() -> None:
    """kNN of MAE's features says little of them: the first version of a name is not its champion either."""
    why = "neighbours in its features and linear probes are no score of MAE; fine-tuning is (`simclr finetune runs/one`)"
    first, later, forced = (
        verdict(of(0.5), held, force=force, no_score=why) for held, force in ((None, False), (of(0.3), False), (None, True))
    )
    assert not first.moved and first.said == f"m/2 is registered, and it is not champion: {why}; --force moves the alias all the same"
    assert not later.moved and "m/1 stays champion: neighbours in its features" in later.said
    assert forced.moved and f"--force gave it the alias, although {why}" in forced.said


def test_scores_of_some_images_never_move_the_alias() -> None:
    for held, force in ((None, False), (None, True), (of(0.1), True)):
        found = verdict(of(0.9, limit="at most 50 training and 50 test images"), held, force=force)
        assert (
            not found.moved and "its scores are of at most 50 training and 50 test images; evaluate the run without --limit" in found.said
        )
    unknown = verdict(Record(scores={"knn_top1": 0.9}), None)
    assert not unknown.moved and "did not record on which images; evaluate it again" in unknown.said
    forced = verdict(Record(scores={"knn_top1": 0.9}), None, force=True)
    assert forced.moved and "--force gave it the alias, although an earlier version evaluated the run" in forced.said


def test_a_record_comes_back_from_its_tags_and_odd_tags_are_no_record() -> None:
    ours = of(0.37)
    back = record.of_tags(ours.tags())
    assert back.scores == ours.scores and back.metric == "knn_top1" and back.trained_on == "runs/photos"
    ends = tuple(round(end, 6) for end in ours.measured.intervals["knn_top1"])
    assert back.measured == replace(ours.measured, time=0.0, intervals={"knn_top1": ends})
    odd = {"score.a": "nan", "score.b": "high", "images.b": "-3", "interval.b": "x … y", "checkpoint.step": "1e9", "score.c": "0.5"}
    assert record.of_tags(odd) == Record(scores={"c": 0.5})


def test_of_which_scores_more_is_better() -> None:
    assert all(map(scores.higher_is_better, ("knn_top1", "probe_top1_at_0.01", "mean_per_class", "top5", "rankme")))
    assert not any(map(scores.higher_is_better, ("probe_decay", "loss", "knn_top1_seconds", "train/loss")))


def test_a_metric_of_which_less_is_better_is_refused(simclr: Command, run: Run) -> None:
    measured = Measured.of(run.data, manifest_of(run), run.origin, limit=WHOLE)
    scores.write(run, [{"name": "trained encoder", "knn_top1": 0.5, "probe_decay": 0.1}], measured, k=5)
    code, _, said = simclr("publish", run.path, "--metric", "probe_decay")
    assert code == 2 and "of probe_decay more is not better; choose one of knn_top1" in said


# ── In MLflow ──────────────────────────────────────────────────────────────────────────────────────────────────────


def manifest_of(run: Run) -> Any:
    from simclr.data.manifest import read_manifest

    return read_manifest(run.data)


def evaluate(run: Run, score: float, at: float, limit: str = WHOLE) -> Run:
    measured = Measured.of(run.data, manifest_of(run), run.origin, limit=limit, split="the test split", step=7)
    measured = replace(measured, time=at, images={"knn_top1": 60}, protocols={"knn_top1": KNN})
    scores.write(
        run, [{"name": "raw pixels", "knn_top1": 0.1}, {"name": "trained encoder", "knn_top1": score, "probe_decay": 0.1}], measured, k=5
    )
    return load_run(run.path)


def test_scores_go_to_the_run_once_each_at_the_step_of_the_checkpoint(uri: str, run: Run) -> None:
    server = client.connect(uri)
    (run.path / "report.html").write_text("<p>")
    for _ in range(2):
        run = outbox.log_scores(evaluate(run, 0.5, 1e9), uri)
    run = outbox.log_scores(evaluate(run, 0.75, 1.1e9), uri)
    outbox.log_scores(evaluate(run, 0.99, 1.2e9, "at most 5 test images"), uri)  # some images: not in the column
    history = server.get_metric_history(run.tracking_run, "evaluate/knn_top1")
    assert [(m.step, m.value, m.timestamp) for m in history] == [(7, 0.5, 10**12), (7, 0.75, 11 * 10**11)]
    found = server.get_run(run.tracking_run)
    assert (
        found.data.metrics["eval/knn_top1"] == 0.25 and found.data.metrics["evaluate/knn_top1"] == 0.75 and found.info.status == "FINISHED"
    )
    assert "evaluate/probe_decay" not in found.data.metrics and run.unlogged == ""
    tags = found.data.tags
    assert tags["evaluated.limit"] == "none" and tags["images.knn_top1"] == "60" and tags["protocol.knn_top1"] == KNN
    assert tags["data_sha256"] == run.data_digest and tags["host"] and tags["version.torch"] and tags["version.python"]
    assert (
        tags["mlflow.source.git.commit"] == run.environment["commit"].removesuffix("-dirty") and len(tags["mlflow.source.git.commit"]) == 40
    )
    (data,) = found.inputs.dataset_inputs
    assert (data.dataset.digest, json.loads(data.dataset.profile)["manifest_sha256"]) == (run.data_digest[:12], run.data_digest)
    assert {file.path for file in server.list_artifacts(run.tracking_run)} >= {"report.html", "evaluation.json"}


def test_scores_on_other_data_have_a_column_of_their_own(run: Run) -> None:
    own, other = (Measured(data="/data/cats v2", manifest_sha256=digest) for digest in (run.data_digest, "c" * 64))
    assert evaluated.metric_of("knn_top1", own, run.data_digest) == "evaluate/knn_top1"
    assert evaluated.metric_of("knn_top1", other, run.data_digest) == "evaluate/cats-v2/knn_top1"


def test_a_dead_server_holds_no_evaluation_up_and_gets_its_scores_later(
    uri: str, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(outbox, "_SCORES_S", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address, began = f"http://127.0.0.1:{silent.getsockname()[1]}", time.monotonic()
        late = outbox.log_scores(evaluate(run, 0.8, 1.3e9).noted(tracking_uri=address), address)
    assert time.monotonic() - began < 3 and late.unlogged == load_run(run.path).unlogged == "scores"
    assert "the scores did not reach MLflow" in capsys.readouterr().err
    assert outbox.catch_up(load_run(run.path).noted(tracking_uri=uri), uri).unlogged == ""
    assert client.connect(uri).get_run(run.tracking_run).data.metrics["evaluate/knn_top1"] == 0.8


def test_a_version_is_a_logged_model_of_its_run_with_scores_and_data(uri: str, run: Run, tmp_path: Path) -> None:
    server = client.connect(uri)
    ours = of(0.5, manifest_sha256=run.data_digest, time=1.4e9)
    number = registry.register(uri, run.tracking_run, run.encoder, "linked.name", ours)
    version = server.get_model_version("linked.name", str(number))
    (output,) = server.get_run(run.tracking_run).outputs.model_outputs
    model = server.get_logged_model(output.model_id)
    assert (output.step, model.status, model.source_run_id, version.run_id) == (7, "READY", run.tracking_run, run.tracking_run)
    assert version.source == model.artifact_location and json.loads(model.tags["mlflow.modelVersions"])[0]["name"] == "linked.name"
    (metric,) = model.metrics
    assert (metric.key, metric.value, metric.step, metric.dataset_digest) == ("evaluate/knn_top1", 0.5, 7, run.data_digest[:12])
    got = registry.pull(uri, "linked.name/1", tmp_path / "new")
    assert got["record"].measured.images == {"knn_top1": 1000} and got["scores"] == {"knn_top1": 0.5}
    for file in ("encoder.safetensors", "config.json"):
        assert (tmp_path / "new" / file).read_bytes() == (run.encoder / file).read_bytes()


def test_a_server_before_logged_models_has_the_files_under_the_run(
    uri: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.exceptions import RestException
    from mlflow.tracking import MlflowClient

    def absent(*_: Any, **__: Any) -> Any:
        raise RestException({"error_code": "ENDPOINT_NOT_FOUND", "message": "404"})

    monkeypatch.setattr(MlflowClient, "create_logged_model", absent)
    registry.register(uri, run.tracking_run, run.encoder, "older", of(0.5))
    assert f"/{run.tracking_run}/artifacts/model-" in client.connect(uri).get_model_version("older", "1").source
    assert registry.pull(uri, "older/1", tmp_path / "new")["scores"] == {"knn_top1": 0.5}


def test_an_upload_that_fails_leaves_no_model_and_no_version(uri: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    def broken(*_: Any, **__: Any) -> None:
        raise OSError("the network is away")

    monkeypatch.setattr(MlflowClient, "log_model_artifact", broken)
    with pytest.raises(OSError, match="the network is away"):
        registry.register(uri, run.tracking_run, run.encoder, "broken", of(0.5))
    server = client.connect(uri)
    assert not [model for model in server.search_logged_models(["1"]) if model.name == "broken"]
    assert not server.search_model_versions("name='broken'")


# ── What comes with the weights ────────────────────────────────────────────────────────────────────────────────────


def test_the_card_says_what_the_scores_are_of_and_loads_wherever_it_lies(run: Run) -> None:
    text = write_card(run.encoder, "photos", of(0.37, split=scores.HELD_BACK), "none")
    assert "| score | on 1,000 images of a held-back tenth of the training split of runs/photos (sha256 bbbbbbbbbbbb…) |" in text
    assert f"| `knn_top1` | 37.0 % (34.1 … 40.0); {KNN} |" in text
    assert 'load_encoder("photos")' not in text and 'load_encoder("DIR")' in text


def test_weights_have_the_permissions_of_the_files_beside_them(run: Run) -> None:
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in run.encoder.iterdir()}
    assert modes["encoder.safetensors"] == modes["config.json"], modes


def test_what_is_sent_again_after_a_protocol_is_the_quick_tables_own(run: Run) -> None:
    run = evaluate(run, 0.5, 1e9)
    (run.path / "evaluation").mkdir(exist_ok=True)
    stated = scores.stated(Measured(limit=WHOLE, data="d", manifest_sha256="a" * 64))
    for name in ("knn", "lbfgs", "lbfgs-limited"):
        limit = {"measured": stated["measured"] | {"limit": "at most 9 test images"}} if "-" in name else {}
        (run.path / f"evaluation/{name}.json").write_text(json.dumps({"top1": 0.9, "mean_per_class": 0.4, **stated, **limit}))
    (run.path / "evaluation/transfer.json").write_text('{"rows": []}')
    assert [values for values, _ in evaluated.whole(run)] == [
        {"knn_mean_per_class": 0.4},
        {"lbfgs_top1": 0.9, "lbfgs_mean_per_class": 0.4},
        {"knn_top1": 0.5},
    ]
