"""Drawings for the report, as HTML text: curves, bars, a scatter plot, pictures as data: URIs. Arrays in, text out; no state.

Plots are SVGs stretched to the width there is (their lines keep their thickness), and every letter is HTML laid over them in per
cent of the plot: type and strokes have the same size on a phone and on a wide screen.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from simclr.text import printable_lines

Row = tuple[float, float, int, float | None, str]
"""A point of the crosshair: place (0 … 1000 from the left and from the top), step, epoch, value as text."""

MAP_WIDTH, MAP_HEIGHT = 800.0, 600.0
_PIXEL_ART = 64  # sides up to this are enlarged by whole numbers with crisp pixels; larger pictures are photographs
_SHEET_BYTES = 900_000
_POINTS = 400
_PALETTE = 10  # colours in page.css, --k0 … --k9


def escape(text: object) -> str:
    """`text` as HTML, also inside an attribute. Control characters, which HTML cannot hold, and marks that turn the order of reading are
    written out; bytes of a file name that are no UTF-8 (lone surrogates) become "?"."""
    return html.escape(printable_lines(str(text).encode("utf-8", "replace").decode()))


# ── Numbers as text ────────────────────────────────────────────────────────────────────────────────────────────────


def percent(share: float | None) -> str:
    """0.9134 → "91.3 %" with a no-break space; None or not finite → "–"."""
    return "–" if share is None or not math.isfinite(share) else f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def duration(seconds: float) -> str:
    """0.42 → "0.4 s", 105 → "1 min 45 s", 7380 → "2 h 03 min"; not finite → "–"."""
    if not math.isfinite(seconds):
        return "–"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s" if whole >= 10 else f"{seconds:.1f} s"
    return f"{whole // 60} min {whole % 60:02d} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def ticks(low: float, high: float, most: int = 4) -> list[float]:
    """Multiples of 1, 2, 2.5 or 5 · 10^i that reach from at most `low` to at least `high`, in about `most` intervals."""
    assert low < high
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    return [i * step for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def tick_text(value: float) -> str:
    """A round number as short as it goes: 0.25, 300, 20k, 1.5M, 2e-5."""
    size, suffix = next(((s, t) for least, s, t in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")) if abs(value) >= least), (1.0, ""))
    return _plain(f"{value / size:,.6g}") + suffix


def _plain(number: str) -> str:
    """A minus sign instead of a hyphen, an exponent without padding."""
    return number.replace("e-0", "e-").replace("e+0", "e").replace("-", "−")


# ── Curves ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantity:
    """The quantity of a curve: its key in the history, its name, and the sentence that explains it."""

    key: str
    name: str
    unit: str = ""
    meaning: str
    digits: str = ".3f"
    share: bool = False
    """Shares in [0, 1], drawn in per cent."""
    from_zero: bool = True

    def text(self, value: float) -> str:
        return percent(value) if self.share else _plain(f"{value:{self.digits}}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """The figures of a history, the rows for each figure's crosshair, and the quantities drawn."""

    figures: str
    rows: list[list[Row]]
    drawn: list[Quantity]


def training(history: Sequence[dict[str, float]], quantities: Sequence[Quantity], references: dict[str, tuple[float, str]]) -> Training:
    """A curve for each of the `quantities` that has a finite value, all over one axis of steps. `references`: key → (value, name).

    A report without the key has no point; one whose value is not finite breaks the line.
    """
    figures, rows, drawn = "", list[list[Row]](), list[Quantity]()
    # Three to a row; the first is so wide that no row has a hole.
    span = (1, 3, 2)[sum(any(math.isfinite(row.get(q.key, math.nan)) for row in history) for q in quantities) % 3]
    for q in quantities:
        points = [(row["step"], row.get("epoch", math.nan), row[q.key]) for row in history if q.key in row]
        step, epoch, y = np.array(points, np.float64).reshape(-1, 3).T
        if not np.isfinite(y).any():
            continue
        first, last = history[0]["step"], history[-1]["step"]
        # From 0, unless the first report came late, as in a run that was resumed without its history.
        domain = (0.0 if first <= last / 4 else first - 1, max(last, first + 1))
        figure, read = _curve(q, step, epoch, y, domain, references.get(q.key), len(rows), 4 if rows or span == 1 else 8)
        figures += figure
        rows.append(read)
        drawn.append(q)
    if figures:
        figures = f'<div class="charts" style="--span:{span}">{figures}</div>'
    return Training(figures=figures, rows=rows, drawn=drawn)


def thin(y: NDArray[np.float64], most: int = _POINTS) -> NDArray[np.int64]:
    """Indices of at most `most` points that keep the first, the last, and each stretch's lowest and highest."""
    if len(y) <= most:
        return np.arange(len(y))
    keep = {0, len(y) - 1}
    for part in np.array_split(np.arange(1, len(y) - 1), (most - 2) // 2):
        finite = part[np.isfinite(y[part])]
        keep |= {int(finite[y[finite].argmin()]), int(finite[y[finite].argmax()])} if len(finite) else {int(part[0])}
    return np.array(sorted(keep))


def y_range(y: NDArray[np.float64], from_zero: bool, reference: float | None) -> tuple[float, float]:
    """The values an axis must show: all finite ones, 0 on request, and the reference if it is within half a range."""
    finite = y[np.isfinite(y)]
    low, high = float(finite.min()), float(finite.max())
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if reference is not None and low - (high - low) / 2 <= reference <= high + (high - low) / 2:
        low, high = min(low, reference), max(high, reference)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        margin = 0.05 * abs(high) or 0.5
        low, high = low - (0 if from_zero else margin), high + margin
    return low, high


def _curve(
    q: Quantity,
    step: NDArray[np.float64],
    epoch: NDArray[np.float64],
    y: NDArray[np.float64],
    domain: tuple[float, float],
    reference: tuple[float, str] | None,
    number: int,
    steps_marked: int,
) -> tuple[str, list[Row]]:
    """A figure with axes over the steps `domain`, some `steps_marked` of them named, and the rows that its crosshair reads. `y` has
    a finite value."""
    factor = 100.0 if q.share else 1.0
    marks = ticks(*y_range(factor * y, q.from_zero, reference and factor * reference[0]))
    keep = thin(y)
    step, epoch, y = step[keep], epoch[keep], y[keep]
    (left, right), bottom, top = domain, marks[0], marks[-1]
    px = 1000 * (step - left) / (right - left)
    py = 1000 * (top - factor * y) / (top - bottom)
    ok = np.isfinite(y)

    heights = [(t, (top - t) / (top - bottom)) for t in marks]
    grid = "".join(f"M0 {1000 * at:.1f}H1000" for _, at in heights)
    letters = "".join(f'<span class="y" style="top:{100 * at:.2f}%">{tick_text(t)}</span>' for t, at in heights)
    drawn = f'<path class="grid" d="{grid}"/>'
    if reference and bottom <= factor * reference[0] <= top:
        at = (top - factor * reference[0]) / (top - bottom)
        drawn += f'<path class="reference" d="M0 {1000 * at:.1f}H1000"/>'
        letters += f'<span class="name {_side(at, px[ok], py[ok])}" style="top:{100 * at:.2f}%">{escape(reference[1])}</span>'
    for i, t in enumerate(t for t in ticks(left, right, steps_marked) if left <= t <= right and t == round(t)):
        at = (t - left) / (right - left)
        drawn += f'<path class="tick" d="M{1000 * at:.1f} 1000v12"/>'
        letters += f'<span class="x{"" if i else " first"}" style="left:{100 * at:.2f}%">{"" if i else "step "}{tick_text(t)}</span>'

    line, pen = "", "M"
    for x, height, fine in zip(px, py, ok, strict=True):
        line += f"{pen}{x:.1f} {height:.1f}" if fine else ""
        pen = "L" if fine else "M"
    alone = ok & ~np.append(False, ok[:-1]) & ~np.append(ok[1:], False)
    # A line of no length with round ends is a dot, and stays round when the plot is stretched.
    dots = "".join(f"M{px[i]:.1f} {py[i]:.1f}h0" for i in np.flatnonzero(ok if len(y) <= 24 else alone))
    drawn += f'<path class="line" d="{line}"/><path class="dots" d="{dots}"/>'

    rows: list[Row] = [
        (round(float(px[i]), 1), round(float(py[i]), 1), int(step[i]), _rounded(epoch[i]), q.text(float(y[i]))) for i in np.flatnonzero(ok)
    ]
    last, at_step = rows[-1][4], f"step {rows[-1][2]:,}" + ("" if rows[-1][3] is None else f", epoch {rows[-1][3]:.1f}")
    alt = f"{q.name} over {len(rows):,} reports: {rows[0][4]} at step {rows[0][2]:,}, {last} at step {rows[-1][2]:,}"
    unit = f", {q.unit}" if q.unit else ""
    return (
        f'<figure class="chart"><figcaption><span><b>{q.name}</b>{unit}</span><output>{last}<small>{at_step}</small></output></figcaption>'
        f'<div class="plot" data-curve="{number}" role="img" aria-label="{escape(alt)}">'
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" aria-hidden="true">{drawn}</svg>{letters}</div></figure>'
    ), rows


def _side(at: float, px: NDArray[np.float64], py: NDArray[np.float64]) -> str:
    """The side of a reference, `at` of the plot's height from its top, on which its name does not lie on the curve, points (px, py) in
    thousandths: above, but below near the top, or the other one."""
    letters = 0.11  # of the height of the plot; their width is about 0.4 of it, at its right
    line = np.interp(np.linspace(600, 1000, 81), px, py) / 1000 - at
    struck = {"above": ((line > -letters) & (line < 0)).any(), "below": ((line > 0) & (line < letters)).any()}
    usual, other = ("below", "above") if at < 0.2 else ("above", "below")
    fits = letters <= at if other == "above" else at <= 1 - letters
    return other if struck[usual] and not struck[other] and fits else usual


def _rounded(epoch: float) -> float | None:
    return round(float(epoch), 2) if math.isfinite(epoch) else None


def stacked_bar(parts: Sequence[tuple[str, float]]) -> str:
    """Named durations in seconds as one bar and its legend. Durations that are not positive and finite are left out."""
    total = sum(s for _, s in parts if math.isfinite(s) and s > 0)
    bar, legend = "", ""
    for i, (name, seconds) in enumerate(parts):
        share = seconds / total if total and math.isfinite(seconds) and seconds > 0 else 0.0
        colour, time = f"k{i % _PALETTE}", duration(seconds)
        bar += f'<i class="{colour}" style="flex-grow:{share:.5f}" title="{escape(name)}: {time}"></i>' if share else ""
        legend += f'<li class="{colour}"><i></i><span>{escape(name)}</span><b>{time}</b><small>{100 * share:.0f} %</small></li>'
    alt = "Total " + duration(total) + ": " + ", ".join(f"{name} {duration(s)}" for name, s in parts)
    return f'<div class="phases" role="img" aria-label="{escape(alt)}">{bar}</div><ol class="legend timings">{legend}</ol>'


# ── The map ────────────────────────────────────────────────────────────────────────────────────────────────────────


def palette(classes: int) -> str:
    """CSS that gives .k0, .k1, … their colours: the tested ten, and beyond them hues a golden angle apart in two shades."""
    if classes <= _PALETTE:
        return "".join(f".k{i}{{--c:var(--k{i})}}" for i in range(_PALETTE))
    hues = [(i, round(137.508 * i % 360, 1), i % 2) for i in range(classes)]
    return "".join(f".k{i}{{--c:light-dark(oklch({(0.6, 0.42)[odd]} .14 {h}),oklch({(0.82, 0.66)[odd]} .12 {h}))}}" for i, h, odd in hues)


def placed(xy: NDArray[np.floating]) -> NDArray[np.float64]:
    """Points (n, 2) in the map's units: one scale for both axes, centred, y upwards."""
    low, high = xy.min(0).astype(np.float64), xy.max(0).astype(np.float64)
    scale = min((MAP_WIDTH - 40) / max(high[0] - low[0], 1e-12), (MAP_HEIGHT - 40) / max(high[1] - low[1], 1e-12))
    at: NDArray[np.float64] = np.array([MAP_WIDTH, MAP_HEIGHT]) / 2 + (xy - (low + high) / 2) * scale * [1, -1]
    return at


def scatter(at: NDArray[np.floating], labels: NDArray[np.integer], wrong: NDArray[np.bool_], names: Sequence[str]) -> str:
    """The map as an SVG of circles, (n, 2) places in the order given; wrong ones have a ring. Names lie over their groups."""
    dots = ""
    for (x, y), k, w in zip(at.tolist(), labels.tolist(), wrong, strict=True):
        dots += f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" class="{f"k{k}" if k >= 0 else "none"}"/>'
        dots += f'<circle cx="{x:.1f}" cy="{y:.1f}" r="8" class="ring"/>' if w else ""
    text = ""
    for k, x, y in _name_places(at, labels, names):
        place = f"left:{100 * x / MAP_WIDTH:.1f}%;top:{100 * y / MAP_HEIGHT:.1f}%"
        text += f'<span class="k{k}" data-class="{k}" style="{place}">{escape(names[k])}</span>'
    svg = f'<svg viewBox="0 0 {MAP_WIDTH:g} {MAP_HEIGHT:g}" aria-hidden="true">{dots}</svg>'
    return f'{svg}<div class="names" aria-hidden="true">{text}</div>'


def _name_places(at: NDArray[np.floating], labels: NDArray[np.integer], names: Sequence[str]) -> list[tuple[int, float, float]]:
    """(class, x, y) of the names: each where its points are densest, moved apart if they would cover each other."""
    if len(names) > 2 * _PALETTE:
        return []
    done: list[tuple[int, float, float]] = []
    centres = {k: _thickest(at[labels == k]) for k in range(len(names)) if (labels == k).any()}
    for k, (x, y) in sorted(centres.items(), key=lambda item: float(item[1][1])):
        half = 4.0 * len(names[k]) + 6
        x, y = float(np.clip(x, half, MAP_WIDTH - half)), float(y)
        for other, ox, oy in done:
            if abs(x - ox) < half + 4.0 * len(names[other]) + 6 and y - oy < 20:
                y = oy + 20
        done.append((k, x, min(y, MAP_HEIGHT - 10)))
    return done


# ── Pictures ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _thickest(points: NDArray[np.floating]) -> NDArray[np.floating]:
    """The point (2,) with the most others near it. A class may lie in several places, and then its median in none of them."""
    some = points[:: max(len(points) // 500, 1)]
    near = np.hypot(*(some[:, None] - some[None]).transpose(2, 0, 1)) < MAP_WIDTH / 16
    place: NDArray[np.floating] = some[near[near.sum(1).argmax()]].mean(0)
    return place


def crisp(images: NDArray[np.uint8]) -> bool:
    """Whether images (…, H, W, 3) have so few pixels that they are shown enlarged, whole numbers of times, with sharp edges."""
    return max(int(side) for side in images.shape[-3:-1]) <= _PIXEL_ART


def display(images: NDArray[np.uint8]) -> str:
    """The end of a list's opening tag up to `>`: the class, and the zooms that show images (…, H, W, 3) at 64 px or more."""
    height, width = images.shape[-3:-1]
    small = -(-64 // max(height, width))
    large = max(small, 96 // max(height, width))
    return f'crisp" style="--w:{width};--small:{small};--large:{large}"' if crisp(images) else 'photos"'


def picture(image: NDArray[np.uint8], alt: str, widest: int = 256) -> str:
    """<img> of image (H, W, 3): a lossless PNG up to 64 px, above that a JPEG whose longer side has at most `widest` pixels."""
    height, width = image.shape[:2]
    file, drawn = io.BytesIO(), Image.fromarray(np.ascontiguousarray(image))
    if crisp(image):
        drawn.save(file, "PNG", optimize=True)
    else:
        scale = min(1.0, widest / max(height, width))
        drawn.resize((round(width * scale), round(height * scale)), Image.Resampling.LANCZOS).save(file, "JPEG", quality=85, optimize=True)
    kind, sort = ("png", "pixels") if crisp(image) else ("jpeg", "photo")
    return f'<img class="{sort}" width="{width}" height="{height}" alt="{escape(alt)}" src="{_data_uri(file, kind)}">'


def columns(images: NDArray[np.uint8], kinds: Sequence[str]) -> str:
    """Columns of pictures (n, kinds, H, W, 3) as HTML, from top to bottom by their `kinds`; "" of none."""
    found = ""
    for i, column in enumerate(images):
        found += "<li>"
        for kind, image in zip(kinds, column, strict=True):
            found += f'<div><span aria-hidden="true">{kind}</span>{picture(image, f"Image {i + 1}, {kind}")}</div>'
        found += "</li>"
    return f'<ol class="gallery {display(images)}>{found}</ol>' if found else ""


def sheet(thumbs: NDArray[np.uint8]) -> str:
    """The data: URI of one PNG with all thumbs (n, h, w, 3), row by row, ⌈√n⌉ to a row.

    Sides over 64 px are reduced to 64. Noise does not compress: a sheet over 0.9 MB keeps 256 colours, then 64.
    """
    n, height, width = thumbs.shape[:3]
    scale = min(1.0, _PIXEL_ART / max(height, width))
    h, w = max(1, round(height * scale)), max(1, round(width * scale))
    columns = math.ceil(math.sqrt(n))
    image = Image.new("RGB", (columns * w, math.ceil(n / columns) * h))
    for i, thumb in enumerate(thumbs):
        drawn = Image.fromarray(np.ascontiguousarray(thumb))
        image.paste(drawn if scale == 1 else drawn.resize((w, h), Image.Resampling.LANCZOS), (i % columns * w, i // columns * h))
    file = io.BytesIO()
    for colours in (None, 256, 64):
        file = io.BytesIO()
        (image if colours is None else image.quantize(colours)).save(file, "PNG", optimize=True)
        if file.tell() <= _SHEET_BYTES:
            break
    return _data_uri(file, "png")


def _data_uri(file: io.BytesIO, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
