"""Drawings of a sweep, as HTML text: curves with error bars, bars, a heat map. Numbers in, text out; no state.

As in `pipelines.html.charts`, plots are SVGs stretched to the width there is, and letters are HTML over them. Series differ by their
colour, one of the report's ten tested ones, and by their dashes; the paper's own numbers are grey.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipelines.html.charts import escape, tick_text, ticks

_DASHES = ("none", "7 4", "2 4", "9 3 2 3", "4 2", "1 3")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """The mean of some trials, with the mean of the lowest and of the highest seed; shares in [0, 1] are in per cent already."""

    mean: float
    low: float
    high: float
    n: int
    """Trials."""
    seeds: int
    """Different seeds among them. One has no spread, also where several trials of it come to the same place."""

    @property
    def text(self) -> str:
        spread = f" ({self.low:.1f} … {self.high:.1f}, n = {self.n})" if self.seeds > 1 else ""
        return f"{self.mean:.1f}{spread}"


def cell(values: Sequence[float], seeds: Sequence[int] = (0,)) -> Cell:
    """The cell of trials with these values, at least one; `seeds` are their seeds."""
    of_seed: dict[int, list[float]] = {}
    for value, seed in zip(values, seeds, strict=True):
        of_seed.setdefault(seed, []).append(value)
    means = [sum(found) / len(found) for found in of_seed.values()]
    return Cell(mean=sum(values) / len(values), low=min(means), high=max(means), n=len(values), seeds=len(means))


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """Points that belong together."""

    name: str
    points: dict[float, Cell]
    """x → its value; for bars, x is the number of the group."""
    published: bool = False
    """The paper's: grey, no error bars."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plot:
    """One plot with its axes."""

    title: str
    series: list[Series]
    x_label: str
    y_label: str
    x_names: dict[float, str]
    """Places on the x axis that are named, and their names."""
    log_x: bool = True
    lines: dict[str, float] = field(default_factory=dict)
    """Named places on the x axis with a vertical line each."""
    levels: dict[str, float] = field(default_factory=dict)
    """Named heights with a horizontal line each."""
    heights: tuple[float, float] | None = None
    """The least and the greatest value, shared by plots to compare; None = this plot's own."""


def _span(values: list[float]) -> list[float]:
    low, high = min(values), max(values)
    if high - low < 1e-9 * max(abs(high), 1):
        low, high = low - 1, high + 1
    return ticks(low, high)


def _frame(plot: Plot, marks: list[float]) -> tuple[str, str]:
    """(grid as SVG, the y axis' letters)."""
    top, bottom = marks[-1], marks[0]
    at = [(t, (top - t) / (top - bottom)) for t in marks]
    grid = "".join(f"M0 {1000 * y:.1f}H1000" for _, y in at)
    letters = "".join(f'<span class="y" style="top:{100 * y:.2f}%">{tick_text(t)}</span>' for t, y in at)
    return f'<path class="grid" d="{grid}"/>', letters


def _wrap(plot: Plot, drawn: str, letters: str, keys: list[tuple[str, str, str]]) -> str:
    """The figure, with a legend of (name, colour's class, dashes)."""
    legend = ""
    for name, sort, dash in keys:
        sample = f'<svg viewBox="0 0 28 8" aria-hidden="true"><path d="M0 4h28" stroke-dasharray="{dash}"/></svg>' if dash else "<i></i>"
        legend += f'<li class="{sort}">{sample}{escape(name)}</li>'
    places = {x: plot.x_names.get(x, f"{x:g}") for s in plot.series for x in s.points}
    spoken = "; ".join(f"{s.name}: " + ", ".join(f"{places[x]} {c.text}" for x, c in s.points.items()) for s in plot.series)
    return (
        f'<figure class="panel"><figcaption><b>{escape(plot.title)}</b><span>{escape(plot.y_label)}</span></figcaption>'
        f'<div class="area" role="img" aria-label="{escape(f"{plot.title}. {spoken}")}">'
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" aria-hidden="true">{drawn}</svg>{letters}'
        f'<span class="axis">{escape(plot.x_label)}</span></div><ul class="legend keys">{legend}</ul></figure>'
    )


def _sorts(series: list[Series]) -> list[str]:
    """The CSS class of each series: its colour, or the paper's grey."""
    own = iter(range(len(series)))
    return ["paper" if s.published else f"k{next(own) % 10}" for s in series]


def _whisker(x: float, c: Cell, height: float, bottom: float, top: float) -> str:
    if c.seeds < 2:
        return ""
    low, high = (1000 * (top - value) / height for value in (c.low, c.high))
    return f"M{x:.1f} {high:.1f}V{low:.1f}M{x - 8:.1f} {high:.1f}h16M{x - 8:.1f} {low:.1f}h16"


def curves(plot: Plot) -> str:
    """Lines over x with error bars. Each series has at least one point."""
    xs = [x for s in plot.series for x in s.points] + list(plot.lines.values()) + list(plot.x_names)
    place = math.log if plot.log_x else float
    left, right = place(min(xs)), place(max(xs))
    pad = 0.06 * (right - left) or 0.5
    values = [v for s in plot.series for c in s.points.values() for v in (c.low, c.high)]
    marks = _span([*values, *plot.levels.values(), *(plot.heights or ())])
    bottom, top = marks[0], marks[-1]
    height = top - bottom

    def at(x: float) -> float:
        return 1000 * (place(x) - left + pad) / (right - left + 2 * pad)

    # Error bars of several curves at the same place stand side by side.
    several = [s for s in plot.series if not s.published and any(c.seeds > 1 for c in s.points.values())]
    aside = {s.name: 16 * (i - (len(several) - 1) / 2) for i, s in enumerate(several)}

    drawn, letters = _frame(plot, marks)
    for x, name in plot.x_names.items():
        drawn += f'<path class="tick" d="M{at(x):.1f} 1000v12"/>'
        letters += f'<span class="x" style="left:{at(x) / 10:.2f}%">{escape(name)}</span>'
    close = len(plot.lines) > 1 and max(map(at, plot.lines.values())) - min(map(at, plot.lines.values())) < 200
    for i, (name, x) in enumerate(plot.lines.items()):
        drawn += f'<path class="reference" d="M{at(x):.1f} 0V1000"/>'
        letters += f'<span class="upright" style="left:{at(x) / 10:.2f}%;top:{-4 - 14 * (i % 2 if close else 0)}px">{escape(name)}</span>'
    for name, y in plot.levels.items():
        share = (top - y) / height
        drawn += f'<path class="reference" d="M0 {1000 * share:.1f}H1000"/>'
        letters += f'<span class="level" style="top:{100 * share:.2f}%">{escape(name)}</span>'
    keys: list[tuple[str, str, str]] = []
    sorts = _sorts(plot.series)
    for number, (s, sort) in enumerate(zip(plot.series, sorts, strict=True)):
        points = sorted(s.points.items())
        right_by = aside.get(s.name, 0.0)
        path = "M" + "L".join(f"{at(x) + right_by:.1f} {1000 * (top - c.mean) / height:.1f}" for x, c in points)
        dots = "".join(f"M{at(x) + right_by:.1f} {1000 * (top - c.mean) / height:.1f}h0" for x, c in points)
        whiskers = "" if s.published else "".join(_whisker(at(x) + right_by, c, height, bottom, top) for x, c in points)
        dash = "3 4" if s.published else _DASHES[number % len(_DASHES)]
        keys.append((s.name, sort, dash))
        drawn += f'<g class="{sort}"><path class="line" stroke-dasharray="{dash}" d="{path}"/><path class="whisker" d="{whiskers}"/>'
        drawn += f'<path class="dots" d="{dots}"/></g>'
    return _wrap(plot, drawn, letters, keys)


def bars(plot: Plot) -> str:
    """Bars from 0 in groups at x = 0, 1, … (`x_names` names them), one per series; the paper's numbers are short lines over them."""
    own = [s for s in plot.series if not s.published]
    marks = _span([0.0] + [v for s in plot.series for c in s.points.values() for v in (c.low, c.high)])
    bottom, top = marks[0], marks[-1]
    height, groups = top - bottom, len(plot.x_names)
    drawn, letters = _frame(plot, marks)
    wide = 1000 / groups
    each = 0.72 * wide / max(len(own), 1)
    for x, name in plot.x_names.items():
        letters += f'<span class="x group" style="left:{(x + 0.5) * wide / 10:.2f}%;max-width:{wide / 10:.1f}%">{escape(name)}</span>'
    sorts = _sorts(plot.series)
    number = 0
    for s, sort in zip(plot.series, sorts, strict=True):
        for x, c in s.points.items():
            y, zero = 1000 * (top - c.mean) / height, 1000 * top / height
            if s.published:
                drawn += f'<path class="{sort} mark" d="M{(x + 0.1) * wide:.1f} {y:.1f}h{0.8 * wide:.1f}"/>'
                continue
            begin = (x + 0.14) * wide + number * each
            drawn += f'<rect class="{sort} bar" x="{begin + 0.06 * each:.1f}" y="{min(y, zero):.1f}" width="{0.88 * each:.1f}"'
            drawn += f' height="{abs(zero - y):.1f}"/><path class="over whisker" d="{_whisker(begin + each / 2, c, height, bottom, top)}"/>'
            where = f"left:{(begin + each / 2) / 10:.2f}%;top:{1000 * (top - c.high) / height / 10:.2f}%"
            letters += f'<span class="value" style="{where}">{c.mean:.1f}</span>' if groups * len(own) <= 12 else ""
        number += not s.published
    return _wrap(plot, drawn, letters, [(s.name, sort, "4 3" if s.published else "") for s, sort in zip(plot.series, sorts, strict=True)])


def heat(title: str, names: Sequence[str], cells: dict[tuple[str, str], Cell], published: dict[tuple[str, str], float], unit: str) -> str:
    """A square of cells, row = first, column = second of `names`; the diagonal is one operation alone. The last column is the row's mean.

    The shade goes from the lowest to the highest value; each cell states its value and, smaller, the paper's.
    """
    values = [c.mean for c in cells.values()]
    low, high = min(values), max(values)
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    body = ""
    for row in names:
        body += f'<tr><th scope="row">{escape(row)}</th>'
        for column in names:
            found, theirs = cells.get((row, column)), published.get((row, column))
            small = f"<small>{theirs:.1f}</small>" if theirs is not None else ""
            if found is None:
                body += f'<td class="none">–{small}</td>'
                continue
            share = (found.mean - low) / (high - low) if high > low else 0.5
            pair = row if row == column else f"{row}, then {column}"
            sort = "deep" if share > 0.6 else ""
            body += f'<td class="{sort}" style="--p:{100 * share:.0f}%" title="{escape(pair)}: {found.text}">{found.mean:.1f}{small}</td>'
        mine = [cells[row, column].mean for column in names if (row, column) in cells]
        body += f'<td class="mean">{sum(mine) / len(mine):.1f}</td></tr>' if mine else '<td class="mean">–</td></tr>'
    return (
        f'<figure class="heated"><figcaption><b>{escape(title)}</b><span>{escape(unit)}</span></figcaption>'
        f'<div class="wide"><table class="heat"><thead><tr><th class="corner">first ↓ second →</th>{head}'
        f'<th scope="col" class="mean">mean</th></tr></thead><tbody>{body}</tbody></table></div>'
        f'<p class="scale"><span>{low:.1f}</span><i></i><span>{high:.1f}</span></p></figure>'
    )


Points = Sequence[tuple[float, float]]


def cloud(title: str, points: Points | Mapping[str, Points], x_label: str, y_label: str, log_x: bool = False) -> str:
    """Points (x, y), at least one; of several series those of each by its name. x > 0 on a logarithmic axis."""
    series = points if isinstance(points, Mapping) else {"": points}
    every = [point for some in series.values() for point in some]
    across = _log_span([x for x, _ in every]) if log_x else _span([x for x, _ in every])
    marks, place = _span([y for _, y in every]), math.log if log_x else float
    left, right, bottom, top = place(across[0]), place(across[-1]), marks[0], marks[-1]
    plot = Plot(title=title, series=[], x_label=x_label, y_label=y_label, x_names={})
    drawn, letters = _frame(plot, marks)

    def at(x: float) -> float:
        return 1000 * (place(x) - left) / (right - left)

    for x in across:
        drawn += f'<path class="tick" d="M{at(x):.1f} 1000v12"/>'
        letters += f'<span class="x" style="left:{at(x) / 10:.2f}%">{tick_text(x)}</span>'
    for number, some in enumerate(series.values()):
        dots = "".join(f"M{at(x):.1f} {1000 * (top - y) / (top - bottom):.1f}h0" for x, y in some)
        drawn += f'<g class="k{number % 10}"><path class="dots" d="{dots}"/></g>'
    return _wrap(plot, drawn, letters, [(name, f"k{number % 10}", "") for number, name in enumerate(series) if name])


def _log_span(values: list[float]) -> list[float]:
    """Round numbers, evenly apart in their logarithm, from at most the least to at least the greatest of `values` > 0."""
    low, high = min(values), max(values)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        every = [m * 10.0**k for k in range(math.floor(math.log10(low)) - 1, math.floor(math.log10(high)) + 2) for m in steps]
        first = max(i for i, x in enumerate(every) if x <= low * (1 + 1e-9))
        last = min(i for i, x in enumerate(every) if x >= high * (1 - 1e-9))
        found = every[first : max(last, first + 1) + 1]
        if len(found) <= 7:
            break
    return found


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's ρ: Pearson's correlation of the ranks, ties sharing the mean of theirs. NaN where one is constant or n < 2."""
    a, b = _ranks(first), _ranks(second)
    if len(a) < 2:
        return math.nan
    middle = (len(a) - 1) / 2
    across = sum((x - middle) * (y - middle) for x, y in zip(a, b, strict=True))
    spread = math.sqrt(sum((x - middle) ** 2 for x in a) * sum((y - middle) ** 2 for y in b))
    return across / spread if spread else math.nan


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(values)
    return [(order.index(v) + len(order) - 1 - order[::-1].index(v)) / 2 for v in values]
