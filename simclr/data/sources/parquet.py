"""Tables of pictures: Parquet files as Hugging Face has them, and what `datasets` saves to a disk. The door to pyarrow."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from simclr.data.sources.arrow_messages import is_packed
from simclr.data.sources.captions import captions_column
from simclr.data.sources.members import MOST_PICTURE_BYTES, ends_of
from simclr.data.sources.parquet_pages import pages
from simclr.data.sources.source import Data, Part, Tree, Unread, digest, is_image, is_junk, too_long
from simclr.data.sources.webdataset import unnumbered
from simclr.errors import UserError

TABLES = (".parquet", ".arrow")
_IMAGE_NAMES = ("image", "img", "images", "picture", "photo", "jpg", "png", "image_bytes", "bytes", "data", "content")
_LABEL_NAMES = ("label", "labels", "fine_label", "class", "class_name", "class_label", "target", "category", "cls", "y", "coarse_label")
_ROWS, _BUFFER_BYTES = 64, 1 << 20  # read at a time
_BOMB_BYTES, _BOMB_RATIO = 256 << 20, 200  # of a column in a row group: unpacked, and as a multiple of its bytes in the file
_MANY = 1_000_000  # rows that a table may have, whatever its size
_BATCH_BYTES = 128 << 20  # where each row may be the whole dictionary
_MOST_LABEL = 1000  # letters
_KINDS = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"GIF8": ".gif", b"BM": ".bmp", b"II*\0": ".tif", b"MM\0*": ".tif", b"RIFF": ".webp"}


class NoPictures(UserError):
    """A table has no column of pictures."""


def is_parquet_folder(names: Iterable[str]) -> bool:
    """Whether files of these names, of a folder without loose pictures, are tables: Parquet, or Arrow as `datasets` saves it."""
    return any(map(_is_table, names))


def parquet_tree(path: Path) -> Tree:
    """The tree of a table or of all tables below a folder. Raises UserError for a table that is damaged or has no column of pictures."""
    if path.is_file():
        return tables_tree(str(path), {"": path})
    tables: dict[str, Path] = {}
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if _is_table(name) and file.is_file() and (other := tables.setdefault(name[: -len(file.suffix)], file)) != file:
            raise UserError(f"{other} and {file} are called alike; move one of them away")
    return tables_tree(str(path), tables)


def _is_table(name: str) -> bool:
    """By its name; what `datasets` keeps of its computations is none."""
    *folders, file = name.split("/")
    return file.lower().endswith(TABLES) and not file.startswith((".", "cache-")) and not any(map(is_junk, folders))


@dataclass(frozen=True, slots=True)
class _Table:
    """A file of rows."""

    path: Path
    schema: Any
    groups: tuple[int, ...]
    """Rows of each row group, or record batch."""
    content: Any
    """Metadata of a Parquet file; the record batches of an Arrow file, mapped."""

    def batches(self, group: int, column: str, inner: str = "") -> Iterator[Any]:
        """Pieces of a column, or of its field `inner`, of a row group. Each call may be in another thread."""
        with _sound(self.path):
            if isinstance(self.content, list):
                found = self.content[group].column(column)
                found.validate(full=True)  # a place outside the file would crash the process
                yield found.field(inner) if inner else found
                return
            # Without a buffer all of a row group would be read at once, which may be the whole file.
            with pyarrow.parquet.ParquetFile(self.path, metadata=self.content, buffer_size=_BUFFER_BYTES) as file:
                columns = [f"{column}.{inner}" if inner else column]
                rows = self._rows_at_once(group, columns[0])
                for batch in file.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False):
                    yield batch.column(0).field(0) if inner else batch.column(0)

    def _rows_at_once(self, group: int, column: str) -> int:
        """As many rows as fit the memory if each is the column's largest value. Raises UserError for a column that unpacks to far more
        than pictures do."""
        rows, of = _ROWS, self.content.row_group(group)
        for chunk in (of.column(number) for number in range(of.num_columns)):
            of_column = chunk.path_in_schema == column or chunk.path_in_schema.startswith(f"{column}.")
            if not of_column or not chunk.num_values:
                continue
            begin, unpacked, largest = chunk.data_page_offset, 0, 0
            if chunk.has_dictionary_page and 0 < chunk.dictionary_page_offset < begin:
                begin = chunk.dictionary_page_offset
            for page in pages(self.path, begin, chunk.total_compressed_size):
                unpacked += page.unpacked
                bomb = page.unpacked > max(MOST_PICTURE_BYTES, 2 * page.stored)
                if bomb or unpacked > _BOMB_BYTES + _BOMB_RATIO * chunk.total_compressed_size:
                    raise UserError(
                        f"{self.path}: {chunk.total_compressed_size:,} bytes of the column {column} unpack to {unpacked >> 20:,} MiB, "
                        "which no pictures do; write it again without compression"
                    )
                largest = max(largest, page.unpacked * page.repeats)
            rows = max(min(rows, _BATCH_BYTES // max(largest, 1)), 1)
        return rows

    @property
    def most_bytes(self) -> int:
        """Of the pictures of a row group: a column may hold one and name it in every row."""
        return _BOMB_BYTES + _BOMB_RATIO * self.path.stat().st_size

    def values(self, column: str, inner: str = "", raw: bool = False) -> Iterator[Any]:
        """All values of a small column; `raw`: texts may be bytes, where one near them is not UTF-8."""
        for group in range(len(self.groups)):
            for batch in self.batches(group, column, inner):
                with _sound(self.path):
                    found = _plain(batch) if raw else batch.to_pylist()
                yield from found

    def features(self) -> dict[str, dict[str, Any]]:
        """What Hugging Face's `datasets` noted on each column."""
        noted = (self.schema.metadata or {}).get(b"huggingface")
        with contextlib.suppress(ValueError, AttributeError, TypeError, KeyError, RecursionError):
            return {name: about for name, about in json.loads(noted or b"")["info"]["features"].items() if isinstance(about, dict)}
        return {}


@dataclass(frozen=True, slots=True)
class _Columns:
    """Which columns are read."""

    image: str
    fields: tuple[str, ...]
    """bytes and perhaps path, where the pictures' column has fields; () where it is the bytes."""
    label: str | None
    notes: tuple[str, ...]


def tables_tree(spec: str, tables: Mapping[str, Path]) -> Tree:
    """The tree of tables: path in the source, without ending → Parquet or Arrow file.

    Each has a column of pictures (encoded files, alone or as Hugging Face's bytes and path) and perhaps one of labels. The numbers of
    shards are left out of names: data/train-00000-of-00002.parquet has data/train/NAME, where NAME is the picture's own or the number of
    its row. Raises UserError for a table that is damaged or has no column of pictures.
    """
    opened = {name: _open(path) for name, path in tables.items()}
    columns = _columns(list(opened.values()))
    places = unnumbered({name: _names(table, columns) for name, table in opened.items()})
    parts: list[Part] = []
    pieces: dict[str, tuple[_Table, int, dict[str, int]]] = {}
    stated: dict[str, str] = {}
    for name, table in opened.items():
        named = tuple(places[name])
        if columns.label and columns.label in table.schema.names:
            classes = _class_names(table, columns.label)
            labels = (_class(value, classes, table.path) for value in table.values(columns.label))
            stated |= {picture: label for picture, label in zip(named, labels, strict=True) if label is not None}
        begin = 0
        for group, count in enumerate(table.groups):
            part = Part(f"{name or table.path.name}, rows {begin:,} to {begin + count - 1:,}", named[begin : begin + count])
            if count:
                parts.append(part)
                pieces[part.name] = table, group, {picture: row for row, picture in enumerate(part.names)}
            begin += count

    def read(part: Part) -> Iterator[tuple[str, Data]]:
        table, group, row_of = pieces[part.name]
        yield from zip(part.names, _pictures(table, columns, group, [row_of[name] for name in part.names]), strict=True)

    def captions() -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, table in opened.items():
            if (column := captions_column(table.schema, (columns.image, columns.label))) is not None:
                found |= {picture: said for picture, said in zip(places[name], table.values(column, raw=True), strict=True) if said}
        return found

    folders: dict[str, set[str]] = {}
    for name in tables:
        folders.setdefault(name.rpartition("/")[0], set()).add(name.rpartition("/")[2])
    alike = len(folders) > 1 and len({frozenset(names) for names in folders.values()}) == 1
    several = (
        f"tables called alike lie in {len(folders)} folders ({', '.join(sorted(folders)[:3])}) and all are read; give one to read it alone"
    )
    return Tree(
        spec=spec,
        parts=parts,
        read=read,
        stated=stated,
        captions=captions,
        identity=digest(*(f"{name} {ends_of(path)}" for name, path in tables.items())),
        times=digest(*(str(path.stat().st_mtime_ns) for path in tables.values())),
        notes=(*columns.notes, *([several] if alike else [])),
    )


def _plain(batch: Any) -> Any:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        kind = pyarrow.large_binary()
        return batch.cast(pyarrow.list_(kind) if pyarrow.types.is_nested(batch.type) else kind).to_pylist()


@contextlib.contextmanager
def _sound(path: Path) -> Iterator[None]:
    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} ends early or is damaged ({(str(error).splitlines() or [''])[0]}); fetch it again") from None


def _open(path: Path) -> _Table:
    table = _opened(path)
    if sum(table.groups) > _MANY + path.stat().st_size:
        raise UserError(
            f"{path} states {sum(table.groups):,} rows in {path.stat().st_size:,} bytes, in which no pictures fit; fetch it again"
        )
    return table


def _opened(path: Path) -> _Table:
    with _sound(path):
        if path.suffix.lower() == ".parquet":
            with pyarrow.parquet.ParquetFile(path) as file:
                groups = tuple(file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups))
                return _Table(path, file.schema_arrow, groups, file.metadata)
        mapped = pyarrow.memory_map(str(path))
        random_access = mapped.read(6) == b"ARROW1"
        mapped.seek(8 if random_access else 0)
        if any(map(is_packed, pyarrow.ipc.MessageReader.open_stream(mapped))):
            raise UserError(
                f"{path} is compressed, so that all of it would be in memory at once; write it without compression, or as Parquet"
            )
        mapped.seek(0)
        reader = pyarrow.ipc.open_file(mapped) if random_access else pyarrow.ipc.open_stream(mapped)
        batches = reader.read_all().to_batches()
        return _Table(path, reader.schema, tuple(len(batch) for batch in batches), batches)


def _columns(tables: Sequence[_Table]) -> _Columns:
    """The columns of pictures and labels, by the first table that has rows."""
    first = next((table for table in tables if sum(table.groups)), tables[0])
    about = first.features()
    types = pyarrow.types
    found: dict[str, tuple[str, ...]] = {}
    for column in first.schema:
        kind = about.get(column.name, {}).get("_type", "")
        fields = tuple(inner.name for inner in column.type if inner.name in ("bytes", "path")) if types.is_struct(column.type) else ()
        plain = types.is_binary(column.type) or types.is_large_binary(column.type) or types.is_binary_view(column.type)
        fitting = "bytes" in fields or plain
        if fitting and (kind == "Image" or (kind in ("", "Value", "dict") and _holds_pictures(first, column.name, fields))):
            found[column.name] = fields
    if not found:
        raise NoPictures(
            f"{first.path} has no column of pictures, only {', '.join(first.schema.names)}; expected a column of encoded pictures, "
            "alone or as bytes and path, as Hugging Face writes them"
        )
    image, *others = sorted(found, key=lambda name: _IMAGE_NAMES.index(name) if name in _IMAGE_NAMES else len(_IMAGE_NAMES))
    for table in tables:
        if image not in table.schema.names:
            raise UserError(f"{table.path} has no column {image}, which {first.path} has; give tables of one kind")
    label, notes = _label_column(tables, first)
    if others:
        notes.insert(0, f"pictures are those of the column {image}; {', '.join(others)} are left out")
    return _Columns(image, found[image], label, tuple(notes))


def _holds_pictures(table: _Table, column: str, fields: tuple[str, ...]) -> bool:
    some = next((batch for group in range(len(table.groups)) for batch in table.batches(group, column, "bytes" if fields else "")), ())
    values = [value.as_py() for value, _ in zip(some, range(_ROWS), strict=False)]
    return any(_kind(value) for value in values if value) or ("path" in fields and not any(values))


def _label_column(tables: Sequence[_Table], first: _Table) -> tuple[str | None, list[str]]:
    """The column of classes, and what is to be said. Of several the one with the most classes."""
    about, types = first.features(), pyarrow.types
    single: list[str] = []
    strange: list[str] = []
    for column in first.schema:
        numbered = about.get(column.name, {}).get("_type") == "ClassLabel"
        if column.name not in _LABEL_NAMES and not numbered:
            continue
        kind = column.type.value_type if types.is_dictionary(column.type) else column.type
        of_classes = types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind) or types.is_boolean(kind)
        (single if of_classes else strange).append(column.name)
    notes = [f"the column {name} ({first.schema.field(name).type}) states no single class a row, and is left out" for name in strange]
    pool = [name for name in single if name in _LABEL_NAMES] or single
    if len(pool) < 2:
        return (pool[0] if pool else None), notes
    sizes = {}
    for name in pool:
        classes = _class_names(first, name)
        values = (value for table in tables if name in table.schema.names for value in table.values(name))
        sizes[name] = len(classes) if classes else len({_class(value, None, first.path) for value in values} - {None})
    named = {name: bool(_class_names(first, name)) or not types.is_integer(first.schema.field(name).type) for name in pool}
    best = max(pool, key=lambda name: (sizes[name], named[name]))
    others = ", ".join(f"{name} ({sizes[name]:,})" for name in pool if name != best)
    return best, [*notes, f"classes are those of the column {best} ({sizes[best]:,}); {others} is left out"]


def _class_names(table: _Table, column: str) -> list[str] | None:
    names = table.features().get(column, {}).get("names")
    return [str(name) for name in names] if isinstance(names, list) else None


def _class(value: Any, classes: list[str] | None, path: Path) -> str | None:
    """The class that a value of a label's column states. −1 is Hugging Face's mark of an unlabelled picture. Raises UserError for a text
    that is no name."""
    if isinstance(value, str) and len(value) > _MOST_LABEL:
        raise UserError(
            f"{path} has a label of {len(value):,} letters, {value[:40]!r} …; expected names of classes; call that column otherwise"
        )
    if value is None or value == -1 or (isinstance(value, str) and not value.strip()):
        return None
    if classes and isinstance(value, int) and 0 <= value < len(classes):
        return classes[value]
    return str(value).strip()


def _names(table: _Table, columns: _Columns) -> list[str]:
    """The pictures' own file names, if all have one and no two the same; else the numbers of their rows."""
    rows = sum(table.groups)
    if "path" in columns.fields:
        paths: dict[str, None] = {}
        for path in table.values(columns.image, "path"):
            name = str(path or "").replace("\\", "/").rpartition("/")[2]
            if name in paths or not is_image(name) or too_long(name):
                break
            paths[name] = None
        if len(paths) == rows:
            return list(paths)
    inner = "bytes" if columns.fields else ""
    batch: Any = next((batch for group in range(len(table.groups)) for batch in table.batches(group, columns.image, inner)), ())
    ending = next((_kind(data) for value in batch if (data := value.as_py())), "")
    return [f"{row:06}{ending}" for row in range(rows)]


def _kind(data: bytes) -> str:
    return next((ending for magic, ending in _KINDS.items() if data.startswith(magic)), "")


def _size_of(value: Any) -> int:
    """Bytes of a picture, which are not copied for that."""
    held = value.get("bytes") if isinstance(value, pyarrow.StructScalar) and value.is_valid and "bytes" in value else value
    return held.as_buffer().size if isinstance(held, pyarrow.BinaryScalar | pyarrow.LargeBinaryScalar) and held.is_valid else 0


def _pictures(table: _Table, columns: _Columns, group: int, rows: Sequence[int]) -> Iterator[Data]:
    """The pictures of some rows, ascending, of a row group. One that is only named, not held, is read where it lies below the table."""
    wanted, begin, left = iter([*rows, -1]), 0, table.most_bytes
    row = next(wanted)
    here = table.path.parent.resolve()
    for batch in table.batches(group, columns.image):
        while begin <= row < begin + len(batch):
            value = batch[row - begin]
            size = _size_of(value)
            left -= size
            if left < 0:
                raise UserError(
                    f"{table.path} names the same pictures again and again, far more of them than it holds; give it without the copies"
                )
            if size > MOST_PICTURE_BYTES:
                yield Unread(f"it has {size / 2**20:,.0f} MiB, more than a picture in a table may have")
                row = next(wanted)
                continue
            value = value.as_py()
            held = value if isinstance(value, bytes) or value is None else value.get("bytes")
            if held is None and isinstance(value, dict) and value.get("path"):
                path = (here / str(value["path"])).resolve()
                held = path if path.is_relative_to(here) else None
            yield held or b""
            row = next(wanted)
        if row < 0:
            return
        begin += len(batch)
