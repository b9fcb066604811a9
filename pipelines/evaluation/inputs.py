"""The inputs of an evaluation: the encoder by run, directory or registry name; its data; the device; the held-back split."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.environ import unused_gpus
from pipelines.runs import sync
from pipelines.runs.directory import load_run
from pipelines.terminal import Bar, say
from simclr.config import Config
from simclr.data.manifest import Manifest
from simclr.encoder import hub
from simclr.errors import UserError

if TYPE_CHECKING:
    import torch

    from simclr.evaluation.features import Features

_MOVED = 4096  # rows at a time


def default_out(encoder: Path) -> Path:
    """The directory for results without --out: inside a directory on disk; for S3 and the registry, whose copy is temporary, runs/."""
    if encoder.is_dir():
        return encoder / "evaluation"
    return Path("runs/evaluation") / re.sub(r"[^\w.-]+", "-", sync.shown(encoder).removeprefix("s3://"))


@contextlib.contextmanager
def opened(encoder: Path, tracking_uri: str | None) -> Iterator[Path]:
    """The directory of a command's encoder: as `sync.directory`, in the Hub's cache, or pulled from the registry until the end."""
    named = str(encoder)
    if hub.is_address(encoder):
        from pipelines.tracking.hub import fetched

        yield fetched(encoder)
        return
    if encoder.exists() or not re.fullmatch(r"[^@/:]+(@[^@/:]+|/\d+)", named):
        with sync.directory(encoder) as directory:
            yield directory
        return
    from pipelines.tracking import registry
    from pipelines.tracking import uri as mlflow_uri

    uri = mlflow_uri.tracking_address(tracking_uri)
    mlflow_uri.check(uri)
    with tempfile.TemporaryDirectory() as scratch:
        with Bar("download", None, "MiB", "MiB/s") as bar:
            registry.pull(uri, named, Path(scratch) / "encoder", sync.mebibytes(bar))
        yield Path(scratch) / "encoder"


def device_of(name: str) -> torch.device:
    """auto = the GPU if torch sees one; it then computes in full float32. Raises UserError if `name` asks for a GPU and there is none."""
    import torch

    from simclr.precision import set_backends

    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device cuda, but {unused_gpus() or 'torch sees no GPU here'}; leave it out to use the CPU")
    device = torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")
    if name == "auto" and device.type == "cpu" and (unused := unused_gpus()):
        say(f"computing on the CPU: {unused}")
    set_backends("float32", device)
    return device


def resolve(encoder: Path, data: Path | None) -> tuple[Path, Config, Path]:
    """(published encoder directory, its config, data directory) of a run or an encoder directory."""
    if (encoder / "run.json").is_file():
        run = load_run(encoder)
        if not run.encoder.is_dir():
            raise UserError(f"{encoder} has no encoder yet; finish it with the command that began it: {run.command}")
        return run.encoder, run.config, sync.shards(data or run.origin)
    if not (encoder / "config.json").is_file():
        raise UserError(f"{encoder} is neither a run nor a published encoder; give a run directory, or `simclr pull` one")
    if data is None:
        raise UserError("which data? give --data DIR (a run directory knows its own, a published encoder does not)")
    from simclr.encoder.directory import config_of, read_text

    return encoder, config_of(read_text(encoder)), sync.shards(data)


def require_common_classes(data: Path, manifest: Manifest) -> None:
    """Say how many test images are of classes that no training image has: they can only be judged wrong. Raises UserError if all are."""
    if not manifest.classes or "test" not in manifest.splits:
        return
    import numpy as np

    from simclr.data import loader

    test = loader.labels(data, "test")
    test = test[test >= 0]
    strange = test[~np.isin(test, loader.labels(data, "train"))]
    if not len(strange):
        return
    kinds = [manifest.classes[label] for label in np.unique(strange)]
    shown = ", ".join(kinds[:3]) + (f" and {len(kinds) - 3:,} more" if len(kinds) > 3 else "")
    found = f"{len(strange):,} of {len(test):,} labelled test images of {data} are of classes that no training image has ({shown})"
    if len(strange) == len(test):
        raise UserError(f"{found}, so every score would be 0; prepare the data again, with --labels or --split-from")
    say(f"{found}: they are judged wrong")


def held_back(train: Features) -> tuple[Features, Features]:
    """(the rest, a tenth), split alike for every encoder. The rest moves up in the memory of `train`, which is gone then: a bank of
    features may not fit twice."""
    import torch

    from simclr import keyed
    from simclr.evaluation.features import Features

    order = torch.from_numpy(keyed.permutation(0, 1, len(train.ids))).to(train.h.device)
    tenth = max(len(order) // 10, 1)
    rest, test = order[tenth:].sort().values, train[order[:tenth].sort().values]
    for first in range(0, len(rest), _MOVED):
        part = rest[first : first + _MOVED]
        train.h[first : first + len(part)] = train.h[part]  # each row moves up or stays, so none is written over before it is read
    return Features(train.h[: len(rest)], train.y[rest], train.ids[rest]), test
