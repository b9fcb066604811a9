"""What `simclr curate` finds, as a list of pictures to train on, a table of reasons and a page."""

from __future__ import annotations

import csv
import io
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.evaluation.bank import Features
from pipelines.evaluation.originals import thumbnails
from pipelines.html.shelves import Case, Tile, page
from pipelines.terminal import Bar, say
from simclr import files, keyed
from simclr.errors import UserError
from simclr.evaluation import curation
from simclr.text import cell, redacted

Pictures = dict[int, NDArray[np.uint8]]
_CASES, _BESIDE, _TILES = 60, 11, 240  # on a page
_TAKEN = 4096  # features at a time


@dataclass(frozen=True, kw_only=True, slots=True)
class Curated:
    """A choice of rows, and what is said of those that it is about."""

    keep: NDArray[np.int64]
    """Rows for list.txt, ascending."""
    told: str
    """The result in a sentence."""
    lead: str
    rest: str
    heading: str
    note: str
    """HTML."""
    columns: tuple[str, ...]
    """Of reasons.csv, after path, id and label."""
    reasons: list[tuple[int, tuple[object, ...]]]
    """(row, values of `columns`), in the order of the table."""
    shown: list[int]
    """Rows whose pictures the page has."""
    drawn: Callable[[Pictures], Sequence[Case | Tile]]


def near_duplicates(features: Features, above: float, device: torch.device) -> Curated:
    """Of each group one stays: the largest picture or, of equal ones, that with the first id."""
    bank, limit = features.bank(device), min(above, 1 - 1e-6)  # copies differ by rounding
    with Bar("compare", len(features), "rows", "rows/s") as bar:
        root = curation.groups(bank, limit, bar.update)
    columns = features.columns
    area = np.array(columns["width"], np.int64) * np.array(columns["height"], np.int64)
    order = np.lexsort((np.array(columns["id"]), -area, root))
    starts = np.flatnonzero(np.r_[True, root[order][1:] != root[order][:-1]])
    sizes = np.diff(np.r_[starts, len(order)])
    kept_of = np.empty(len(order), np.int64)
    kept_of[order] = np.repeat(order[starts], sizes)
    repeats = np.flatnonzero(kept_of != np.arange(len(order)))
    cosines = np.empty(len(repeats), np.float32)
    for at in range(0, len(repeats), _TAKEN):
        some = repeats[at : at + _TAKEN]
        cosines[at : at + _TAKEN] = (bank.take(some) * bank.take(kept_of[some])).sum(1).cpu().numpy()
    number = {int(order[start]): int(size) for start, size in zip(starts, sizes, strict=True) if size > 1}
    by_size = sorted(number, key=lambda row: (-number[row], row))
    members: dict[int, list[tuple[int, float]]] = {row: [] for row in by_size}
    for row, cosine in zip(repeats.tolist(), cosines.tolist(), strict=True):
        members[int(kept_of[row])].append((row, cosine))
    reasons: list[tuple[int, tuple[object, ...]]] = []
    for group, kept in enumerate(by_size):
        for row, cosine in sorted(members[kept], key=lambda one: (-one[1], one[0])):
            labels = (columns["label"][kept], columns["label"][row])
            why = "near duplicate" if cosine >= limit - 1e-6 else "connected through others of its group"
            why += "; another label" if None not in labels and labels[0] != labels[1] else ""
            reasons.append((row, (group, features.called(kept), columns["id"][kept], round(cosine, 6), why)))
    if by_size and (low := float(cosines.min())) < above - 0.1:
        say(f"a chain of near duplicates connects pictures of cosine {low:.2f}; a higher --near-duplicates than {above:g} cuts it")
    cases = by_size[:_CASES]
    inside = {row: sorted(members[row], key=lambda one: (-one[1], one[0]))[:_BESIDE] for row in cases}

    def drawn(pictures: Pictures) -> list[Case]:
        found = []
        for kept in cases:
            notes = (f"kept, of {number[kept]:,}", _size(features, kept))
            beside = [_beside(features, row, pictures, cosine, columns["label"][kept]) for row, cosine in inside[kept]]
            first = Tile(name=features.called(kept), picture=pictures.get(kept), notes=notes, chosen=True)
            found.append(Case(first=first, others=tuple(beside)))
        return found

    keep = np.setdiff1d(np.arange(len(features)), repeats)
    rest = f"among {len(features):,} pictures, in {len(number):,} groups: the cosine of two is {above:g} or more, and one of each stays."
    if len(by_size) > len(cases):
        rest += f" The {len(cases)} largest groups are shown."
    return Curated(
        keep=keep,
        told=f"{len(repeats):,} of {len(features):,} pictures repeat another (cosine {above:g} or more, {len(number):,} groups); "
        f"list.txt has the other {len(keep):,}",
        lead=f"{len(repeats):,} near duplicates",
        rest=rest,
        heading="Groups",
        note="<p>First the picture of a group that stays in the list, the largest one or, of equal ones, the first; then the others, "
        "most alike first, with the cosine of their feature and that of the one that stays. What pairs of near duplicates connect is one "
        "group, so a cosine may lie below the limit.</p>",
        columns=("group", "repeats", "repeats_id", "cosine", "reason"),
        reasons=reasons,
        shown=sorted({*cases, *(row for rows in inside.values() for row, _ in rows)}),
        drawn=drawn,
    )


def diverse(features: Features, count: int, seed: int, device: torch.device) -> Curated:
    """`count` rows, each the farthest from those before it; the first is drawn by the seed."""
    if count > len(features):
        raise UserError(f"--diverse {count:,}: {features.place} has only {len(features):,} rows; ask for fewer")
    first = int(keyed.permutation(seed, 0, len(features))[0])
    with Bar("choose", count, "rows", "rows/s") as bar:
        found = curation.farthest_first(features.bank(device), count, first, bar.update)
    if len(found.rows) < count:
        say(f"only {len(found.rows):,} features differ, so the list has no more: every other row is a copy of one in it")
    reasons: list[tuple[int, tuple[object, ...]]] = []
    for place, (row, distance) in enumerate(zip(found.rows.tolist(), found.distance.tolist(), strict=True)):
        why = "farthest from those before it" if place else f"drawn by seed {seed}"
        reasons.append((row, (place + 1, round(distance, 6) if place else None, why)))
    shown = found.rows[:_TILES].tolist()

    def drawn(pictures: Pictures) -> list[Tile]:
        tiles = []
        for place, row in enumerate(shown):
            note = f"distance {found.distance[place]:.3f}" if place else "the first"
            label = features.columns["label"][row]
            notes = (f"{place + 1}: {note}", *([label] if label is not None else []))
            tiles.append(Tile(name=features.called(row), picture=pictures.get(row), notes=notes))
        return tiles

    covered = f"no picture is farther than {found.radius:.3f} (cosine distance) from the nearest in the list"
    return Curated(
        keep=np.sort(found.rows),
        told=f"{len(found.rows):,} of {len(features):,} pictures; {covered}",
        lead=f"{len(found.rows):,} pictures",
        rest=f"of {len(features):,}: {covered}." + (f" The first {len(shown):,} are shown." if len(shown) < len(found.rows) else ""),
        heading="The choice",
        note="<p>In the order in which they were chosen: each is the farthest from all before it, and the number is its distance "
        "(1 − cosine) to the nearest of them. Pictures that are like no others come first.</p>",
        columns=("order", "distance", "reason"),
        reasons=reasons,
        shown=sorted(shown),
        drawn=drawn,
    )


def outliers(features: Features, count: int, k: int, device: torch.device) -> Curated:
    """The `count` rows with the largest mean cosine distance to their `k` nearest others."""
    if count >= len(features):
        raise UserError(f"--outliers {count:,}: {features.place} has {len(features):,} rows, and none would be left; ask for fewer")
    if k >= len(features):
        raise UserError(
            f"--k {k:,}: {features.place} has {len(features):,} rows, each with {len(features) - 1:,} others; give a smaller --k"
        )
    with Bar("compare", len(features), "rows", "rows/s") as bar:
        found = curation.isolation(features.bank(device), k, bar.update)
    order = np.argsort(-found.distance, kind="stable")[:count]
    middle, least, most = (float(x) for x in (np.median(found.distance), found.distance[order[-1]], found.distance[order[0]]))
    columns = features.columns
    reasons: list[tuple[int, tuple[object, ...]]] = []
    for row in order.tolist():
        near = int(found.nearest[row])
        values = (round(float(found.distance[row]), 6), features.called(near), columns["id"][near], round(float(found.cosine[row]), 6))
        reasons.append((row, (*values, f"mean distance to the {k} nearest; the median of all is {middle:.6f}")))
    shown = order[:_CASES].tolist()

    def drawn(pictures: Pictures) -> list[Case]:
        cases = []
        for row in shown:
            near, label = int(found.nearest[row]), columns["label"][row]
            notes = (f"distance {found.distance[row]:.3f}", *([label] if label is not None else []))
            first = Tile(name=features.called(row), picture=pictures.get(row), notes=notes, chosen=True)
            cases.append(Case(first=first, others=(_beside(features, near, pictures, float(found.cosine[row]), label),)))
        return cases

    return Curated(
        keep=np.sort(np.setdiff1d(np.arange(len(features)), order)),
        told=f"the {count:,} of {len(features):,} pictures farthest from their {k} nearest: mean distance {least:.3f} to "
        f"{most:.3f}, the median of all is {middle:.3f}; list.txt has the other {len(features) - count:,}",
        lead=f"{count:,} outliers",
        rest=f"of {len(features):,} pictures: their mean cosine distance to the {k} nearest others is {least:.3f} or more; "
        f"the median of all is {middle:.3f}." + (f" The first {len(shown):,} are shown." if len(shown) < count else ""),
        heading="Outliers",
        note="<p>The outliers, the farthest first, with the mean distance (1 − cosine); beside each the picture that is nearest to it.</p>",
        columns=("distance", "nearest", "nearest_id", "cosine", "reason"),
        reasons=reasons,
        shown=sorted({*shown, *found.nearest[shown].tolist()}),
        drawn=drawn,
    )


def _beside(features: Features, row: int, pictures: Pictures, cosine: float, label: str | None) -> Tile:
    """A picture beside another one of this `label`."""
    own = features.columns["label"][row]
    notes = (f"cosine {cosine:.4f}", _size(features, row), *([own] if own is not None else []))
    return Tile(name=features.called(row), picture=pictures.get(row), notes=notes, odd=None not in (own, label) and own != label)


def _size(features: Features, row: int) -> str:
    return f"{features.columns['width'][row]:,} × {features.columns['height'][row]:,} px"


def write(out: Path, features: Features, found: Curated) -> None:
    """list.txt, reasons.csv and page.html in `out`."""
    columns = features.columns
    command = shlex.join(["simclr", *(redacted(word) for word in sys.argv[1:])])
    notes = {"command": command, "features": features.place, "encoder": f"sha256 {features.about.encoder}", "images": len(found.keep)}
    head = [f"# {name}: {str(value).replace(chr(10), ' ')}" for name, value in notes.items()]
    out.mkdir(parents=True, exist_ok=True)
    files.write_text(out / "list.txt", "\n".join([*head, *map(features.line, found.keep.tolist())]) + "\n")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "id", "label", *found.columns])
    for row, values in found.reasons:
        own = (columns["path"][row], columns["id"][row], columns["label"][row])
        writer.writerow([cell(value) for value in (*own, *values)])
    files.write_text(out / "reasons.csv", text.getvalue())
    pictures = thumbnails(features.about, [(columns["id"][row], columns["split"][row], columns["path"][row]) for row in found.shown])
    small = {row: pictures[i] for i, row in enumerate(found.shown) if i in pictures}
    facts = {"features": features.place, "source": features.about.source, "encoder": f"sha256 {features.about.encoder[:12]}…"}
    drawn = found.drawn(small)
    files.write_text(out / "page.html", page("Curation", found.lead, found.rest, found.heading, found.note, drawn, facts, command))
