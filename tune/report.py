"""`simclr sweep report DIR`: the paper's figures from a sweep's trials, their numbers as CSV, and one HTML page with both."""

from __future__ import annotations

import csv
import io
import math
from importlib import resources
from pathlib import Path

from pipelines.html import charts, page
from pipelines.html.charts import escape
from simclr import files
from simclr.errors import UserError
from simclr.family import method_name
from simclr.papers import named
from simclr.text import cell
from tune import drawing, mirror, sweep_dir
from tune.own_figures import each_axis
from tune.paper_figures import FIGURES, Drawing, Material
from tune.sweep_dir import METRICS, NAMES, Sweep, Trial, shown

UNITS = {
    "eval/knn_top1": "weighted kNN, top-1, %",
    "eval/probe_top1": "linear probe, top-1, %",
    "health/rankme": "effective rank (RankMe), dimensions",
    "health/align_uniform": "alignment + uniformity, lower is better",
}


def report(path: Path) -> Path:
    """Write results.csv, figures.csv and report.html into the sweep's directory, or its copy of one in S3; returns the page's path.

    Raises UserError if there is no sweep, or none of its trials has finished.
    """
    path, at = mirror.opened(path)
    sweep = sweep_dir.load(path, at)
    sweep_dir.write_results(sweep)
    found = sweep_dir.trials(path)
    if not any(trial.status == "finished" for trial in found):
        raise UserError(f"no trial of {sweep.shown} has finished yet; `simclr sweep --resume {sweep.shown}` goes on with it")
    drawings = _drawings(sweep, found)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["metric", "what", "mean", "lowest_seed", "highest_seed", "n", "published"])
    for metric, drawn in drawings.items():
        writer.writerows(map(cell, (metric, *row)) for row in drawn.rows)
    files.write_text(path / "figures.csv", table.getvalue())
    files.write_text(path / "report.html", render(sweep, found, drawings))
    mirror.sent(path, at)
    return path / "report.html"


def _drawings(sweep: Sweep, found: list[Trial]) -> dict[str, Drawing]:
    """Metric → its figures: the linear probe, which the paper compares by, and the sweep's own metric."""
    finished = [trial for trial in found if trial.status == "finished"]
    drawn: dict[str, Drawing] = {}
    for metric in dict.fromkeys(("eval/probe_top1", sweep.metric)):
        scored = [trial for trial in finished if trial.score(metric) is not None]
        if not scored:
            continue
        material = Material(base=sweep.base, trials=scored, metric=metric, unit=UNITS[metric])
        if sweep.space in FIGURES and not sweep.vary:
            drawn[metric] = FIGURES[sweep.space](material)
        else:
            drawn[metric] = each_axis(material, sweep.restricted.axes)
    return drawn


def render(sweep: Sweep, found: list[Trial], drawings: dict[str, Drawing]) -> str:
    """The page: the best trial, the figures, how label-free scores agree with the probe, all trials, the command."""
    order = sweep_dir.ranked(found, sweep.metric)
    space = sweep.restricted
    best = ", ".join(f"{path} {_value(value)}" for path, value in order[0].values.items()) if order else ""
    counts = [(name, sum(trial.status == name for trial in found)) for name in ("finished", "stopped", "failed", "running")]
    how = ", ".join(f"{count} {name}" for name, count in counts if count)
    rest = f"{best}. {len(found)} trials: {how}." if order else f"{len(found)} trials: {how}."
    sections = [
        (f"figure-{i}", f"By {UNITS[metric].split(',')[0]}", _note(sweep, drawn), drawn.html)
        for i, (metric, drawn) in enumerate(drawings.items())
    ]
    command = f'<div class="command"><pre id="command" tabindex="0"><code>{escape(sweep.command)}</code></pre>'
    command += '<button id="copy" type="button" hidden>Copy</button></div>'
    sections += [
        ("labels", "Without labels", _AGREE, _agreement(found)),
        ("trials", "All trials", _ALL, _table(sweep, found)),
        ("reproduce", "Reproduce it", f"<p>{escape(space.why)}</p>", command),
    ]
    style = resources.files("tune").joinpath("page.css").read_text(encoding="utf-8") + charts.palette(10)
    title = f"{named(method_name(sweep.base)).title} sweep · {sweep.space} · {sweep.recipe}"
    lead = shown(sweep.metric, order[0].score(sweep.metric)) if order else "No result yet"
    return page.document(title, lead, rest, "", sections, style, {"curves": [], "map": {}})


def _note(sweep: Sweep, drawn: Drawing) -> str:
    space = sweep.restricted
    repeats = f"<p>Repeats {escape(space.repeats)}.</p>" if space.repeats else ""
    seeds = f"<p>{drawn.spread} {sweep.seeds} seeds.</p>" if sweep.seeds > 1 else "<p>One seed: no error bars.</p>"
    marked = any(row[-1] for row in drawn.rows)
    shapes = "<p>The paper’s numbers are ResNet-50’s on ImageNet: compare shapes, not heights.</p>" if marked else ""
    return drawn.note + repeats + seeds + shapes


_ALL = "<p>Best first. A stopped trial counts with its last score. results.csv has every number.</p>"
_AGREE = (
    "<p>Scores that need no label, against the linear probe, which does: one point per finished trial. Spearman’s ρ compares the order of "
    "the trials alone: 1 is the same order, 0 none.</p>"
)


def agreement(found: list[Trial]) -> dict[str, tuple[float, int]]:
    """Score → (Spearman's ρ of its order, best first, with the probe's; number of finished trials that have both)."""
    result = {}
    for metric in ("health/rankme", "health/align_uniform", "eval/knn_top1"):
        both = _both(found, metric)
        sign = 1 if METRICS[metric] == "max" else -1
        if len(both) > 2:
            result[metric] = (drawing.spearman([sign * a for a, _ in both], [b for _, b in both]), len(both))
    return result


def _both(found: list[Trial], metric: str) -> list[tuple[float, float]]:
    pairs = [(t.score(metric), t.score("eval/probe_top1")) for t in found if t.status == "finished"]
    return [(a, b) for a, b in pairs if a is not None and b is not None]


def _agreement(found: list[Trial]) -> str:
    drawn = ""
    for metric, (rho, n) in agreement(found).items():
        both = [(100 * a if metric.startswith("eval/") else a, 100 * b) for a, b in _both(found, metric)]
        words = f"ρ = {rho:.2f}, n = {n}" if math.isfinite(rho) else f"n = {n}"
        drawn += drawing.cloud(f"{UNITS[metric].split(',')[0]}: {words}", both, UNITS[metric], "linear probe, top-1, %")
    return f'<div class="panels">{drawn}</div>' if drawn else ""


def _table(sweep: Sweep, found: list[Trial]) -> str:
    order = sweep_dir.ranked(found, sweep.metric)
    order += [trial for trial in found if trial not in order]
    paths = [path for axis in sweep.restricted.axes for path in axis.paths]
    metrics = [name for name in METRICS if any(name in trial.scores for trial in found)]
    head = "".join(f"<th scope=col>{escape(name)}</th>" for name in ("trial", *paths, "seed", "steps"))
    head += "".join(f'<th scope=col class="number">{escape(NAMES[name])}</th>' for name in metrics)
    body = ""
    for trial in order:
        steps = f"{trial.step:,}" + ("" if trial.status == "finished" else f" of {trial.total_steps:,}, {trial.status}")
        cells = "".join(f"<td>{escape(text)}</td>" for text in (*(_value(trial.values.get(p, "")) for p in paths), trial.seed, steps))
        cells += "".join(f'<td class="number">{_score(trial, name)}</td>' for name in metrics)
        body += f'<tr class="{trial.status}"><th scope="row">{escape(trial.name)}</th>{cells}</tr>'
        if trial.reason:
            body += f'<tr class="{trial.status}"><td></td><td colspan="{len(paths) + 2 + len(metrics)}">{escape(trial.reason)}</td></tr>'
    return f'<div class="wide"><table class="rows"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _score(trial: Trial, metric: str) -> str:
    value = trial.score(metric)
    if value is None:
        return "–"
    return f"{100 * value:.1f}" if metric.startswith("eval/") else f"{value:.3g}".replace("-", "−")


def _value(value: object) -> str:
    if isinstance(value, tuple):
        return " + ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
