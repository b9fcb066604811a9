"""`simclr publish`: a run's encoder → a version in the registry; `champion` moves to it when it is the best."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from pipelines import address, tracking
from pipelines.evaluate import scores_of
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
    run, began = load_run(args.run), time.monotonic()
    row = scores_of(args.run)[-1]
    scores = {key: float(value) for key, value in row.items() if key != "name"}
    if args.metric not in scores:
        raise ValueError(f"no score {args.metric!r}; choose one of {', '.join(scores)}")
    uri = address.tracking_address(args.tracking_uri)
    if address.redacted(uri) != run.tracking_uri:
        if args.tracking_uri or "…" in run.tracking_uri:  # whose credentials are not in run.json
            where = f"it was logged at {run.tracking_uri}" if run.tracking_uri else "it was not logged to any MLflow"
            raise ValueError(f"{args.run} is not known at {address.redacted(uri)}: {where}; give that address with --tracking-uri")
        uri = run.tracking_uri
    address.check(uri)
    name = args.name or run.data.resolve().name
    version = tracking.register(uri, run.tracking_run, run.encoder, name, scores)
    moved, before = tracking.promote(uri, name, version, args.metric)
    if moved:
        than = f" (before: {100 * before:.1f} %)" if before is not None else ""
        say(f"{name}/{version} is champion with {args.metric} {100 * scores[args.metric]:.1f} %{than}")
    else:
        say(f"{name}/{version} is registered; the champion stays, with {args.metric} {100 * (before or 0):.1f} %")
    run.noted(registered=f"{name}/{version}").took("publish", time.monotonic() - began)
    return {"name": name, "version": version, "champion": moved, "before": before}
