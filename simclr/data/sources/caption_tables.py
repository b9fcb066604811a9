"""Tables of captions: CSV, TSV and JSON lines. A row that could be another's is refused, for a caption that is cut looks like one."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from simclr.data.sources.name_tables import decoded, encoding_of
from simclr.data.sources.source import is_image
from simclr.errors import UserError

_MOST_BYTES = 1 << 30
_TABLES = (".csv", ".tsv", ".jsonl", ".txt")

Rows = list[tuple[int, list[Any]]]
"""Each with the line on which it begins, and its cells in the order of the head."""


def rows_of(path: Path, notes: list[str]) -> tuple[list[str], Rows]:
    """The head of a table, and its rows; None stands for a cell that is missing. Bytes that are not UTF-8 are surrogates, as
    `surrogateescape` writes them. Raises UserError for another file, and naming the line where a row is damaged or has too many cells."""
    ending = path.suffix.lower()
    if ending not in _TABLES:
        raise UserError(f"--captions {path} is no table; expected CSV, TSV or JSON lines of names and captions")
    if path.stat().st_size > _MOST_BYTES:
        raise UserError(
            f"{path} has {path.stat().st_size / 2**30:.1f} GiB; expected a table of captions of at most 1; put them into Parquet or "
            "WebDataset, beside their pictures"
        )
    data = path.read_bytes()
    text = decoded(data, "surrogateescape")
    if encoding_of(data) == "latin-1":
        notes.append(f"{path} is not UTF-8 and was read as Latin-1")
    if ending == ".jsonl":
        return _of_objects(path, text)
    return _of_csv(path, text, notes) if ending == ".csv" else _of_tsv(path, text, notes)


def _of_objects(path: Path, text: str) -> tuple[list[str], Rows]:
    objects: list[tuple[int, dict[str, Any]]] = []
    for line, written in enumerate(text.split("\n"), 1):  # at no other sign: U+2028 and the like may stand within a caption
        if not written.strip():
            continue
        try:
            found = json.loads(written)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise UserError(f"{path}, line {line:,}: this is not one object of JSON a line; mend it")
        objects.append((line, found))
    head = list(dict.fromkeys(key for _, found in objects[:100] for key in found))
    return head, [(line, [found.get(key) for key in head]) for line, found in objects]


def _of_csv(path: Path, text: str, notes: list[str]) -> tuple[list[str], Rows]:
    first = text.partition("\n")[0]
    comma = ";" if ";" in first and "," not in first else ","
    try:
        rows = _parsed(text, comma, csv.QUOTE_MINIMAL)
    except csv.Error as error:
        raise UserError(f"{path}, {error}; a quotation mark there is not closed, or not doubled; or write JSON lines") from None
    for line, cells in rows:
        for cell in cells:
            if "\n" in cell and any(_like_row(within, comma, len(rows[0][1])) for within in cell.split("\n")):
                last = cell.splitlines()[-1][:40]
                raise UserError(f"{path}, line {line:,}: a quotation mark there closes only behind {last!r}; close it, or write JSON lines")
    return _even(path, rows, f"a caption with {comma!r} in it stands between quotation marks; mend the line", notes)


def _of_tsv(path: Path, text: str, notes: list[str]) -> tuple[list[str], Rows]:
    """Where tabs part cells, many write a quotation mark as a letter of the caption, which nobody closes; pandas and others quote."""
    try:
        rows = _parsed(text, "\t", csv.QUOTE_MINIMAL)
        quoted = not any("\n" in cell and "\t" in cell for _, cells in rows for cell in cells)  # else two rows' marks met by chance
    except csv.Error:
        quoted = False
    if not quoted:
        try:
            rows = _parsed(text, "\t", csv.QUOTE_NONE)
        except csv.Error as error:
            raise UserError(f"{path}, {error}; see that it is a table with tabs, or write JSON lines") from None
    return _even(path, rows, "a caption with a tab in it fits no such table; write JSON lines", notes)


def _parsed(text: str, delimiter: str, quoting: Any) -> Rows:
    """Raises csv.Error with the line on which the damaged row begins."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    rows: Rows = []
    line = 1
    try:
        for cells in reader:
            if cells:
                rows.append((line, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        raise csv.Error(f"line {line:,}: {error}") from None
    return rows


def _like_row(line: str, delimiter: str, width: int) -> bool:
    cells = line.split(delimiter)
    return len(cells) == width > 1 and any(is_image(cell.strip()) for cell in cells)


def _even(path: Path, rows: Rows, mend: str, notes: list[str]) -> tuple[list[str], Rows]:
    """The rows behind the head, each as long as it."""
    if not rows:
        return [], []
    head = [cell.strip() for cell in rows[0][1]]
    short: list[int] = []
    for line, cells in rows[1:]:
        while len(cells) > len(head) and not cells[-1].strip():  # a separator at the end of a line
            cells.pop()
        if len(cells) > len(head):
            raise UserError(f"{path}, line {line:,} has {len(cells):,} cells, and its head has {len(head):,}; {mend}")
        if len(cells) < len(head):
            short.append(line)
            cells += [None] * (len(head) - len(cells))
    if short:
        rows_have = "1 row has" if len(short) == 1 else f"{len(short):,} rows have"
        notes.append(f"{rows_have} fewer cells than the head of {path}, as line {short[0]:,}")
    return head, rows[1:]
