"""One MLflow run per job, from the driver; the model registry. The door to MLflow, which is imported late: it costs seconds.

Nothing here is called from a training step. Metrics go through a queue to one thread, so a slow or absent server delays
nothing; what it did not take in time is counted and said, and metrics.jsonl in the run directory has every report anyway.
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import importlib.metadata
import json
import logging
import os
import re
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipelines.terminal import say
from pipelines.tracking.uri import database_file, redacted
from simclr.errors import UserError

# Read at each use. With MLflow's defaults a call to a server that is down blocks for four minutes; 30 s is for large encoders.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
# Read when MLflow is imported. Its failures arrive here as exceptions, said once; its log would say them at every try.
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # "Retrying (Retry(total=0, …" in the middle of a bar

_AWAY_S = 30.0  # the longest pause between two tries while a server is away
_FLUSH_S, _KILLED_S = 30.0, 3.0  # a finished job waits this long for its last metrics; an interrupted one has to end within 5 s
_EVERY_S, _BATCH, _BATCH_PARAMS = 0.5, 900, 100  # metrics go out this often; MLflow takes 1,000 values, 100 parameters at a time
_SCORE_TAG = "score."
_ABSENT, _EXISTS = "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS"
_FINAL = (_ABSENT, "INVALID_PARAMETER_VALUE")  # answers that trying again does not change


@contextlib.contextmanager
def _locked(uri: str) -> Iterator[None]:
    """One process at a time at the embedded database, also from several hosts on a shared disk; a server sees to itself."""
    with contextlib.ExitStack() as stack:
        if file := database_file(uri):
            file.parent.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context((file.parent / ".mlflow.lock").open("w")), fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _one_sentence(uri: str) -> Iterator[None]:
    """What MLflow or its storage refuses becomes a UserError of one line, without credentials."""
    import requests
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, requests.RequestException) as error:
        raise UserError(f"MLflow at {redacted(uri)} refused: {_line(error)}") from None


def _unless(code: str, call: Callable[..., Any], *args: Any) -> Any:
    """`call(*args)`, or None where MLflow answers with error `code`; a server that is away is another error."""
    from mlflow.exceptions import MlflowException

    try:
        return call(*args)
    except MlflowException as error:
        if error.error_code == code:
            return None
        raise


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return redacted(text[0])[:400] if text else type(error).__name__


def _client(uri: str) -> Any:
    """An MlflowClient. A new database gets its tables under our lock: MLflow's own lies in the host's temporary folder."""
    from mlflow.tracking import MlflowClient

    if not database_file(uri):
        return MlflowClient(uri, uri)
    from mlflow.store.tracking import sqlalchemy_store  # noqa: F401  its import takes a second: not under the lock

    with _locked(uri):
        return MlflowClient(uri, uri)  # creates the tables, if need be


def _experiment(client: Any, uri: str, name: str) -> str:
    """The id of experiment `name`, made where there is none and restored where it was deleted."""
    if client.get_experiment_by_name(name) is None:
        place = (file.absolute().parent / "artifacts").as_uri() if (file := database_file(uri)) else None
        _unless(_EXISTS, client.create_experiment, name, place)  # exists: somebody else was faster
    found = client.get_experiment_by_name(name)
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


class Tracker:
    """The MLflow run of one job. Opening it takes 4 s of imports (5 s where the database is new): do it in a thread.

    While a server is away metrics wait in memory; when it is back they arrive complete and in order. Safe from any thread.
    """

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
        """Open a run, or go on with `run_id`, where it still exists. Raises UserError where MLflow refuses.

        `known` gets the run's id as soon as there is a run: the requests after that may fail, and who tries again goes on with it.
        """
        with _one_sentence(uri):
            from mlflow.entities import Param, RunTag

            self._uri, self._mlflow = uri, _client(uri)
            run = _unless(_ABSENT, self._mlflow.get_run, run_id) if run_id else None
            if run is None or run.info.lifecycle_stage == "deleted":
                run = self._mlflow.create_run(_experiment(self._mlflow, uri, experiment), run_name=run_name)
            else:
                self._mlflow.update_run(run_id, status="RUNNING")
            self.run_id = str(run.info.run_id)
            known(self.run_id)
            self._mlflow.log_batch(self.run_id, tags=[RunTag(k, v) for k, v in tags.items()])
            new = [Param(k, str(v)) for k, v in params.items() if k not in run.data.params]  # a logged parameter cannot change
            for begin in range(0, len(new), _BATCH_PARAMS):
                self._mlflow.log_batch(self.run_id, params=new[begin : begin + _BATCH_PARAMS])
            # A resumed job repeats the steps since its last checkpoint, with the same values: they are not logged twice.
            self._last = {k: max(m.step for m in self._mlflow.get_metric_history(self.run_id, k)) for k in run.data.metrics}
        self._metrics, self._files = deque[Any](), deque[Any]()  # a Metric, a (file, folder) leaves when it is delivered
        self._refused, self._trouble = 0, "no answer"
        self._status, self._deadline, self._ended = "FINISHED", float("inf"), False
        self._closing, self._thread = threading.Event(), threading.Thread(target=self._deliver, name="mlflow", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: dict[str, float], at_s: float | None = None) -> None:
        """Queue `metrics` of `step` (NaN is a value), at Unix time `at_s` (now); returns at once. A step of a metric that is not
        after the last one was repeated, with the same value, and is left out."""
        from mlflow.entities import Metric

        at_ms = int((time.time() if at_s is None else at_s) * 1000)
        new = {k: float(v) for k, v in metrics.items() if step > self._last.get(k, -1)}
        self._last |= dict.fromkeys(new, step)
        self._metrics.extend(Metric(k, v, at_ms, step) for k, v in new.items())

    def artifact(self, path: Path, folder: str = "") -> None:
        """Queue a copy of file `path`, as it will be when its turn comes, into the run's artifacts; returns at once."""
        self._files.append((str(path), folder or None))

    def close(self, status: str = "FINISHED") -> int:
        """Deliver what waits, within 30 s (KILLED: 3 s), and end the run. Says and returns how many metrics and files are lost."""
        first = not self._closing.is_set()
        if first:
            within = _KILLED_S if status == "KILLED" else _FLUSH_S
            self._status, self._deadline = status, time.monotonic() + within
            self._closing.set()
            self._thread.join(within)
        lost = self._refused + len(self._metrics) + len(self._files)
        if first and (lost or not self._ended):
            what = f"{lost:,} metrics or files" if lost else "the end of the run"
            say(f"{what} did not reach MLflow at {redacted(self._uri)} ({self._trouble}); metrics.jsonl has every report")
        return lost

    def _deliver(self) -> None:
        """The thread: sends what waits; where that fails, again and again, until the run is closed and its time is over."""
        from mlflow.exceptions import MlflowException

        pause = _EVERY_S
        while True:
            closing = self._closing.is_set()  # asked before sending, so that nothing queued before `close` is missed
            try:
                while self._metrics or self._files:
                    self._send()
                if closing:
                    self._mlflow.set_terminated(self.run_id, self._status)
                    self._ended = True
                    return
                pause = _EVERY_S
            except Exception as error:  # whatever the server's trouble is, later may be better
                if not isinstance(error, MlflowException | OSError) and self._trouble != _line(error):
                    traceback.print_exception(error)  # a bug, whose place somebody should see
                self._trouble = _line(error)
                if time.monotonic() > self._deadline or getattr(error, "error_code", "") in _FINAL:
                    return
                pause = min(2 * pause, _AWAY_S)
            if closing:
                time.sleep(_EVERY_S)
            else:
                self._closing.wait(pause)

    def _send(self) -> None:
        """Send the oldest metrics, or a file. What will never be taken is dropped and counted."""
        from mlflow.exceptions import MlflowException

        waiting, most = (self._metrics, _BATCH) if self._metrics else (self._files, 1)
        batch = [waiting[i] for i in range(min(most, len(waiting)))]
        try:
            if waiting is self._metrics:
                self._mlflow.log_batch(self.run_id, metrics=batch)
            else:
                self._mlflow.log_artifact(self.run_id, *batch[0])
        except (MlflowException, FileNotFoundError) as error:
            if getattr(error, "error_code", _ABSENT) not in _FINAL:
                raise
            self._trouble = _line(error)
            self._refused += len(batch)
        for _ in batch:
            waiting.popleft()


# ── Registry ───────────────────────────────────────────────────────────────────────────────────────────────────────


def register(uri: str, run_id: str, encoder: Path, name: str, scores: dict[str, float]) -> int:
    """Register the encoder directory as a new version of model `name`, under run `run_id`, with its scores. Returns the version.

    The version is an MLflow model without pickled code: `mlflow.pyfunc.load_model("models:/NAME@champion")` reads it wherever this
    package is installed. Raises UserError for a name that the registry cannot hold or a directory that is no encoder.
    """
    if not re.fullmatch(r"[^/:@'\"\\]+", name) or not name.strip(". "):
        raise UserError(f"model name {name!r} cannot be registered; expected a name without / : @ \\ and quotes, give one with --name")
    if not _is_encoder(encoder):
        raise UserError(f"{encoder} is no published encoder; expected encoder.safetensors and config.json, `simclr pretrain` writes them")
    with _one_sentence(uri):
        client = _client(uri)
        with tempfile.TemporaryDirectory() as scratch:
            # Every version has a folder of its own: a run that trains on and is published again keeps its earlier version's files.
            folder = _describe(Path(scratch), run_id, scores)
            client.log_artifacts(run_id, scratch, folder)
        client.log_artifacts(run_id, str(encoder), f"{folder}/encoder")
        _unless(_EXISTS, client.create_registered_model, name)
        source = f"{client.get_run(run_id).info.artifact_uri}/{folder}"
        tags = {_SCORE_TAG + metric: repr(float(value)) for metric, value in scores.items()}
        card = (encoder / "README.md").read_text() if (encoder / "README.md").is_file() else None
        return int(client.create_model_version(name, source, run_id=run_id, tags=tags, description=card).version)


def _describe(model: Path, run_id: str, scores: dict[str, float]) -> str:
    """Write what makes a folder with an encoder directory in it an MLflow model: MLmodel, requirements, example. Returns its name.

    By hand: `mlflow.pyfunc.save_model` copies the weights and looks for pip.
    """
    import numpy as np
    from mlflow import pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    images, features = TensorSpec(np.dtype(np.uint8), (-1, -1, -1, 3)), TensorSpec(np.dtype(np.float32), (-1, -1))
    spec = Model(run_id=run_id, signature=ModelSignature(Schema([images]), Schema([features])), metadata={"scores": scores})
    spec.artifact_path = f"model-{spec.model_uuid}"
    example = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).tolist()  # two images
    (model / "input_example.json").write_text(json.dumps(example))
    spec.saved_input_example_info = {"artifact_path": "input_example.json", "type": "ndarray", "format": "tf-serving"}
    pyfunc.add_to_model(spec, loader_module="pipelines.tracking.pyfunc", data="encoder", python_env="python_env.yaml")
    spec.save(str(model / "MLmodel"))
    # Not this package: on the public index its name is somebody else's.
    pins = [f"{package}=={importlib.metadata.version(package).partition('+')[0]}" for package in ("torch", "numpy", "safetensors")]
    (model / "requirements.txt").write_text("\n".join(pins) + "\n")
    (model / "python_env.yaml").write_text(f"python: {sys.version.split()[0]}\ndependencies:\n- -r requirements.txt\n")
    return str(spec.artifact_path)


def promote(uri: str, name: str, version: int, metric: str, alias: str = "champion") -> tuple[bool, float | None]:
    """Move `alias` to `version` if its score in `metric` is higher than the present holder's, or nobody with a score holds it.

    Returns (moved, the holder's score before). Raises UserError where the version has no such score.
    """
    with _one_sentence(uri):
        client = _client(uri)
        scores = _scores(_find(client, uri, name, None, version))
        if metric not in scores:
            raise UserError(f"{name}/{version} has no score {metric!r}; its scores: {', '.join(scores) or 'none'}")
        with _locked(uri):  # between comparing and moving, another job's better version must not get in
            held = client.get_registered_model(name).aliases.get(alias)
            before = _scores(client.get_model_version(name, str(held))).get(metric) if held is not None else None
            moved = before is None or scores[metric] > before
            if moved:
                client.set_registered_model_alias(name, alias, str(version))
        return moved, before


def pull(uri: str, spec: str, to: Path, progress: Callable[[int, int], None] = lambda done, of: None) -> dict[str, Any]:
    """Download the encoder that `spec` names (NAME@alias or NAME/version) to the directory `to`, which must be new or empty.

    `progress` gets the bytes that are there and all bytes, now and then. Returns name, version, run_id and scores. Raises
    UserError naming what exists where `spec` names nothing; `to` then is as it was, and it appears whole or not at all.
    """
    match = re.fullmatch(r"([^@/:]+)(?:@([^@/]+)|/(\d+))", spec)
    if not match:
        raise UserError(f"{spec!r} names no model version; expected NAME@alias (patterns@champion) or NAME/version (patterns/3)")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"{to} exists and is not empty; pull to a new directory")
    name, alias, number = match.groups()
    with _one_sentence(uri):
        from mlflow.artifacts import download_artifacts

        client = _client(uri)
        version = _find(client, uri, name, alias, int(number or 0))
        source = client.get_model_version_download_uri(name, version.version)
        to.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=to.parent, prefix=f".{to.name}-") as scratch:
            found = Path(scratch) / "encoder"
            with contextlib.suppress(FileNotFoundError), _watched(Path(scratch), _bytes(client, version, source), progress):
                download_artifacts(artifact_uri=f"{source}/encoder", dst_path=scratch, tracking_uri=uri)
            if not _is_encoder(found):
                raise UserError(f"{name}/{version.version} has lost its files at {redacted(source)}; publish the run again")
            if to.exists():  # replaced, it would be lost to a shell that stands in it
                for file in sorted(found.iterdir(), reverse=True):  # the weights first: without config.json it is no encoder
                    file.rename(to / file.name)
            else:
                found.rename(to)
    return {"name": name, "version": int(version.version), "run_id": version.run_id, "scores": _scores(version)}


def version_of(uri: str, name: str, alias: str) -> int:
    """The version of model `name` that `alias` points to. Raises UserError naming what exists where there is none."""
    with _one_sentence(uri):
        return int(_find(_client(uri), uri, name, alias, 0).version)


def _bytes(client: Any, version: Any, source: str) -> int:
    """Size of a version's encoder, or 0 where it was registered from elsewhere than its run's artifacts."""
    import requests
    from mlflow.exceptions import MlflowException

    folder = source.rpartition("/")[2]
    try:
        there = client.list_artifacts(version.run_id, f"{folder}/encoder")
    except (MlflowException, requests.RequestException, OSError):  # only the bar's end depends on it
        return 0
    return sum(int(f.file_size or 0) for f in there)


@contextlib.contextmanager
def _watched(folder: Path, total: int, progress: Callable[[int, int], None]) -> Iterator[None]:
    """Tell `progress`, four times a second, how many bytes are in `folder`: MLflow's own bar counts files."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.25):
            with contextlib.suppress(OSError):  # a file that was renamed meanwhile
                progress(sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()), total)

    thread = threading.Thread(target=look, name="download", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _is_encoder(directory: Path) -> bool:
    return (directory / "encoder.safetensors").is_file() and (directory / "config.json").is_file()


def _scores(version: Any) -> dict[str, float]:
    """A version's scores; NaN is none, since nothing compares with it: as champion it would stay for ever."""
    return {k.removeprefix(_SCORE_TAG): float(v) for k, v in version.tags.items() if k.startswith(_SCORE_TAG) and v != "nan"}


def _find(client: Any, uri: str, name: str, alias: str | None, number: int) -> Any:
    """The version that `alias` points to, or version `number`. Raises UserError naming the nearest that exist."""
    model = _unless(_ABSENT, client.get_registered_model, name)
    if model is None:
        raise _missing(f"no model {name!r} at {redacted(uri)}", "models", name, [m.name for m in client.search_registered_models()])
    if alias is not None and alias not in model.aliases:
        raise _missing(f"model {name!r} has no alias {alias!r}", "aliases", alias, list(model.aliases))
    version = _unless(_ABSENT, client.get_model_version, name, str(number if alias is None else model.aliases[alias]))
    if version is None:
        there = [str(v.version) for v in client.search_model_versions(f"name='{name}'")]
        raise _missing(f"model {name!r} has no version {number}", "versions", str(number), there)
    return version


def _missing(what: str, kind: str, asked: str, there: list[str]) -> UserError:
    near = difflib.get_close_matches(asked, there, n=5, cutoff=0.3) or sorted(there)[:5]
    return UserError(f"{what}; " + (f"{kind} there: {', '.join(near)}" if near else f"no {kind} yet: `simclr publish RUN` makes one"))
