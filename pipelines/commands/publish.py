"""`simclr publish`: a run's encoder → a version in the registry; `champion` moves to it when it is the best."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from pipelines.commands.report import refresh
from pipelines.evaluation.quick import scores_of
from pipelines.runs import sync
from pipelines.runs.directory import Run, load_run
from pipelines.runs.scores import higher_is_better
from pipelines.terminal import say, show
from pipelines.tracking import champion, evaluated, registry, trust
from pipelines.tracking import uri as mlflow_uri
from pipelines.tracking.card import UNKNOWN_LICENCE, write_card
from pipelines.tracking.outbox import logged_at
from pipelines.tracking.record import Record
from simclr.errors import UserError
from simclr.family import method_name
from simclr.papers import unscored


@dataclass(frozen=True)
class Args:
    """Register the encoder of an evaluated run.

    It becomes the champion if its score is higher than the present champion's, and if the two compare: all images of the same data, the
    same metric and protocol.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory, or s3://bucket/prefix of one, after `simclr evaluate`."""
    name: str | None = None
    """Model name in the registry. Default: the name of the run's data directory."""
    metric: str | None = None
    """The score that decides the champion; higher is better. Default: knn_top1, for a classifier top1, or rankme for data
    without labels."""
    force: bool = False
    """Make it champion also where the present champion's score is of other data, another metric or another protocol, or its method is MAE,
    of which these are no scores, and say so. Scores of some images (`evaluate --limit`) never do."""
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
        record = _record(run, directory)
        write_card(run.encoder, f"hf://{repository}", record, args.licence)
        at = hub.push(run.encoder, repository, record, args.licence)
        run.took("publish", time.monotonic() - began)
    return at


def _record(run: Run, directory: Path) -> Record:
    """The run's scores of which more is better, and what they are of."""
    rows, measured = scores_of(directory)
    scores = {key: float(value) for key, value in rows[-1].items() if key != "name" and higher_is_better(key)}
    return Record(scores=scores, measured=measured, trained_on=run.origin, trained_on_sha256=run.data_digest)


def _publish(args: Args, asked: Path) -> dict[str, Any]:
    run, began = load_run(args.run), time.monotonic()
    record = _record(run, args.run)
    scores = record.scores
    metric = args.metric or next((name for name in ("knn_top1", "top1") if name in scores), "rankme")
    if metric not in scores:
        known = metric in scores_of(args.run)[0][-1]
        why = f"of {metric} more is not better" if known else f"no score {metric!r}"
        raise UserError(f"{why}; choose one of {', '.join(scores)}")
    name = args.name or run.data.resolve().name
    registry.require_name(name)
    uri = trust.address_for(run, args.tracking_uri, asked)
    mlflow_uri.check(uri)
    record = replace(record, metric=metric)
    write_card(run.encoder, name, record, args.licence)  # refuses a run without an encoder, before anything is logged
    run, run_id = logged_at(run, uri)
    version = registry.register(uri, run_id, run.encoder, name, record)
    aside = unscored(method_name(run.config), sync.shown(asked)) if run.stage == "pretrain" else ""
    verdict = champion.promote(uri, name, version, metric, args.force, aside.replace(": ", " (`", 1) + "`)" * bool(aside))
    say(verdict.said)
    run = run.noted(registered=f"{name}/{version}")
    run.took("publish", time.monotonic() - began)
    refresh(run)
    evaluated.log(uri, replace(run, tracking_run=run_id))
    return {"name": name, "version": version, "champion": verdict.moved, "before": verdict.before}
