"""The paper's figures, repeated from a sweep's trials: one function for each space makes the points."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from simclr.config import Config
from simclr.optim import lr_peak
from tune import drawing, paper_numbers, resolve
from tune.drawing import Cell, Plot, Series
from tune.plan import OTHER_SEED
from tune.spaces import OPERATIONS
from tune.sweep_dir import Trial

_PAPER = "published"
_CELLS = "A cell is the mean, and states the lowest and highest when pointed at, of"


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """Figures as HTML, and their numbers as rows of a table."""

    html: str
    note: str
    """A sentence or two beside it."""
    spread: str = "Error bars: lowest and highest of"
    """How the figure shows the seeds; their number follows."""
    rows: list[list[object]]
    """[what, mean, lowest seed, highest seed, n, published or ""]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Material:
    """The finished trials of a sweep, and the name of their scores."""

    base: Config
    trials: list[Trial]
    metric: str
    unit: str
    """The y axis' name, with its unit."""

    @property
    def as_published(self) -> bool:
        """Whether these scores are of the paper's kind."""
        return self.metric == "eval/probe_top1"

    def score(self, trial: Trial, metric: str = "") -> float:
        value = trial.scores[metric or self.metric]
        return 100 * value if (metric or self.metric).startswith("eval/") else value

    def cells(self, key: Callable[[Trial], Any], metric: str = "") -> dict[Any, Cell]:
        """key → the mean over trials, in the order of the keys' first trials."""
        groups: dict[Any, list[Trial]] = {}
        for trial in self.trials:
            if (metric or self.metric) in trial.scores:
                groups.setdefault(key(trial), []).append(trial)
        return {
            name: drawing.cell([self.score(trial, metric) for trial in found], [_seed(trial) for trial in found])
            for name, found in groups.items()
        }

    def varied(self, path: str) -> list[Any]:
        """The values of a field among the trials, in order."""
        found = {trial.values.get(path, resolve.value_of(self.base, path)) for trial in self.trials}
        return sorted(found, key=lambda v: (isinstance(v, str), v))


def _seed(trial: Trial) -> int:
    """The seed that the sweep gave the trial; one that failed was tried once more on another."""
    return trial.seed - (OTHER_SEED if trial.reason else 0)


def value_in(trial: Trial, base: Config, path: str) -> Any:
    return trial.values.get(path, resolve.value_of(base, path))


def _lr(trial: Trial, base: Config) -> float:
    """The peak learning rate, rounded for a figure."""
    values = (value_in(trial, base, path) for path in ("optim.base_lr", "train.batch_size", "optim.scaling"))
    return float(f"{lr_peak(*values):.4g}")


def temperature_lr(m: Material) -> Drawing:
    """τ × learning rate, a plot for each batch size with the lr that each rule gives; then τ alone beside Table 5."""
    base, html = m.base, ""
    rows: list[list[object]] = []
    recipe_lr = lr_peak(base.optim.base_lr, base.train.batch_size, base.optim.scaling)
    every = m.cells(lambda t: (value_in(t, base, "loss.temperature"), _lr(t, base), value_in(t, base, "train.batch_size"))).values()
    for n in m.varied("train.batch_size"):
        mine = Material(base=base, trials=[t for t in m.trials if value_in(t, base, "train.batch_size") == n], metric=m.metric, unit=m.unit)
        found = mine.cells(lambda t: (value_in(t, base, "loss.temperature"), _lr(t, base)))
        temperatures = sorted({key[0] for key in found})
        lrs = sorted({key[1] for key in found})
        series = [Series(name=f"τ = {t:g}", points={lr: found[t, lr] for lr in lrs if (t, lr) in found}) for t in temperatures]
        ratio = n / base.train.batch_size
        lines = {"linear": recipe_lr * ratio, "√N": recipe_lr * math.sqrt(ratio)} if ratio != 1 else {"both rules": recipe_lr}
        html += drawing.curves(
            Plot(
                title=f"N = {n}",
                series=series,
                x_label="peak learning rate",
                y_label=m.unit,
                x_names={lr: f"{lr:.3g}" for lr in lrs},
                lines=lines,
                heights=(min(c.low for c in every), max(c.high for c in every)),
            )
        )
        rows += [[f"N {n}, τ {t:g}, lr {lr:g}", *_row(c), ""] for (t, lr), c in found.items()]
    best: dict[float, Cell] = {}
    for t in m.varied("loss.temperature"):
        of_t = Material(base=base, trials=[x for x in m.trials if value_in(x, base, "loss.temperature") == t], metric=m.metric, unit=m.unit)
        cells = of_t.cells(lambda x: (_lr(x, base), value_in(x, base, "train.batch_size")))
        best[t] = max(cells.values(), key=lambda c: c.mean)
    table = {t: v for (name, t), v in paper_numbers.TABLE_5.items() if name == "nt_xent" and m.as_published}
    theirs = Series(name=f"{_PAPER}, Table 5", points={t: drawing.cell([v]) for t, v in table.items()}, published=True)
    html += drawing.curves(
        Plot(
            title="The best of each temperature",
            series=[Series(name="best lr and N", points=best), *([theirs] if table else [])],
            x_label="temperature τ",
            y_label=m.unit,
            x_names={t: f"{t:g}" for t in sorted({*best, *table})},
        )
    )
    rows += [[f"τ {t:g}, best", *_row(c), table.get(t, "")] for t, c in best.items()]
    note = (
        "<p>One curve for each temperature, over the learning rate at its peak. The dashed lines are the rates that the two scaling rules "
        "give this batch size, from the recipe's at its own; where both give the same, a point is the mean of both rules.</p>"
    )
    return Drawing(html=f'<div class="panels">{html}</div>', note=note, rows=rows)


def _row(c: Cell) -> list[object]:
    return [round(c.mean, 4), round(c.low, 4), round(c.high, 4), c.n]


def augmentation_pairs(m: Material) -> Drawing:
    """Fig. 5."""
    found = m.cells(lambda t: value_in(t, m.base, "views.operations"))
    names: list[str] = [op for op in OPERATIONS if any(op in key for key in found)]
    cells: dict[tuple[str, str], Cell] = {}
    for key, c in found.items():
        cells[key[0], key[-1]] = c
    at: dict[str, int] = {op: i for i, op in enumerate(paper_numbers.FIG_5_OPERATIONS)}
    theirs: dict[tuple[str, str], float] = {(a, b): paper_numbers.FIG_5[at[a]][at[b]] for a in names for b in names if m.as_published}
    rows: list[list[object]] = [[" + ".join((a,) if a == b else (a, b)), *_row(c), theirs.get((a, b), "")] for (a, b), c in cells.items()]
    both = [(c.mean, theirs[key]) for key, c in cells.items() if theirs]
    rho = drawing.spearman([a for a, _ in both], [b for _, b in both])
    agreement = f" Spearman's ρ with the paper's {len(both)} values: {rho:.2f}." if math.isfinite(rho) else ""
    note = (
        "<p>Both branches get the same random crop; one stays as it is, the other goes through the row's operation and then the column's. "
        f"The diagonal is an operation alone.{f' Small: {_PAPER}, Fig. 5.' if theirs else ''}{agreement}</p>"
    )
    html = drawing.heat("One branch, one or two operations", names, cells, theirs, m.unit)
    return Drawing(html=html, note=note, rows=rows, spread=_CELLS)


def _bars(m: Material, names: dict[Any, str], key: Callable[[Trial], object], theirs: dict[Any, float], label: str, note: str) -> Drawing:
    """One bar for each of `names`, with the paper's number of the same key."""
    found = m.cells(key)
    shown = [k for k in names if k in found]
    series = [Series(name="this sweep", points={float(i): found[k] for i, k in enumerate(shown)})]
    marks = {float(i): drawing.cell([theirs[k]]) for i, k in enumerate(shown) if k in theirs and m.as_published}
    series += [Series(name=_PAPER, points=marks, published=True)] if marks else []
    x_names = {float(i): names[k] for i, k in enumerate(shown)}
    html = drawing.bars(Plot(title=label, series=series, x_label="", y_label=m.unit, x_names=x_names))
    rows: list[list[object]] = [[names[k], *_row(found[k]), theirs.get(k, "") if marks else ""] for k in shown]
    return Drawing(html=html, note=f"<p>{note}</p>" if marks else "", rows=rows)


def colour_strength(m: Material) -> Drawing:
    key = _pair(m, "views.colour_strength", lambda t: _blurs(value_in(t, m.base, "views.blur_p")))
    names = {(s, blur): f"{s:g}{' + blur' if blur else ''}" for s, blur in paper_numbers.TABLE_1}
    return _bars(m, names, key, paper_numbers.TABLE_1, "Strength of the colour distortion", "Dashed: the paper's Table 1.")


def _blurs(p: float | tuple[float, float]) -> bool:
    """Whether any view is blurred, by its probability or those of both views."""
    return max(p) > 0 if isinstance(p, tuple) else p > 0


def _pair(m: Material, path: str, second: Callable[[Trial], object]) -> Callable[[Trial], object]:
    return lambda t: (value_in(t, m.base, path), second(t))


def losses(m: Material) -> Drawing:
    names: dict[Any, str] = {
        ("margin_triplet", False): "triplet",
        ("nt_logistic", False): "logistic",
        ("margin_triplet", True): "triplet, semi-hard",
        ("nt_logistic", True): "logistic, semi-hard",
        ("nt_xent", False): "NT-Xent",
    }
    key = _pair(m, "loss.name", lambda t: value_in(t, m.base, "loss.semi_hard"))
    return _bars(m, names, key, paper_numbers.TABLE_4, "Losses", "Dashed: the paper's Table 4, whose losses were tuned one by one.")


def normalisation(m: Material) -> Drawing:
    names = {(name, t): f"{'ℓ2' if name == 'nt_xent' else 'none'}, τ {t:g}" for name, t in paper_numbers.TABLE_5}
    key = _pair(m, "loss.name", lambda t: value_in(t, m.base, "loss.temperature"))
    note = "With ℓ2 normalisation of the projections, and without. Dashed: the paper's Table 5."
    return _bars(m, names, key, paper_numbers.TABLE_5, "Normalisation and temperature", note)


def projection_head(m: Material) -> Drawing:
    found = m.cells(lambda t: (value_in(t, m.base, "head.layers"), value_in(t, m.base, "head.d_out")))
    kinds = {1: "linear", 2: "nonlinear"}
    series = []
    for layers, name in kinds.items():
        mine = {float(d): c for (k, d), c in found.items() if k == layers}
        series += [Series(name=name, points=mine)] if mine else []
    none = [c for (k, _), c in found.items() if k == 0]
    levels = {"no head": none[0].mean} if none else {}
    rows: list[list[object]] = [[f"{kinds.get(k, 'none')} {d if k else ''}".strip(), *_row(c), ""] for (k, d), c in found.items()]
    sizes = sorted({x for s in series for x in s.points})
    plot = Plot(
        title="Projection head",
        series=series,
        x_label="dimension of z",
        y_label=m.unit,
        x_names={d: f"{d:g}" for d in sizes},
        levels=levels,
    )
    note = "<p>The paper's Fig. 8, which has no printed numbers: nonlinear above linear above none, whatever the size.</p>"
    return Drawing(html=drawing.curves(plot) if series else "", note=note, rows=rows)


def _grouped(m: Material, group: str, by: str, title: str, names: tuple[str, str], note: str) -> Drawing:
    """Bars in groups by one field, a series for each value of the other."""
    found = m.cells(lambda t: (value_in(t, m.base, group), value_in(t, m.base, by)))
    groups, kinds = (sorted({key[i] for key in found}) for i in (0, 1))
    series = [
        Series(name=f"{names[1]} {kind:g}", points={float(i): found[g, kind] for i, g in enumerate(groups) if (g, kind) in found})
        for kind in kinds
    ]
    x_names = {float(i): f"{g:g}" for i, g in enumerate(groups)}
    html = drawing.bars(Plot(title=title, series=series, x_label=names[0], y_label=m.unit, x_names=x_names))
    rows: list[list[object]] = [[f"{names[0]} {g:g}, {names[1]} {k:g}", *_row(c), ""] for (g, k), c in found.items()]
    return Drawing(html=html, note=f"<p>{note}</p>", rows=rows)


def batch_epochs(m: Material) -> Drawing:
    note = "The paper's Fig. 9, which has no printed numbers: larger batches are better in short runs, and longer runs close the gap."
    return _grouped(m, "train.batch_size", "train.epochs", "Batch size and length", ("batch size N, images", "epochs"), note)


def width_depth(m: Material) -> Drawing:
    note = "The paper's Fig. 7, which has no printed numbers: deeper and wider is better."
    return _grouped(m, "encoder.depth", "encoder.width", "Depth and width", ("depth, layers", "width ×"), note)


def labels_fraction(m: Material) -> Drawing:
    shares = sorted({float(name.rpartition("_")[2]) for t in m.trials for name in t.scores if name.startswith("eval/probe_top1_at_")})

    def network(trial: Trial) -> object:
        return value_in(trial, m.base, "encoder.depth"), value_in(trial, m.base, "encoder.width")

    by_share = {share: m.cells(network, f"eval/probe_top1_at_{share:g}") for share in shares}
    networks = list(dict.fromkeys(key for found in by_share.values() for key in found))
    series = [
        Series(name=f"ResNet-{key[0]} ({key[1]}×)", points={s: by_share[s][key] for s in shares if key in by_share[s]}) for key in networks
    ]
    series += [
        Series(name=f"{_PAPER}, fine-tuned {name}", points={s: drawing.cell([v]) for s, v in found.items()}, published=True)
        for name, found in paper_numbers.V2_TABLE_1.items()
    ]
    x_names = {0.01: "1 %", 0.1: "10 %", 1.0: "100 %"}
    unit = "linear probe, top-1, %"
    plot = Plot(title="Scored with few labels", series=series, x_label="share of the labels", y_label=unit, x_names=x_names)
    rows: list[list[object]] = [[s.name + f", {100 * x:g} %", *_row(c), ""] for s in series if not s.published for x, c in s.points.items()]
    note = "<p>v2's Table 1 in miniature: a linear probe on the frozen encoder, where the paper fine-tunes the encoder too.</p>"
    return Drawing(html=drawing.curves(plot) if shares and m.as_published else "", note=note, rows=rows)


FIGURES: dict[str, Callable[[Material], Drawing]] = {
    "smoke": temperature_lr,
    "temperature-lr": temperature_lr,
    "augmentation-pairs": augmentation_pairs,
    "colour-strength": colour_strength,
    "projection-head": projection_head,
    "losses": losses,
    "normalisation-temperature": normalisation,
    "batch-epochs": batch_epochs,
    "width-depth": width_depth,
    "labels-fraction": labels_fraction,
}
