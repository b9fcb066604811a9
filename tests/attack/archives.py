"""Hostile archives, tables and shards: mutations of sound ones, and bombs made by hand. `use` does with one what `prepare` does, and with
an .npy file what `embed` does."""

from __future__ import annotations

import bz2
import contextlib
import functools
import gzip
import io
import itertools
import lzma
import shutil
import struct
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import scipy.io
from PIL import Image

from pipelines.commands import prepare
from simclr.data.options import Options
from simclr.data.sources.patterns import patterns_source
from simclr.data.sources.reading import Reading
from simclr.errors import UserError
from tests.attack import lies
from tests.attack.images import _HOW, scans, zeros
from tests.support.embedding import pictures


def use(path: Path) -> None:
    """Listing, sample, forecast and a small `prepare` of an archive, table or shard; of an .npy file, `embed`'s reading."""
    if path.suffix == ".npy":
        for _ in pictures(path):
            pass
        return
    out = Path(tempfile.mkdtemp(dir=path.parent)) / "out"
    source, options = path, Options(max_skipped_pct=100, shard_mib=8)
    if path.suffix == ".arrow":  # is read where it lies in a folder
        source = out.with_name("tables")
        source.mkdir()
        (source / path.name).hardlink_to(path)
    if path.suffix == ".beton":  # is linked as it is
        options = Options()
    args = prepare.Args(source=str(source), out=out, reading=Reading(), options=options, threads=2, dry_run=False)
    try:
        with contextlib.suppress(UserError):  # what a forecast refuses, `prepare` must refuse as well
            prepare.dry_run(args)
        prepare.prepare(args)
    finally:
        shutil.rmtree(out.parent)


def cases(seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """`count` of (file name, content): first the bombs, then mutations drawn by `seed`."""
    made = ((f"{name}-bomb{suffix}", make()) for name, (suffix, make) in BOMBS.items())
    yield from itertools.islice(itertools.chain(made, _mutations(np.random.default_rng(seed))), count)


def _mutations(draw: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    sound = _sound()
    for number in itertools.count():
        name = list(sound)[number % len(sound)]
        how = _HOW[int(draw.integers(len(_HOW)))]
        stem, _, suffix = name.partition(".")
        yield f"{number}-{stem}-{how.__name__.strip('_')}.{suffix}", how(sound[name], draw)


# ---------------------------------------------------------------- sound ones


@functools.cache
def _pictures() -> dict[str, bytes]:
    draw, found = np.random.default_rng(0), {}
    for number in range(8):
        buffer = io.BytesIO()
        pixels = np.kron(draw.integers(0, 256, (4, 4, 3), dtype=np.uint8), np.ones((16, 16, 1), np.uint8))
        Image.fromarray(pixels).save(buffer, "JPEG")
        found[f"train/{'ab'[number % 2]}/{number}.jpg"] = buffer.getvalue()
    return found


def _tar(files: Mapping[str, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _zip(files: Mapping[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def _parquet(table: Mapping[str, object] | pyarrow.Table, **options: object) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table if isinstance(table, pyarrow.Table) else pyarrow.table(dict(table)), buffer, **options)
    return buffer.getvalue()


def _arrow(table: pyarrow.Table, stream: bool, compression: str | None = None) -> bytes:
    buffer, options = io.BytesIO(), pyarrow.ipc.IpcWriteOptions(compression=compression)
    writer = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with writer(buffer, table.schema, options=options) as file:
        file.write_table(table)
    return buffer.getvalue()


@functools.cache
def _beton() -> bytes:
    from simclr.data import shards

    with tempfile.TemporaryDirectory() as folder:
        source = patterns_source("patterns:train=8,test=2,size=32", "train=8,test=2,size=32")
        shards.prepare(source, Path(folder) / "out", Options(kind="jpeg"), 1, lambda done: None)
        return (Path(folder) / "out" / "train-00000.beton").read_bytes()


@functools.cache
def _sound() -> dict[str, bytes]:
    """Archives that are read, of every kind."""
    files = _pictures()
    labels = b"file,label\n" + b"".join(f"{name},{name[6]}\n".encode() for name in files)
    flat = {name.rpartition("/")[2]: data for name, data in files.items()} | {"labels.csv": labels}
    samples = {f"{i}.{end}": content for i, data in enumerate(files.values()) for end, content in (("jpg", data), ("cls", b"%d" % (i % 2)))}
    rows = pyarrow.table({"image": [{"bytes": data, "path": None} for data in files.values()], "label": [i % 2 for i in range(len(files))]})
    plain = _tar(files)
    array = io.BytesIO()
    np.save(array, np.zeros((3, 8, 8, 3), np.uint8))
    return {
        "plain.tar": plain,
        "gnu.tar": _tar({f"{'long' * 40}/{name}": data for name, data in files.items()}, tarfile.GNU_FORMAT),
        "packed.tar.gz": gzip.compress(plain),
        "packed.tar.bz2": bz2.compress(plain),
        "packed.tar.xz": lzma.compress(plain),
        "labelled.tar": _tar(flat),
        "nested.tar": _tar({"a.tar": _tar(flat), "b.tar": _tar(flat), "c/d.tar.gz": gzip.compress(_tar(flat))}),
        "nested.tar.gz": gzip.compress(_tar({"a.tar": _tar(flat)})),
        "plain.zip": _zip(files),
        "labelled.zip": _zip(flat, zipfile.ZIP_STORED),
        "packed.zip": _zip(flat, zipfile.ZIP_LZMA),
        "samples.tar": _tar(samples),
        "rows.parquet": _parquet(rows),
        "packed.parquet": _parquet(rows, compression="zstd"),
        "shard.beton": _beton(),
        "array.npy": array.getvalue(),
    }


# ---------------------------------------------------------------- bombs


def _header(name: str, size: int, kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, link
    return info.tobuf(tarfile.GNU_FORMAT)


def _raw(name: str, size: bytes, kind: bytes, rest: bytes = b"") -> bytes:
    """A header with these bytes as its size, and `rest` from byte 345 on."""
    block = bytearray(_header(name, 0, kind))
    block[124:136], block[345 : 345 + len(rest)], block[148:156] = size, rest, b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def _pax(fields: Mapping[str, str], kind: bytes = tarfile.XHDTYPE) -> bytes:
    return tarfile.TarInfo._create_pax_generic_header(dict(fields), kind, "utf-8")  # type: ignore[attr-defined]


_END = bytes(1024)


def long_of(packer: Callable[[bytes], bytes], size: int, name: str = "train/a/big.png", ahead: bytes = b"") -> bytes:
    """A packed tar with one file of `size` zeros: one packed piece of them again and again, which all three formats allow."""
    whole, rest = divmod(size + -size % 512, 64 << 20)
    piece = packer(bytes(64 << 20)) if whole else b""
    return packer(ahead + _header(name, size)) + piece * whole + packer(bytes(rest) + _END)


def _sparse(name: str, size: int) -> bytes:
    """A file of holes with one stored byte at its beginning."""
    block = bytearray(_header(name, 512, tarfile.GNUTYPE_SPARSE))
    block[386:410], block[483:495], block[148:156] = b"%011o\0%011o\0" % (0, 1), b"%011o\0" % size, b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + _padded(b"\xff")


def _few() -> bytes:
    """Two sound pictures, without the end of the archive."""
    return b"".join(_header(name, len(data)) + _padded(data) for name, data in list(_pictures().items())[:2])


def _loose() -> bytes:
    """The same in no folder, so that their classes are looked for in files."""
    return b"".join(_header(name[8:], len(data)) + _padded(data) for name, data in list(_pictures().items())[:2])


def _matryoshka(depth: int) -> bytes:
    data = _tar(_pictures())
    for _ in range(depth):
        data = _tar({"a.tar": data})
    return data


def overlapping(count: int, name: str, data: bytes) -> bytes:
    """A zip whose directory names one packed file many times."""
    one = _zip({f"0000{name}": data})
    at, end = one.rindex(b"PK\1\2"), one.rindex(b"PK\5\6")
    entries = b"".join(one[at:end].replace(b"0000", b"%04d" % i) for i in range(count))
    tail = struct.pack("<HHIIH", count, count, len(entries), at, 0)
    return one[:at] + entries + one[end : end + 8] + tail


def _lying_zip(method: int, data: bytes) -> bytes:
    """A zip of a picture that unpacks to far more than it says."""
    whole = bytearray(_zip({"a.jpg": data, **_pictures()}, method))
    for mark, offset in ((b"PK\3\4", 22), (b"PK\1\2", 24)):
        at = whole.index(mark) + offset
        whole[at : at + 4] = struct.pack("<I", 1 << 20)
    return bytes(whole)


def _links(count: int) -> bytes:
    """Each link leads to the next; the last to a picture."""
    links = [_header(f"{i:06}.jpg", 0, tarfile.SYMTYPE, f"{i + 1:06}.jpg") for i in range(count)]
    return b"".join(links) + _few() + _header(f"{count:06}.jpg", 1) + _padded(b"a") + _END


def _rows_of_nothing(count: int) -> bytes:
    pictures = pyarrow.array(list(_pictures().values()), pyarrow.binary())
    empty = pyarrow.nulls(count, pyarrow.binary())
    return _parquet(pyarrow.table({"image": pyarrow.chunked_array([pictures, empty])}))


def _large_value() -> pyarrow.Table:
    return pyarrow.table({"image": [*_pictures().values(), bytes(300 << 20)]})


def _dictionary(values: list[bytes], times: int, column: str = "image") -> bytes:
    """A table in which each row is one of few large values, stored once."""
    some = list(_pictures().values())
    indices = pyarrow.array(np.resize(np.arange(len(values), dtype=np.int32), times))
    kind = pyarrow.binary() if column == "image" else pyarrow.string()
    large = pyarrow.DictionaryArray.from_arrays(indices, pyarrow.array(values, kind))
    other = {} if column == "image" else {"image": pyarrow.array([some[i % len(some)] for i in range(times)], pyarrow.binary())}
    options = {"compression": "zstd", "dictionary_pagesize_limit": 1 << 30, "store_schema": False}
    return _parquet(pyarrow.table({column: large, **other}), **options)


def _shard_of(jpeg: bytes, height: int, width: int) -> bytes:
    """A shard whose first image is another JPEG, behind the others."""
    from ffcv.types import ALLOC_TABLE_TYPE

    from simclr.data.ffcv import writer

    data = bytearray(_beton())
    header = np.frombuffer(data[: writer.HeaderType.itemsize], writer.HeaderType).copy()
    count, at = int(header["num_samples"][0]), int(header["alloc_table_ptr"][0])
    rows = np.frombuffer(data, writer.METADATA, count, writer._METADATA_AT).copy()
    table = np.frombuffer(data, ALLOC_TABLE_TYPE, count, at).copy()
    image = rows[rows.dtype.names[0]]
    image["data_ptr"][0], image["height"][0], image["width"][0], image["mode"][0] = at, height, width, 0
    table["ptr"][0], table["size"][0] = at, len(jpeg)
    header["alloc_table_ptr"] = at + len(jpeg)
    data[: header.nbytes] = header.tobytes()
    data[writer._METADATA_AT : writer._METADATA_AT + rows.nbytes] = rows.tobytes()
    return bytes(data[:at]) + jpeg + table.tobytes()


def _npy(shape: str, kind: str = "|u1", content: bytes = b"") -> bytes:
    head = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    head += b" " * (-(len(head) + 11) % 64) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(head)) + head + content


def _mat(size: int) -> bytes:
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, {"synsets": np.zeros(4)})
    packed = zeros(size)
    return buffer.getvalue()[:128] + struct.pack("<II", 15, len(packed)) + packed


def _devkit(mat: bytes) -> bytes:
    flat = {f"val_{i}.jpg": data for i, data in enumerate(_pictures().values())}
    truth = b"".join(b"%d\n" % (1 + i % 2) for i in range(len(flat)))
    return _tar({**_pictures(), **{f"val/{name}": data for name, data in flat.items()}, "devkit/truth.txt": truth, "devkit/meta.mat": mat})


def _with_text(name: str, text: bytes) -> bytes:
    flat = {name.rpartition("/")[2]: data for name, data in _pictures().items()}
    return gzip.compress(_tar(flat | {name: text}), 1)


_GB = 1 << 30
BOMBS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "zeros": (".tar.bz2", lambda: long_of(bz2.compress, 3_700 << 20)),
    "zeros-gz": (".tar.gz", lambda: long_of(functools.partial(gzip.compress, compresslevel=6), 4 * _GB, ahead=_few())),
    "zeros-xz": (".tar.xz", lambda: long_of(functools.partial(lzma.compress, preset=0), 4 * _GB)),
    "zeros-inner": (".tar", lambda: _tar({"a.tar.bz2": long_of(bz2.compress, 3_700 << 20), "b.tar": _tar(_pictures())})),
    "zeros-text": (".tar.bz2", lambda: long_of(bz2.compress, 60 << 20, "labels.csv", _loose())),
    "holes": (".tar", lambda: _few() + _sparse("train/a/big.png", 3_700 << 20) + _END),
    "holes-many": (".tar", lambda: _few() + b"".join(_sparse(f"train/a/{i}.png", 500 << 20) for i in range(40)) + _END),
    "holes-text": (".tar", lambda: _loose() + b"".join(_sparse(f"{i}.csv", 60 << 20) for i in range(200)) + _END),
    "deep-path": (".tar.gz", lambda: gzip.compress(_pax({"path": "a/" * 40_000 + "b.jpg"}) + _header("x", 0) + _few() + _END)),
    "deep-paths": (
        ".tar.gz",
        lambda: gzip.compress(b"".join(_pax({"path": "a/" * 2000 + f"{i}/b.jpg"}) + _header("x", 0) for i in range(300)) + _few() + _END),
    ),
    "long-name": (
        ".tar.gz",
        lambda: gzip.compress(_header("././@LongLink", 2 * _GB, tarfile.GNUTYPE_LONGNAME)) + gzip.compress(bytes(64 << 20), 1) * 32,
    ),
    "long-field": (".tar.gz", lambda: gzip.compress(_raw("x", b"%011o\0" % (2 * _GB), tarfile.XHDTYPE) + b"9" * (128 << 20), 1)),
    "fields-in-turn": (".tar", lambda: _pax({"comment": "x"}, tarfile.XGLTYPE) * 5_000 + _few() + _END),
    "map": (
        ".tar.gz",
        lambda: gzip.compress(
            _pax({"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "a.png", "GNU.sparse.realsize": "9"})
            + _header("x", 20 << 20)
            + b"1\n"
            + b"9" * (20 << 20)
        ),
    ),
    "backwards": (".tar", lambda: _few() + _raw("a.jpg", b"\xff" * 10 + b"\xfc\0", tarfile.REGTYPE) + _END),
    "size-most": (".tar", lambda: _few() + _raw("a.jpg", b"\x80" + b"\x7f" * 11, tarfile.REGTYPE) + _END),
    "members": (".tar.gz", lambda: gzip.compress(b"".join(_header(f"{i}.jpg", 0) for i in range(50_000)), 1) * 100),
    "links": (".tar.gz", lambda: gzip.compress(_links(60_000), 1)),
    "nested": (".tar", lambda: _matryoshka(300)),
    "nested-packed": (".tar.gz", lambda: gzip.compress(_matryoshka(300))),
    "overlap": (".zip", lambda: overlapping(5_000, ".png", bytes(60 << 20))),
    "overlap-text": (".zip", lambda: overlapping(5_000, ".csv", bytes(60 << 20))),
    "zip-zeros": (".zip", lambda: _zip({**_pictures(), **{f"{i}.png": bytes(300 << 20) for i in range(3)}})),
    "zip-lies": (".zip", lambda: _lying_zip(zipfile.ZIP_DEFLATED, bytes(600 << 20))),
    "zip-lies-bz2": (".zip", lambda: _lying_zip(zipfile.ZIP_BZIP2, bytes(600 << 20))),
    "zip-members": (".zip", lambda: overlapping(9_999, ".jpg", b"a") * 1),
    "zip-entries": (".zip", lambda: lies.entries(2_000_000)),
    "zip64-entries": (".zip", lambda: lies.entries(4_000_000, True)),
    "zip-link": (".zip", lambda: _zip_link(bytes(200 << 20))),
    "table-rows": (".tar.gz", lambda: _with_text("labels.csv", b"a,b\n" * (15 << 20))),
    "table-cells": (".tar.gz", lambda: _with_text("labels.csv", b"ab," * (20 << 20))),
    "lines": (".tar.gz", lambda: _with_text("labels.txt", b"ab\n" * (20 << 20))),
    "json-deep": (".tar.gz", lambda: _with_text("labels.jsonl", b"[" * (10 << 20))),
    "json-rows": (".tar.gz", lambda: _with_text("labels.jsonl", b'{"a":1}\n' * (7 << 20))),
    "json-broad": (".tar.gz", lambda: _with_text("labels.jsonl", b'{"a":[' + b"[]," * (20 << 20) + b"1]}")),
    "devkit": (".tar", lambda: _devkit(_mat(4 * _GB))),
    "sample-class": (".tar", lambda: _tar({f"{i}.{e}": d for i in range(4) for e, d in (("jpg", b"a"), ("json", b"[" * (1 << 20)))})),
    "rows-of-nothing": (".parquet", lambda: _rows_of_nothing(50_000_000)),
    "dictionary": (".parquet", lambda: _dictionary([_pictures()["train/a/0.jpg"] + bytes(60 << 20)], 5_000)),
    "dictionary-most": (".parquet", lambda: _dictionary([_pictures()["train/a/0.jpg"] + bytes(280 << 20)], 5_000)),
    "dictionary-labels": (".parquet", lambda: _dictionary(["a" * (10 << 20), "b" * (10 << 20)], 5_000, "label")),
    "lying-footer": (".parquet", lambda: lies.lying_footer([bytes(400 << 20)] * 2)),
    "prefixes": (".parquet", lambda: lies.prefixes(60 << 20, 40)),
    "value": (
        ".parquet",
        lambda: _parquet({"image": [*_pictures().values(), bytes(600 << 20)]}, compression="zstd", use_dictionary=False),
    ),
    "packed-batch": (".arrow", lambda: _arrow(pyarrow.table({"image": [*_pictures().values(), bytes(300 << 20)]}), True, "zstd")),
    "declared": (".beton", lambda: _shard_of(_pictures()["train/a/0.jpg"], 65_535, 65_535)),
    "scans": (".beton", lambda: _shard_of(scans(700), 4096, 4096)),
    "declared-npy": (".npy", lambda: _npy("(40000000000, 1, 1, 3)")),
    "overflow-npy": (".npy", lambda: _npy(f"({1 << 62}, 4, 4, 3)")),
    "objects-npy": (".npy", lambda: _npy("(1,)", "|O", b"cos\nsystem\n(S'touch /tmp/simclr-was-here'\ntR.")),
    "nested-npy": (".npy", lambda: _npy("(" * 3000 + ")" * 3000)),
    "large-npy": (".npy", lambda: _npy("(1, 40000, 40000, 3)", content=b"")),
}


def _zip_link(target: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        link = zipfile.ZipInfo("a.jpg")
        link.create_system, link.external_attr, link.compress_type = 3, 0o120777 << 16, zipfile.ZIP_DEFLATED
        archive.writestr(link, target)
        for name, data in _pictures().items():
            archive.writestr(name, data)
    return buffer.getvalue()
