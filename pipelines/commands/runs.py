"""`simclr runs`: the runs and sweeps in a directory or at an s3:// prefix, with state and progress."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated

import tyro

from pipelines.runs import status
from pipelines.runs.home import LEASE
from pipelines.runs.listing import NAMES, Line, last_time, line, sweep
from pipelines.terminal import show
from simclr.data.s3.uri import Address, address
from simclr.errors import UserError
from simclr.family import METHODS
from simclr.papers import named, unscored
from simclr.text import printable

if TYPE_CHECKING:
    from simclr.data.s3.store import Store

_MOST_METRICS_BYTES = 1 << 30
_TRIALS = 10  # of each sweep in a table of several
_OF_SWEEP = ("sweep.json", "plan.json", status.FILE)


@dataclass(frozen=True)
class Args:
    """List runs and sweeps, the newest first; below a sweep its trials, the best first."""

    at: Annotated[Path, tyro.conf.Positional] = Path("runs")
    """Directory, or s3://bucket/prefix, that holds run directories and sweeps' (also one of them)."""
    json: bool = False
    """One JSON object per line instead of a table."""


def main(args: Args) -> None:
    groups = sorted(_groups(args.at), key=lambda group: -group[0].updated)
    if args.json:
        for found in (found for group in groups for found in group):
            show(json.dumps(asdict(found)))
    elif groups:
        show(table(groups))


def _groups(at: Path) -> list[list[Line]]:
    """Every run at or below `at`, and every sweep with its trials. Raises UserError if nothing is there, or S3 does not answer."""
    place = address(at)
    if place is not None:
        return list(_remote(place))
    if not at.is_dir():
        raise UserError(f"{at} is no directory; expected one that holds runs, or s3://bucket/prefix")
    return list(_local(at))


def _local(at: Path) -> Iterator[list[Line]]:
    for path in [at / "run.json", *sorted(at.glob("*/run.json"))]:
        if path.is_file():
            whole = (p.parent.name for p in path.parent.glob("checkpoints/step-*/checkpoint.json"))
            metrics, state = path.parent / "metrics.jsonl", path.parent / status.FILE
            text = _tail(metrics) if metrics.is_file() else ""
            yield [line(path.parent.name, _text(path), text, list(whole), _text(state) if state.is_file() else None)]
    for path in [at / "sweep.json", *sorted(at.glob("*/sweep.json"))]:
        if path.is_file():
            own = {name: _text(file) for name in _OF_SWEEP if (file := path.parent / name).is_file()}
            trials = {p.parent.name: (_text(p), p.stat().st_mtime) for p in path.parent.glob("trials/*/trial.json") if p.is_file()}
            yield sweep(path.parent.name, own, trials)


def _remote(place: Address) -> Iterator[list[Line]]:
    from simclr.data.s3.store import Store

    store = Store()
    parts = [PurePosixPath(found.name).parts for found in store.listing(place)]
    names = {"/".join(part) for part in parts}

    def read(name: str) -> str:
        return store.read(place / name, _MOST_METRICS_BYTES).decode(errors="replace")

    for home in sorted({part[:-1] for part in parts if part[-1] == "run.json" and len(part) <= 2}):
        below = "".join(f"{folder}/" for folder in home)
        whole = [p[-2] for p in parts if p[:-3] == home and p[-3:-2] == ("checkpoints",) and p[-1] == "checkpoint.json"]
        metrics, state = (read(below + name) if below + name in names else None for name in ("metrics.jsonl", status.FILE))
        silent = _silent(store, place / (below + LEASE)) if state is not None and below + LEASE in names else None
        yield [line(home[-1] if home else place.name, read(f"{below}run.json"), metrics or "", whole, state, silent)]
    for home in sorted({part[:-1] for part in parts if part[-1] == "sweep.json" and len(part) <= 2}):
        below = "".join(f"{folder}/" for folder in home)
        own = {name: read(below + name) for name in _OF_SWEEP if below + name in names}
        of_trials = [p for p in parts if p[:-3] == home and p[-3:-2] == ("trials",) and p[-1] == "trial.json"]
        trials = {p[-2]: (text := read("/".join(p)), _reported(text, "/".join((*p[:-1], "metrics.jsonl")), names, read)) for p in of_trials}
        yield sweep(home[-1] if home else place.name, own, trials)


def _reported(trial_json: str, metrics: str, names: set[str], read: Callable[[str], str]) -> float:
    """Unix time of the last report of a trial in S3 that runs; of others it is not asked."""
    return last_time(read(metrics)) if '"running"' in trial_json and metrics in names else 0.0


def _silent(store: Store, at: Address) -> bool:
    """Whether the lease at `at` says that nobody writes the run."""
    from simclr.data.s3.lease import Register

    found = Register(store, at).read()
    return found is None or found.holder.released or found.silent_s > found.holder.length_s


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _tail(path: Path, size: int = 1 << 16) -> str:
    """The last `size` bytes: runs of a million steps have long files, and the last report is enough."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - size))
        return file.read().decode(errors="replace")


def table(groups: list[list[Line]]) -> str:
    """The lines in columns, for people. Of several sweeps only the best trials are shown, and methods only where not all are SimCLR. Below
    them a sentence where kNN is shown of a method that it does not score."""
    rows: list[tuple[str, ...]] = [("run", "recipe", "method", "state", "step", "images/s", "checkpoint", "loss", "score", "last report")]
    for first, *trials in groups:
        shown = trials if len(groups) == 1 else trials[:_TRIALS]
        more = f"the best {_TRIALS} of {len(trials)} trials; `simclr runs` of it alone lists all" if len(shown) < len(trials) else ""
        rows += [_row(first, more), *(_row(one) for one in shown)]
    if not {row[2] for row in rows[1:]} - {"", "SimCLR"}:
        rows = [(*row[:2], *row[3:]) for row in rows]
    numbers = {"step", "images/s", "checkpoint", "loss", "score"}
    right = {column for column, name in enumerate(rows[0]) if name in numbers}
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(f"{cell:>{w}}" if i in right else f"{cell:<{w}}" for i, (cell, w) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows
    ]
    with_knn = {one.method for one, *_ in groups if one.metric == "eval/knn_top1"}
    asides = [unscored(name) for name in METHODS if named(name).title in with_knn and unscored(name)]
    return "\n".join([*lines, *asides])


def _row(one: Line, more: str = "") -> tuple[str, ...]:
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(one.updated)) if one.updated else "–"
    note = "; ".join(text for text in (one.note, more) if text)
    return (
        printable(f"  {'/'.join(one.run.split('/')[-2:])}" if one.kind == "trial" else one.run),
        printable(one.varied if one.kind == "trial" else one.recipe),
        one.method,
        one.state,
        f"{one.step:,}" + (f" / {one.total_steps:,}" if one.total_steps else "") + (" trials" if one.kind == "sweep" else ""),
        "–" if one.images_per_s is None else f"{one.images_per_s:,.0f}",
        "–" if one.checkpoint is None else f"{one.checkpoint:,}",
        "–" if one.loss is None else f"{one.loss:.3f}",
        _score(one),
        when + (f"  {printable(note)}" if note else ""),
    )


def _score(one: Line) -> str:
    if one.score is None:
        return "–"
    name = NAMES.get(one.metric, one.metric)
    return printable(f"{name} {100 * one.score:.1f} %" if one.metric.startswith("eval/") else f"{name} {one.score:.3g}")
