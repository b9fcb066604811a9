"""Embeddings of images as Parquet parts. The door to pyarrow for them.

part-00000.parquet …     one row an image: `id, split, path, sha256, label, width, height, feature`
failed-00000.parquet …   images that could not be embedded: `id, split, path, label, reason`

The schema's metadata has, under `simclr`, a JSON object: which encoder made the features, with which preprocessing, of which source.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow
import pyarrow.parquet
from numpy.typing import NDArray

from simclr import files
from simclr.data.depth import Rule
from simclr.data.s3 import pins
from simclr.data.s3.place import Place
from simclr.data.s3.quota import make_room
from simclr.data.s3.uri import copy_of, locked
from simclr.data.sources.parquet_pages import require_modest
from simclr.errors import UserError

SCHEMA = 1
DTYPES: dict[str, Any] = {"float32": pyarrow.float32(), "float16": pyarrow.float16()}
PART = re.compile(r"part-\d{5,}\.parquet")
FAILED = re.compile(r"failed-\d{5,}\.parquet")
_KEY = b"simclr"
_INSTEAD = "embed the images again"
_MOST_D = 1 << 20
_COLUMNS = {
    "id": pyarrow.int64(),
    "split": pyarrow.string(),
    "path": pyarrow.string(),
    "sha256": pyarrow.string(),
    "label": pyarrow.string(),
    "width": pyarrow.int32(),
    "height": pyarrow.int32(),
}
_COMPRESSED = dict.fromkeys(_COLUMNS, "zstd")  # the features have no order that a compressor would find
_FAILED = {"id": pyarrow.int64(), **dict.fromkeys(("split", "path", "label", "reason"), pyarrow.string())}


@dataclass(frozen=True, kw_only=True, slots=True)
class About:
    """What made the features of a table, from its schema's metadata."""

    encoder: str
    """Digest of the encoder's weights (hex)."""
    preprocessing: dict[str, Any]
    source: str
    """The images, as the user named them in a shell."""
    d: int
    """Numbers of a feature."""
    dtype: Literal["float32", "float16"] = "float32"
    key: str = ""
    """A hash of all on which the rows depend: features with another key are of another job."""
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Black and white point of pixels of more than 8 bits (`depth.Rule`)."""
    bands: tuple[int, ...] = ()
    """Which bands were red, green and blue; () = those of the pictures."""
    method: str = ""
    """What pretrained the encoder, where neighbours and probes are no score of it (`papers.unscored`); "" elsewhere."""
    schema: int = SCHEMA

    def to_json(self) -> bytes:
        values = {name: getattr(self, name) for name in self.__slots__}
        # Earlier versions refuse fields that they do not know.
        return json.dumps({name: value for name, value in values.items() if value or name not in ("ranges", "bands", "method")}).encode()

    def rule(self, others: Mapping[str, tuple[float, float]] | None = None) -> Rule:
        """How other pictures are to be read to be seen as these were; `others` are ranges of kinds of pixels that these had not."""
        own = {kind: (black, white) for kind, (black, white) in self.ranges.items()}
        return Rule(ranges={**(others or {}), **own}, bands=(self.bands[0], self.bands[1], self.bands[2]) if self.bands else None)


def write_part(file: Path, about: About, rows: Mapping[str, Sequence[Any]], features: NDArray[np.floating[Any]]) -> None:
    """Write a part to `file`: the columns but for `feature` as `rows` (a value per image), and `features` (n, d)."""
    dtype = DTYPES[about.dtype]
    flat = pyarrow.array(np.ascontiguousarray(features, about.dtype).reshape(-1), dtype)
    columns = [pyarrow.array(list(map(_text, rows[name])), kind) for name, kind in _COLUMNS.items()]
    columns.append(pyarrow.FixedSizeListArray.from_arrays(flat, about.d))
    fields = [*_COLUMNS.items(), ("feature", pyarrow.list_(dtype, about.d))]
    schema = pyarrow.schema(fields, metadata={_KEY: about.to_json()})
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, schema=schema), file, compression=_COMPRESSED, use_dictionary=False)


def write_failed(file: Path, about: About, rows: Sequence[tuple[int, str, str, str | None, str]]) -> None:
    """Write the images that could not be embedded to `file`: id, split, path, label and reason of each."""
    columns = [pyarrow.array([_text(row[i]) for row in rows], kind) for i, kind in enumerate(_FAILED.values())]
    schema = pyarrow.schema(list(_FAILED.items()), metadata={_KEY: about.to_json()})
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, schema=schema), file)


def write_table(file: Path, columns: dict[str, list[Any]]) -> None:
    """Write columns of plain values to a Parquet file."""
    with files.whole(file) as scratch:
        pyarrow.parquet.write_table(pyarrow.table(columns), scratch)


def _text(value: Any) -> Any:
    """A text without what UTF-8 cannot hold: names of files may be bytes of any encoding."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def about_in(file: Path) -> About:
    """What made the features in `file`. Raises UserError if it is no such part."""
    try:
        return _about(pyarrow.parquet.read_schema(file), file)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file} is no Parquet file that can be read ({_short(error)}); {_INSTEAD}") from None


def merge(parts: Sequence[Path], file: Path) -> None:
    """Write the rows of all `parts`, in their order, to one `file`; a part's rows are in memory at a time."""
    with files.whole(file) as scratch, contextlib.ExitStack() as stack:
        writer = None
        for part in parts:
            with pyarrow.parquet.ParquetFile(part) as opened:
                writer = writer or stack.enter_context(
                    pyarrow.parquet.ParquetWriter(scratch, opened.schema_arrow, compression=_COMPRESSED, use_dictionary=False)
                )
                for group in range(opened.num_row_groups):
                    writer.write_table(opened.read_row_group(group))
        stack.close()


class FeatureParts:
    """A table of features: a folder of parts, or one file. Rows are numbered from 0, in the order of the parts' names."""

    def __init__(self, parts: Sequence[Path], failed: Sequence[Path] = ()) -> None:
        self.parts = list(parts)
        self.failed = list(failed)
        self.counts: list[int] = []
        for part in self.parts:
            try:
                with pyarrow.parquet.ParquetFile(part) as opened:
                    require_modest(part, opened.metadata)
                    about, count = _about(opened.schema_arrow, part), opened.metadata.num_rows
            except (pyarrow.ArrowException, OSError) as error:
                raise UserError(f"{part} is no Parquet file that can be read ({_short(error)}); {_INSTEAD}") from None
            if not self.counts:
                self.about = about
            elif (about.encoder, about.key, about.d) != (self.about.encoder, self.about.key, self.about.d):
                raise UserError(f"{part} has features of another job than {self.parts[0].name} beside it; embed into a folder of its own")
            self.counts.append(count)
        self.d = self.about.d

    def __len__(self) -> int:
        return sum(self.counts)

    def table(self, columns: Sequence[str]) -> dict[str, list[Any]]:
        """The values of small columns, each a list with one value a row."""
        if unknown := set(columns) - set(_COLUMNS):
            raise UserError(f"features have no column {', '.join(sorted(unknown))}; expected {', '.join(_COLUMNS)}")
        found: dict[str, list[Any]] = {name: [] for name in columns}
        for part in self.parts:
            read = _read(part, list(columns))
            for name in columns:
                found[name] += read.column(name).to_pylist()
        return found

    def blocks(self, rows: int = 1 << 14) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """(number of the first row, features (n, d) float32) of at most `rows` rows at a time, in order. Raises UserError for features that
        are not finite numbers."""
        first = 0
        for part in self.parts:
            with pyarrow.parquet.ParquetFile(part) as opened:
                for batch in opened.iter_batches(rows, columns=["feature"]):
                    yield first, self._dense(batch.column(0), part)
                    first += len(batch)

    def take(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """(len(rows), d) features of these rows, in the order asked for. Each part that has some is read once."""
        found = np.empty((len(rows), self.d), np.float32)
        before = np.cumsum([0, *self.counts])
        where = np.searchsorted(before, rows, side="right") - 1
        for part in np.unique(where):
            chosen = np.flatnonzero(where == part)
            column = _read(self.parts[part], ["feature"]).column("feature").take(pyarrow.array(rows[chosen] - before[part]))
            found[chosen] = np.concatenate([self._dense(chunk, self.parts[part]) for chunk in column.chunks])
        return found

    def failures(self) -> list[dict[str, Any]]:
        """The images that could not be embedded: id, split, path, label, reason."""
        return failures(self.failed)

    def _dense(self, column: Any, part: Path) -> NDArray[np.float32]:
        flat = column.flatten()
        if column.null_count or flat.null_count or len(flat) != len(column) * self.d:
            raise UserError(f"{part} has rows without a feature; {_INSTEAD}")
        dense: NDArray[np.float32] = flat.to_numpy(zero_copy_only=False).astype(np.float32, copy=False).reshape(-1, self.d)
        if not np.isfinite(dense).all():
            raise UserError(f"{part} has features that are no finite numbers; {_INSTEAD}")
        return dense


def failures(parts: Sequence[Path]) -> list[dict[str, Any]]:
    """The images in parts of failures."""
    return [row for part in parts for row in _read(part, list(_FAILED)).to_pylist()]


def open_features(place: str | Path) -> FeatureParts:
    """The table of features at `place`: a folder of parts, one .parquet file, or s3://prefix, whose parts are fetched to this machine's
    cache. Raises UserError if there is none, or if its parts are of several jobs."""
    there = Place(place)
    if there.at is not None:
        return _fetched(there)
    path = files.user_path(str(place))
    if path.is_file():
        return FeatureParts([path])
    found = {name: path / name for name in sorted(Place(path).names())}
    return _opened(found, path)


def _read(part: Path, columns: list[str]) -> Any:
    try:
        return pyarrow.parquet.read_table(part, columns=columns, partitioning=None)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{part} is no Parquet file that can be read ({_short(error)}); {_INSTEAD}") from None


def _opened(found: dict[str, Path], place: object) -> FeatureParts:
    parts = [path for name, path in found.items() if PART.fullmatch(name)]
    if not parts:
        raise UserError(
            f"there are no features at {place} (no part-00000.parquet); `simclr embed ENCODER IMAGES --out {place}` puts them there"
        )
    return FeatureParts(sorted(parts, key=_number), [path for name, path in found.items() if FAILED.fullmatch(name)])


def _fetched(there: Place) -> FeatureParts:
    assert there.at is not None
    copy = copy_of(there.at, "features")
    pins.hold(copy, there.at, "a command that reads its features")
    if there.at.name.endswith(".parquet"):
        with locked(copy):
            there.store.download(there.at, copy)
        return FeatureParts([copy])
    with locked(copy):
        copy.mkdir(mode=0o700, exist_ok=True)
        wanted = {o.name: o for o in there.store.listing(there.at) if PART.fullmatch(o.name) or FAILED.fullmatch(o.name)}
        marks = {name: copy / f".{name}.etag" for name in wanted}
        held = {n for n, m in marks.items() if (copy / n).is_file() and m.is_file() and m.read_text() == wanted[n].etag}
        fetch = [found for name, found in wanted.items() if name not in held]
        make_room(copy, sum(found.bytes for found in fetch), f"for the features of {there}")
        for found in fetch:
            there.store.download(there.at / found.name, copy / found.name, found.bytes)
            files.write_text(marks[found.name], found.etag)
    return _opened({name: copy / name for name in sorted(wanted)}, there)


def _number(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


def _about(schema: Any, file: Path) -> About:
    from simclr import fields

    text = (schema.metadata or {}).get(_KEY)
    if text is None or not (set(_COLUMNS) <= set(schema.names) or "reason" in schema.names):
        raise UserError(f"{file} has no features of `simclr embed` (no such metadata); {_INSTEAD}")
    values = files.json_in(text, f"the metadata of {file}", _INSTEAD)
    if values.get("schema") != SCHEMA:
        raise UserError(f"{file} has feature schema {fields.short(values.get('schema'))}, this version reads {SCHEMA}; {_INSTEAD}")
    about = fields.build(About, values, f"the metadata of {file}", _INSTEAD)
    if about.dtype not in DTYPES or not 0 < about.d <= _MOST_D:
        raise UserError(f"{file} is said to hold {fields.short(about.dtype)} features of {fields.short(about.d)} numbers; {_INSTEAD}")
    if any(not black < white for black, white in about.ranges.values()) or (
        about.bands and (len(about.bands) != 3 or min(about.bands) < 1)
    ):
        raise UserError(f"{file} is said to be of pixels from {fields.short(about.ranges)}, bands {fields.short(about.bands)}; {_INSTEAD}")
    if "feature" in schema.names and schema.field("feature").type != pyarrow.list_(DTYPES[about.dtype], about.d):
        raise UserError(f"{file} holds other features than its metadata says ({schema.field('feature').type}); {_INSTEAD}")
    return about


def _short(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
