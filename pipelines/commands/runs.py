"""`simclr runs`: the runs in a directory or at an s3:// prefix, with state and progress."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import tyro

from pipelines.runs.directory import LATEST_S, SCHEMA
from pipelines.terminal import show
from simclr import fields, files
from simclr.data.s3.uri import Address, address
from simclr.errors import UserError
from simclr.stages import STAGES
from simclr.text import printable

_INSTEAD = "bring it back from a copy"
_MOST_METRICS_BYTES = 1 << 30
_SILENT_S = 600.0  # a run without a report for longer has stopped; reports come every few seconds


@dataclass(frozen=True)
class Args:
    """List runs, the newest first."""

    at: Annotated[Path, tyro.conf.Positional] = Path("runs")
    """Directory, or s3://bucket/prefix, that holds run directories (also one of them)."""
    json: bool = False
    """One JSON object per line instead of a table."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One run of the list."""

    run: str
    """Its name below the directory asked for."""
    recipe: str
    state: str
    """new (no step yet), running (reported in the last ten minutes), stopped (incomplete, no such report), complete."""
    step: int
    total_steps: int | None
    images_per_s: float | None
    """As last reported."""
    checkpoint: int | None
    """Step of the last whole checkpoint."""
    loss: float | None
    updated: float
    """Unix time of the last report, else of the run's beginning."""
    note: str = ""
    """What is wrong with the run, or ""."""


def main(args: Args) -> None:
    lines = sorted(_lines(args.at), key=lambda line: -line.updated)
    if args.json:
        for line in lines:
            show(json.dumps(asdict(line)))
    elif lines:
        show(table(lines))


def _lines(at: Path) -> list[Line]:
    """Every run at or below `at`. Raises UserError if nothing is there, or S3 does not answer."""
    place = address(at)
    if place is not None:
        return _remote(place)
    if not at.is_dir():
        raise UserError(f"{at} is no directory; expected one that holds runs, or s3://bucket/prefix")
    found = []
    for path in [at / "run.json", *sorted(at.glob("*/run.json"))]:
        if path.is_file():
            whole = (p.parent.name for p in path.parent.glob("checkpoints/step-*/checkpoint.json"))
            metrics = path.parent / "metrics.jsonl"
            text = _tail(metrics) if metrics.is_file() else ""
            found.append(line(path.parent.name, path.read_text(encoding="utf-8", errors="replace"), text, list(whole)))
    return found


def _remote(place: Address) -> list[Line]:
    from simclr.data.s3.store import Store

    store = Store()
    names = {found.name for found in store.listing(place)}
    found = []
    for name in sorted(name for name in names if PurePosixPath(name).name == "run.json" and len(PurePosixPath(name).parts) <= 2):
        home = PurePosixPath(name).parent
        parts = [PurePosixPath(n).parts for n in names]
        whole = [p[-2] for p in parts if p[:-3] == home.parts and p[-3:-2] == ("checkpoints",) and p[-1] == "checkpoint.json"]
        metrics = str(home / "metrics.jsonl")
        text = store.read(place / metrics, _MOST_METRICS_BYTES).decode(errors="replace") if metrics in names else ""
        found.append(line(place.name if str(home) == "." else str(home), store.read(place / name).decode(errors="replace"), text, whole))
    return found


def _tail(path: Path, size: int = 1 << 16) -> str:
    """The last `size` bytes: runs of a million steps have long files, and the last report is enough."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - size))
        return file.read().decode(errors="replace")


def line(name: str, run_json: str, metrics: str, checkpoints: list[str]) -> Line:
    """A run's line, from the text of run.json, the (end of the) text of metrics.jsonl, and names of its whole checkpoints."""
    last: dict[str, Any] = {}
    for row in reversed(metrics.splitlines()):
        with contextlib.suppress(UserError):  # half a line of a machine that crashed
            last = {name: value for name, value in files.json_in(row, "a report", "").items() if fields.fits(value, float)}
            break
    numbers = (name.removeprefix("step-").partition(".")[0] for name in checkpoints)  # a writer's token may follow: see simclr.checkpoint
    steps = [int(number) for number in numbers if number.isdigit()]
    note, recipe, total, began = "", "?", None, 0.0
    try:
        about = files.json_in(run_json, "run.json", _INSTEAD)
        fields.require(about, {"recipe": str, "created": float, "schema": int}, "run.json", _INSTEAD)
        recipe, began = about["recipe"], about["created"]
        if about["schema"] != SCHEMA:
            note = f"of another schema than {SCHEMA}"
        else:
            about.setdefault("stage", "pretrain")
            fields.require(about, {"config": dict[str, Any], "stage": Literal[tuple(STAGES)]}, "run.json", _INSTEAD)
            total = STAGES[about["stage"]].from_dict(about["config"]).train.steps
    except UserError as error:
        note = f"run.json cannot be read: {error}"
    step, total = last.get("step", max(steps, default=0)), last.get("total_steps", total)
    updated = last.get("time", began)
    if not 0 <= updated < LATEST_S:
        updated, note = 0.0, note or "its times are no Unix times"
    if total is not None and step >= total:
        state = "complete"
    elif time.time() - updated < _SILENT_S:
        state = "running" if step else "new"
    else:
        state = "stopped" if step else "new"
    return Line(
        run=name,
        recipe=recipe,
        state=state,
        step=step,
        total_steps=total,
        images_per_s=last.get("speed/images_per_s"),
        checkpoint=max(steps, default=None),
        loss=last.get("train/loss"),
        updated=updated,
        note=note,
    )


def table(lines: list[Line]) -> str:
    """The lines in columns, for people."""
    rows = [("run", "recipe", "state", "step", "images/s", "checkpoint", "loss", "last report")]
    for one in lines:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(one.updated)) if one.updated else "–"
        rows.append(
            (
                printable(one.run),
                printable(one.recipe),
                one.state,
                f"{one.step:,}" + (f" / {one.total_steps:,}" if one.total_steps else ""),
                "–" if one.images_per_s is None else f"{one.images_per_s:,.0f}",
                "–" if one.checkpoint is None else f"{one.checkpoint:,}",
                "–" if one.loss is None else f"{one.loss:.3f}",
                when + (f"  {printable(one.note)}" if one.note else ""),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    right = {3, 4, 5, 6}
    return "\n".join(
        "  ".join(f"{cell:>{w}}" if i in right else f"{cell:<{w}}" for i, (cell, w) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows
    )
