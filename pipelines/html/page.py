"""The report of a run: one self-contained HTML page. Numbers and pictures in, text out; `simclr report` gathers them from the run."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.html import charts, curves, neighbours, patches
from pipelines.html.charts import escape, percent
from pipelines.html.data import data_table
from pipelines.html.neighbours import Neighbours, class_name
from simclr import files
from simclr.papers import unscored

# The page may use only its own style, script and data: pictures, so that no class name can make it load anything.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_ICON = (
    "data:image/svg+xml,%3Csvg xmlns='http:%2F%2Fwww.w3.org/2000/svg' viewBox='0 0 16 16'%3E"
    "%3Ccircle cx='6' cy='8' r='5' fill='%230b6a75'/%3E%3Ccircle cx='10' cy='8' r='5' fill='%23d9822b' fill-opacity='.8'/%3E%3C/svg%3E"
)


@dataclass(frozen=True, kw_only=True)
class Score:
    """How good a representation is: shares of test images that are classified right, in [0, 1]."""

    name: str
    knn_top1: float
    probe_top1: float | None
    """None = no linear probe was fitted."""


@dataclass(frozen=True, kw_only=True)
class FeatureMap:
    """Test features laid out in the plane."""

    xy: NDArray[np.floating]
    """(n, 2), in any unit; a point that is not finite is left out."""
    labels: NDArray[np.integer]
    """(n,) classes, −1 = unlabelled."""
    predicted: NDArray[np.integer]
    """(n,) classes that weighted kNN gives."""
    thumbs: NDArray[np.uint8]
    """(n, h, w, 3)."""

    def __post_init__(self) -> None:
        n = len(self.xy)
        assert self.xy.shape == (n, 2) and self.labels.shape == self.predicted.shape == (n,) and len(self.thumbs) == n

    @property
    def wrong(self) -> NDArray[np.bool_]:
        """(n,) whether kNN gives another class than the true one; False for unlabelled points."""
        return np.asarray((self.labels >= 0) & (self.predicted != self.labels), np.bool_)


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """All that the page shows. Empty parts (scores, history, timings, pictures, a map without points) have no section."""

    title: str
    command: str
    """Shell command that reproduces the run."""
    config: dict[str, str | int | float | bool | None]
    """Flat: "optim.base_lr" → 0.3."""
    facts: dict[str, str]
    """Machine, versions, run id, registered version, wall-clock, …"""
    scores: list[Score]
    """The baselines first; the last row is this run's own encoder."""
    history: list[dict[str, float]]
    """One dict per report, in order of "step"."""
    classes: tuple[str, ...]
    """Empty = unlabelled data."""
    gallery: NDArray[np.uint8]
    """(n, 3, H, W, 3): original, view 0, view 1."""
    neighbours: Neighbours
    map: FeatureMap
    timings: list[tuple[str, float]]
    """(phase, seconds), in order."""
    understood: dict[str, Any] = field(default_factory=dict)
    """How the source was understood (`Manifest.understood`)."""
    measured: str = ""
    """The images that the scores are of, in words; "" = not known."""
    attention: NDArray[np.floating] = field(default_factory=lambda: np.zeros((0, 0, 0, 0)))
    """(m, heads, rows, columns): the class token's attention to the patches of the neighbours' queries; empty = it has no class token."""
    painted: NDArray[np.uint8] = field(default_factory=lambda: np.zeros((0, 3, 0, 0, 3), np.uint8))
    """(n, 3, H, W, 3) of MAE: masked, painted, original."""
    finetuned: tuple[str, float] | None = None
    """A run that fine-tuned this one's encoder, and the share of test images that it classifies right; None = none is known."""
    method: str = "simclr"
    """The method of a pretraining, or the name of a later stage: see `curves.words`."""

    @property
    def chance(self) -> float | None:
        """Accuracy of chance: one of the classes, picked at random; None without labels."""
        return 1 / len(self.classes) if self.classes else None


def write(data: ReportData, path: Path) -> Path:
    """Write the page to `path`, whole or not at all; returns `path`."""
    text = render(data)
    files.require_writable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, text)
    return path


def render(data: ReportData) -> str:
    """The page as HTML: no network, no fonts, no files beside it. All text that comes from `data` is escaped."""
    said = curves.words(data.method, data.config)
    training, points, near = _training(data, said), _points(data), data.neighbours
    sections = [
        ("training", "Training", _training_notes(training.drawn), training.figures),
        ("views", "What the network sees", _views(data, said), charts.columns(data.gallery, ("original", *said.views))),
        ("painted", "What it paints", _painted_notes(data), charts.columns(data.painted, patches.PAINTED)),
        ("attention", "Where it looks", patches.attention_notes(data.method, data.attention), _attention(data)),
        ("neighbours", "Nearest neighbours", neighbours.notes(near, data.classes), neighbours.drawn(near, data.classes)),
        ("map", "Map of the features", _map_notes(points), _map(data, points)),
        ("data", "The data", _DATA, data_table(data.understood)),
        ("time", "Where the time went", _TIME, charts.stacked_bar(data.timings) if data.timings else ""),
        ("reproduce", "Reproduce it", _REPRODUCE, _reproduce(data)),
    ]
    lead, rest = headline(data)
    payload: dict[str, object] = {"curves": training.rows, "map": _readings(data, points)}
    return document(data.title, lead, rest, _scores(data), sections, charts.palette(len(data.classes)), payload)


def document(
    title: str, lead: str, rest: str, header: str, sections: list[tuple[str, str, str, str]], style: str, payload: dict[str, object]
) -> str:
    """A page as HTML, without network, fonts or files beside it: its result in large letters (`lead`) with a sentence (`rest`), and
    sections (anchor, heading, note beside it, content). Sections without content are left out.

    title, lead and rest are escaped here; the others are HTML, `style` is CSS after the page's own, `payload` is the script's data.
    """
    assets = resources.files("pipelines.html")
    own, script = (assets.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    sections = [section for section in sections if section[3]]
    links = "".join(f'<a href="#{anchor}">{heading}</a>' for anchor, heading, _, _ in sections)
    body = "".join(
        f'<section id="{anchor}"><div class="margin"><h2>{heading}</h2>{note}</div><div class="figure">{drawn}</div></section>\n'
        for anchor, heading, note, drawn in sections
    )
    numbers = json.dumps(payload, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{escape(title)} · {escape(lead)}</title><meta name="description" content="{escape(f"{lead}: {rest}")}">
<link rel="icon" href="{_ICON}">
<style>{own}{style}</style></head>
<body><a class="skip" href="#main">Skip to the content</a>
<nav aria-label="Sections"><div>{links}</div><button id="theme" type="button" hidden>Dark</button></nav>
<main id="main" tabindex="-1"><header><h1>{escape(title)}</h1>
<p class="result"><strong>{escape(lead)}<span class="sr">: </span></strong>{escape(rest)}</p>{header}</header>
{body}</main>
<script type="application/json" id="data">{numbers}</script><script>{script}</script></body></html>
"""


# ── The result ─────────────────────────────────────────────────────────────────────────────────────────────────────


def headline(data: ReportData) -> tuple[str, str]:
    """The result, and its comparison: ("kNN 91.3 %", "2.4 × raw pixels, … and 9.1 × chance.")."""
    no_score = bool(unscored(data.method))
    if no_score or not data.scores or not math.isfinite(data.scores[-1].knn_top1):
        losses = [(row["step"], row["train/loss"]) for row in data.history if math.isfinite(row.get("train/loss", math.nan))]
        if not losses:
            return "No result yet", "the run has no score and no loss."
        tuned = f" Fine-tuned, its encoder reaches {percent(data.finetuned[1])} top-1 ({data.finetuned[0]})." if data.finetuned else ""
        said = curves.words(data.method, data.config)
        rest = f"{said.measure}after {losses[-1][0]:,.0f} steps; it began at {losses[0][1]:.3f}{said.against}.{tuned}"
        return f"Loss {losses[-1][1]:.3f}", rest
    *others, own = data.scores
    against = [(s.name, s.knn_top1) for s in others] + ([("chance", data.chance)] if data.chance else [])
    ratios = [f"{_ratio(own.knn_top1 / value)}\N{NO-BREAK SPACE}× {name}" for name, value in against if math.isfinite(value) and value > 0]
    sentences = [" and ".join(filter(None, (", ".join(ratios[:-1]), ratios[-1]))) + "."] if ratios else []
    if own.probe_top1 is not None and math.isfinite(own.probe_top1):
        sentences.append(f"A linear probe on the same features reaches {percent(own.probe_top1)}.")
    return f"kNN {percent(own.knn_top1)}", " ".join(sentences)


def _ratio(value: float) -> str:
    return f"{value:.1f}" if value < 9.95 else f"{value:,.0f}"


def _scores(data: ReportData) -> str:
    if not data.scores:
        return ""
    probed = any(s.probe_top1 is not None for s in data.scores)
    rows = ""
    for s in data.scores:
        cells = _meter(s.knn_top1, data.chance) + (_meter(s.probe_top1, data.chance) if probed else "")
        rows += f'<tr><th scope="row">{escape(s.name)}</th>{cells}</tr>'
    notes = [
        f"{'Both are shares' if probed else 'Scores are shares'} of test images that are classified right"
        + (f": {escape(data.measured)}." if data.measured else "."),
        "<em>Weighted kNN</em>: the nearest training images by cosine vote for their class, each with weight exp(cosine / temperature).",
    ]
    if probed:
        notes.append("<em>Linear probe</em>: a logistic regression fitted to the frozen features.")
    if data.chance:
        notes.append(f'<span class="key"><i></i>chance: {percent(data.chance)}, one of {len(data.classes):,} classes at random.</span>')
    return (
        '<table class="scores"><thead><tr><th scope="col">Representation</th><th scope="col">Weighted kNN, top-1</th>'
        f"{'<th scope=col>Linear probe, top-1</th>' if probed else ''}</tr></thead><tbody>{rows}</tbody></table>"
        f'{_aside(data)}<p class="note">{" ".join(notes)}</p>'
    )


def _aside(data: ReportData) -> str:
    """Below the table of a method that it does not score: what does."""
    said, _, command = unscored(data.method, data.facts.get("run", "RUN")).partition(": ")
    return f'<p class="note"><strong>{said[0].upper()}{said[1:]}:</strong> <code>{escape(command)}</code></p>' if said else ""


def _meter(value: float | None, chance: float | None) -> str:
    if value is None or not math.isfinite(value):
        return '<td><b>–</b><span class="meter"></span></td>'
    bar = f'<i class="bar" style="width:{100 * min(max(value, 0), 1):.2f}%"></i>'
    mark = f'<i class="chance" style="left:{100 * chance:.2f}%"></i>' if chance else ""
    return f'<td><b>{percent(value)}</b><span class="meter">{bar}{mark}</span></td>'


# ── Sections ───────────────────────────────────────────────────────────────────────────────────────────────────────

_VIEWS = "<p>From top to bottom: an image of the training split, {given}{small}. It never sees the original or a label; {task}.</p>"
_DATA = "<p>Splits and classes, as they were read from the source when the shards were prepared.</p>"
_TIME = "<p>Wall-clock time of each phase, in the order in which they ran.</p>"
_REPRODUCE = (
    "<p>All randomness is keyed by the seed: the same command on the same data draws the same batches and views, in the same order.</p>"
)


def _training(data: ReportData, said: curves.Words) -> charts.Training:
    references = {"train/loss": said.chance} if said.chance is not None else {}
    if data.chance:
        references["eval/knn_top1"] = (data.chance, "chance")
    return charts.training(data.history, curves.quantities(data.method, said), references)


def _training_notes(drawn: list[charts.Quantity]) -> str:
    meanings = "".join(f"<dt>{q.name}</dt><dd>{q.meaning}</dd>" for q in drawn)
    return (
        '<p>Each point is one report of the run.<span class="screen"> Point at a curve, or focus it and press ← or →: '
        f"all of them show the same step.</span></p><dl>{meanings}</dl>"
    )


def _views(data: ReportData, said: curves.Words) -> str:
    small = data.config.get("local.crops")
    beside = f", beside {small} small crops that are not shown" if small else ""
    given = f"and {said.given}" if " and " not in said.given else said.given
    text = _VIEWS.format(given=given, small=beside, task=escape(said.task))
    return text + (patches.UNPAINTED if data.method == "mae" and not len(data.painted) else "")


def _painted_notes(data: ReportData) -> str:
    return patches.painted_notes(bool(data.config.get("normalised", True)), data.config.get("mask_ratio"))


def _attention(data: ReportData) -> str:
    return patches.attention_drawn(data.neighbours.queries, data.attention, data.neighbours.query_labels, data.classes)


def _points(data: ReportData) -> FeatureMap | None:
    """The points of the map, in drawing order: wrong ones last, so that their rings lie on top."""
    m = data.map
    labels = m.labels if data.classes else np.full_like(m.labels, -1)
    order = np.argsort(m.wrong & (labels >= 0), kind="stable")
    order = order[np.isfinite(m.xy[order]).all(1)]
    if not len(order):
        return None
    return FeatureMap(xy=charts.placed(m.xy[order]), labels=labels[order], predicted=m.predicted[order], thumbs=m.thumbs[order])


def _map_notes(points: FeatureMap | None) -> str:
    text = (
        "<p>Each point is a test image. Images with similar features lie close together; the axes have no unit, and the distance "
        "between far groups means little.</p>"
    )
    if points is not None and (points.labels >= 0).any():
        text += (
            "<p>The colour is the true class, which the encoder was never told. A ring marks an image for which weighted kNN gives "
            f"another: {int(points.wrong.sum()):,} of {int((points.labels >= 0).sum()):,} here. The legend counts the right ones of "
            "each class.</p>"
        )
    return text + '<p class="screen">Point at an image, tap it, or walk with the arrow keys.</p>'


def _map(data: ReportData, points: FeatureMap | None) -> str:
    if points is None:
        return ""
    wrong, legend = points.wrong, ""
    for k in np.unique(points.labels[points.labels >= 0]).tolist():
        mine = points.labels == k
        legend += (
            f'<li><button type="button" class="k{k}" data-class="{k}" aria-pressed="true"><i></i>{escape(class_name(data.classes, k))} '
            f"<small>{int((mine & ~wrong).sum())}/{int(mine.sum())}</small></button></li>"
        )
    if legend:
        legend = (
            '<div class="controls"><button type="button" data-all aria-pressed="true">All classes</button>'
            f'<button type="button" data-wrong aria-pressed="false"><i></i>Only wrong <small>{int(wrong.sum())}</small></button></div>'
            f'<ul class="legend classes">{legend}</ul>'
        )
    about = f"Map of {len(points.xy):,} test images{f', {int(wrong.sum())} classified wrongly' if legend else ''}"
    dots = charts.scatter(points.xy, points.labels, wrong, data.classes)
    return (
        f'<div class="map"><div class="plane" role="img" aria-label="{about}">{dots}'
        '<div class="card" hidden><canvas></canvas><p></p></div></div>'
        f'<p class="sr" aria-live="polite"></p>{legend}<img id="sheet" alt="" hidden src="{charts.sheet(points.thumbs)}"></div>'
    )


def _readings(data: ReportData, points: FeatureMap | None) -> dict[str, object]:
    """The texts for the map's script, in the order of its circles."""
    if points is None:
        return {}
    return {
        "at": points.xy.round(1).tolist(),
        "labels": points.labels.tolist(),
        "predicted": points.predicted.tolist(),
        "names": data.classes,
        "crisp": charts.crisp(points.thumbs),
    }


def _reproduce(data: ReportData) -> str:
    text = ""
    if data.command:
        text = f'<div class="command"><pre id="command" tabindex="0"><code>{escape(data.command)}</code></pre>'
        text += '<button id="copy" type="button" hidden>Copy</button></div>'
    if data.facts:
        facts = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in data.facts.items())
        text += f'<dl class="facts">{facts}</dl>'
    groups: dict[str, str] = {}
    for path, value in data.config.items():
        group, _, name = path.rpartition(".")
        shown = "–" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
        row = f'<tr data-key="{escape(path)}"><th scope="row">{escape(name)}</th><td>{escape(shown)}</td></tr>'
        groups[group] = groups.get(group, "") + row
    if groups:
        tables = (
            f"<details open><summary>{escape(name or 'run')}</summary><table><tbody>{rows}</tbody></table></details>"
            for name, rows in groups.items()
        )
        text += (
            f'<h3>Config</h3><p class="search" hidden><input id="search" type="search" placeholder="Search {len(data.config)} fields" '
            f'aria-label="Search the config"><output></output></p><div class="config">{"".join(tables)}</div>'
        )
    return text
