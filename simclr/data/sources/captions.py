"""What is said in words of pictures, for training on image–text pairs."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from simclr import files
from simclr.data.sources.name_tables import Pictures, Table, decoded
from simclr.data.sources.reading import Reading, pictures
from simclr.data.sources.source import Tree
from simclr.errors import UserError

_NAMES = ("file_name", "filename", "filepath", "file", "image", "image_id", "image_name", "image_path", "img", "path", "name", "key")
_WORDS = ("caption", "captions", "title", "text", "sentence", "description", "raw", "comment", "alt_text")
_COLUMNS = ("caption", "captions", "text", "TEXT", "sentence", "sentences", "title", "description", "prompt", "alt_text")
_MOST_BYTES = 1 << 30
_TABLES = (".csv", ".tsv", ".jsonl", ".txt")


def taken(tree: Tree, reading: Reading, names: Collection[str], notes: list[str]) -> Mapping[str, str]:
    """Picture → caption, as `reading.captions` says; what an owner may not expect goes into `notes`.

    Raises UserError where no picture has one."""
    if reading.captions == "auto":
        found, where = dict(tree.captions()), f"{tree.spec}"
        missing = "; expected WebDataset with KEY.txt, or Parquet with a column caption or text, or give a file: --captions FILE"
    else:
        found, missing = _of_table(reading, names, notes), "; see that its names are those of the pictures"
        where = reading.captions
    if not found:
        raise UserError(f"{where} has captions of none of {pictures(len(names))}{missing}")
    silent = sum(1 for name in names if not name.endswith("/") and not found.get(name))
    if silent:
        notes.append(f"{pictures(silent)} have no caption; those that would train are skipped")
    return found


def captions_column(schema: Any, others: Collection[str | None]) -> str | None:
    """The column of captions of an Arrow schema, of texts or of lists of texts; `others` are taken."""
    for name in _COLUMNS:
        if name in schema.names and name not in others:
            kind = schema.field(name).type
            if str(getattr(kind, "value_type", kind)) in ("string", "large_string"):
                return name
    return None


def caption_in(value: Any) -> str:
    """A row's caption; of several the first."""
    text = next((text for text in value if text), "") if isinstance(value, list) else value
    return str(text or "").strip()


def _of_table(reading: Reading, names: Collection[str], notes: list[str]) -> dict[str, str]:
    path = files.user_path(reading.captions)
    head, rows = _rows(path)
    lower = {column.lower(): column for column in head}
    if reading.caption_columns:
        missing = [column for column in reading.caption_columns if column.lower() not in lower]
        if missing:
            raise UserError(f"{path} has no column {missing[0]!r}, only {', '.join(head[:20])}")
        name, caption = (lower[column.lower()] for column in reading.caption_columns)
    else:
        name, caption = (next((lower[word] for word in of if word in lower), "") for of in (_NAMES, _WORDS))
    if not name or not caption:  # columns that nobody names may be anything
        raise UserError(
            f"{path} has no columns of names and captions; expected file_name or filepath beside caption, title or text, or say which: "
            "--caption-columns NAME CAPTION"
        )
    values: dict[str, str] = {}
    several: dict[str, None] = {}
    for row in rows:
        key, text = caption_in(row.get(name)), caption_in(row.get(caption))
        if key and text and values.setdefault(key, text) != text:
            several[key] = None
    if several:
        notes.append(f"{path} has several captions for {pictures(len(several))}, as {next(iter(several))}; the first one counts")
    return Pictures(names).find(Table("", values)).values  # its own folder says nothing: it need not lie in the source


def _rows(path: Path) -> tuple[list[str], Iterator[Mapping[str, Any]]]:
    """The head of a table, and its rows."""
    if path.suffix.lower() not in _TABLES:
        raise UserError(f"--captions {path} is no table; expected CSV, TSV or JSON lines of names and captions")
    if path.stat().st_size > _MOST_BYTES:
        raise UserError(
            f"{path} has {path.stat().st_size / 2**30:.1f} GiB; expected a table of captions of at most 1; put them into Parquet or "
            "WebDataset, beside their pictures"
        )
    text = decoded(path.read_bytes())
    if path.suffix.lower() == ".jsonl":
        try:
            objects = [json.loads(line) for line in filter(str.strip, text.splitlines())]
        except (ValueError, RecursionError):
            objects = [None]
        if not all(isinstance(found, dict) for found in objects):
            raise UserError(f"{path} is not one object of JSON a line; mend it")
        return list(dict.fromkeys(key for found in objects[:100] for key in found)), iter(objects)
    first = text.partition("\n")[0]
    # Where tabs part cells, a quotation mark is a letter of the caption, and nobody closes it.
    tabs = path.suffix.lower() != ".csv"
    comma = ";" if ";" in first and "," not in first else ","
    reader = csv.DictReader(
        io.StringIO(text, newline=""), delimiter="\t" if tabs else comma, quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
    )
    try:
        return [*(reader.fieldnames or ())], iter(list(reader))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num:,}: {error}; a quotation mark there is not closed, or write JSON lines") from None
