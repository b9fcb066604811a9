"""`simclr evaluate --suite transfer`: the twelve datasets of the paper's Table 8, beside its figures."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.terminal import Bar, say, show
from simclr import files
from simclr.errors import UserError

if TYPE_CHECKING:
    from simclr.data.tasks import Rows, Task
    from simclr.encoder.directory import PublishedEncoder

_BATCH = 256
_METRICS = {"top1": "top-1", "mean_per_class": "mean per class", "map11": "11-point mAP"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """The choice of datasets, and the settings of their scores."""

    root: Path
    """The folder of torchvision's datasets, in its own layout."""
    only: tuple[str, ...] = ()
    """Datasets; none = all that are there."""
    fine_tune: bool = False
    """Also fine-tune the whole network on each dataset."""
    tuning_steps: int = 20_000
    """Optimizer steps of each of these trainings."""
    rates: tuple[float, ...] = ()
    """Learning rates to try; none = the paper's."""
    decays: tuple[float, ...] = ()
    """Weight decays to try; none = the paper's."""
    download: bool = False
    """Let torchvision download absent datasets."""
    threads: int = 1
    """Threads that read and decode images."""
    resamples: int = 1000
    """Bootstrap resamples behind an interval."""
    limit: int | None = None
    """Images of each part, at most; None = all."""
    device: str = "auto"
    """auto, cpu or cuda."""


Method = Callable[["PublishedEncoder", "dict[str, Rows]", "Task", "Settings"], dict[str, Any]]
"""(encoder, the dataset's parts, its row of the table, settings) → value, low, high in [0, 1], and the hyperparameters chosen."""


def run(directory: Path, settings: Settings, out: Path, name: str) -> list[dict[str, Any]]:
    """Score the encoder (or run) in `directory` on every dataset under --root; print the table, write `out`/transfer.json (with --limit
    transfer-limited.json) after each; return the rows."""
    from simclr.data.tasks import TASKS, open_task

    if not settings.root.is_dir() and not settings.download:
        raise UserError(f"--root {settings.root} is no directory; expected one that holds {', '.join(t.folder for t in TASKS.values())}")
    tasks = {task: TASKS[task] for task in chosen(settings.only, list(TASKS))}
    # All are opened before the first is embedded, so that an unreadable folder is found now and not in hours.
    found = {task: open_task(task, settings.root, settings.download) for task in tasks}
    present = {task: parts for task, parts in found.items() if parts is not None}
    absent = {task: str(settings.root / tasks[task].folder) for task in tasks if found[task] is None}
    if not present:
        raise UserError(f"none of {', '.join(tasks)} is under {settings.root}; lay them out as torchvision does, or add --download")
    for task, place in absent.items():
        say(f"{tasks[task].title} is absent: {place}")
    out.mkdir(parents=True, exist_ok=True)
    encoder = _encoder(directory, settings.device)
    file = out / ("transfer-limited.json" if settings.limit else "transfer.json")
    rows: list[dict[str, Any]] = []
    for task, parts in present.items():
        for method, score in METHODS.items() if settings.fine_tune else [("linear", linear)]:
            began = time.monotonic()
            found_row = score(encoder, parts, tasks[task], settings)
            row = {"dataset": task, "title": tasks[task].title, "metric": tasks[task].metric, "method": method, **found_row}
            rows.append(row | {"published": asdict(tasks[task].published), "seconds": time.monotonic() - began})
        text = {"encoder": name, "size_px": encoder.preprocessing.size_px, "limit": settings.limit, "rows": rows, "absent": absent}
        files.write_text(file, json.dumps(text, indent=1) + "\n")
    show(table(rows))
    for task, place in absent.items():
        show(f"absent: {tasks[task].title} ({place})")
    say(str(file))
    return rows


def chosen(only: tuple[str, ...], known: list[str]) -> list[str]:
    """The datasets that `--only` names, in the table's order; all if it names none."""
    names = [name for words in only for name in words.split(",") if name]
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=3, cutoff=0.4) or known
            raise UserError(f"--only {name}: no dataset of the suite; nearest: {', '.join(near)}")
    return [name for name in known if name in names] if names else known


def _encoder(directory: Path, device: str) -> PublishedEncoder:
    import simclr
    from pipelines.evaluation.inputs import device_of
    from pipelines.runs.directory import load_run

    if (directory / "run.json").is_file():
        run = load_run(directory)
        if not run.encoder.is_dir():
            raise UserError(f"{directory} has no encoder yet; finish it with the command that began it: {run.command}")
        directory = run.encoder
    return simclr.load_encoder(directory).to(device_of(device))


def linear(encoder: PublishedEncoder, parts: dict[str, Rows], task: Task, settings: Settings) -> dict[str, Any]:
    """A linear classifier on frozen features."""
    from simclr.evaluation import transfer_linear

    limit = settings.limit or max(len(rows) for rows in parts.values())
    with Bar(task.title, sum(min(limit, len(rows)) for rows in parts.values())) as bar:
        embedded = {
            part: transfer_linear.embed_rows(encoder, rows, _BATCH, settings.threads, bar.advance, settings.limit)
            for part, rows in parts.items()
        }
    split = transfer_linear.split(embedded, task.split)
    with Bar(f"{task.title}, L-BFGS", None, "iterations", "iterations/s") as bar:
        score = transfer_linear.linear(
            split,
            task.classes,
            task.metric,
            settings.resamples,
            lambda iteration, moving: bar.update(iteration, f"{moving} of the fits still move"),
        )
    told = {"lambda": score.swept.penalty, "converged": score.swept.converged, "refit_converged": score.swept.refit_converged}
    counts = {part: len(getattr(split, part).y) for part in ("train", "validation", "test")}
    return {"value": score.value, "low": score.low, "high": score.high, **told, **counts}


def fine_tuned(encoder: PublishedEncoder, parts: dict[str, Rows], task: Task, settings: Settings) -> dict[str, Any]:
    """The whole network, once for every pair of --rates and --decays and once more with the best."""
    from simclr.evaluation import transfer_finetune

    tuning = transfer_finetune.Tuning(
        steps=settings.tuning_steps,
        rates=settings.rates or transfer_finetune.RATES,
        decays=settings.decays or transfer_finetune.DECAYS,
        threads=settings.threads,
    )
    with Bar(f"{task.title}, fine-tuning", None, "steps", "steps/s") as bar:

        def progress(step: int, of: int) -> None:
            bar.resize(of)
            bar.update(step)

        score = transfer_finetune.fine_tuned(encoder, parts, task, tuning, settings.resamples, settings.limit, progress)
    told = {"lr": score.lr, "weight_decay": score.weight_decay, "validated": score.validation, "steps": tuning.steps}
    return {"value": score.value, "low": score.low, "high": score.high, **told, **score.counts}


METHODS: Mapping[str, Method] = {"linear": linear, "fine_tuned": fine_tuned}


def table(rows: list[dict[str, Any]]) -> str:
    """The paper's Table 8 with a column of ours, in per cent, for each method that was run."""
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        lines.append(f"{method:<15} {'metric':<15} {'ours':>6} {'95 %':>13} {'SimCLR 4×':>10} {'supervised 4×':>14}")
        for row in mine:
            at = f"{100 * row['low']:.1f} … {100 * row['high']:.1f}"
            published = row["published"]
            theirs = f"{published[method]:>10.1f} {published[method + '_supervised']:>14.1f}"
            lines.append(f"{row['title']:<15} {_METRICS[row['metric']]:<15} {100 * row['value']:>6.1f} {at:>13} {theirs}")
    lines.append("SimCLR 4×, supervised 4×: arXiv:2002.05709, Table 8, ResNet-50 (4×) pretrained on ImageNet")
    return "\n".join(lines)
