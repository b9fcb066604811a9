"""What is said in words of pictures, for training on image–text pairs."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simclr import files
from simclr.data.sources.caption_tables import Rows, rows_of
from simclr.data.sources.name_tables import Found, Pictures, Table, decoded, is_utf8, plain
from simclr.data.sources.reading import Reading, pictures
from simclr.data.sources.source import Tree
from simclr.errors import UserError

_PATHS = ("file_name", "filename", "filepath", "file", "image", "image_name", "image_path", "img", "path", "name")
_NAMES = (*_PATHS, "key", "image_id")  # ids last: a running number is the name of another picture's file, too
_WORDS = ("caption", "captions", "title", "text", "sentence", "description", "raw", "comment", "alt_text")
_COLUMNS = ("caption", "captions", "text", "TEXT", "sentence", "sentences", "title", "description", "prompt", "alt_text")
_SURROGATES = re.compile(r"[\ud800-\udfff]")


def taken(tree: Tree, reading: Reading, names: Collection[str], notes: list[str]) -> Mapping[str, str]:
    """Picture → caption, as `reading.captions` says; what an owner may not expect goes into `notes`.

    Raises UserError where no picture has one, and for what is no text."""
    said = _Said()
    if reading.captions == "auto":
        where = str(tree.spec)
        missing = "; expected WebDataset with KEY.txt, or Parquet with a column caption or text, or give a file: --captions FILE"
        for name, value in tree.captions().items():
            said.add(name, value, f"{where}: {name}")
    else:
        where, missing = reading.captions, "; see that its names are those of the pictures"
        said = _of_table(reading, names, notes)
    if not said.first:
        raise UserError(f"{where} has captions of none of {pictures(len(names))}{missing}")
    notes += said.notes(where)
    silent = sum(1 for name in names if not name.endswith("/") and not said.first.get(name))
    if silent:
        notes.append(f"{pictures(silent)} have no caption; those that would train are skipped")
    return said.first


def captions_column(schema: Any, others: Collection[str | None]) -> str | None:
    """The column of captions of an Arrow schema, of texts or of lists of texts; `others` are taken."""
    for name in _COLUMNS:
        if name in schema.names and name not in others:
            kind = schema.field(name).type
            if str(getattr(kind, "value_type", kind)) in ("string", "large_string"):
                return name
    return None


@dataclass(slots=True)
class _Said:
    """Captions as they come in."""

    first: dict[str, str] = field(default_factory=dict)
    """Picture, or what a table calls it → its first caption, in whole letters and without space around it."""
    several: dict[str, None] = field(default_factory=dict)
    """Those with different ones."""
    strange: dict[str, None] = field(default_factory=dict)
    """Those with one that is not UTF-8."""

    def add(self, name: str, value: Any, where: str) -> None:
        """Raises UserError for a value that is neither a text, or its bytes, nor a list of texts."""
        texts = value if isinstance(value, list) else [value]
        if not all(text is None or isinstance(text, str | bytes) for text in texts):
            raise UserError(f"{where} has {value!r:.60} for a caption; expected a text or a list of texts")
        clean: dict[str, None] = {}
        for text in filter(None, texts):
            read = decoded(text, "surrogateescape") if isinstance(text, bytes) else text
            whole = _SURROGATES.sub("\ufffd", read)
            if whole != read or (isinstance(text, bytes) and not is_utf8(text)):
                self.strange[name] = None
            if stripped := whole.strip():
                clean[stripped] = None
        if clean and (len(clean) > 1 or self.first.get(name, next(iter(clean))) not in clean):
            self.several[name] = None
        for text in clean:
            self.first.setdefault(name, text)

    def of(self, key_of: Mapping[str, str]) -> _Said:
        """The same of pictures (picture → what the table calls it)."""
        first = {picture: self.first[key] for picture, key in key_of.items() if key in self.first}
        some = [dict.fromkeys(picture for picture, key in key_of.items() if key in found) for found in (self.several, self.strange)]
        return _Said(first, *some)

    def notes(self, where: str) -> Iterator[str]:
        if self.several:
            some = next(iter(self.several))
            yield f"{where} has several captions for {pictures(len(self.several))}, as {some}; the first one counts"
        if self.strange:
            are = "1 caption is" if len(self.strange) == 1 else f"{len(self.strange):,} captions are"
            some = next(iter(self.strange))
            yield f"{are} not UTF-8 in {where}, as that of {some}; read as UTF-16 or Latin-1, or with � for what is no letter"


def _of_table(reading: Reading, names: Collection[str], notes: list[str]) -> _Said:
    path = files.user_path(reading.captions)
    head, rows = rows_of(path, notes)
    columns, caption = _columns(path, head, reading.caption_columns)
    rows = [(line, cells) for line, cells in rows if cells[caption] not in (None, "", [])]
    known = Pictures(names)
    found: dict[int, Found] = {}
    meant: dict[int, Mapping[str, str]] = {}
    for column in columns:
        keys = {key: key for _, cells in rows if (key := _key(cells[column]))}
        found[column] = known.find(Table("", keys))  # its own folder says nothing: it need not lie in the source
        meant[column] = found[column].values or (_by_file(known, keys) if len(columns) > 1 else {})
    _require_agreement(path, head, rows, meant, head[caption])
    column = max(columns, key=lambda column: found[column].named)
    said = _Said()
    for line, cells in rows:
        if key := _key(cells[column]):
            said.add(key, cells[caption], f"{path}, line {line:,}")
    lost = len(said.first.keys() - set(found[column].values.values()))
    notes.append(
        f"captions are the column {head[caption]} of {path}, by {head[column]} ({found[column].by}); {lost:,} of its {len(said.first):,} "
        "names are those of no picture, or of several"
    )
    return said.of(found[column].values)


def _columns(path: Path, head: Sequence[str], given: tuple[str, str] | None) -> tuple[list[int], int]:
    """The columns that may have names of pictures, the likeliest first, and the one of captions."""
    lower = [column.lower() for column in head]
    wanted = {column.lower() for column in given} if given else {*_NAMES, *_WORDS}
    if twice := [column for column, count in Counter(lower).items() if count > 1 and column in wanted]:
        raise UserError(f"{path} has two columns {twice[0]}, and nobody says which counts; rename one")
    if given:
        missing = [column for column in given if column.lower() not in lower]
        if missing:
            raise UserError(f"{path} has no column {missing[0]!r}, only {', '.join(head[:20])}")
        name, caption = (lower.index(column.lower()) for column in given)
        return [name], caption
    names, captions = ([lower.index(word) for word in of if word in lower] for of in (_NAMES, _WORDS))
    if not names or not captions:  # columns that nobody names may be anything
        raise UserError(
            f"{path} has no columns of names and captions; expected file_name or filepath beside caption, title or text, or say which: "
            "--caption-columns NAME CAPTION"
        )
    return names, captions[0]


def _key(cell: Any) -> str:
    return plain(str(cell).strip()) if isinstance(cell, str | int) and not isinstance(cell, bool) else ""


def _by_file(known: Pictures, keys: Collection[str]) -> Mapping[str, str]:
    """Picture → the key whose last part is the picture's file, where no other key ends so. That is too little to take a caption by, and
    enough to doubt another column."""
    count = Counter(key.rpartition("/")[2] for key in keys)
    return known.find(Table("", {file: key for key in keys if count[file := key.rpartition("/")[2]] == 1})).values


def _require_agreement(path: Path, head: Sequence[str], rows: Rows, found: Mapping[int, Mapping[str, str]], caption: str) -> None:
    """Raise UserError where two columns of a row name different pictures. `found`: column → picture → what the column calls it."""
    named = {column: {key: picture for picture, key in of.items()} for column, of in found.items() if of}
    for (one, of_one), (other, of_other) in itertools.combinations(named.items(), 2):
        for line, cells in rows:
            a, b = of_one.get(_key(cells[one])), of_other.get(_key(cells[other]))
            if a and b and a != b:
                raise UserError(
                    f"{path}, line {line:,}: the column {head[one]} names {a}, and {head[other]} names {b}; say which of them counts: "
                    f"--caption-columns {head[one]} {caption}, or {head[other]} {caption}"
                )
