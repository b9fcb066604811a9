"""Classes and splits of pictures from files beside them, ImageNet's own lists among them."""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from simclr.data.sources.name_tables import Found, Pictures, Table, decoded, plain, read_table
from simclr.data.sources.source import MOST_TEXTS, Tree, ending
from simclr.data.sources.splits import Kind, split_of
from simclr.errors import UserError

_LABELS = (
    *("label", "class", "class_name", "classname", "category", "category_name", "category_id", "class_id", "classid", "label_id", "target"),
    *("breed", "species", "diagnosis", "dx", "labels", "y", "wnid", "synset", "predictionstring"),
)
_SPLITS = ("split", "set", "subset", "partition", "phase", "is_test", "is_train")
_NO_CLASSES = re.compile(r"submission|prediction|partition|bbox|landmark|(?<![a-z])(splits?|folds?|kfold)(?![a-z])", re.IGNORECASE)
"""In the names of files whose values are no classes."""
_PACKED, _MOST_MAT_BYTES = 15, 64 << 20  # the type of a packed piece in a .mat file
_FIT = 0.9  # a file is taken for one of labels if it names this share of the pictures that have none
_NEAR = 0.05

Texts = Mapping[str, Callable[[], bytes]]


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


def _taken(path: str, found: Found, table: Table | None = None) -> Taken:
    column = f", column {table.column}" if table is not None and table.column else ""
    other = (
        f"{path} has the columns {', '.join(table.others)} too; --label-columns takes another" if table is not None and table.others else ""
    )
    return Taken(path, found.values, found.several, (other,) if other else (), found.by + column)


def guessed(
    texts: Texts, names: Collection[str], pictures: Callable[[str], Pictures | None], classes: set[str]
) -> tuple[Taken | None, str]:
    """The classes of the pictures `names`, from one of the files `texts`, None if no file fits; and a sentence about one that nearly fits.

    `pictures`: a file's path → all those that it may mean, of which `names` are some; None = it is of others. `classes`: those of the
    training pictures. A file fits if it names nearly all of `names` and has at least two classes, of which one is among `classes` where
    there are any. Numbers count the classes in the order of a list of them, or sorted, from 0.
    """
    fitting: list[Taken] = []
    near, first = "", next(iter(names), "")
    among: set[str] | None = None  # the names in memory, from the first table on that has enough rows
    for path in sorted(texts, key=lambda path: (-_shared(path, first), path)):
        meant = pictures(path)
        if not names or meant is None or not _may_have_classes(path):
            continue
        data = texts[path]()
        taken = _one_a_line(path, data, texts, names, classes)
        if taken is None:
            table = read_table(path, data, _LABELS)
            if table is None or len(table.values) + len(table.several) <= _NEAR * len(names):
                continue
            among = set(names) if among is None else among
            found = meant.find(table, among)
            if found.named < _FIT * len(names) or not table.known:
                if found.named > _NEAR * len(names) and table.column.lower() not in _SPLITS:
                    what = "" if table.known else f", but nobody says that its {table.column!r} are classes,"
                    near = f"{path} names {found.named:,} of {len(names):,} pictures{what} and was not taken; --labels FILE takes it"
                continue
            taken = as_classes(_taken(path, found, table), texts, classes)
        different = len(set(taken.values.values())) if taken is not None else 0
        if taken is None or different < min(2, len(names)) or different > max(len(names) / 2, 10):  # a line number is no class
            continue
        if classes and not classes & set(taken.values.values()):
            continue
        fitting.append(taken)
    if any(_differ(fitting[0], other) for other in fitting[1:]):
        return (
            None,
            f"{fitting[0].path} and {next(t.path for t in fitting if _differ(fitting[0], t))} give other classes; --labels FILE says which",
        )
    return (max(fitting, key=lambda taken: len(taken.values)), "") if fitting else (None, near)


def _differ(one: Taken, other: Taken) -> bool:
    return any(other.values.get(name, value) != value for name, value in one.values.items())


def _may_have_classes(path: str) -> bool:
    return PurePosixPath(path).suffix.lower() != ".mat" and not _NO_CLASSES.search(path.rpartition("/")[2])


def _shared(path: str, name: str) -> int:
    """How many folders two paths share."""
    pairs = zip(path.split("/")[:-1], name.split("/")[:-1], strict=False)
    return sum(1 for one, other in pairs if one == other)


def as_classes(taken: Taken, texts: Texts, classes: set[str]) -> Taken | None:
    """Numbers as the names of classes: by a list of the classes, where there is one, else the sorted ones from 0."""
    values = set(taken.values.values())
    if not classes or values & classes or not all(value.isdigit() for value in values):
        return taken
    numbers = {int(value) for value in values}
    listed = [(path, order) for path in sorted(texts) if path != taken.path and (order := _order(decoded(texts[path]()), classes))]
    if listed:
        path, order = listed[0]
        if any(other != order for _, other in listed) or not numbers <= order.keys():
            return None  # which is which, nobody says
        note = f"{taken.path} has numbers, which {path} turns into classes: {min(order)} is {order[min(order)]}"
        also: tuple[str, ...] = (path,)
    else:
        order, also = dict(enumerate(sorted(classes))), ()
        if min(numbers) != 0 or max(numbers) >= len(classes):
            return None  # counted from 1, or in another order
        note = f"{taken.path} has numbers from 0, taken as the sorted classes: 0 is {order[0]}"
    values_by = {name: order[int(value)] for name, value in taken.values.items()}
    return Taken(taken.path, values_by, taken.several, (*taken.notes, note), taken.by, also)


def _order(text: str, classes: set[str]) -> dict[int, str]:
    """Number → class, where the text lists just the classes, with their numbers or in their order; else {}."""
    lines = [line.split() for line in text.splitlines() if line.strip()]
    if len(lines) != len(classes):
        return {}
    order: dict[int, str] = {}
    for at, words in enumerate(lines):
        named = [plain(word) for word in words if plain(word) in classes] or [
            plain(word).rpartition("/")[2] for word in words if plain(word).rpartition("/")[2] in classes
        ]
        stated = [int(word) for word in words if word.isdigit() and word not in classes]
        if not named:
            return {}
        order[stated[0] if len(words) == 2 and len(stated) == 1 else at] = named[0]
    return order if set(order.values()) == classes else {}


def _one_a_line(path: str, data: bytes, texts: Texts, names: Collection[str], classes: set[str]) -> Taken | None:
    """A list with one class a line, for the pictures in the order of their names: ImageNet's validation. Its ground truth has numbers of
    the devkit, whose meta.mat says which class is which; they do not count the sorted classes."""
    lines = [line.strip() for line in decoded(data).splitlines() if line.strip()]
    if len(lines) != len(names) or len(names) < 2 or any(len(line.split()) != 1 for line in lines):
        return None
    ordered = sorted(names, key=lambda name: name.rpartition("/")[2])
    if set(lines) <= classes and len(set(lines)) < len(lines):  # else it may be a list of the classes
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
        _require_modest(data)
        rows = scipy.io.loadmat(io.BytesIO(data), squeeze_me=True)["synsets"]
        found = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in rows.ravel() if int(row["num_children"]) == 0}
    except Exception as error:  # SciPy raises nearly anything for a damaged file
        raise UserError(
            f"{where} is no meta.mat of ImageNet's devkit ({type(error).__name__}: {error}); fetch it again, or move it away"
        ) from None
    return found


def _require_modest(data: bytes) -> None:
    """Raise ValueError for a .mat file whose packed pieces unpack to more than `_MOST_MAT_BYTES`; SciPy would unpack them all."""
    order, at, given = "<" if data[126:128] == b"IM" else ">", 128, 0
    while at + 8 <= len(data):
        kind, size = struct.unpack_from(f"{order}II", data, at)
        if kind == _PACKED:
            given += len(zlib.decompressobj().decompress(data[at + 8 : at + 8 + size], _MOST_MAT_BYTES + 1))
        if given > _MOST_MAT_BYTES:
            raise ValueError(f"it unpacks to more than {_MOST_MAT_BYTES >> 20} MiB")
        at += 8 + size


def disagreeing(texts: Texts, pictures: Pictures, folder_of: Callable[[str], str | None]) -> Taken | None:
    """A file that names nearly all `pictures` with classes that are not those of their folders, and no part of them."""
    for path in sorted(texts):
        if not _may_have_classes(path):
            continue
        table = read_table(path, texts[path](), _LABELS)
        if table is None or not table.known or len(table.values) + len(table.several) < _FIT * len(pictures):
            continue
        found = pictures.find(table)
        if found.named < _FIT * len(pictures):
            continue
        pairs = {(folder_of(name), value) for name, value in found.values.items()}
        values, folders = {value for _, value in pairs}, {folder for folder, _ in pairs}
        if 2 <= len(values) <= max(len(found.values) / 2, 10) and len(pairs) > max(len(values), len(folders)):
            return _taken(path, found, table)
    return None


def given(path: str, data: bytes, pictures: Pictures, columns: tuple[str, str] | None, want: Sequence[str] = _LABELS) -> Taken:
    """The values that a user's own file states for `pictures`. Raises UserError if it has no such columns, or names none."""
    table = read_table(path, data, want, columns)
    if table is None:
        first = decoded(data[:4096]).splitlines()[:1]
        raise UserError(
            f"{path} is no table of names and values: its first line is {first[0][:80] if first else ''!r}; expected two columns, "
            "or a head with known names (file_name, label); --label-columns NAME VALUE says which"
        )
    found = pictures.find(table)
    if not found.named:
        key = next(iter(table.values), "")
        raise UserError(f"{path} names none of the pictures: it has {key!r}, the source has {pictures.names[0]!r}")
    lost = len(table.values) + len(table.several) - found.named
    taken = _taken(path, found, table)
    unknown = (f"{lost:,} of the {lost + found.named:,} names in {path} are those of no picture, or of several",) if lost else ()
    return replace(taken, notes=(*taken.notes, *unknown))


def _listed(path: str, data: bytes, pictures: Pictures, value: str) -> Taken | None:
    """A list of names, one a line, alone or as the first word: nine of ten of its lines must name a picture."""
    lines = [line.strip() for line in decoded(data).splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    first = [re.split(r"[,;\s]", line)[0] for line in lines]
    for names in (lines, first, first[1:]):
        found = pictures.find(Table(path, dict.fromkeys(names, value)))
        if found.named >= max(_FIT * len(set(names)), 1):
            return _taken(path, found)
    return None


def lists_of_splits(texts: Texts, pictures: Pictures) -> dict[Kind, list[Taken]]:
    """Files that are called like a split and list names of pictures: split → such files. One that lists nearly all pictures is none."""
    found: dict[Kind, list[Taken]] = {}
    for path in sorted(texts):
        kind, only = split_of(PurePosixPath(path).stem)
        if kind is None or not only or PurePosixPath(path).suffix.lower() not in (".txt", ".csv", ".tsv"):
            continue
        taken = _listed(path, texts[path](), pictures, kind)
        if taken is not None and (kind == "train" or len(taken.values) < _FIT * len(pictures)):
            found.setdefault(kind, []).append(taken)
    return found


def splits_of(path: str, data: bytes, pictures: Pictures, columns: tuple[str, str] | None) -> Taken:
    """The splits that a user's file states: a table of names and splits, or a list of the names that are the test split."""
    table = read_table(path, data, _SPLITS, columns)
    found = pictures.find(table) if table is not None else None
    if table is not None and found is not None and found.named:
        if (flag := table.column.lower()) in ("is_test", "is_train"):
            names = {"1": flag[3:], "0": "train" if flag == "is_test" else "test"}
            values = {name: names.get({"true": "1", "false": "0"}.get(value.lower(), value), value) for name, value in found.values.items()}
            return Taken(path, values, found.several, by=found.by)
        stated = (table.column and table.known) or all(split_of(value)[0] for value in found.values.values())
        if stated:
            return _taken(path, found)
    listed = _listed(path, data, pictures, "test") if columns is None else None
    return listed if listed is not None else given(path, data, pictures, columns, _SPLITS)


def few_texts(tree: Tree) -> dict[str, Callable[[], bytes]]:
    """Files that may hold labels, without those of folders that have one for each picture: boxes, or captions."""
    crowded = Counter(map(_folder_and_ending, tree.texts))
    return {path: text for path, text in tree.texts.items() if crowded[_folder_and_ending(path)] <= MOST_TEXTS}


def _folder_and_ending(path: str) -> tuple[str, str]:
    return path.rpartition("/")[0], ending(path)


def of_which(path: str, kinds: Collection[Kind]) -> set[Kind]:
    """Of which kinds of pictures a file may speak, by its own name: LOC_val_solution.csv of val's only."""
    kind = split_of(PurePosixPath(path).stem)[0]
    return {kind} if kind is not None and kind in kinds else set(kinds)
