"""Tars within a tar, of which the folders count as those of any other source, and how often a compressed tar is unpacked."""

from __future__ import annotations

import gzip
import io
import random
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import numpy as np
import pytest
from PIL import Image

from simclr.data import shards
from simclr.data.sources import tar
from simclr.data.sources.archives import archive_tree
from simclr.data.sources.open import open_source
from simclr.data.sources.source import Source
from simclr.errors import UserError
from tests.simclr.data.test_archives import packed, read

SETS = {s: {f"./{kind}/{s}{i}.jpg": f"{kind} {i}".encode() for kind in ("cat", "dog") for i in (0, 1)} for s in ("train", "test")}


def tarred(root: Path, files: Mapping[str, bytes]) -> bytes:
    return packed(root / "inner.tar", files).read_bytes()


def classes(source: Source) -> dict[str, Counter[str | None]]:
    """What the items say, which is what was understood."""
    found: dict[str, Counter[str | None]] = {}
    for item in source.items():
        found.setdefault(item.split, Counter())[item.label] += 1
    understood: dict[str, dict[str, object]] = source.understood["splits"]  # type: ignore[assignment]
    assert {split: of["classes"] for split, of in understood.items()} == found
    return found


EXPECTED = {"train": {"cat": 2, "dog": 2}, "test": {"cat": 2, "dog": 2}}


@pytest.mark.parametrize("few", [64, 0])
def test_folders_in_a_tar_in_a_tar_are_those_of_splits_and_classes(tmp_path: Path, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it holds one tar of everything, or a tar of each split; whether there are few or many, whose beginning says it."""
    monkeypatch.setattr(tar, "_FEW_INNER", few)
    everything = {f"./{split}/{name}": data for split, files in SETS.items() for name, data in files.items()}
    for ending, pack in ((".tar", bytes), (".tar.gz", gzip.compress)):
        one = packed(tmp_path / "wrapped.tar", {f"dataset{ending}": pack(tarred(tmp_path, everything))})
        assert classes(open_source(str(one))) == EXPECTED
        each = packed(tmp_path / "release.tar", {f"{split}{ending}": pack(tarred(tmp_path, files)) for split, files in SETS.items()})
        source = open_source(str(each))
        assert classes(source) == EXPECTED and source.total == 8


def test_an_inner_tar_of_loose_pictures_alone_is_listed_when_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many. Beside pictures anything else may be a class's: a file of labels, a sidecar, an archive, a number of shards."""
    monkeypatch.setattr(tar, "_FEW_INNER", 0)
    deep = tarred(tmp_path, {"d.jpg": b"d"})
    inner: dict[str, dict[str, bytes]] = {
        "loose": {"./": b"", "1.jpg": b"1", "2.jpg": b"2"},
        "folder": {"1.jpg": b"1", "x/2.jpg": b"2"},
        "texts": {"1.jpg": b"1", "labels.csv": b"1.jpg,cat"},
        "deep": {"deep.tar": deep},
        "empty": {},
    }
    tree = archive_tree(packed(tmp_path / "a.tar", {f"{name}.tar": tarred(tmp_path, files) for name, files in inner.items()}))
    assert [part.name for part in tree.parts if not part.names] == ["loose", "deep/deep"]
    pictures = {"loose/1.jpg": b"1", "loose/2.jpg": b"2", "folder/1.jpg": b"1", "folder/x/2.jpg": b"2", "texts/1.jpg": b"1"}
    assert read(tree) == pictures | {"deep/deep/d.jpg": b"d"}
    assert {name: text() for name, text in tree.texts.items()} == {"texts/labels.csv": b"1.jpg,cat"}
    numbered = archive_tree(packed(tmp_path / "b.tar", {f"{i:04}.tar": tarred(tmp_path, {"1.jpg": b"%d" % i}) for i in (0, 1)}))
    assert read(numbered) == {"1.jpg": b"0", "0001_1.jpg": b"1"} and "their numbers are no classes" in numbered.notes[0]
    samples = {f"{i:04}.tar": tarred(tmp_path, {f"{i}.jpg": b"", f"{i}.cls": b"%d" % i}) for i in (0, 1)}
    assert archive_tree(packed(tmp_path / "c.tar", samples)).stated == {"0.jpg": "0", "1.jpg": "1"}


def test_an_inner_tar_beside_the_folder_it_was_unpacked_to_is_refused(tmp_path: Path) -> None:
    inner = tarred(tmp_path, {"1.jpg": b"1"})
    packed(tmp_path / "set/train.tar", {"cat.tar": inner, "dog.tar": inner})
    packed(tmp_path / "set/train/cat.tar", {"other.jpg": b"2"})
    with pytest.raises(UserError, match="set has two archives train/cat; give the folder of one of them"):
        open_source(str(tmp_path / "set"))


def test_an_inner_tar_that_changes_is_another_source(tmp_path: Path) -> None:
    trees = []
    for content in (b"1", b"2"):
        trees.append(archive_tree(packed(tmp_path / "a.tar", {"x.tar": tarred(tmp_path, {"1.jpg": content}), "b.jpg": b"b"})))
    assert trees[0].identity != trees[1].identity and all(tree.times for tree in trees)


class Counted(io.RawIOBase):
    """A file that counts what is read of it."""

    def __init__(self, file: IO[bytes], seen: list[int]) -> None:
        self.file, self.seen = file, seen

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.file.seek(offset, whence)

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self.file.read(len(buffer))
        buffer[: len(data)] = data
        self.seen.append(len(data))
        return len(data)


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes that are read of compressed tars."""
    seen: list[int] = []
    opened = {b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=io.BufferedReader(Counted(file, seen)))}
    monkeypatch.setattr(tar, "_PACKERS", opened)
    return seen


def noise(count: int, bytes_each: int) -> dict[str, bytes]:
    return {f"{i}.jpg": random.Random(i).randbytes(bytes_each) for i in range(count)}


def test_links_in_a_compressed_tar_are_read_once(tmp_path: Path, unpacked: list[int]) -> None:
    """A step back to where the last one began would unpack all that lies before it."""
    files: dict[str, bytes | str] = {**noise(8, 100_000), **{f"link{i}.jpg": f">{i % 8}.jpg" for i in range(80)}}
    path = packed(tmp_path / "a.tar.gz", files)
    tree = archive_tree(path)
    unpacked.clear()
    assert len(read(tree)) == 88 and sum(unpacked) < 1.2 * path.stat().st_size


def test_texts_in_a_compressed_tar_are_kept_when_it_is_listed(tmp_path: Path, unpacked: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of all lengths: tarfile steps back where a file ends with its block."""
    texts = {f"{size}.txt": b"x" * size for size in (0, 1, 511, 512, 1024, 100_000)}
    inner = tarred(tmp_path, {"t.csv": b"t", "t.jpg": b"t"})
    path = packed(tmp_path / "a.tar.gz", {**noise(8, 100_000), **texts, "in.tar": inner, "z.jpg": b"z"})
    tree = archive_tree(path)
    texts["in/t.csv"] = b"t"
    assert {name: text() for name, text in tree.texts.items()} == texts and sum(unpacked) < 1.2 * path.stat().st_size
    assert read(tree)["z.jpg"] == b"z"
    labelled = {path.replace("jpg", "cls"): b"%d" % i for i, path in enumerate(noise(8, 1))}
    path = packed(tmp_path / "b.tar.gz", {**noise(8, 100_000), **labelled})
    for room, times in ((64 << 20, 1), (0, 2)):  # what finds no room is read when it is asked for
        monkeypatch.setattr(tar, "_KEPT_BYTES", room)
        unpacked.clear()
        assert archive_tree(path).stated["7.jpg"] == "7"
        assert times - 0.2 < sum(unpacked) / path.stat().st_size < times + 0.2


def test_one_prepare_unpacks_a_compressed_tar_three_times(tmp_path: Path, unpacked: list[int]) -> None:
    """To be listed, for the sample, and to be read."""
    draw = np.random.default_rng(0)
    files: dict[str, bytes] = {"first.bin": random.Random(0).randbytes(1_000_000), "labels.csv": b"name,label\n"}
    for i in range(8):
        buffer = io.BytesIO()
        Image.fromarray(draw.integers(0, 256, (96, 96, 3), np.uint8)).save(buffer, "PNG")
        files[f"{'ab'[i % 2]}/{i}.png"] = buffer.getvalue()
    path = packed(tmp_path / "a.tar.gz", files)
    assert shards.prepare(open_source(str(path)), tmp_path / "out", shards.Options(), 1, lambda done: None).examples("train") == 8
    assert 2.8 < sum(unpacked) / path.stat().st_size < 3.2
