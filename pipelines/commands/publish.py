"""`simclr publish`: a run's encoder → a version in the registry; `champion` moves to it when it is the best."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from pipelines.evaluation.quick import scores_of
from pipelines.runs import sync
from pipelines.runs.directory import load_run
from pipelines.terminal import say, show
from pipelines.tracking import registry, trust
from pipelines.tracking import uri as mlflow_uri
from pipelines.tracking.card import UNKNOWN_LICENCE, write_card
from pipelines.tracking.outbox import logged_at
from simclr.errors import UserError


@dataclass(frozen=True)
class Args:
    """Register the encoder of an evaluated run."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory, or s3://bucket/prefix of one, after `simclr evaluate`."""
    name: str | None = None
    """Model name in the registry. Default: the name of the run's data directory."""
    metric: str | None = None
    """The score that decides the champion; higher is better. Default: knn_top1, for a classifier top1, or rankme for data
    without labels."""
    tracking_uri: str | None = None
    """MLflow address. Default: $MLFLOW_TRACKING_URI, else the one that the run was logged at, unless it would get credentials of yours.
    A server that does not know the run gets it first."""
    hub: str | None = None
    """Publish as this ORG/NAME on the Hugging Face Hub (private, if it is new) and in no registry; its address is then hf://ORG/NAME."""
    licence: str = UNKNOWN_LICENCE
    """Licence of the weights, for the model card: README.md in the encoder's directory, and the version's description."""

    def __post_init__(self) -> None:
        if self.hub and (self.name or self.metric or self.tracking_uri):
            raise UserError("--hub publishes on the Hub alone, under its own name; leave out --name, --metric and --tracking-uri, or --hub")


def main(args: Args) -> None:
    if args.hub:
        show(to_hub(args, args.hub))
        return
    result = publish(args)
    show(f"{result['name']}/{result['version']}{' @champion' if result['champion'] else ''}")


def publish(args: Args) -> dict[str, Any]:
    """Register and, if it beats the present champion, move the alias. Returns name, version, champion, before."""
    with sync.directory(args.run) as run:
        return _publish(replace(args, run=run), args.run)


def to_hub(args: Args, repository: str) -> str:
    """Publish the run's encoder as `repository` on the Hub. Returns the address of the commit."""
    from pipelines.tracking import hub

    with sync.directory(args.run) as directory:
        run, began = load_run(directory), time.monotonic()
        scores = _scores(directory)
        write_card(run.encoder, f"hf://{repository}", scores, args.licence)
        at = hub.push(run.encoder, repository, scores, args.licence)
        run.took("publish", time.monotonic() - began)
    return at


def _scores(run: Path) -> dict[str, float]:
    return {key: float(value) for key, value in scores_of(run)[-1].items() if key != "name"}


def _publish(args: Args, asked: Path) -> dict[str, Any]:
    run, began = load_run(args.run), time.monotonic()
    scores = _scores(args.run)
    metric = args.metric or next((name for name in ("knn_top1", "top1") if name in scores), "rankme")
    if metric not in scores:
        raise UserError(f"no score {metric!r}; choose one of {', '.join(scores)}")
    name = args.name or run.data.resolve().name
    registry.require_name(name)
    uri = trust.address_for(run, args.tracking_uri, asked)
    mlflow_uri.check(uri)
    write_card(run.encoder, name, scores, args.licence)  # refuses a run without an encoder, before anything is logged
    run, run_id = logged_at(run, uri)
    version = registry.register(uri, run_id, run.encoder, name, scores)
    moved, before = registry.promote(uri, name, version, metric)
    if moved:
        than = f" (before: {score_text(metric, before)})" if before is not None else ""
        say(f"{name}/{version} is champion with {metric} {score_text(metric, scores[metric])}{than}")
    else:
        say(f"{name}/{version} is registered; the champion stays, with {metric} {score_text(metric, before or 0)}")
    run.noted(registered=f"{name}/{version}").took("publish", time.monotonic() - began)
    return {"name": name, "version": version, "champion": moved, "before": before}


def score_text(metric: str, value: float) -> str:
    """Shares in per cent, anything else as a number."""
    return f"{100 * value:.1f} %" if metric.endswith(("top1", "top5", "per_class")) else f"{value:.3g}"
