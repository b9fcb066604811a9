"""The model registry: encoders as versions of a model, their scores, and the champion."""

from __future__ import annotations

import contextlib
import difflib
import importlib.metadata
import json
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipelines.tracking.client import ABSENT, EXISTS, connect, locked, one_sentence, unless
from pipelines.tracking.uri import redacted
from simclr.errors import UserError

_SCORE_TAG = "score."


def register(uri: str, run_id: str, encoder: Path, name: str, scores: dict[str, float]) -> int:
    """Register the encoder directory as a new version of model `name`, under run `run_id`, with its scores. Returns the version.

    The version is an MLflow model without pickled code: `mlflow.pyfunc.load_model("models:/NAME@champion")` reads it wherever this
    package is installed. Raises UserError for a name that the registry cannot hold or a directory that is no encoder.
    """
    if not re.fullmatch(r"[^/:@'\"\\]+", name) or not name.strip(". "):
        raise UserError(f"model name {name!r} cannot be registered; expected a name without / : @ \\ and quotes, give one with --name")
    if not _is_encoder(encoder):
        raise UserError(f"{encoder} is no published encoder; expected encoder.safetensors and config.json, `simclr pretrain` writes them")
    with one_sentence(uri):
        client = connect(uri)
        with tempfile.TemporaryDirectory() as scratch:
            # Every version has its own folder: a run that is published twice keeps the files of its first version.
            folder = _describe(Path(scratch), run_id, scores)
            client.log_artifacts(run_id, scratch, folder)
        client.log_artifacts(run_id, str(encoder), f"{folder}/encoder")
        unless(EXISTS, client.create_registered_model, name)
        source = f"{client.get_run(run_id).info.artifact_uri}/{folder}"
        tags = {_SCORE_TAG + metric: repr(float(value)) for metric, value in scores.items()}
        card = (encoder / "README.md").read_text() if (encoder / "README.md").is_file() else None
        return int(client.create_model_version(name, source, run_id=run_id, tags=tags, description=card).version)


def _describe(model: Path, run_id: str, scores: dict[str, float]) -> str:
    """Write the files that make the folder of an encoder directory an MLflow model: MLmodel, requirements, example. Returns its name.

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
    # Without this package: on the public index another project has its name.
    pins = [f"{package}=={importlib.metadata.version(package).partition('+')[0]}" for package in ("torch", "numpy", "safetensors")]
    (model / "requirements.txt").write_text("\n".join(pins) + "\n")
    (model / "python_env.yaml").write_text(f"python: {sys.version.split()[0]}\ndependencies:\n- -r requirements.txt\n")
    return str(spec.artifact_path)


def promote(uri: str, name: str, version: int, metric: str, alias: str = "champion") -> tuple[bool, float | None]:
    """Move `alias` to `version` if its score in `metric` is higher than the present holder's, or no version with a score holds it.

    Returns (moved, the previous holder's score). Raises UserError if the version has no such score.
    """
    with one_sentence(uri):
        client = connect(uri)
        scores = _scores(_find(client, uri, name, None, version))
        if metric not in scores:
            raise UserError(f"{name}/{version} has no score {metric!r}; its scores: {', '.join(scores) or 'none'}")
        with locked(uri):  # so that no other job promotes a better version between comparing and moving
            held = client.get_registered_model(name).aliases.get(alias)
            before = _scores(client.get_model_version(name, str(held))).get(metric) if held is not None else None
            moved = before is None or scores[metric] > before
            if moved:
                client.set_registered_model_alias(name, alias, str(version))
        return moved, before


def pull(uri: str, spec: str, to: Path, progress: Callable[[int, int], None] = lambda done, of: None) -> dict[str, Any]:
    """Download the encoder that `spec` names (NAME@alias or NAME/version) to the directory `to`, which must be new or empty.

    `progress` gets (bytes so far, all bytes) now and then. Returns name, version, run_id and scores. If `spec` names nothing, raises
    UserError with the names that exist. `to` appears whole or not at all.
    """
    match = re.fullmatch(r"([^@/:]+)(?:@([^@/]+)|/(\d+))", spec)
    if not match:
        raise UserError(f"{spec!r} names no model version; expected NAME@alias (patterns@champion) or NAME/version (patterns/3)")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"{to} exists and is not empty; pull to a new directory")
    name, alias, number = match.groups()
    with one_sentence(uri):
        from mlflow.artifacts import download_artifacts

        client = connect(uri)
        version = _find(client, uri, name, alias, int(number or 0))
        source = client.get_model_version_download_uri(name, version.version)
        to.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=to.parent, prefix=f".{to.name}-") as scratch:
            found = Path(scratch) / "encoder"
            with contextlib.suppress(FileNotFoundError), _watched(Path(scratch), _bytes(client, version, source), progress):
                download_artifacts(artifact_uri=f"{source}/encoder", dst_path=scratch, tracking_uri=uri)
            if not _is_encoder(found):
                raise UserError(f"{name}/{version.version} has lost its files at {redacted(source)}; publish the run again")
            if to.exists():  # replacing it would leave a shell whose current folder it is in a deleted one
                for file in sorted(found.iterdir(), reverse=True):  # the weights first: without config.json it is no encoder
                    file.rename(to / file.name)
            else:
                found.rename(to)
    return {"name": name, "version": int(version.version), "run_id": version.run_id, "scores": _scores(version)}


def version_of(uri: str, name: str, alias: str) -> int:
    """The version of model `name` that `alias` points to. If there is none, raises UserError with the names that exist."""
    with one_sentence(uri):
        return int(_find(connect(uri), uri, name, alias, 0).version)


def _bytes(client: Any, version: Any, source: str) -> int:
    """Size of a version's encoder; 0 if its files are not among its run's artifacts."""
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
    """A version's scores, without NaN: no score compares with NaN, so such a champion would stay for ever."""
    return {k.removeprefix(_SCORE_TAG): float(v) for k, v in version.tags.items() if k.startswith(_SCORE_TAG) and v != "nan"}


def _find(client: Any, uri: str, name: str, alias: str | None, number: int) -> Any:
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
