"""`simclr pull`: registry → an encoder directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pipelines.runs.scores import with_interval
from pipelines.terminal import Bar, show
from pipelines.tracking import registry
from pipelines.tracking import uri as mlflow_uri
from simclr import files


@dataclass(frozen=True)
class Args:
    """Download a registered encoder; `simclr.load_encoder(DIR)` loads it."""

    model: Annotated[str, tyro.conf.Positional]
    """NAME@alias (patterns@champion) or NAME/version (patterns/3)."""
    to: Path
    """Directory to make."""
    tracking_uri: str | None = None
    """MLflow address. Default: $MLFLOW_TRACKING_URI, else the database under runs/."""


def main(args: Args) -> None:
    files.require_folder(args.to)
    uri = mlflow_uri.tracking_address(args.tracking_uri)
    mlflow_uri.check(uri)
    with Bar("download", None, "MiB", "MiB/s") as bar:

        def progress(done: int, total: int) -> None:
            bar.resize(total >> 20)
            bar.update(done >> 20)

        got = registry.pull(uri, args.model, args.to, progress)
    record, measured = got["record"], got["record"].measured
    told = [name for name in record.scores if name.endswith("top1")] or list(record.scores)
    scores = ", ".join(with_interval(name, record.scores[name], measured.intervals.get(name)) for name in told)
    of = f" on {measured.told(told[0])}" if told else ""
    trained = f"; trained on {record.trained_on} (manifest sha256 {record.trained_on_sha256[:12]}…)" if record.trained_on else ""
    show(f"{args.to}: {got['name']} version {got['version']} ({scores or 'no scores'}{of}{trained})")
