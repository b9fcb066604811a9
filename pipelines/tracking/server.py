"""How MLflow asks its servers: its settings here, and its names that are not public.

`tests/pipelines/tracking/test_server.py` checks these. They are the function that sends a request with every setting and credential that
MLflow has; the table of the addresses that MLflow and its plugins know; and the store of a run's files, since the public client cannot
delete. The public ways that they wait for: a function that says, within a time, whether the store at an address can be used, and one
that deletes artifacts.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
from collections.abc import Iterator
from urllib.parse import urlsplit

from simclr.text import cut, redacted

_TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
_TIMEOUT_S = "30"
SLOWEST = 250_000
"""Bytes per second of the slowest line that an upload is given time for: 2 Mbit/s."""

_WORDS = {
    "gaierror": "no host has that name",
    "ConnectionRefusedError": "nothing listens there",
    "TimeoutError": "no answer in time",
    "RemoteDisconnected": "it closes the connection without an answer",
    "LocationParseError": "that is no valid address",
}

# Read at each use. With MLflow's defaults a call to a server that is down blocks for four minutes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault(_TIMEOUT, _TIMEOUT_S)
# Read when MLflow is imported. Its failures come here as exceptions and are said once; its log would repeat them at every try.
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # "Retrying (Retry(total=0, …" in the middle of a bar


def load() -> None:
    """Import MLflow, whose seconds are not the server's."""
    import mlflow.tracking  # noqa: F401


def trouble_at(uri: str, timeout_s: float) -> str:
    """Why the MLflow server at `uri` cannot be used, in words, or "". MLflow itself asks, with one more try: so proxies, certificates,
    tokens, logins and its plugins for requests are those that the work will have."""
    from mlflow.exceptions import MlflowException
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    try:
        answer = http_request(
            get_default_host_creds(uri.rstrip("/")),
            "/api/2.0/mlflow/experiments/search",
            "GET",
            max_retries=1,
            backoff_factor=0,
            backoff_jitter=0,
            raise_on_status=False,
            respect_retry_after_header=False,
            timeout=timeout_s,
            params={"max_results": 1},
        )
    except MlflowException as error:
        return _reason(error)
    if answer.status_code == 403 and "invalid host header" in answer.text[:1000].lower():
        host = urlsplit(uri).netloc.rpartition("@")[2]
        return (
            f"it refuses requests under the name {host} and takes those under localhost and private addresses alone; whoever runs it "
            f"starts it with --allowed-hosts '{host},localhost:*,127.0.0.1:*', which names all that it shall take"
        )
    if answer.status_code in (401, 403):
        return f"it refuses the credentials with status {answer.status_code}; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    is_mlflow = answer.ok and "json" in answer.headers.get("Content-Type", "")
    return "" if is_mlflow else f"something else answers, with status {answer.status_code}"


def _reason(error: BaseException) -> str:
    """What is at the bottom of a failed request, in words or by its name, with what was wrong with a certificate."""
    found = error
    while inner := found.__cause__ or found.__context__ or _within(found):
        found = inner
    name = type(found).__name__
    if "SSL" in name:
        return f"{name}: {cut(str(getattr(found, 'verify_message', '') or getattr(found, 'reason', '') or found))}"
    return _WORDS.get(name, name) if found is not error else redacted(str(error).splitlines()[0])[:300]


def _within(error: BaseException) -> BaseException | None:
    """The exception that urllib3 or requests has put into another one's arguments."""
    inner = getattr(error, "reason", None) or (error.args[0] if error.args else None)
    return inner if isinstance(inner, BaseException) else None


def known(uri: str) -> bool:
    """Whether MLflow or a plugin of it has a store for addresses like `uri`: databricks, arn:…, a database. Paths alone are none."""
    from mlflow.exceptions import MlflowException
    from mlflow.tracking._tracking_service.utils import _tracking_store_registry

    if not re.match(r"[a-z][\w+.-]*(:|$)", uri, re.IGNORECASE) or uri.startswith(("http:", "https:", "sqlite:")):
        return False
    try:
        return uri in ("databricks", "databricks-uc", "uc") or (":" in uri and bool(_tracking_store_registry.get_store_builder(uri)))
    except MlflowException:
        return False


def trouble_with(uri: str) -> str:
    """Why the store at `uri`, which is `known`, cannot be used, in MLflow's words, or ""."""
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    try:
        MlflowClient(uri).search_experiments(max_results=1)
        return ""
    except (MlflowException, OSError, ImportError, ValueError) as error:  # a driver or an SDK that is not installed, a login that fails
        return redacted((str(error).strip().splitlines() or [type(error).__name__])[0])[:300]


def remove(uri: str, place: str) -> None:
    """Remove the files of MLflow at `uri` that lie at `place`."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    get_artifact_repository(place, tracking_uri=uri).delete_artifacts()


@contextlib.contextmanager
def patience(size: int, place: str) -> Iterator[None]:
    """Inside, MLflow waits for the answer to an upload of `size` bytes to `place` as long as a line of `SLOWEST` takes, and 30 s: what a
    proxy or the server passes on is answered after all has arrived there. A timeout that the user has set stays."""
    wait_s = int(_TIMEOUT_S) + math.ceil(size / SLOWEST)
    with contextlib.ExitStack() as stack:
        if place.startswith("s3:"):
            from simclr.data.s3 import access

            stack.enter_context(access.patient(wait_s))
        if os.environ.get(_TIMEOUT) == _TIMEOUT_S:
            os.environ[_TIMEOUT] = str(wait_s)
            stack.callback(os.environ.__setitem__, _TIMEOUT, _TIMEOUT_S)
        yield
