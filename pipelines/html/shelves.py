"""A page of pictures with a reason under each: neighbours of queries, groups of near duplicates, a choice. Pictures in, text out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.html.charts import escape, picture
from pipelines.html.neighbours import breakable
from pipelines.html.page import document

_STYLE = """
.shelf { display: grid; grid-template-columns: repeat(auto-fill, minmax(132px, 1fr)); gap: 20px 14px; }
.cases > li { display: grid; grid-template-columns: 148px minmax(0, 1fr); gap: 28px; padding: 20px 0;
  border-bottom: 1px solid var(--rule); }
.cases > li:first-child { padding-top: 0; }
.cases > li:last-child { border: 0; }
.cases .shelf { grid-template-columns: repeat(auto-fill, minmax(104px, 1fr)); }
.tile { min-width: 0; }
.tile > span { display: grid; place-items: center; width: 100%; aspect-ratio: 1; border-radius: 4px; background: var(--raised);
  border: 1px solid var(--rule); overflow: hidden; }
.tile img { width: 100%; height: 100%; object-fit: contain; border-radius: 0; }
.tile > .gone { padding: 8px; font-size: 12px; line-height: 1.35; text-align: center; color: var(--soft); border-style: dashed; }
.tile figcaption { margin-top: 6px; font-size: 12.5px; line-height: 1.35; overflow-wrap: anywhere; }
.tile figcaption b { display: block; font-weight: 500; }
.tile figcaption small { display: block; font-size: 12px; color: var(--soft); }
.tile.chosen > span { border: 2px solid var(--accent); }
.tile.odd figcaption small:last-child { color: var(--wrong); }
@media (max-width: 760px) { .cases > li { grid-template-columns: minmax(0, 1fr); gap: 14px; } .cases > li > figure { max-width: 148px; } }
@media print { .tile, .cases > li { break-inside: avoid; } }
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """A picture with what is said of it."""

    name: str
    picture: NDArray[np.uint8] | None
    """(h, w, 3); None = it cannot be read where the page is made."""
    notes: tuple[str, ...] = ()
    chosen: bool = False
    """A frame in the accent's colour."""
    odd: bool = False
    """Its last note is one to look at."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A picture, and those beside it."""

    first: Tile
    others: tuple[Tile, ...]


def page(
    title: str, lead: str, rest: str, heading: str, note: str, shown: Sequence[Case | Tile], facts: dict[str, str], command: str
) -> str:
    """The page as HTML: no network, no fonts, no files beside it. `shown` are cases, below one another, or tiles, side by side. All of it
    is text, escaped here, but for `note`, which is HTML."""
    rows = "".join(f"<li>{_tile(c.first)}<div class=shelf>{''.join(map(_tile, c.others))}</div></li>" for c in shown if isinstance(c, Case))
    tiles = "".join(_tile(tile) for tile in shown if isinstance(tile, Tile))
    drawn = (f'<ol class="cases">{rows}</ol>' if rows else "") + (f'<div class="shelf">{tiles}</div>' if tiles else "")
    listed = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items() if value)
    how = (
        f'<div class="command"><pre id="command" tabindex="0"><code>{escape(command)}</code></pre>'
        f'<button id="copy" type="button" hidden>Copy</button></div><dl class="facts">{listed}</dl>'
    )
    sections = [
        ("pictures", escape(heading), note, drawn),
        ("how", "How it was made", "<p>The same command on the same features gives the same list.</p>", how),
    ]
    return document(title, lead, rest, "", sections, _STYLE, {"curves": [], "map": None})


def _tile(tile: Tile) -> str:
    drawn = '<span class="gone">not to be read here</span>'
    if tile.picture is not None:
        drawn = f"<span>{picture(tile.picture, tile.name, 192)}</span>"
    notes = "".join(f"<small>{escape(note)}</small>" for note in tile.notes)
    sort = " chosen" * tile.chosen + " odd" * tile.odd
    return f'<figure class="tile{sort}">{drawn}<figcaption><b>{breakable(tile.name)}</b>{notes}</figcaption></figure>'
