"""`simclr neighbours`: features + pictures or rows → the rows nearest to each, exactly."""

from __future__ import annotations

import csv
import io
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro

from pipelines.evaluation import inputs
from pipelines.terminal import Bar, say, show
from simclr import files
from simclr.errors import UserError
from simclr.text import cell, redacted

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from pipelines.evaluation.bank import Features
    from simclr.evaluation.search import Found

_KINDS = (".html", ".csv", ".parquet")
_SHOWN = 100  # queries on a page
_COLUMNS = ("query", "rank", "cosine", "id", "path", "label", "split")


@dataclass(frozen=True)
class Args:
    """The pictures most alike to others, by the cosine of their features: exact, in one pass over all rows, in the memory of a block."""

    features: Annotated[Path, tyro.conf.Positional]
    """What `simclr embed` wrote: a directory or s3://bucket/prefix of Parquet parts, or a .parquet file."""
    query: Annotated[tuple[str, ...], tyro.conf.Positional]
    """With --encoder: picture files, folders of them, and all else that `simclr embed` reads. A word that is none of these, or every
    word without --encoder, is a row of FEATURES by its path or id; it is no neighbour of itself."""
    k: int = 10
    """Neighbours of each query."""
    encoder: Path | None = None
    """The encoder that made FEATURES: a published directory, s3://bucket/prefix of one, or NAME@alias in the registry."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""
    out: Path | None = None
    """Page with the pictures (.html), or table (.csv, .parquet) to write."""
    tracking_uri: str | None = None
    """MLflow address, for an encoder in the registry. Default: $MLFLOW_TRACKING_URI, else the database under runs/."""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise UserError(f"--k is {self.k}; expected at least 1")


@dataclass(frozen=True)
class _Query:
    """What is looked for."""

    name: str
    row: int | None
    """Of the features; None: a picture."""
    feature: NDArray[np.float32] | None = None
    picture: NDArray[np.uint8] | None = None


def main(args: Args) -> None:
    if not args.query:
        raise UserError("which pictures? give files or folders with --encoder, or rows by their path or id")
    if args.out is not None:
        files.require_file(args.out, _KINDS)
    device = inputs.device_of(args.device)
    from pipelines.evaluation.bank import Features

    features = Features(args.features)
    queries = _queries(args, features, device)
    found = _search(features, queries, args.k, device)
    features.tell_zeros()
    rows = list(_rows(features, queries, found))
    show(_table(rows))
    if args.out is not None:
        _write(args, features, queries, found, rows)
        show(str(args.out))


def _queries(args: Args, features: Features, device: torch.device) -> list[_Query]:
    if args.encoder is None:
        for word in args.query:
            if Path(word).exists() and word not in features.columns["path"]:
                raise UserError(
                    f"{word} is no row of {features.place}; to look for pictures give --encoder, the one that made the features"
                )
        return [_Query(features.called(row), row) for row in map(features.named, args.query)]
    from simclr.data.s3.uri import address

    words = [word for word in args.query if Path(word).exists() or address(word) is not None]
    found = [_Query(features.called(row), row) for row in (features.named(word) for word in args.query if word not in words)]
    return (_pictures(args, words, features, device) if words else []) + found


def _pictures(args: Args, words: list[str], features: Features, device: torch.device) -> list[_Query]:
    """Queries of the pictures that `words` name, seen as the rows of the features were."""
    from pipelines.evaluation.query import embed

    assert args.encoder is not None
    with inputs.opened(args.encoder, args.tracking_uri) as directory:
        found = embed(directory, args.encoder, words, features.about, device, _SHOWN)
    return [_Query(name, None, feature, picture) for name, feature, picture in found]


def _search(features: Features, queries: list[_Query], k: int, device: torch.device) -> Found:
    import torch

    from simclr.evaluation.search import Found, search

    bank = features.bank(device)
    m, own = len(queries), np.array([-1 if query.row is None else query.row for query in queries])
    h = torch.empty(m, features.d, device=device)
    if (rows := np.flatnonzero(own >= 0)).size:
        h[torch.from_numpy(rows).to(device)] = bank.take(own[rows])
    for i, query in enumerate(queries):
        if query.feature is not None:
            h[i] = torch.nn.functional.normalize(torch.from_numpy(query.feature).to(device), dim=0)
    if (most := len(features) - bool(rows.size)) < 1:
        raise UserError(f"{features.place} has one row, which has no other for a neighbour")
    if k > most:
        say(f"--k is {k:,}, and there are {most:,} other rows: all are listed")
    with Bar("search", len(features), "rows", "rows/s") as bar:
        found = search(h, bank, min(k, most), own if rows.size else None, bar.update)
    return Found(found.index.cpu(), found.similarity.cpu())


def _rows(features: Features, queries: list[_Query], found: Found) -> Any:
    for i, query in enumerate(queries):
        for rank, (row, cosine) in enumerate(zip(found.index[i].tolist(), found.similarity[i].tolist(), strict=True), 1):
            about = (features.columns[name][row] for name in ("id", "path", "label", "split"))
            yield dict(zip(_COLUMNS, (query.name, rank, round(cosine, 6), *about), strict=True))


def _table(rows: list[dict[str, Any]]) -> str:
    """A line per neighbour, below each query's name."""
    lines: list[str] = []
    for row in rows:
        if row["rank"] == 1:
            lines.append(row["query"])
        label = f"  {row['label']}" if row["label"] is not None else ""
        lines.append(f"  {row['rank']:>4}  {row['cosine']:.4f}  {row['path'] or row['id']}{label}")
    return "\n".join(lines)


def _write(args: Args, features: Features, queries: list[_Query], found: Found, rows: list[dict[str, Any]]) -> None:
    assert args.out is not None
    args.out.parent.mkdir(parents=True, exist_ok=True)
    match args.out.suffix.lower():
        case ".csv":
            text = io.StringIO()
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(_COLUMNS)
            writer.writerows([cell(row[name]) for name in _COLUMNS] for row in rows)
            files.write_text(args.out, text.getvalue())
        case ".parquet":
            from simclr.data.feature_parts import write_table

            write_table(args.out, {name: [row[name] for row in rows] for name in _COLUMNS})
        case _:
            files.write_text(args.out, _page(features, queries, found))


def _page(features: Features, queries: list[_Query], found: Found) -> str:
    from pipelines.evaluation.originals import thumbnails
    from pipelines.html.shelves import Case, Tile, page

    shown = queries[:_SHOWN]
    wanted = sorted({*found.index[: len(shown)].flatten().tolist(), *(q.row for q in shown if q.row is not None)})
    columns = features.columns
    pictures = thumbnails(features.about, [(columns["id"][row], columns["split"][row], columns["path"][row]) for row in wanted])
    small = {row: pictures[i] for i, row in enumerate(wanted) if i in pictures}
    cases = []
    for i, query in enumerate(shown):
        label = columns["label"][query.row] if query.row is not None else None
        others = []
        for row, cosine in zip(found.index[i].tolist(), found.similarity[i].tolist(), strict=True):
            other = columns["label"][row]
            notes = (f"cosine {cosine:.4f}", *([other] if other is not None else []))
            odd = None not in (label, other) and label != other
            others.append(Tile(name=features.called(row), picture=small.get(row), notes=notes, odd=odd))
        own = query.picture if query.row is None else small.get(query.row)
        first = Tile(name=query.name, picture=own, notes=(label,) if label is not None else (), chosen=True)
        cases.append(Case(first=first, others=tuple(others)))
    count = f"{len(queries):,} {'query' if len(queries) == 1 else 'queries'}"
    rest = f"for {count}, among {len(features):,} rows: exact, by the cosine of the features, nearest first."
    if len(shown) < len(queries):
        rest += f" The first {len(shown):,} queries are shown."
    note = (
        "<p>First the query, then the rows nearest to it. The number is the cosine of the two features, 1 for the same direction. "
        "A label in another colour is another than the query's.</p>"
    )
    facts = {"features": features.place, "source": features.about.source, "encoder": f"sha256 {features.about.encoder[:12]}…"}
    command = shlex.join(["simclr", *(redacted(word) for word in sys.argv[1:])])
    return page("Neighbours", f"{found.index.shape[1]:,} nearest", rest, "Nearest neighbours", note, cases, facts, command)
