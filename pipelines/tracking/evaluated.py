"""What MLflow's pages show of a run's evaluation: metrics, tags, the data, files, and the logged model of a published encoder.

`simclr evaluate` measures once, and what it found is sent whenever the server answers (`outbox.log_scores`). All of it can be sent again:
what MLflow has is not added a second time.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pipelines.runs import scores
from pipelines.runs.directory import Run
from pipelines.runs.scores import Measured
from pipelines.tracking import trust
from pipelines.tracking.client import ABSENT, NO_SUCH_CALL, connect, log_data, name_of, one_sentence, unless
from pipelines.tracking.record import Record
from simclr import files

Scored = tuple[dict[str, float], Measured]
_BESIDE = ("_top5", "_mean_per_class")  # of the same images and protocol as their top-1, which tells them
_SOURCE = {"mlflow.source.name": "simclr publish", "mlflow.source.type": "LOCAL"}
_SHOWN = ("report.html", "evaluation.json", "evaluation/*.png", "evaluation/*.json")


def metric_of(score: str, measured: Measured, trained_on_sha256: str) -> str:
    """The name in MLflow of a score of `simclr evaluate`: evaluate/knn_top1, or on other data than the run's, whose manifest has that
    sha256, evaluate/NAME/knn_top1. `eval/…` is online evaluation's: of fewer images, while the run trains."""
    other = trained_on_sha256 and measured.manifest_sha256 != trained_on_sha256
    name = re.sub(r"[^\w.-]+", "-", name_of(measured.data), flags=re.ASCII)
    return f"evaluate/{name}/{score}" if other else f"evaluate/{score}"


def log(uri: str, run: Run) -> None:
    """Send what `simclr evaluate` found of all images to the MLflow run of `run`. Raises UserError if MLflow refuses."""
    found = whole(run)
    if not found:
        return
    with one_sentence(uri):
        from mlflow.entities import RunTag

        client = connect(uri)
        there = unless(ABSENT, client.get_run, run.tracking_run)
        if there is None:  # it was deleted
            return
        trust.require_same_host(uri, there.info.artifact_uri, f"the storage of run {run.tracking_run}")
        for values, measured in found:
            log_data(client, run.tracking_run, measured.data, measured.manifest_sha256, "evaluation")
            _log_metrics(client, run.tracking_run, values, measured, run.data_digest)
            told = Record(scores={name: value for name, value in values.items() if not name.endswith(_BESIDE)}, measured=measured)
            tags = [RunTag(name, text) for name, text in told.tags().items() if not name.startswith("score.")]
            client.log_batch(run.tracking_run, tags=tags)
        for file in sorted(file for name in _SHOWN for file in run.path.glob(name)):
            if file.is_file() and not file.is_symlink() and "-limited" not in file.name:
                folder = "evaluation" if file.parent != run.path else None
                client.log_artifact(run.tracking_run, str(file), folder)


def whole(run: Run) -> list[Scored]:
    """The scores of all images: those of each protocol, then the quick table's. Scores of some images do not stand in a column with others,
    nor do those of earlier versions, which did not say what they are of."""
    found = []
    for file in sorted((run.path / "evaluation").glob("*.json")):
        told = files.read_json(file, f"remove {file}")
        measured = scores.measured_in(told, file)
        values = {f"{file.stem}_{name}": told.get(name) for name in ("top1", "top5", "mean_per_class")}
        if measured.whole:
            found.append(({name: float(value) for name, value in values.items() if isinstance(value, float | int)}, measured))
    if (text := run.evaluation()) is not None and (measured := scores.measured_in(text, run.evaluation_file())).whole:
        own = {name: float(value) for name, value in text["scores"][-1].items() if scores.higher_is_better(name)}
        found = [({name: value for name, value in values.items() if name not in own}, at) for values, at in found]
        found.append((own, measured))
    return found


def _log_metrics(client: Any, run_id: str, values: Mapping[str, float], measured: Measured, trained_on_sha256: str) -> None:
    """Log `values` at the step of the checkpoint. Of a run that is evaluated again, the newest is its value at this step."""
    metrics = _metrics(values, measured, trained_on_sha256)
    known = {(m.key, m.step, m.timestamp) for metric in metrics for m in client.get_metric_history(run_id, metric.key)}
    client.log_batch(run_id, metrics=[m for m in metrics if (m.key, m.step, m.timestamp) not in known])


def _metrics(values: Mapping[str, float], measured: Measured, trained_on_sha256: str, **of: Any) -> list[Any]:
    from mlflow.entities import Metric

    at_ms, step = int(1000 * measured.time), measured.step or 0
    return [Metric(metric_of(name, measured, trained_on_sha256), value, at_ms, step, **of) for name, value in values.items()]


# ── The logged model ─────────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def logged_model(client: Any, run: Any, name: str, record: Record) -> Iterator[Any]:
    """A new logged model of the MLflow `run`, for the files of an encoder; None on a server before MLflow 3. At the end it is ready, with
    its scores, or marked as failed."""
    from mlflow.entities import LoggedModelOutput

    about, run_id = record.measured, run.info.run_id
    params = {"step": str(about.step)} if about.step is not None else {}
    asked = (run.info.experiment_id, re.sub(r"[^\w -]+", "-", name)[:200], run_id, record.tags() | _SOURCE, params, "encoder")
    model = unless(NO_SUCH_CALL, client.create_logged_model, *asked)
    if model is None:
        yield None
        return
    status = "FAILED"
    try:
        yield model
        status = "READY"
    finally:
        with contextlib.ExitStack() as stack:
            if status == "FAILED":
                stack.enter_context(contextlib.suppress(Exception))  # the first error is the one to be told
            client.finalize_logged_model(model.model_id, status)
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, about.step or 0)])
    if record.scores and about.whole:
        dataset = log_data(client, run_id, about.data, about.manifest_sha256, "evaluation")
        of = {"model_id": model.model_id, "run_id": run_id}
        of |= {"dataset_name": dataset[0], "dataset_digest": dataset[1]} if dataset else {}
        client.log_batch(run_id, metrics=_metrics(record.scores, about, record.trained_on_sha256, **of))


def link(client: Any, model_id: str, name: str, version: int) -> None:
    """Tell MLflow's pages which version a logged model became, as its own `register_model` does."""
    client.set_logged_model_tags(model_id, {"mlflow.modelVersions": json.dumps([{"name": name, "version": version}])})
