"""Text files that state something of pictures by their names: a class, a split. Tables, lists, and how their names are found."""

from __future__ import annotations

import codecs
import csv
import functools
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from simclr.errors import UserError

_NAMES = (
    *("file_name", "filename", "file", "image", "image_id", "imageid", "image_name", "img", "image_path", "filepath", "path", "name", "id"),
    "image index",
)
_AMBIGUOUS = ""
_ESCAPED, _NOT_ASCII = re.compile("[\udc80-\udcff]"), re.compile("[^\x00-\x7f]")


@dataclass(frozen=True, slots=True)
class Table:
    """A file of names and values."""

    path: str
    values: Mapping[str, str]
    """Name as in the file → value. Names that the file gives several values are missing."""
    several: tuple[str, ...] = ()
    """Names that have several values."""
    known: bool = True
    """Whether the head calls the column of values as was wanted, or there is no head."""
    column: str = ""
    others: tuple[str, ...] = ()
    """Other columns that are called as was wanted."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a table said of pictures."""

    values: dict[str, str]
    """Picture, by its path in the source → value."""
    several: tuple[str, ...]
    """Pictures to which it gives several values."""
    by: str
    """How pictures were found in it."""

    @property
    def named(self) -> int:
        return len(self.values) + len(self.several)


def encoding_of(data: bytes) -> str:
    """utf-16 where a byte-order mark says so; latin-1, in which every byte is a letter, where more bytes are no UTF-8 than there are
    letters in UTF-8 that are not ASCII; else utf-8-sig, which passes over a byte-order mark. Bytes of a last letter that is cut do not
    count beside other letters."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    if is_utf8(data):
        return "utf-8-sig"
    text = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode(data)  # without the bytes of a last letter that is cut
    bad = sum(1 for _ in _ESCAPED.finditer(text))
    letters = sum(1 for _ in _NOT_ASCII.finditer(text)) - bad
    return "latin-1" if bad > letters or not letters else "utf-8-sig"


def is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def decoded(data: bytes, errors: str = "backslashreplace") -> str:
    """Text in the encoding that it seems to have. `errors`: what becomes of single bytes that are not UTF-8, as in `bytes.decode`; as they
    are by themselves, two names of classes that differ in them stay two."""
    encoding = encoding_of(data)
    return data.decode(encoding, "replace" if encoding == "utf-16" else errors)


def read_table(path: str, data: bytes, want: Sequence[str], columns: tuple[str, str] | None = None) -> Table | None:
    """The names and values in a text file, None if it does not look like one of names and values.

    CSV with or without a head, TSV, JSON lines with `file_name`, and plain text with a name and a value on each line. `columns` names
    the two of a table with a head; else they are guessed by common names, `want` those of the value. Raises UserError for `columns`
    that the file does not have.
    """
    text, ending = decoded(data), PurePosixPath(path).suffix.lower()
    rows: list[list[str]]
    if ending == ".jsonl":
        rows = _json_rows(text)
    elif ending in (".csv", ".tsv") or (text[:4096].count("\t") and ending == ".txt"):
        head = text[:4096].splitlines()[:1]
        separator = "\t" if ending != ".csv" else ";" if head and ";" in head[0] and "," not in head[0] else ","
        try:
            rows = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(text, newline=""), delimiter=separator) if any(row)]
        except csv.Error:  # a field of more than 128 KiB, as an outline of an organ
            return None
    else:
        rows = [line.rsplit(None, 1) for line in text.splitlines() if line.strip() and not line.startswith("#")]
    width = Counter(len(row) for row in rows[:200]).most_common(1)[0][0] if rows else 0
    while rows and len(rows[0]) < width:  # a number of lines, a title
        rows.pop(0)
    chosen = _columns(path, rows, want, columns) if rows else None
    if chosen is None:
        return None
    name, value, headed = chosen
    values: dict[str, str] = {}
    several: dict[str, None] = {}
    for row in rows[headed:]:
        if len(row) <= max(name, value) or not row[name] or not row[value]:
            continue
        found = row[value]
        if headed and rows[0][value].lower() == "predictionstring":
            found = found.split()[0]  # ImageNet's: class and box, class and box …
        if values.setdefault(row[name], found) != found:
            several[row[name]] = None
    for key in several:
        del values[key]
    column = rows[0][value] if headed else ""
    others = tuple(cell for cell in rows[0] if cell.lower() in want and cell != column) if headed and columns is None else ()
    return Table(path, values, tuple(several), not headed or columns is not None or column.lower() in want, column, others)


def _json_rows(text: str) -> list[list[str]]:
    """The objects of JSON lines as a table with a head."""
    objects = []
    for line in filter(str.strip, text.split("\n")):  # a text within may have the other signs at which Python ends a line
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            return []
        if not isinstance(found, dict):
            return []
        objects.append(found)
    head = list(dict.fromkeys(key for found in objects[:100] for key in found))
    return [head, *([str(found.get(key, "")) for key in head] for found in objects)] if head else []


def _columns(
    path: str, rows: Sequence[Sequence[str]], want: Sequence[str], columns: tuple[str, str] | None
) -> tuple[int, int, bool] | None:
    """(column of names, column of values, whether the first row is a head)."""
    head = [cell.lower() for cell in rows[0]]
    if columns is not None:
        missing = [column for column in columns if column.lower() not in head]
        if missing:
            raise UserError(f"{path} has no column {missing[0]!r}; its first line has {', '.join(rows[0][:20])}")
        return head.index(columns[0].lower()), head.index(columns[1].lower()), True
    names = [head.index(word) for word in _NAMES if word in head]
    values = [head.index(word) for word in want if word in head]
    if names and values and names[0] != values[0]:
        return names[0], values[0], True
    if len(rows[0]) == 2:
        # Two columns without known words: a head only if its first cell has no ending while the others have.
        endings = Counter(bool(PurePosixPath(row[0]).suffix) for row in rows[1:200] if row)
        headed = bool(names or values) or (not PurePosixPath(rows[0][0]).suffix and endings[True] > endings[False])
        return 0, 1, headed
    if PurePosixPath(path).name == "val_annotations.txt":  # Tiny-ImageNet's: name, class, and the box of the object
        return 0, 1, False
    return None


class Pictures:
    """Pictures by their paths in the source, to be found by what a table calls them: the whole path, the path below the table's folder,
    or the end of the path, also without its ending, where no other picture has the same end."""

    def __init__(self, names: Collection[str]) -> None:
        self._given = names
        self._ends: dict[str, dict[str, str]] = {}

    def __len__(self) -> int:
        return len(self._given)

    @functools.cached_property
    def names(self) -> list[str]:
        """All in memory, from the first table on in which they are looked up."""
        return list(self._given)

    def find(self, table: Table, among: Collection[str] | None = None) -> Found:
        """What `table` says of the pictures, or of those `among` them."""
        folder = table.path.rpartition("/")[0]
        keys = {plain(key): value for key, value in table.values.items()}
        many = [plain(key) for key in table.several]
        best = Found({}, (), "name")
        for form, by, prefix in (
            *((form, by, "") for form, by in (("path", "path"),)),
            *((("path", "path below the file", f"{folder}/"),) if folder else ()),
            *(("3", "last 3 parts of the path", ""), ("2", "last 2 parts of the path", ""), ("1", "name", "")),
        ):
            for bare in (False, True):
                ends = self._index(form, bare)
                values = {
                    name: value for key, value in keys.items() if (name := ends.get(prefix + key)) and (among is None or name in among)
                }
                several = tuple(name for key in many if (name := ends.get(prefix + key)) and (among is None or name in among))
                if len(values) + len(several) > best.named:
                    best = Found(values, several, f"{by} without ending" if bare else by)
            if best.named in (len(keys) + len(many), len(self.names)):
                break
        return best

    def _index(self, form: str, bare: bool) -> dict[str, str]:
        """End of the path → picture."""
        key = f"{form} {bare}"
        if key not in self._ends:
            cut: Callable[[str], str] = (lambda name: name) if form == "path" else _Last(int(form))
            ends: dict[str, str] = {}
            for name in self.names:
                end = _stem(cut(name)) if bare else cut(name)
                ends[end] = _AMBIGUOUS if end in ends else name
            self._ends[key] = ends
        return self._ends[key]


@dataclass(frozen=True, slots=True)
class _Last:
    """The last `parts` of a path."""

    parts: int

    def __call__(self, name: str) -> str:
        return "/".join(name.split("/")[-self.parts :])


def _stem(path: str) -> str:
    """`path` without the ending of its last part."""
    stem, dot, ending = path.rpartition(".")
    return stem if dot and stem and "/" not in ending else path


def plain(key: str) -> str:
    """A path as a source writes it."""
    return key.replace("\\", "/").removeprefix("./").lstrip("/")
