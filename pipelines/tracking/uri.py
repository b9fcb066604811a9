"""The address of MLflow: its choice, its check, and its text without credentials."""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import threading
from pathlib import Path

from simclr import proxy
from simclr.errors import UserError
from simclr.text import redacted as redacted

_NUMBERS = ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR")  # MLflow reads them
_ANSWER_S = 8.0  # a server's time to answer `check`
_HINT = "leave out --tracking-uri and MLFLOW_TRACKING_URI for the embedded database"


def tracking_address(given: str | None) -> str:
    """The MLflow address: the flag's, else the environment's, else the embedded database's."""
    return given or os.environ.get("MLFLOW_TRACKING_URI") or default_uri(Path("runs"))


def default_uri(runs: Path) -> str:
    """The embedded tracking database, `runs`/mlflow.db, with artifacts under `runs`/artifacts: no server needed."""
    return f"sqlite:///{(runs / 'mlflow.db').absolute()}"


def check(uri: str) -> None:
    """Raise UserError within 10 s if no MLflow answers at `uri`, or its database cannot be used. Writes nothing to either; the database of
    another kind, and what a plugin of MLflow's reaches, MLflow opens."""
    if file := database_file(uri):
        _check_database(file, uri)
        return
    from pipelines.tracking import server

    proxy.spare_this_machine()
    web = re.fullmatch(r"https?://[^/\s]+(/\S*)?", uri) is not None
    for name in _NUMBERS:
        if (value := os.environ.get(name)) and not value.isdigit():
            raise UserError(f"${name} is {value!r}; expected a whole number")
    if not web and not server.known(uri):
        raise UserError(
            f"{redacted(uri)} is no MLflow address; expected http(s)://HOST:PORT, sqlite:///FILE, or one that MLflow or a plugin of it "
            f"knows (databricks, postgresql://…{', arn:… with sagemaker-mlflow installed' if uri.startswith('arn:') else ''})"
        )
    # In a thread: a request's timeouts begin anew with every address, redirect and byte, and name look-up has none.
    trouble: list[str | Exception] = [f"no answer within {_ANSWER_S:.0f} s"]

    def ask() -> None:
        try:
            trouble.append(server.trouble_at(uri, _ANSWER_S) if web else server.trouble_with(uri))
        except Exception as error:  # a bug: raised again below, outside the thread
            trouble.append(error)

    server.load()
    asking = threading.Thread(target=ask, name="mlflow check", daemon=True)
    asking.start()
    asking.join(_ANSWER_S + 0.5)
    if isinstance(trouble[-1], Exception):
        raise trouble[-1]
    if trouble[-1] and not web:
        raise UserError(f"MLflow at {redacted(uri)} cannot be used: {trouble[-1]}")
    if trouble[-1]:
        raise UserError(f"no MLflow server at {redacted(uri)} ({trouble[-1]}{proxy.hint(uri)}); start it, correct the address, or {_HINT}")


def same_server(one: str, other: str) -> bool:
    """Whether two addresses are one as text: a login, case of the host, a port that goes without saying and a last slash change nothing."""
    return _normal(redacted(one)) == _normal(redacted(other))


def _normal(address: str) -> str:
    found = re.fullmatch(r"(https?)://([^/?#]*)(.*)", address, re.IGNORECASE | re.DOTALL)
    if not found:
        return address
    scheme, host = found[1].lower(), found[2].lower().removeprefix("…@")
    return f"{scheme}://{host.removesuffix(':443' if scheme == 'https' else ':80')}{found[3].rstrip('/')}"


def database_file(uri: str) -> Path | None:
    """The file of an embedded database, None for a server."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def _check_database(file: Path, uri: str) -> None:
    if file.name in ("", ":memory:") or "?" in uri or file.is_dir():
        raise UserError(f"the tracking address {uri} names no file; expected sqlite:///FILE (without '?'), or {_HINT}")
    folder = next(p for p in file.absolute().parents if p.exists())  # SQLite writes its journal beside the file
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK) or (file.exists() and not os.access(file, os.R_OK | os.W_OK)):
        raise UserError(f"the tracking database {file} cannot be written; give another --tracking-uri, or {_HINT}")
    if file.exists():
        try:
            with contextlib.closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as database:
                database.execute("SELECT count(*) FROM sqlite_master")
        except sqlite3.Error as error:
            raise UserError(f"{file} is no usable tracking database ({error}); move it away, or give another --tracking-uri") from None
