"""What is said in words of pictures, for training on image–text pairs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from simclr import files
from simclr.data.sources.name_tables import Pictures, read_table
from simclr.data.sources.reading import Reading, pictures
from simclr.data.sources.source import Tree
from simclr.errors import UserError

_WORDS = ("caption", "captions", "title", "text", "sentence", "description", "raw", "comment", "alt_text")
_COLUMNS = ("caption", "captions", "text", "TEXT", "sentence", "sentences", "title", "description", "prompt", "alt_text")
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
    if path.suffix.lower() not in _TABLES:
        raise UserError(f"--captions {path} is no table; expected CSV, TSV or JSON lines of names and captions")
    table = read_table(str(path), path.read_bytes(), _WORDS, reading.caption_columns, first_counts=True)
    if table is None or not table.column or not table.known:  # two columns that nobody names may be anything
        raise UserError(
            f"{path} has no columns of names and captions; expected file_name or filepath beside caption, title or text, or say which: "
            "--caption-columns NAME CAPTION"
        )
    if table.several:
        notes.append(f"{path} has several captions for {pictures(len(table.several))}, as {table.several[0]}; the first one counts")
    return Pictures(names).find(replace(table, path="")).values  # its own folder says nothing: it need not lie in the source
