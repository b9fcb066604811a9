"""`simclr report`: a run → report.html, one page with its scores, curves and pictures."""

from __future__ import annotations

import contextlib
import math
import time
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from pipelines.html import page
from pipelines.html.neighbours import Neighbours
from pipelines.html.page import FeatureMap, ReportData, Score
from pipelines.html.sheets import write_sheets
from pipelines.runs import scores as scored
from pipelines.runs import sync
from pipelines.runs.directory import Run, load_run, subset_described
from pipelines.terminal import show
from simclr import fields, files
from simclr.data.arrays import require_plain_headers, require_small
from simclr.data.manifest import read_manifest
from simclr.errors import UserError
from simclr.family import BYOL, DINO, MoCoV3, method_name
from simclr.papers import named, unscored
from simclr.recipes import changed_from

_MOST_BYTES = 1 << 30  # of pictures.npz, unpacked; the largest that `evaluate` writes is a tenth
# Name in pictures.npz → its sides, equal where their names are, and its kind (see `pipelines.html.pictures.write_pictures`).
_ARRAYS: dict[str, tuple[tuple[str | int, ...], type[np.generic]]] = {
    "gallery": (("g", 3, "gallery height", "gallery width", 3), np.uint8),
    "queries": (("m", "height", "width", 3), np.uint8),
    "query_labels": (("m",), np.int64),
    "query_names": (("m",), np.str_),
    "neighbours": (("m", "k", "height", "width", 3), np.uint8),
    "neighbour_labels": (("m", "k"), np.int64),
    "neighbour_names": (("m", "k"), np.str_),
    "similarity": (("m", "k"), np.float32),
    "map": (("n", 2), np.float32),
    "map_labels": (("n",), np.int64),
    "map_predicted": (("n",), np.int64),
    "thumbs": (("n", "thumb height", "thumb width", 3), np.uint8),
    "attention": (("a", "heads", "rows", "columns"), np.float32),
    "painted": (("p", 3, "painted height", "painted width", 3), np.uint8),
}
_NAMED = {"query_names": "query", "neighbour_names": "neighbour"}
"""Not in files of earlier versions."""
_SOME = ("attention", "painted")
"""Of some runs alone."""


_TITLES = {"finetune": "Fine-tuning", "distill": "Distilling"}  # of an encoder that may be of any method


@dataclass(frozen=True)
class Args:
    """Write a run's report: one HTML file that needs no network and nothing beside it."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory, or s3://bucket/prefix of one; after `simclr evaluate` the page also has scores, neighbours and a map of the
    features."""
    out: Path | None = None
    """File to write. Default: RUN/report.html."""


def main(args: Args) -> None:
    show(str(report(args)))


def report(args: Args) -> Path:
    """Gather the run directory's content and write the page. Returns its path."""
    if args.out is not None:
        files.require_file(args.out, (".html", ".htm"))
    with sync.directory(args.run) as run:
        return page.write(gather(load_run(run)), args.out or run / "report.html")


def refresh(run: Run) -> None:
    """Write the page, and its pictures as files, as commands do that leave them to MLflow."""
    data = gather(run)
    page.write(data, run.path / "report.html")
    write_sheets(data, run.path / "evaluation")


def gather(run: Run) -> ReportData:
    """All that the page shows. It has no section for what the run lacks."""
    scores, facts = _scores(run)
    history = run.history()
    manifest = read_manifest(run.data) if (run.data / "manifest.json").is_file() else None
    of = scored.newest(run)
    facts = {
        "run": str(run.path),
        "began": time.strftime("%d %B %Y, %H:%M", time.localtime(run.created)),
        **({"extends" if run.start["extends"] else "began with": f"{run.began_with}: {run.start['taken']}"} if run.start else {}),
        **({"images": subset_described(run.subset)} if run.subset else {}),
        **_length(run, history),
        **({"notes": "; ".join(run.notes)} if run.notes else {}),
        **facts,
        **({"registered as": run.registered} if run.registered else {}),
        **({"MLflow": f"run {run.tracking_run} at {run.tracking_uri}"} if run.tracking_run else {}),
        "data": f"{run.origin} (manifest sha256 {run.data_digest[:12]}…)",
        **run.environment,
    }
    gallery, neighbours, points, attention, painted = _pictures(
        run.path / "pictures.npz", len(manifest.classes) if manifest is not None else 1 << 31
    )
    return ReportData(
        title=f"{_TITLES.get(run.stage) or named(method_name(run.config)).title} · {changed_from(run.recipe, run.config)}",
        method=method_name(run.config) if run.stage == "pretrain" else run.stage,
        command=run.command,
        config=run.config.flat(),
        facts=facts,
        scores=scores,
        history=_with_averages(run, history),
        classes=manifest.classes if manifest is not None else (),
        gallery=gallery,
        neighbours=neighbours,
        map=points,
        attention=attention,
        painted=painted,
        finetuned=_finetuned(run),
        timings=list(run.timings().items()),
        understood=manifest.understood if manifest is not None else {},
        measured=of[1].told("knn_top1") if of is not None and of[1].limit else "",
    )


def _scores(run: Run) -> tuple[list[Score], dict[str, str]]:
    found = scored.newest(run)
    if found is None:
        return [], {}
    text, measured = found
    last, limited = text["scores"][-1], _limited(run) if measured.whole or not measured.limit else {}
    if "knn_top1" not in last:
        if "rankme" not in last:  # a classifier's
            shares = ((name.replace("_", " "), value) for name, value in last.items() if name != "name")
            told = ", ".join(f"{name} {100 * value:.1f} %" for name, value in shares)
            return [], {f"on {measured.told('top1')}" if measured.data else "on the test split": told} | limited
        ranks = ", ".join(f"{row['name']} {row['rankme']:.1f}" for row in text["scores"] if "rankme" in row)
        of = {"scored on": measured.told("rankme")} if measured.limit else {}
        return [], {"effective rank of the features (RankMe)": ranks} | of | limited
    instead = f"evaluate the run again: `simclr evaluate {run.path}`"
    fields.require(text, {"k": int}, run.evaluation_file(bool(measured.limit) and not measured.whole), instead)
    rows = [row for row in text["scores"] if "knn_top1" in row]
    scores = [Score(name=row["name"], knn_top1=row["knn_top1"], probe_top1=row.get("probe_top1")) for row in rows]
    intervals = ", ".join(scored.with_interval(name, last[name], at) for name, at in measured.intervals.items() if name in last)
    facts = {"kNN": f"k = {text['k']}, τ = {run.config.watch.temperature:g}, cosine", **({"scores": intervals} if intervals else {})}
    return scores, facts | limited


def _finetuned(run: Run) -> tuple[str, float] | None:
    """Of a run whose method kNN is no score of: the best of the runs beside it that fine-tuned its encoder, by name and top-1."""
    if run.stage != "pretrain" or not unscored(method_name(run.config)) or not run.encoder.is_dir():
        return None
    from pipelines.train.classifiers import digest

    own, found = digest(run.encoder), list[tuple[float, str]]()
    for path in run.path.parent.glob("*/run.json"):
        with contextlib.suppress(UserError):  # the page is this run's, not that of a damaged one beside it
            other = load_run(path.parent)
            scores = scored.newest(other) if getattr(other.config, "encoder_sha256", "") == own else None
            if scores is not None and "top1" in scores[0]["scores"][-1]:
                found.append((scores[0]["scores"][-1]["top1"], path.parent.name))
    return max(found)[::-1] if found else None


def _limited(run: Run) -> dict[str, str]:
    """The scores of some images, of a run that was scored on all of them too."""
    text = run.evaluation(limited=True)
    if text is None:
        return {}
    measured, last = scored.measured_in(text, run.evaluation_file(limited=True)), text["scores"][-1]
    name = next((name for name in ("knn_top1", "rankme") if name in last), "")
    if not name:
        return {}
    return {"also": f"{scored.with_interval(name, last[name], measured.intervals.get(name))} on {measured.told(name)}"}


def _length(run: Run, history: list[dict[str, float]]) -> dict[str, str]:
    if not history:
        return {}
    last = history[-1]
    speeds = [row["speed/images_per_s"] for row in history[1:] if "speed/images_per_s" in row]
    rate = f", {np.median(speeds):,.0f} images/s (median)" if speeds else ""
    epochs = f", {last['epoch']:.1f} epochs" if "epoch" in last else ""
    return {"length": f"{last['step']:,.0f} steps of {run.config.train.batch_size:,} images{epochs}{rate}"}


def _with_averages(run: Run, history: list[dict[str, float]]) -> list[dict[str, float]]:
    """The reports, with the share of itself that a moving average kept where the share goes to 1: a function of the step."""
    if not isinstance(run.config, MoCoV3 | BYOL | DINO):
        return history
    from simclr.methods.average import cosine_to_one

    totals = [row.get("total_steps", run.config.train.steps) for row in history]
    kept = [
        cosine_to_one(int(row["step"]) - 1, int(total), run.config.ema) if total else math.nan
        for row, total in zip(history, totals, strict=True)
    ]
    return [{**row, "train/ema": keep} for row, keep in zip(history, kept, strict=True)]


def _pictures(path: Path, classes: int) -> tuple[np.ndarray, Neighbours, FeatureMap, np.ndarray, np.ndarray]:
    """Gallery, neighbours, map, attention and what MAE paints of pictures.npz, with labels of so many `classes`; empty ones without that
    file. Raises UserError for a file that `evaluate` did not write."""
    found = {name: np.zeros([0 if isinstance(side, str) else side for side in shape], kind) for name, (shape, kind) in _ARRAYS.items()}
    if path.is_file():
        try:
            require_small(path, _MOST_BYTES)
            require_plain_headers(path)
            with np.load(path) as file:
                named = {name: np.full(file[f"{of}_labels"].shape, "") for name, of in _NAMED.items() if name not in file}
                named |= {name: found[name] for name in _SOME if name not in file}
                found = {name: named[name] if name in named else file[name] for name in found}
            _require_pictures(found, classes)
        # Errors of the file: nothing here computes.
        except (zipfile.BadZipFile, zlib.error, KeyError, ValueError, EOFError, OSError, NotImplementedError, RuntimeError) as error:
            if files.trouble(error):  # of the disk
                raise
            again = f"`simclr evaluate {path.parent}` makes it again"
            raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); {again}") from None
    neighbours = Neighbours(
        queries=found["queries"],
        query_labels=found["query_labels"],
        query_names=found["query_names"],
        images=found["neighbours"],
        labels=found["neighbour_labels"],
        names=found["neighbour_names"],
        similarity=found["similarity"],
    )
    points = FeatureMap(xy=found["map"], labels=found["map_labels"], predicted=found["map_predicted"], thumbs=found["thumbs"])
    return found["gallery"], neighbours, points, found["attention"], found["painted"]


def _require_pictures(found: dict[str, np.ndarray], classes: int) -> None:
    """Raise ValueError unless the arrays are as `pictures.write_pictures` makes them."""
    sides: dict[str, int] = {}
    for name, (shape, kind) in _ARRAYS.items():
        array = found[name]
        fits = array.ndim == len(shape) and array.dtype.kind == np.dtype(kind).kind
        if not fits or any(
            there != (sides.setdefault(side, there) if isinstance(side, str) else side)
            for side, there in zip(shape, array.shape, strict=True)
        ):
            raise ValueError(f"{name} is {array.dtype} {array.shape}")
        if name.endswith(("labels", "predicted")) and array.size and not -1 <= array.min() <= array.max() < max(classes, 1):
            raise ValueError(f"{name} has classes from {array.min()} to {array.max()}, the data has {classes}")
        if array.dtype == np.uint8 and len(array) and not array.size:
            raise ValueError(f"{name} has no pixels")
    shares = found["attention"]
    if len(shares) and (len(shares) != len(found["queries"]) or not shares.size or not np.all((shares >= 0) & (shares <= 1))):
        raise ValueError(f"attention {shares.shape} has no shares of {len(found['queries'])} images")
