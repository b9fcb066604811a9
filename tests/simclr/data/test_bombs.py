"""Small archives, tables, texts and arrays with large costs: each is refused in one sentence, or what is hostile in it is left out, before
it is unpacked. `tests/attack` measures memory and time of the same files at full size."""

from __future__ import annotations

import bz2
import gzip
import itertools
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from simclr.data.encode import encode
from simclr.data.sources import label_files, layout, parquet, parquet_pages, reading
from simclr.data.sources import zip as zip_file
from simclr.data.sources.archives import archive_tree, is_archive_file
from simclr.data.sources.folder import walk
from simclr.data.sources.members import followed
from simclr.data.sources.open import open_source
from simclr.data.sources.parquet import parquet_tree
from simclr.data.sources.reading import Reading
from simclr.data.sources.source import Item, Tree, Unread
from simclr.errors import UserError
from tests.attack import archives, lies
from tests.support.embedding import pictures

# ---------------------------------------------------------------- archives


@pytest.mark.parametrize(
    ("suffix", "make", "sentence"),
    [
        (
            ".tar.bz2",
            lambda: archives.long_of(bz2.compress, 32 << 20),
            r"unpacks to \d+ MiB or more .*from 0.0 MiB, which no pictures",
        ),
        (".tar", lambda: archives._few() + archives._sparse("a.png", 3_700 << 20) + archives._END, "unpacks to 3,700 MiB or more"),
        (".tar.gz", lambda: gzip.compress(archives._raw("x", b"%011o\0" % (2 << 30), tarfile.XHDTYPE) + bytes(9 << 20)), "more than 1 MiB"),
        (".tar", lambda: archives._pax({"comment": "x"}, tarfile.XGLTYPE) * 999 + archives._few() + archives._END, "RecursionError"),
        (".tar", lambda: archives._few() + archives._raw("a.jpg", b"\xff" * 10 + b"\xfc\0", b"0") + archives._END, "impossible size"),
        (".tar", lambda: archives._few() + archives._raw("a.jpg", b"\x80" + b"\x7f" * 11, b"0") + archives._END, "is damaged"),
        (".zip", lambda: archives.overlapping(900, ".png", bytes(1 << 16)), r"states 900 files of .* that unpack to 56 MiB, which no"),
        (".zip", lambda: archives._zip({"a.png": bytes(9 << 20)}), "unpack to 9 MiB, which no pictures do"),
    ],
)
def test_an_archive_that_is_a_bomb_is_one_sentence(
    suffix: str, make: Callable[[], bytes], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("tar", "zip"):
        monkeypatch.setattr(f"simclr.data.sources.{kind}._BOMB_BYTES", 4 << 20)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(make())
    with pytest.raises(UserError, match=sentence):
        open_source(str(path))


def test_a_packed_tar_has_no_more_members_than_bytes_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simclr.data.sources.tar._MANY", 100)
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(b"".join(archives._header(f"{i}.jpg", 0) for i in range(5000)) + archives._END))
    with pytest.raises(UserError, match=r"and [\d,]+ files from 0.0 MiB"):
        archive_tree(tmp_path / "a.tar.gz")


def test_entries_of_a_zip_are_counted_before_they_are_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their number is stated to be, and however the pieces lie in which they are counted."""
    monkeypatch.setattr(zip_file, "_MANY", 999)
    monkeypatch.setattr(zip_file, "_COUNTED_BYTES", 1001)
    path = tmp_path / "a.zip"
    for long in (False, True):
        path.write_bytes(b"#!/bin/sh\n" + lies.entries(990, long))  # what lies ahead of an archive is allowed
        assert len(zipfile.ZipFile(path).infolist()) == 990 and not archive_tree(path).parts
        path.write_bytes(lies.entries(3000, long))
        with monkeypatch.context() as patch, pytest.raises(UserError, match=r"has 0.1 MiB and states 3,000 files, more than pictures fit"):
            patch.setattr(zipfile, "ZipFile", lambda *given: pytest.fail("parsed"))
            archive_tree(path)


def test_a_zip_that_says_less_than_it_holds_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        (tmp_path / "a.zip").write_bytes(archives._lying_zip(method, bytes(3 << 20)))
        tree = archive_tree(tmp_path / "a.zip")
        with pytest.raises(UserError, match="Bad CRC-32"):
            list(tree.read(tree.parts[0]))
    (tmp_path / "link.zip").write_bytes(archives._zip_link(bytes(9 << 20)))
    assert archive_tree(tmp_path / "link.zip").ignored == {"link": 1}


def test_paths_of_a_thousand_folders_are_left_out(tmp_path: Path) -> None:
    deep = "a/" * 200 + "b.jpg"
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(archives._pax({"path": deep}) + archives._header("x", 0) + archives._few() + archives._END))
    tree = archive_tree(path)
    assert tree.ignored == {"name too long": 1} and len(tree.parts[0].names) == 2
    (tmp_path / "a.zip").write_bytes(archives._zip({deep: b"a", "b.jpg": b"b"}))
    assert archive_tree(tmp_path / "a.zip").ignored == {"name too long": 1}
    (tmp_path / "disk" / ("a/" * 70)).mkdir(parents=True)
    (tmp_path / "disk" / ("a/" * 70) / "b.jpg").write_bytes(b"a")
    found = walk(tmp_path / "disk")
    assert not found.parts and "is left out with all that lies in it: it is more than 64 folders deep" in found.notes[0]


def test_folders_that_link_to_each_other_are_not_walked_for_ever(tmp_path: Path) -> None:
    names = [f"f{i}" for i in range(9)]
    for name in names:
        (tmp_path / name).mkdir()
        for other in names:
            (tmp_path / name / other).symlink_to(tmp_path / other)
    with pytest.raises(UserError, match="is reached by more than 100 links to folders"):
        walk(tmp_path)


def test_chains_of_links_cost_what_their_number_does() -> None:
    links = {str(i): str(i + 1) for i in range(20_000)} | {"x": "y", "y": "x", "z": "x", "lost": "nowhere"}
    found, lost = followed(links, {"20000": 0})
    assert set(found.values()) == {"20000"} and len(found) == 20_000 and lost == ["x", "y", "z", "lost"]


def test_tars_within_tars_are_read_four_deep(tmp_path: Path) -> None:
    for depth, read in ((4, True), (5, False), (300, False)):
        (tmp_path / "a.tar").write_bytes(archives._matryoshka(depth))
        (tmp_path / "a.tar.gz").write_bytes(gzip.compress(archives._matryoshka(depth)))
        for path in (tmp_path / "a.tar", tmp_path / "a.tar.gz"):
            tree = archive_tree(path)
            assert bool(tree.parts) == read and tree.ignored == ({} if read else {".tar": 1}), (depth, path)


def test_what_a_file_without_an_ending_is_costs_its_first_block(tmp_path: Path) -> None:
    (tmp_path / "bomb").write_bytes(gzip.compress(archives._raw("x", b"%011o\0" % (2 << 30), tarfile.XHDTYPE) + bytes(9 << 20)))
    (tmp_path / "none").write_bytes(gzip.compress(b"text" * 999))
    assert is_archive_file(tmp_path / "bomb") and not is_archive_file(tmp_path / "none")


def test_a_large_picture_in_an_inner_archive_has_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simclr.data.sources.tar.MOST_PICTURE_BYTES", 99)
    monkeypatch.setattr("simclr.data.sources.tar._FEW_INNER", 0)
    (tmp_path / "a.tar").write_bytes(archives._tar({"cats.tar": archives._tar({"a.jpg": b"a", "b.jpg": bytes(100)})}))
    tree = archive_tree(tmp_path / "a.tar")
    found = dict(tree.read(tree.parts[0]))
    assert found["cats/a.jpg"] == b"a" and isinstance(found["cats/b.jpg"], Unread)
    assert "more than a picture in an archive may have" in encode(Item("train", None, "b", found["cats/b.jpg"]), "raw", 8, 90).skipped


# ---------------------------------------------------------------- tables, labels, arrays


@pytest.mark.parametrize(
    ("name", "make", "sentence"),
    [
        ("a.parquet", lambda: archives._rows_of_nothing(3_000_000), r"states 3,000,008 rows in [\d,]+ bytes, in which no pictures fit"),
        (
            "a.parquet",
            lambda: archives._dictionary([bytes(9 << 20)], 9),
            r"bytes of the column image unpack to 9 MiB, which no pictures",
        ),
        (
            "a.parquet",
            lambda: lies.lying_footer([bytes(5 << 20)] * 2),
            r"bytes of the column image unpack to 10 MiB, which no pictures",
        ),
        ("a.parquet", lambda: lies.lying_footer([b"a"])[:-400] + bytes(400), "is damaged"),
        ("a.parquet", lambda: archives._dictionary(["a" * 2000, "b"], 9, "label"), r"has a label of 2,000 letters"),
        ("a.arrow", lambda: archives._arrow(pyarrow.table({"image": [b"a" * 9999]}), True, "zstd"), "is compressed, so that all of it"),
        ("a.arrow", lambda: archives._arrow(pyarrow.table({"image": [b"a" * 9999]}), False, "lz4"), "is compressed, so that all of it"),
    ],
)
def test_a_table_that_is_a_bomb_is_one_sentence(
    name: str, make: Callable[[], bytes], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simclr.data.sources.parquet._BOMB_BYTES", 4 << 20)
    (tmp_path / name).write_bytes(make())
    with pytest.raises(UserError, match=sentence):
        parquet_tree(tmp_path)


def test_the_pages_of_a_table_are_known_by_their_own_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every form that pyarrow writes, against the sums that a sound footer states."""
    rows = [bytes([65 + i % 9]) * (900 + i) for i in range(700)]
    path = tmp_path / "a.parquet"
    for version, compression, dictionary in itertools.product(("1.0", "2.0"), ("zstd", "none"), (True, False)):
        table = pyarrow.table({"image": rows, "label": [f"class {i % 3}" for i in range(len(rows))]})
        written = {"data_page_version": version, "compression": compression, "use_dictionary": dictionary, "write_page_checksum": True}
        pyarrow.parquet.write_table(table, path, data_page_size=4096, write_batch_size=16, row_group_size=300, **written)
        metadata = pyarrow.parquet.ParquetFile(path).metadata
        for chunk in (metadata.row_group(group).column(column) for group in range(3) for column in range(2)):
            begin = min(chunk.data_page_offset, chunk.dictionary_page_offset or chunk.data_page_offset)
            found = list(parquet_pages.pages(path, begin, chunk.total_compressed_size))
            heads = chunk.total_compressed_size - sum(page.stored for page in found)
            assert sum(page.unpacked for page in found) + heads == chunk.total_uncompressed_size
            assert [page.repeats for page in found] == [dictionary] + [False] * (len(found) - 1)
    with pytest.raises(UserError, match=r"a.parquet ends early or is damaged"):
        list(parquet_pages.pages(path, 4, path.stat().st_size))
    path.write_bytes(lies.prefixes(1 << 20, 90))
    chunk = pyarrow.parquet.ParquetFile(path).metadata.row_group(0).column(0)
    assert [page.repeats for page in parquet_pages.pages(path, chunk.data_page_offset, chunk.total_compressed_size)] == [True]
    monkeypatch.setattr(parquet, "_BATCH_BYTES", 3 << 20)
    assert [len(batch) for batch in parquet._open(path).batches(0, "image")][:3] == [2, 2, 2]


def test_values_that_are_too_large_count_among_what_a_table_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(archives._dictionary([archives._pictures()["train/a/0.jpg"] + np.random.default_rng(0).bytes(1 << 20)], 50))
    monkeypatch.setattr(parquet, "MOST_PICTURE_BYTES", 1 << 20)
    tree = parquet_tree(path)
    (part,) = tree.parts
    assert {type(data) for _, data in tree.read(part)} == {Unread}
    monkeypatch.setattr(parquet, "_BOMB_BYTES", 9 << 20)
    monkeypatch.setattr(parquet, "_BOMB_RATIO", 1)
    with pytest.raises(UserError, match="names the same pictures again and again"):
        list(tree.read(part))


def test_texts_with_too_many_lines_or_bytes_are_not_looked_at_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "_MOST_LINES", 5)
    for name in archives._pictures():
        (tmp_path / name.rpartition("/")[2]).write_bytes(b"a")
    (tmp_path / "labels.csv").write_text("file,label\n" + "".join(f"{i}.jpg,{i % 2}\n" for i in range(8)))
    source = open_source(str(tmp_path))
    assert (
        "labels.csv was not looked at for classes, because it has 9 lines and 9 cells; --labels FILE takes it" in source.understood["notes"]
    )  # type: ignore[operator]
    (tmp_path / "other.csv").write_text("file,label\n" + "".join(f"{i}.jpg,{i % 2}\n" for i in range(8)))
    said = [note for note in open_source(str(tmp_path)).understood["notes"] if "not looked at" in note]  # type: ignore[attr-defined]
    assert said == [
        "labels.csv was not looked at for classes, because it has 9 lines and 9 cells, nor 1 other text; --labels FILE takes it"
    ]
    monkeypatch.setattr(layout, "_MOST_READ_BYTES", -1)
    assert "because the texts read for classes have more than" in str(open_source(str(tmp_path)).understood["notes"])
    monkeypatch.setattr(reading, "_MOST_LABELS_BYTES", 9)
    with pytest.raises(UserError, match=r"labels.csv has 0 MiB; expected a file of names and values of at most 1,024"):
        Reading(labels=str(tmp_path / "labels.csv"))


def test_texts_are_counted_once_and_readings_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "_MOST_READ_BYTES", 10)
    modest = layout._Modest({"a": lambda: b"12345678", "b": lambda: b"abcdefgh", "c": lambda: b"1"})
    assert [modest.read("a") for _ in range(8)] == [b"12345678"] * 8 and modest.read("b") == b"abcdefgh" and not modest.notes()
    assert modest.read("c") == b"" and [*modest.passed_over] == ["c"]
    often = layout._Modest({"a": lambda: b"12345678"})
    assert [bool(often.read("a")) for _ in range(13)] == [True] * 11 + [False] * 2


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".tsv", ".jsonl"])
def test_a_folder_with_a_text_for_each_picture_has_no_labels_in_them(suffix: str) -> None:
    texts = {f"boxes/{i}{suffix}": bytes for i in range(51)} | {
        f"boxes/labels{other}": bytes for other in (".csv", ".txt") if other != suffix
    }
    tree = Tree(spec="", parts=[], read=lambda part: iter(()), texts={**texts, f"labels{suffix}": bytes})
    assert set(label_files.few_texts(tree)) == {f"labels{suffix}"} | {path for path in texts if "labels" in path}


def test_a_devkit_that_unpacks_to_gigabytes_is_refused() -> None:
    with pytest.raises(UserError, match=r"is no meta.mat of ImageNet's devkit .*unpacks to more than 64 MiB"):
        label_files.devkit_classes(archives._mat(80 << 20), "meta.mat")


@pytest.mark.parametrize("name", [name for name in archives.BOMBS if name.endswith("-npy")])
def test_an_array_whose_header_lies_is_one_sentence(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    path.write_bytes(archives.BOMBS[name][1]())
    with pytest.raises(UserError, match=r"a.npy (is no .npy file that can be read|holds)"):
        next(pictures(path))


def test_an_array_of_images_larger_than_the_memory_is_named_with_the_flag(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    head = archives._npy("(1, 40000, 40000, 3)")
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + 3 * 40_000**2)
    with pytest.raises(UserError, match=r"40,000 × 40,000 pixels, which would fill the memory; --max-pixels 1600000000 reads them"):
        next(pictures(path))
