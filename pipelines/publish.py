"""`simclr publish`: a run's encoder → a version in the registry; `champion` moves to it when it is the best."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from pipelines import tracking
from pipelines.evaluate import require_scores
from pipelines.pretrain import tracking_address
from pipelines.rundir import load_run
from pipelines.terminal import say


@dataclass(frozen=True)
class Args:
    """Register the encoder of an evaluated run."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory, after `simclr evaluate`."""
    name: str | None = None
    """Model name in the registry. Default: the name of the run's data directory."""
    metric: str = "knn_top1"
    """The score that decides who is champion: knn_top1 or probe_top1."""
    tracking_uri: str | None = None
    """MLflow address. Default: the run's."""


def main(args: Args) -> None:
    result = publish(args)
    print(f"{result['name']}/{result['version']}{' @champion' if result['champion'] else ''}")


def publish(args: Args) -> dict[str, Any]:
    """Register and, if it beats the present champion, move the alias. Returns name, version, champion, before."""
    run = load_run(args.run)
    row = require_scores(args.run)["scores"][-1]
    scores = {key: float(value) for key, value in row.items() if key != "name"}
    if args.metric not in scores:
        raise ValueError(f"no score {args.metric!r}; choose one of {', '.join(scores)}")
    uri = args.tracking_uri or run.tracking_uri or tracking_address(None)
    if uri != run.tracking_uri:
        raise ValueError(f"the run was not logged at {tracking.redacted(uri)}; publish it where it was, or train it with --tracking-uri")
    tracking.check(uri)
    name = args.name or run.data.resolve().name
    version = tracking.register(uri, run.tracking_run, run.encoder, name, scores)
    moved, before = tracking.promote(uri, name, version, args.metric)
    if moved:
        than = f" (before: {100 * before:.1f} %)" if before is not None else ""
        say(f"{name}/{version} is champion with {args.metric} {100 * scores[args.metric]:.1f} %{than}")
    else:
        say(f"{name}/{version} is registered; the champion stays, with {args.metric} {100 * (before or 0):.1f} %")
    return {"name": name, "version": version, "champion": moved, "before": before}
