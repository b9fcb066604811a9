"""`simclr report`: a run → report.html, one page with its scores, curves and pictures."""

from __future__ import annotations

import time
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from pipelines.html import page
from pipelines.html.page import FeatureMap, Neighbours, ReportData, Score
from pipelines.runs import sync
from pipelines.runs.directory import Run, load_run
from simclr import fields
from simclr.data.arrays import require_plain_headers
from simclr.data.manifest import read_manifest
from simclr.errors import UserError


@dataclass(frozen=True)
class Args:
    """Write a run's report: one HTML file that needs no network and nothing beside it."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory, or s3://bucket/prefix of one; after `simclr evaluate` the page also has scores, neighbours and a map of the
    features."""
    out: Path | None = None
    """File to write. Default: RUN/report.html."""


def main(args: Args) -> None:
    print(report(args))


def report(args: Args) -> Path:
    """Gather the run directory's content and write the page. Returns its path."""
    with sync.directory(args.run) as run:
        return page.write(gather(load_run(run)), args.out or run / "report.html")


def gather(run: Run) -> ReportData:
    """All that the page shows. It has no section for what the run lacks."""
    scores, facts = _scores(run)
    history = run.history()
    manifest = read_manifest(run.data) if (run.data / "manifest.json").is_file() else None
    facts = {
        "run": str(run.path),
        "began": time.strftime("%d %B %Y, %H:%M", time.localtime(run.created)),
        **({"extends" if run.start["extends"] else "began with": f"{run.began_with}: {run.start['taken']}"} if run.start else {}),
        **_length(run, history),
        **({"notes": "; ".join(run.notes)} if run.notes else {}),
        **facts,
        **({"registered as": run.registered} if run.registered else {}),
        **({"MLflow": f"run {run.tracking_run} at {run.tracking_uri}"} if run.tracking_run else {}),
        "data": f"{run.origin} (manifest sha256 {run.data_digest[:12]}…)",
        **run.environment,
    }
    gallery, neighbours, points = _pictures(run.path / "pictures.npz")
    return ReportData(
        title=f"SimCLR · {run.recipe}",
        command=run.command,
        config=run.config.flat(),
        facts=facts,
        scores=scores,
        history=history,
        classes=manifest.classes if manifest is not None else (),
        gallery=gallery,
        neighbours=neighbours,
        map=points,
        timings=list(run.timings().items()),
        understood=manifest.understood if manifest is not None else {},
    )


def _scores(run: Run) -> tuple[list[Score], dict[str, str]]:
    text = run.evaluation()
    if text is None:
        return [], {}
    last = text["scores"][-1]
    if "knn_top1" not in last:
        if "rankme" not in last:  # a classifier's
            shares = ((name.replace("_", " "), value) for name, value in last.items() if name != "name")
            return [], {"on the test split": ", ".join(f"{name} {100 * value:.1f} %" for name, value in shares)}
        ranks = ", ".join(f"{row['name']} {row['rankme']:.1f}" for row in text["scores"] if "rankme" in row)
        return [], {"effective rank of the features (RankMe)": ranks}
    instead = f"evaluate the run again: `simclr evaluate {run.path}`"
    fields.require(text, {"k": int}, run.path / "evaluation.json", instead)
    rows = [row for row in text["scores"] if "knn_top1" in row]
    scores = [Score(name=row["name"], knn_top1=row["knn_top1"], probe_top1=row.get("probe_top1")) for row in rows]
    return scores, {"kNN": f"k = {text['k']}, τ = {run.config.watch.temperature:g}, cosine"}


def _length(run: Run, history: list[dict[str, float]]) -> dict[str, str]:
    if not history:
        return {}
    last = history[-1]
    speeds = [row["speed/images_per_s"] for row in history[1:] if "speed/images_per_s" in row]
    rate = f", {np.median(speeds):,.0f} images/s (median)" if speeds else ""
    epochs = f", {last['epoch']:.1f} epochs" if "epoch" in last else ""
    return {"length": f"{last['step']:,.0f} steps of {run.config.train.batch_size:,} images{epochs}{rate}"}


def _pictures(path: Path) -> tuple[np.ndarray, Neighbours, FeatureMap]:
    """Gallery, neighbours and map of pictures.npz; empty ones without that file."""
    side = 1
    empty = {
        "gallery": np.zeros((0, 3, side, side, 3), np.uint8),
        "queries": np.zeros((0, side, side, 3), np.uint8),
        "query_labels": np.zeros(0, np.int64),
        "neighbours": np.zeros((0, 0, side, side, 3), np.uint8),
        "neighbour_labels": np.zeros((0, 0), np.int64),
        "similarity": np.zeros((0, 0), np.float32),
        "map": np.zeros((0, 2), np.float32),
        "map_labels": np.zeros(0, np.int64),
        "map_predicted": np.zeros(0, np.int64),
        "thumbs": np.zeros((0, side, side, 3), np.uint8),
    }
    if path.is_file():
        try:
            require_plain_headers(path)
            with np.load(path) as file:
                found = {name: file[name] for name in empty}
        except (zipfile.BadZipFile, zlib.error, KeyError, ValueError, EOFError) as error:  # errors of the file: nothing here computes
            again = f"`simclr evaluate {path.parent}` makes it again"
            raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); {again}") from None
    else:
        found = empty
    neighbours = Neighbours(
        queries=found["queries"],
        query_labels=found["query_labels"],
        images=found["neighbours"],
        labels=found["neighbour_labels"],
        similarity=found["similarity"],
    )
    points = FeatureMap(xy=found["map"], labels=found["map_labels"], predicted=found["map_predicted"], thumbs=found["thumbs"])
    return found["gallery"], neighbours, points
