"""The model registry: encoders as versions of a model, their scores, and the champion."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.terminal import say
from pipelines.tracking import evaluated, flavor, server, trust, version
from pipelines.tracking.client import ABSENT, connect, one_sentence, unless
from pipelines.tracking.record import Record, of_tags
from simclr import files
from simclr.errors import UserError
from simclr.text import printable, redacted

FILES = ("encoder.safetensors", "config.json", "head.safetensors", "towers.safetensors", "classifier.safetensors", "README.md")
"""A published encoder. Nothing else of its directory is registered or pulled."""
_LOOK_S = 0.25


def register(uri: str, run_id: str, encoder: Path, name: str, record: Record) -> int:
    """Register the encoder directory as a new version of model `name`, under run `run_id`, with its `record`. Returns the version.

    The version is an MLflow model that carries its code: `mlflow.pyfunc.load_model("models:/NAME@champion")` reads it where this package is
    not installed. Nothing is pickled. It is a logged model of the run too, which has the files; a server before MLflow 3 knows none, and
    gets them among the run's. Raises UserError for a name that the registry cannot hold or a directory that is no encoder.
    """
    require_name(name)
    parts = require_plain(encoder).values()
    timm = bool(files.read_json(encoder / "config.json", "publish it again").get("encoder", {}).get("timm"))
    with one_sentence(uri):
        client = connect(uri)
        run = client.get_run(run_id)
        trust.require_same_host(uri, run.info.artifact_uri, f"the storage of run {run_id}")
        size = sum(part.stat().st_size for part in parts)
        card = (encoder / "README.md").read_text() if (encoder / "README.md").is_file() else None
        with evaluated.logged_model(client, run, name, record) as model, tempfile.TemporaryDirectory() as scratch:
            model_id = model.model_id if model is not None else None
            place = model.artifact_location if model is not None else run.info.artifact_uri
            trust.require_same_host(uri, place, f"the storage of run {run_id}")
            trust.say_folder(uri, place)
            # Every version has its own folder: a run that is published twice keeps the files of its first version.
            folder = flavor.describe(Path(scratch), run_id, record.scores, model_id, timm)
            source = place if model_id is not None else f"{place}/{folder}"
            with version.removed_on_failure(client, uri, source, model_id), server.patience(size, place):
                if model_id is not None:
                    client.log_model_artifacts(model_id, scratch)
                else:
                    client.log_artifacts(run_id, scratch, folder)
                for part in parts:
                    if model_id is not None:
                        client.log_model_artifact(model_id, str(part), "encoder")
                    else:
                        client.log_artifact(run_id, str(part), f"{folder}/encoder")
        # The files, then the version: one that is seen is whole.
        with version.removed_on_failure(client, uri, source, model_id):
            number = version.made(client, name, source, run_id, record.tags(), card, model_id)
        if model_id is not None:
            evaluated.link(client, model_id, name, number)
        return number


def require_plain(encoder: Path) -> dict[str, Path]:
    """The files of the encoder directory, by name. Raises UserError where it is none, or one of its files is no plain one."""
    if not _is_encoder(encoder):
        raise UserError(f"{encoder} is no published encoder; expected encoder.safetensors and config.json, `simclr pretrain` writes them")
    parts = {name: encoder / name for name in FILES if (encoder / name).exists()}
    for part in parts.values():
        if part.is_symlink() or not part.is_file():  # the directory may be somebody else's, and the link lead to a file of ours
            raise UserError(f"{part} is no plain file; put the file itself there, and publish again")
    return parts


def require_name(name: str) -> None:
    """Raise UserError, with the signs at fault, for the name of a model that the registry cannot hold or a terminal does not show."""
    odd = [c for c in "/:@'\"\\" if c in name]
    unseen = ["signs that are not seen"] if printable(name) != name else []
    if odd or unseen or not name.strip(". "):
        found = " ".join(odd + unseen) or "no letter and no digit"
        raise UserError(
            f"model name {name!r} cannot be registered, it has {found}; expected one without / : @ \\, quotes and signs that are not seen "
            "(control characters, line breaks, signs without width), give it with --name"
        )


def pull(uri: str, spec: str, to: Path, progress: Callable[[int, int], None] = lambda done, of: None) -> dict[str, Any]:
    """Download the encoder that `spec` names (NAME@alias or NAME/version) to the directory `to`, which must be new or empty.

    `progress` gets (bytes so far, all bytes) now and then. Returns name, version, run_id, scores and record. If `spec` names
    nothing, raises UserError with the names that exist. Files that are no part of an encoder are named and left out. `to` appears whole or
    not at all.
    """
    match = re.fullmatch(r"([^@/:]+)(?:@([^@/]+)|/(\d+))", spec)
    if not match:
        raise UserError(f"{spec!r} names no model version; expected NAME@alias (patterns@champion) or NAME/version (patterns/3)")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"{to} exists and is not empty; pull to a new directory")
    name, alias, number = match.groups()
    with one_sentence(uri):
        client = connect(uri)
        version = find(client, uri, name, alias, int(number or 0))
        what = f"{name}/{version.version}"
        source = client.get_model_version_download_uri(name, version.version)
        trust.require_same_host(uri, source, what)
        folder = trust.folder_of(uri, source, what)
        sizes = _listed(uri, source, what)
        if folder is not None and any((folder / "encoder" / file).is_symlink() for file in sizes):
            raise UserError(f"{what} has links among its files at {folder}/encoder; publish the run again")
        lost = f"{what} has lost its files at {redacted(source)}; publish the run again"
        if not {"encoder.safetensors", "config.json"} <= sizes.keys():
            raise UserError(lost)
        total = sum(size or 0 for size in sizes.values())
        files.require_space(to, total, f"for {what}", "use another --to")
        to.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=to.parent, prefix=f".{to.name}-", ignore_cleanup_errors=True) as scratch:
            found = Path(scratch) / "encoder"
            _download(uri, f"{source}/encoder", sizes, found, lambda done: progress(done, total))
            if not _is_encoder(found):
                raise UserError(lost)
            for file in found.iterdir():
                files.usual_mode(file)  # a store on a disk gives its own permissions
            if to.exists():  # replacing it would leave a shell whose current folder it is in a deleted one
                for file in sorted(found.iterdir(), reverse=True):  # the weights first: without config.json it is no encoder
                    file.rename(to / file.name)
            else:
                found.rename(to)
    record = of_tags(version.tags)
    return {"name": name, "version": int(version.version), "run_id": version.run_id, "scores": record.scores, "record": record}


def version_of(uri: str, name: str, alias: str) -> int:
    """The version of model `name` that `alias` points to. If there is none, raises UserError with the names that exist."""
    with one_sentence(uri):
        return int(find(connect(uri), uri, name, alias, 0).version)


def _listed(uri: str, source: str, what: str) -> dict[str, int | None]:
    """The files of an encoder below `source`, with their bytes (None where the store does not say). Says what else lies there."""
    from mlflow.artifacts import list_artifacts

    found, others = dict[str, int | None](), []
    for info in list_artifacts(artifact_uri=f"{source}/encoder", tracking_uri=uri):
        name = str(info.path).removeprefix("encoder/")
        if name in FILES and not info.is_dir:
            found[name] = info.file_size
        else:
            others.append(name)
    if others:
        more = f" and {len(others) - 3:,} more" if len(others) > 3 else ""
        say(f"left out of {what}, since no encoder has such files: {', '.join(others[:3])}{more}")
    return found


def _download(uri: str, place: str, sizes: dict[str, int | None], to: Path, progress: Callable[[int], None]) -> None:
    """Fetch the files named in `sizes` from `place` into the new folder `to`; `progress` gets the bytes so far, four times a second
    (MLflow's own bar counts files). Raises UserError as soon as there are more bytes than `sizes` says, and at the end for fewer."""
    from mlflow.artifacts import download_artifacts

    to.mkdir()
    trouble: list[Exception] = []

    def fetch() -> None:
        try:
            for name in sizes:
                with contextlib.suppress(FileNotFoundError):
                    download_artifacts(artifact_uri=f"{place}/{name}", dst_path=str(to), tracking_uri=uri)
        except Exception as error:  # raised again below, outside the thread
            trouble.append(error)

    # In a thread, since a server may send more than it listed, without end.
    thread = threading.Thread(target=fetch, name="download", daemon=True)
    thread.start()
    most = sum(size for size in sizes.values() if size) if all(size is not None for size in sizes.values()) else None
    while thread.is_alive():
        thread.join(_LOOK_S)
        done = _bytes_in(to)
        progress(done)
        if most is not None and done > most:
            _cut(to)
            raise UserError(f"{redacted(place)} sends more bytes than the {most:,} that it lists; publish the run again")
    if trouble:
        raise trouble[0]
    for name, size in sizes.items():
        if size is not None and (to / name).is_file() and (to / name).stat().st_size != size:
            raise UserError(f"{name} at {redacted(place)} has {(to / name).stat().st_size:,} bytes, {size:,} are listed; pull it again")


def _cut(folder: Path) -> None:
    """End what writes into `folder` in this process. MLflow has no way to stop a download, and the interpreter waits for its threads: their
    files become /dev/full, and the next write fails."""
    full = os.open("/dev/full", os.O_WRONLY)
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # a file that was closed meanwhile
            if link.readlink().is_relative_to(folder.absolute()):
                os.dup2(full, int(link.name))
    os.close(full)


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # a file that was renamed meanwhile
            total += path.stat().st_size if path.is_file() else 0
    return total


def _is_encoder(directory: Path) -> bool:
    return (directory / "encoder.safetensors").is_file() and (directory / "config.json").is_file()


def find(client: Any, uri: str, name: str, alias: str | None, number: int) -> Any:
    """The version that `alias` points to, or version `number`. If there is none, raises UserError with the nearest names."""
    model = unless(ABSENT, client.get_registered_model, name)
    if model is None:
        raise _missing(f"no model {name!r} at {redacted(uri)}", "models", name, [m.name for m in client.search_registered_models()])
    if alias is not None and alias not in model.aliases:
        raise _missing(f"model {name!r} has no alias {alias!r}", "aliases", alias, list(model.aliases))
    version = unless(ABSENT, client.get_model_version, name, str(number if alias is None else model.aliases[alias]))
    if version is None:
        there = [str(v.version) for v in client.search_model_versions(f"name='{name}'")]
        raise _missing(f"model {name!r} has no version {number}", "versions", str(number), there)
    return version


def _missing(what: str, kind: str, asked: str, there: list[str]) -> UserError:
    near = difflib.get_close_matches(asked, there, n=5, cutoff=0.3) or sorted(there)[:5]
    return UserError(f"{what}; " + (f"{kind} there: {', '.join(near)}" if near else f"no {kind} yet: `simclr publish RUN` makes one"))
