"""Figures of a space that repeats no paper's: the score over each field that was varied."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tune import drawing
from tune.drawing import Cell, Plot, Series
from tune.paper_figures import Drawing, Material, value_in
from tune.spaces import Axis, Between, WholeBetween
from tune.sweep_dir import Trial

_MOST_SERIES = 6
_WIDE = 8.0  # a list whose greatest number is so many times its least is drawn over a logarithmic axis


def each_axis(m: Material, axes: Sequence[Axis]) -> Drawing:
    """A plot for each axis: a cloud over a range, curves over a list of numbers, bars over names. Colours are the values of another axis
    with a list of few."""
    html = ""
    rows: list[list[object]] = []
    for axis in axes:
        value = _value(m, axis)
        found = m.cells(value)
        html += _plot(m, axis, next((other for other in axes if other is not axis and _splits(m, other)), None)) if len(found) > 1 else ""
        rows += [[f"{axis.key} {_text(k)}", round(c.mean, 4), round(c.low, 4), round(c.high, 4), c.n, ""] for k, c in found.items()]
    panels = f'<div class="panels">{html}</div>' if html else ""
    note = "<p>The score over each field that was varied. A point is the mean of the trials at its place, whatever else differs.</p>"
    return Drawing(html=panels, note=note, rows=rows)


def _value(m: Material, axis: Axis) -> Callable[[Trial], Any]:
    """A trial's value on an axis; of fields that vary together all of theirs."""

    def value(trial: Trial) -> Any:
        found = tuple(value_in(trial, m.base, path) for path in axis.paths)
        return found[0] if len(found) == 1 else found

    return value


def _splits(m: Material, axis: Axis) -> bool:
    return isinstance(axis.values, tuple) and 1 < len(m.cells(_value(m, axis))) <= _MOST_SERIES


def _plot(m: Material, axis: Axis, by: Axis | None) -> str:
    value, other = _value(m, axis), _value(m, by) if by is not None else lambda trial: None
    found: dict[Any, dict[Any, Cell]] = {}
    for (x, group), c in m.cells(lambda trial: (value(trial), other(trial))).items():
        found.setdefault(group, {})[x] = c
    names = {group: f"{by.label} {_text(group)}" if by is not None else "mean of the trials" for group in sorted(found, key=_order)}
    places = sorted({x for cells in found.values() for x in cells}, key=_order)
    if not isinstance(axis.values, tuple):
        clouds = {name if by is not None else "": [(x, c.mean) for x, c in found[group].items()] for group, name in names.items()}
        log = axis.values.log if isinstance(axis.values, Between | WholeBetween) else True
        return drawing.cloud(axis.key, clouds, f"{axis.label}{', logarithmic' if log else ''}", m.unit, log)
    if all(isinstance(x, int | float) and not isinstance(x, bool) for x in places):
        log = places[0] > 0 and places[-1] >= _WIDE * places[0]
        series = [Series(name=name, points=found[group]) for group, name in names.items()]
        x_names = {x: _text(x) for x in places}
        return drawing.curves(Plot(title=axis.key, series=series, x_label=axis.label, y_label=m.unit, x_names=x_names, log_x=log))
    at = {x: float(number) for number, x in enumerate(places)}
    series = [Series(name=name, points={at[x]: c for x, c in found[group].items()}) for group, name in names.items()]
    return drawing.bars(Plot(title=axis.key, series=series, x_label=axis.label, y_label=m.unit, x_names={at[x]: _text(x) for x in places}))


def _order(value: Any) -> tuple[bool, Any]:
    return (False, value) if isinstance(value, int | float) else (True, str(value))


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return " + ".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)
