"""Classes of pictures from files beside them: tables of names and classes, and ImageNet's own lists."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from simclr.data.sources.splits import Kind, split_of
from simclr.errors import UserError

_NAMES = (
    "file_name",
    "filename",
    "file",
    "image",
    "image_id",
    "imageid",
    "image_name",
    "img",
    "image_path",
    "filepath",
    "path",
    "name",
    "id",
)
_LABELS = (
    *("label", "class", "class_name", "classname", "category", "category_name", "category_id", "class_id", "label_id", "target"),
    *("breed", "species", "diagnosis", "dx", "labels", "y", "wnid", "synset", "predictionstring"),
)
_SPLITS = ("split", "set", "subset", "partition", "fold", "is_test", "phase")
_NO_CLASSES = frozenset({"submission", "partition", "partitions", "split", "splits", "fold", "folds", "bbox", "landmarks"})
"""Words in the names of files whose values are no classes."""
_MOST_BYTES = 256 << 20
_FIT = 0.9  # a file is taken for one of labels if it names this share of the pictures that have none
_NEAR = 0.05


@dataclass(frozen=True, slots=True)
class Table:
    """A file of names and values: classes, or splits."""

    path: str
    values: Mapping[str, str]
    """Name as in the file → value. Names that the file gives several values are missing."""
    several: tuple[str, ...] = ()
    """Names that have several values."""
    columns: tuple[str, str] | None = None
    """Names of the two columns that were read, where the file names its columns."""


@dataclass(frozen=True, slots=True)
class Taken:
    """What a file said of pictures."""

    path: str
    values: dict[str, str]
    """Picture, by its path in the source → value."""
    several: tuple[str, ...] = ()
    """Pictures for which the file states several classes, and which have none therefore."""
    notes: tuple[str, ...] = ()
    by: str = "name"
    """How pictures were found in it."""
    also: tuple[str, ...] = ()
    """Other files that it took."""


def read_table(path: str, data: bytes, want: Sequence[str] = _LABELS, columns: tuple[str, str] | None = None) -> Table | None:
    """The names and values in a text file, None if it does not look like one of names and values.

    CSV with or without a head, TSV, JSON lines with `file_name`, and plain text with a name and a value on each line. `columns` names
    the two of a table with a head; else they are guessed by common names, `want` those of the value. Raises UserError for `columns`
    that the file does not have.
    """
    if len(data) > _MOST_BYTES:
        return None
    text = data.decode("utf-8-sig", errors="surrogateescape")
    ending = PurePosixPath(path).suffix.lower()
    if ending == ".jsonl":
        rows = _json_rows(text)
    elif ending in (".csv", ".tsv") or (text[:4096].count("\t") and ending == ".txt"):
        head = text[:4096].splitlines()[:1]
        separator = "\t" if ending != ".csv" else ";" if head and ";" in head[0] and "," not in head[0] else ","
        rows = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(text, newline=""), delimiter=separator) if any(row)]
    else:
        rows = [line.rsplit(None, 1) for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if not rows:
        return None
    chosen = _columns(path, rows, want, columns)
    if chosen is None:
        return None
    name, value, headed = chosen
    values: dict[str, str] = {}
    several: dict[str, None] = {}
    for row in rows[headed:]:
        if len(row) <= max(name, value) or not row[name]:
            continue
        found = row[value]
        if headed and rows[0][value].lower() == "predictionstring":
            found = found.split()[0] if found.split() else ""  # ImageNet's: class and box, class and box …
        if values.setdefault(row[name], found) != found:
            several[row[name]] = None
    for key in several:
        del values[key]
    return Table(path, values, tuple(several), (rows[0][name], rows[0][value]) if headed else None)


def _json_rows(text: str) -> list[list[str]]:
    """The objects of JSON lines as a table with a head."""
    objects = []
    for line in filter(str.strip, text.splitlines()):
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            return []
        if not isinstance(found, dict):
            return []
        objects.append(found)
    head = list(dict.fromkeys(key for found in objects[:100] for key in found))
    return [head, *([str(found.get(key, "")) for key in head] for found in objects)]


def _columns(
    path: str, rows: Sequence[Sequence[str]], want: Sequence[str], columns: tuple[str, str] | None
) -> tuple[int, int, bool] | None:
    """(column of names, column of values, whether the first row is a head)."""
    head = [cell.lower().strip() for cell in rows[0]]
    if columns is not None:
        missing = [column for column in columns if column.lower() not in head]
        if missing:
            raise UserError(f"{path} has no column {missing[0]!r}; its first line has {', '.join(rows[0][:20])}")
        return head.index(columns[0].lower()), head.index(columns[1].lower()), True
    names = [head.index(word) for word in _NAMES if word in head]
    values = [head.index(word) for word in want if word in head]
    if names and values and names[0] != values[0]:
        return names[0], values[0], True
    widths = Counter(len(row) for row in rows)
    if widths.most_common(1)[0][0] == 2:
        # Two columns without known words: a head only if its first cell has no ending while the others have.
        endings = Counter(bool(PurePosixPath(row[0]).suffix) for row in rows[1:200] if row)
        headed = bool(names or values) or (not PurePosixPath(rows[0][0]).suffix and endings[True] > endings[False])
        return 0, 1, headed
    if PurePosixPath(path).name == "val_annotations.txt":  # Tiny-ImageNet's: name, class, and the box of the object
        return 0, 1, False
    return None


def matched(table: Table, names: Iterable[str]) -> Taken:
    """What `table` says of the pictures `names`: by their whole path, their path below the table's folder, or the end of their path, also
    without its ending, where no other of them has the same end."""
    names = list(names)
    beside = str(PurePosixPath(table.path).parent)
    below = "" if beside == "." else beside + "/"
    keys = {_plain(key): value for key, value in table.values.items()}
    many = {_plain(key) for key in table.several}
    best: dict[str, str] = {}
    several: list[str] = []
    best_by = "name"
    forms: list[tuple[str, Callable[[str], str]]] = [
        ("path", lambda name: name),
        ("path below the file", lambda name: name.removeprefix(below)),
    ]
    forms += [(f"last {n} parts of the path", lambda name, n=n: "/".join(name.split("/")[-n:])) for n in (3, 2)]  # type: ignore[misc]
    forms += [("name", lambda name: name.rpartition("/")[2])]
    forms += [(f"{by} without ending", lambda name, form=form: _stem(form(name))) for by, form in reversed(forms)]  # type: ignore[misc]
    for by, form in forms:
        ends = [form(name) for name in names]
        seen = Counter(ends)
        found = {name: keys[end] for name, end in zip(names, ends, strict=True) if end in keys and seen[end] == 1}
        found_many = [name for name, end in zip(names, ends, strict=True) if end in many and seen[end] == 1]
        if len(found) + len(found_many) > len(best) + len(several):
            best, several, best_by = found, found_many, by
        if len(best) + len(several) == len(names):
            break
    return Taken(table.path, best, tuple(several), by=best_by)


def _stem(path: str) -> str:
    """`path` without the ending of its last part."""
    stem, dot, ending = path.rpartition(".")
    return stem if dot and "/" not in ending else path


def _plain(key: str) -> str:
    return key.replace("\\", "/").removeprefix("./").lstrip("/")


def guessed(texts: Mapping[str, Callable[[], bytes]], names: Sequence[str], classes: set[str]) -> tuple[Taken | None, str]:
    """The classes of the pictures `names`, which have none by their folders, from one of the files `texts`, None if no file fits; and a
    sentence about a file that nearly fits.

    `classes`: those of the training pictures. A file fits if it names nearly all pictures and has at least two classes, of which one is
    among `classes` where there are any. Numbers stand for the sorted `classes` if they count them from 0.
    """
    if not names:
        return None, ""
    best: Taken | None = None
    near = ""
    for path in sorted(texts, key=lambda path: (-len(_shared(path, names[0])), path)):
        if PurePosixPath(path).suffix.lower() == ".mat" or _NO_CLASSES & set(re.findall("[a-z]+", path.rpartition("/")[2].lower())):
            continue
        data = texts[path]()
        found = _numbered_list(path, data, texts, names, classes)
        if found is None:
            table = read_table(path, data)
            found = matched(table, names) if table is not None else None
            named = len(found.values) + len(found.several) if found is not None else 0
            if found is None or named < _FIT * len(names):
                if named > _NEAR * len(names):
                    near = f"{path} names {named:,} of {len(names):,} pictures and was not taken for their classes; --labels FILE takes it"
                continue
            found = _as_classes(found, classes)
        different = len(set(found.values.values())) if found is not None else 0
        if found is None or different < min(2, len(names)) or different > max(len(names) / 2, 10):  # a line number is no class
            continue
        if classes and not classes & set(found.values.values()):
            continue
        if best is None or len(found.values) > len(best.values):
            best = found
    return best, "" if best is not None else near


def _shared(path: str, name: str) -> str:
    """The folders that two paths share."""
    one, other = path.split("/")[:-1], name.split("/")[:-1]
    shared = [a for a, b in zip(one, other, strict=False) if a == b]
    return "/".join(shared)


def _as_classes(found: Taken, classes: set[str]) -> Taken | None:
    """Numbers as the names of classes, where the file counts the sorted classes from 0."""
    values = set(found.values.values())
    if not classes or values & classes or not all(value.isdigit() for value in values):
        return found
    numbers = {int(value) for value in values}
    if min(numbers) != 0 or max(numbers) >= len(classes):
        return None  # counted from 1, or in another order: which is which, nobody says
    ordered = sorted(classes)
    note = f"{found.path} has numbers from 0, taken as the sorted classes: 0 is {ordered[0]}"
    return Taken(found.path, {name: ordered[int(value)] for name, value in found.values.items()}, found.several, (note,), found.by)


def _numbered_list(
    path: str, data: bytes, texts: Mapping[str, Callable[[], bytes]], names: Sequence[str], classes: set[str]
) -> Taken | None:
    """A list with one class a line, for the pictures in the order of their names: ImageNet's validation. Its ground truth has numbers of
    the devkit, whose meta.mat says which class is which; they do not count the sorted classes."""
    lines = data.decode("utf-8-sig", errors="replace").split()
    if (
        len(lines) != len(names)
        or len(names) < 2
        or any(" " in line.strip() for line in data.decode("utf-8-sig", errors="replace").splitlines())
    ):
        return None
    ordered = sorted(names, key=lambda name: name.rpartition("/")[2])
    if set(lines) <= classes:
        return Taken(path, dict(zip(ordered, lines, strict=True)), by="order of names")
    if not all(line.isdigit() for line in lines):
        return None
    for other in sorted(texts):
        if PurePosixPath(other).name == "meta.mat":
            known = devkit_classes(texts[other](), other)
            if {int(line) for line in lines} <= known.keys():
                note = f"its numbers are the devkit's, which {other} turns into classes"
                values = {name: known[int(line)] for name, line in zip(ordered, lines, strict=True)}
                return Taken(path, values, (), (note,), "order of names", (other,))
    return None


def devkit_classes(data: bytes, where: str) -> dict[int, str]:
    """ILSVRC2012_ID → WNID of ImageNet's meta.mat. The numbers are the devkit's own order, not that of the sorted WNIDs. Raises UserError
    if the file is none of this kind."""
    import scipy.io  # takes 0.2 s

    try:
        rows = scipy.io.loadmat(io.BytesIO(data), squeeze_me=True)["synsets"]
        found = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in rows.ravel() if int(row["num_children"]) == 0}
    except Exception as error:  # SciPy raises nearly anything for a damaged file
        raise UserError(
            f"{where} is no meta.mat of ImageNet's devkit ({type(error).__name__}: {error}); fetch it again, or move it away"
        ) from None
    return found


def given(path: str, data: bytes, names: Sequence[str], columns: tuple[str, str] | None, want: Sequence[str] = _LABELS) -> Taken:
    """The values that a user's own file states for the pictures `names`. Raises UserError if it has no such columns, or names none."""
    table = read_table(path, data, want, columns)
    if table is None:
        first = data[:4096].decode("utf-8-sig", errors="replace").splitlines()[:1]
        raise UserError(
            f"{path} is no table of names and values: its first line is {first[0][:80] if first else ''!r}; expected two columns, "
            "or a head with known names (file_name, label); --label-columns NAME VALUE says which"
        )
    found = matched(table, names)
    if not found.values and not found.several:
        key = next(iter(table.values), "")
        raise UserError(f"{path} names none of the pictures: it has {key!r}, the source has {names[0] if names else 'no pictures'!r}")
    return found


def lists_of_splits(texts: Mapping[str, Callable[[], bytes]], names: Sequence[str]) -> dict[Kind, list[Taken]]:
    """Files that are called like a split and list names of pictures, one a line: split → such files. A file counts if nine of ten of its
    lines name a picture, and not nearly all pictures are in it."""
    found: dict[Kind, list[Taken]] = {}
    for path in sorted(texts):
        kind, only = split_of(PurePosixPath(path).stem)
        if kind is None or not only or PurePosixPath(path).suffix.lower() not in (".txt", ".csv", ".tsv"):
            continue
        lines = [line.strip() for line in texts[path]().decode("utf-8-sig", errors="surrogateescape").splitlines()]
        lines = [line for line in lines if line and not line.startswith("#")]
        for listed in (lines, [re.split(r"[,;\s]", line)[0] for line in lines], [re.split(r"[,;\s]", line)[0] for line in lines[1:]]):
            taken = matched(Table(path, dict.fromkeys(listed, kind)), names)
            if len(taken.values) >= max(_FIT * len(set(listed)), 1) and (kind == "train" or len(taken.values) < _FIT * len(names)):
                found.setdefault(kind, []).append(taken)
                break
    return found


def splits_of(path: str, data: bytes, names: Sequence[str], columns: tuple[str, str] | None) -> Taken:
    """The splits that a user's file states: a table of names and splits, or a list of the names that are the test split."""
    text = data.decode("utf-8-sig", errors="surrogateescape")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    listed = matched(Table(path, dict.fromkeys(lines, "test")), names)
    if columns is None and len(listed.values) >= _FIT * len(set(lines)):
        return listed
    return given(path, data, names, columns, _SPLITS)
