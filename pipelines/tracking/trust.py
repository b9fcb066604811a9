"""Which addresses get what the environment holds for MLflow: those that the user names, and none that a file or a server names alone.

MLflow sends its token to every http address that it is given. A run directory may be somebody else's, its run.json too; and whoever may
write to a shared registry may register a version whose files lie anywhere.
"""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from pipelines.runs.directory import Run
from pipelines.terminal import say
from pipelines.tracking.uri import database_file, same_server, tracking_address
from simclr.errors import UserError
from simclr.text import cut, redacted

_SECRETS = ("TOKEN", "USERNAME", "PASSWORD", "AUTH", "AWS_SIGV4", "CLIENT_CERT_PATH")  # MLFLOW_TRACKING_…
_THIS_MACHINE = ("localhost", "127.0.0.1", "::1")
_SERVER = re.compile(r"(\[[0-9a-f:]+\]|[\w.-]+)(?::(\d{1,5}))?", re.IGNORECASE)


def address_for(run: Run, given: str | None, asked: Path) -> str:
    """The MLflow address for `run`, which the user `asked` for: the one that the user names, by the flag's `given` or the environment, or
    else the one in its run.json where following that can give nothing away.

    Raises UserError where only run.json names an address, and that would get credentials, or be written to as a database.
    """
    uri, there = tracking_address(given), run.tracking_uri
    if given or os.environ.get("MLFLOW_TRACKING_URI") or not run.tracking_run or same_server(uri, there):
        return uri
    logged = f"{asked} was logged at {there}, as its run.json says"
    if "…" in there:  # run.json has no credentials
        raise UserError(f"{logged}, with credentials that are not written down; give that address with --tracking-uri")
    if file := database_file(there):
        if not _holds(file, run.tracking_run):
            raise UserError(f"{logged}, which is no database of yours with that run in it; give its address with --tracking-uri")
    elif not there.lower().startswith(("http://", "https://")):  # MLflow, or a plugin of it, has a login of its own for it
        raise UserError(f"{logged}, where MLflow may use a login of yours; if you trust that address, give it with --tracking-uri")
    elif held := secrets():
        raise UserError(f"{logged}, which would get what {held} holds; if you trust that address, give it with --tracking-uri")
    return there


def secrets() -> str:
    """Names of what MLflow would send to any server, or ""."""
    found = [f"$MLFLOW_TRACKING_{name}" for name in _SECRETS if os.environ.get(f"MLFLOW_TRACKING_{name}")]
    found += [str(file) for file in [Path("~/.mlflow/credentials").expanduser()] if file.exists()]
    return " or ".join(found)


def require_same_host(uri: str, place: str, what: str) -> None:
    """Raise UserError if the files of `what`, which MLflow at `uri` says lie at `place`, are on another host that MLflow would send its
    credentials to. Stores with credentials of their own (s3://, gs://, …) are where a server keeps files."""
    scheme, ours = place.partition(":")[0].lower(), uri.partition(":")[0].lower()
    # Of a runs:/ or models:/ address only MLflow knows where it leads; libraries drop spaces and control characters.
    if scheme in ("runs", "models") or place != place.strip() or not place.isprintable():
        raise UserError(f"{what} lies at {cut(redacted(place))}, which is no place of files; publish the run again")
    proxied = scheme == "mlflow-artifacts"
    if scheme not in ("http", "https", "mlflow-artifacts") or (proxied and re.match(":(?!//)|:///", place[len(scheme) :])):
        return  # the last: a path on MLflow's own server
    there = _server(place.partition("://")[2], ours if proxied else scheme)
    here = _server(uri.partition("://")[2].partition("/")[0].rpartition("@")[2], ours)
    held = secrets()
    if held and (there is None or there != here or (scheme != ours and not proxied)):
        out = "put the credentials into the address instead, $MLFLOW_TRACKING_URI=https://USER:PASSWORD@HOST: then no other host gets them"
        if any(name in held for name in ("_TOKEN", "_AUTH", "_AWS_SIGV4", "_CERT_PATH")):  # these fit into no address
            out = "start MLflow's server with --serve-artifacts, so that it hands the files out itself, and log the run there anew"
        shown = cut(redacted(place))
        raise UserError(f"{what} lies at {shown}, another server than MLflow's at {redacted(uri)}, and would get what {held} holds; {out}")


def folder_of(uri: str, place: str, what: str) -> Path | None:
    """The folder of this machine that `place` means; None for one elsewhere. Raises UserError where a server on another machine names
    it."""
    if (folder := _folder(place)) is not None and not _here(uri):
        shown = cut(str(folder))
        raise UserError(
            f"{what} lies in a folder of its server's machine, {shown}, says {redacted(uri)}. If that is on a disk that you share, use "
            f"{shown}/encoder as it is; else start the server with --serve-artifacts and publish the run again"
        )
    return folder


def say_folder(uri: str, place: str) -> None:
    """Say so where a server on another machine has its clients write files to a folder: that is this machine's folder of the name, which
    only a shared disk makes the server's too."""
    if (folder := _folder(place)) is not None and not _here(uri):
        shown = cut(str(folder))
        say(f"{redacted(uri)} has files written to {shown} of this machine; if that is no disk of both, start it with --serve-artifacts")


def _folder(place: str) -> Path | None:
    """The folder that the place of files is, None for one with another scheme than file:."""
    if not re.match(r"file:|(?![\w+.-]+:)", place, re.IGNORECASE):
        return None
    return Path(url2pathname(urlsplit(place).path if place[:5].lower() == "file:" else place))


def _here(uri: str) -> bool:
    """Whether MLflow is a database, or a server on this machine."""
    return bool(database_file(uri)) or (urlsplit(uri).hostname or "") in _THIS_MACHINE


def _server(address: str, scheme: str) -> tuple[str, int] | None:
    """(host, port) of what follows :// in an address; None with a user or a backslash in it, since libraries read that each in their own
    way. The `scheme` gives the port where none is written."""
    found = _SERVER.fullmatch(address.partition("/")[0])
    return (found[1].lower(), int(found[2] or (443 if scheme == "https" else 80))) if found else None


def _holds(file: Path, run_id: str) -> bool:
    """Whether `file` is a database of this user in which MLflow has the run."""
    return file.is_file() and file.stat().st_uid == os.geteuid() and has(file, run_id)


def has(file: Path, run_id: str) -> bool:
    """Whether MLflow has the run in the database `file`. It is only read: MLflow writes its tables into whatever database it is given."""
    try:
        with contextlib.closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as database:
            # The name of MLflow's table and its key; the public way is to open the database, which writes.
            return database.execute("SELECT 1 FROM runs WHERE run_uuid = ?", (run_id,)).fetchone() is not None
    except sqlite3.Error:
        return False
