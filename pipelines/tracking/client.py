"""A run at MLflow. This file and the registry are the door to MLflow, which is imported late: the import takes seconds.

Every call here takes as long as the server takes. No training step calls anything here: see `outbox`.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipelines.terminal import say
from pipelines.tracking import server as server  # sets what MLflow reads from the environment
from pipelines.tracking import trust
from pipelines.tracking.uri import check, database_file, redacted
from simclr import files, proxy
from simclr.errors import UserError

MOST = 900
"""Values in one request; MLflow takes 1,000."""
COPY_OF = "simclr.copy_of"
"""The tag of a run that was logged elsewhere first: its id there. `COPIED_FROM` is the address."""
COPIED_FROM = "simclr.copied_from"
ABSENT, EXISTS, _INVALID = "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "INVALID_PARAMETER_VALUE"
NO_SUCH_CALL = "ENDPOINT_NOT_FOUND"
"""The answer of a server that is older than what is asked of it."""
_PARAMS = 100  # that MLflow takes at a time
_DIGEST = 12  # as reports and messages show it; MLflow takes 36 characters


@contextlib.contextmanager
def locked(uri: str) -> Iterator[None]:
    """Lets one process at a time use the embedded database, also from several hosts on a shared disk. A server needs no lock."""
    with contextlib.ExitStack() as stack:
        if file := database_file(uri):
            file.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(files.locked(file.parent / ".mlflow.lock"))
        yield


@contextlib.contextmanager
def one_sentence(uri: str) -> Iterator[None]:
    """Turns an error of MLflow or its storage into a UserError of one line, without credentials."""
    import requests
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, requests.RequestException) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"MLflow at {redacted(uri)} refused: {redacted(lines[0])[:400]}") from None


def unless(code: str, call: Callable[..., Any], *args: Any) -> Any:
    """`call(*args)`, or None if MLflow answers with error `code`. An unreachable server is another error."""
    from mlflow.exceptions import MlflowException

    try:
        return call(*args)
    except MlflowException as error:
        if error.error_code == code:
            return None
        raise


def connect(uri: str) -> Any:
    """An MlflowClient. Its registry of models is at $MLFLOW_REGISTRY_URI, else where MLflow has it for `uri`: Unity Catalog for databricks.
    A new database gets its tables under our lock: MLflow's own lies in the host's temporary folder."""
    from mlflow.tracking import MlflowClient

    if not database_file(uri):
        proxy.spare_this_machine()
        return MlflowClient(uri)
    from mlflow.store.tracking import sqlalchemy_store  # noqa: F401  its import takes a second: not under the lock

    with locked(uri):
        return MlflowClient(uri)  # creates the tables, if need be


def has_run(uri: str, run_id: str) -> bool:
    """Whether MLflow at `uri` has the run. Raises UserError if there is no MLflow, or it refuses."""
    if file := database_file(uri):
        return trust.has(file, run_id)
    check(uri)
    with one_sentence(uri):
        found = unless(ABSENT, connect(uri).get_run, run_id)
    return found is not None and found.info.run_id == run_id


def copy_of(uri: str, experiment: str, run_id: str) -> str | None:
    """The id of the run of `experiment` at MLflow `uri` whose tag `COPY_OF` is `run_id`: the oldest, if two commands made one at once."""
    if not re.fullmatch(r"[\w.-]{1,200}", run_id):  # it becomes a part of a query
        raise UserError(f"run.json is damaged: tracking_run is {run_id[:200]!r}, expected a run's id; take it out of the file")
    with one_sentence(uri):
        client = connect(uri)
        found = client.get_experiment_by_name(experiment)
        query = f"tags.`{COPY_OF}` = '{run_id}'"
        runs = client.search_runs([found.experiment_id], query, max_results=1, order_by=["attributes.start_time ASC"]) if found else []
    return str(runs[0].info.run_id) if runs else None


def name_of(data: str) -> str:
    """The name of data at this address, as MLflow's pages show it."""
    return data.rstrip("/").rpartition("/")[2][:200] or "data"


def log_data(client: Any, run_id: str, data: str, manifest_sha256: str, context: str) -> tuple[str, str] | None:
    """Name the `data`, whose manifest has this sha256, as an input of a run; `context` is training or evaluation. Nothing of it is read or
    sent. Returns (name, digest) as MLflow has them, None for data that nobody knows."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    if not data or not manifest_sha256:
        return None
    name, digest = name_of(data), manifest_sha256[:_DIGEST]
    source, kind = json.dumps({"uri": data}), "s3" if data.startswith("s3://") else "local"
    dataset = Dataset(name, digest, kind, source, profile=json.dumps({"manifest_sha256": manifest_sha256}))
    unless(NO_SUCH_CALL, client.log_inputs, run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])
    return name, digest


def _experiment(client: Any, uri: str, name: str) -> str:
    """The id of experiment `name`, which is made if absent and restored if deleted."""
    if client.get_experiment_by_name(name) is None:
        place = (file.absolute().parent / "artifacts").as_uri() if (file := database_file(uri)) else None
        unless(EXISTS, client.create_experiment, name, place)  # exists: another process was faster
    found = client.get_experiment_by_name(name)
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


class MLflowRun:
    """The MLflow run of one job. For one thread."""

    def __init__(
        self,
        uri: str,
        experiment: str,
        run_name: str,
        params: dict[str, object],
        tags: dict[str, str],
        run_id: str | None = None,
        known: Callable[[str], object] = lambda run_id: None,
    ) -> None:
        """Open a run, or go on with `run_id` if it still exists. The imports take 4 s, with a new database 5 s. Raises UserError if
        MLflow refuses, as all methods do.

        `known` gets the run's id as soon as the run exists: later requests may fail, and a retry then goes on with the same run.
        """
        with one_sentence(uri):
            from mlflow.entities import Param, RunTag

            self._uri, self._mlflow = uri, connect(uri)
            run = unless(ABSENT, self._mlflow.get_run, run_id) if run_id else None
            if run is None or run.info.lifecycle_stage == "deleted":
                run = self._mlflow.create_run(_experiment(self._mlflow, uri, experiment), run_name=run_name, tags=tags)
                trust.say_folder(uri, run.info.artifact_uri)
            else:
                self._mlflow.update_run(run_id, status="RUNNING")
                self._mlflow.log_batch(run_id, tags=[RunTag(k, v) for k, v in tags.items()])
            self.run_id = str(run.info.run_id)
            known(self.run_id)
            new = [Param(k, str(v)) for k, v in params.items() if k not in run.data.params]  # a logged parameter cannot change
            for begin in range(0, len(new), _PARAMS):
                self._mlflow.log_batch(self.run_id, params=new[begin : begin + _PARAMS])
            # A resumed job repeats the steps since its last checkpoint, with the same values: they are not logged twice.
            self._last = {k: max(m.step for m in self._mlflow.get_metric_history(self.run_id, k)) for k in run.data.metrics}
        self._refused = 0

    def log(self, reports: Sequence[dict[str, Any]]) -> None:
        """Log the metrics of `reports`, at most `MOST` values, each at its "time". Steps that are not after a metric's last step are
        repeats, and are left out. Values that MLflow will never take are dropped and counted; `end` says how many."""
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        last, batch = dict(self._last), []
        for report in reports:
            step, at_ms = int(report["step"]), int(1000 * report.get("time", time.time()))
            new = {k: v for k, v in metrics_of(report).items() if step > last.get(k, -1)}
            last |= dict.fromkeys(new, step)
            batch += [Metric(k, v, at_ms, step) for k, v in new.items()]
        with one_sentence(self._uri):
            try:
                self._mlflow.log_batch(self.run_id, metrics=batch)
            except MlflowException as error:
                if error.error_code not in (ABSENT, _INVALID):  # a retry does not help against these
                    raise
                if error.error_code == _INVALID and len(reports) > 1:  # the others are good
                    for report in reports:
                        self.log([report])
                    return
                self._refused += len(batch)
        self._last = last

    def trained_on(self, data: str, manifest_sha256: str) -> None:
        """Name the data as the run's input."""
        with one_sentence(self._uri):
            log_data(self._mlflow, self.run_id, data, manifest_sha256, "training")

    def artifact(self, path: Path) -> None:
        """Copy file `path`, if there is one, into the run's artifacts."""
        if path.is_file():
            with one_sentence(self._uri):
                place = self._mlflow.get_run(self.run_id).info.artifact_uri
                trust.require_same_host(self._uri, place, f"the storage of run {self.run_id}")
                self._mlflow.log_artifact(self.run_id, str(path))

    def end(self, status: str = "FINISHED") -> None:
        with one_sentence(self._uri):
            unless(ABSENT, self._mlflow.set_terminated, self.run_id, status)  # absent: it was deleted
        if self._refused:
            say(f"{self._refused:,} metrics did not reach MLflow at {redacted(self._uri)}: it refuses them; metrics.jsonl has every report")


def metrics_of(report: dict[str, Any]) -> dict[str, float]:
    """The metrics of a line of metrics.jsonl that MLflow gets. NaN is a value."""
    return {k: float(v) for k, v in report.items() if "/" in k or k == "epoch"}
