"""Whether shards that exist are those of a source: names and sizes, times, content, how it was understood. And copies of other classes."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.runs.directory import manifest_digest
from simclr.data import labels, shards
from simclr.data.manifest import Manifest, read_manifest, read_names, write_manifest, write_names
from simclr.data.options import Options
from simclr.data.sources.source import Item, Source
from simclr.errors import UserError
from tests.simclr.data.test_junk import encoded, photo
from tests.simclr.data.test_shards import noise
from tests.support.sources import source_of


def photos(folder: Path, swap: bool = False, **more: Any) -> Source:
    """Six pictures and a damaged file on the disk, two of which may be swapped: names and sizes stay."""
    folder.mkdir(exist_ok=True)
    files = {f"{i}.png": encoded(photo(i), "BMP") for i in range(6)} | {"bad.png": b"no image"}
    if swap:
        files["1.png"], files["2.png"] = files["2.png"], files["1.png"]
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return source_of([Item("train", None, name, folder / name) for name in files], str(folder), identity="names and sizes", **more)


def prepare(source: Source, out: Path, identity: Any = "times", **options: Any) -> Manifest:
    return shards.prepare(source, out, Options(max_skipped_pct=20, **options), 1, lambda done: None, identity=identity)


def test_files_that_changed_with_names_and_sizes_alike_are_told_apart(tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = prepare(photos(tmp_path / "photos", times="monday"), out)
    assert manifest.times == "monday" and manifest.content and manifest.skipped == 1
    copied = photos(tmp_path / "photos", times="tuesday")
    with pytest.raises(
        UserError, match=r"has the names and sizes that .* other modification times; if .* copied, say --identity names; --id"
    ):
        prepare(copied, out)
    assert prepare(copied, out, "names") == prepare(copied, out, "content") == manifest
    changed = photos(tmp_path / "photos", swap=True, times="tuesday")
    with pytest.raises(UserError, match=r"have other content than when .* was made from them; use another --out"):
        prepare(changed, out, "content")
    assert prepare(replace(copied, times=""), out) == manifest  # not known


def test_manifests_of_before_agree_as_before(tmp_path: Path) -> None:
    out, source = tmp_path / "out", photos(tmp_path / "photos", times="monday", understood=read_as(["one"]))
    manifest = prepare(source, out)
    text = replace(manifest, times="", content="", understood={}).to_json()
    old = "\n".join(line for line in text.split("\n") if line.split('"')[1:2] not in (["times"], ["content"], ["conflicts"]))
    old = old.replace(' "understood": {},\n', "").replace(' "pixels": {},\n', "")
    (out / "manifest.json").write_text(old)
    assert "understood" not in old and prepare(source, out) == read_manifest(out) == Manifest.from_json(text)
    with pytest.raises(UserError, match="was made before contents were noted; compare with --identity names, or use another --out"):
        prepare(source, out, "content")


def read_as(classes: Sequence[str], asked: str = "auto", **words: Any) -> dict[str, Any]:
    """What was understood, as sources say it."""
    splits = {"train": {"images": 6, "labelled": 6, "classes": dict.fromkeys(classes, 3), "examples": [["0.png", classes[0]]]}}
    return {"asked": {"labels": asked}, "splits": splits, "counted": True, "classes_by": asked} | words


def test_classes_that_were_read_otherwise_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    items = [Item("train", "ab"[i % 2], f"{i}.png", encoded(photo(i), "PNG")) for i in range(6)]
    by_folder = source_of(items, understood=read_as("ab"))
    manifest = prepare(by_folder, out)
    assert manifest.understood["splits"]["train"]["classes"] == {"a": 3, "b": 3} and prepare(by_folder, out) == manifest
    reworded = read_as("ab", classes_by="by folders", left_out={".txt": 3}, notes=["a note"])
    assert prepare(source_of(items, understood=reworded), out) == manifest
    sentence = "classes were read otherwise: train: 6 of 2 classes there, train: 12 of 4 classes now; use another --out"
    with pytest.raises(UserError, match=sentence):
        prepare(source_of(items, understood=read_as("cdef", "parent")), out)
    write_manifest(out, replace(manifest, understood={}))  # of before
    assert prepare(by_folder, out).classes == ("a", "b")
    with pytest.raises(UserError, match="classes were read otherwise: a b there, none now; use another --out"):
        prepare(source_of(items, understood=read_as(["images"])), out)


def test_shards_of_before_whose_splits_were_read_otherwise_are_refused(tmp_path: Path) -> None:
    """The old code took the pictures of dev/ and Testing/ for training ones."""
    items = [Item("train", "ab"[i % 2], f"{i}.png", encoded(photo(i), "PNG")) for i in range(6)]
    write_manifest(tmp_path, replace(prepare(source_of(items), tmp_path), understood={}))
    half = {name: {"images": 3, "labelled": 3, "classes": {"a": 2, "b": 1}, "examples": []} for name in ("train", "test")}
    now = source_of(items, understood={"splits": half, "counted": True})
    with pytest.raises(UserError, match="classes were read otherwise: train 6 there, train 3, test 3 now; use another --out"):
        prepare(now, tmp_path)


def test_a_source_that_is_counted_when_it_is_read_finds_its_shards(tmp_path: Path) -> None:
    """Also where a class had no picture that can be read, and where pictures of the test split are chosen one by one."""
    items = [Item("test" if i > 3 else "train", "ab"[i % 2], f"{i}.png", encoded(photo(i), "PNG")) for i in range(6)]
    listed = {"train": {"images": 0, "labelled": 0, "classes": {"a": 0, "a (2)": 0, "b": 0}, "examples": []}}
    source = source_of(items, understood={"splits": listed, "counted": False, "asked": {"labels": "auto"}})
    manifest = prepare(source, tmp_path)
    assert {name: split["classes"] for name, split in manifest.understood["splits"].items()} == {
        "train": {"a": 2, "b": 2},
        "test": {"a": 1, "b": 1},
    }
    assert prepare(source, tmp_path) == manifest
    with pytest.raises(UserError, match="classes were read otherwise"):
        prepare(replace(source, understood=source.understood | {"asked": {"labels": "parent"}}), tmp_path)


def test_an_interrupted_prepare_of_other_classes_or_times_is_not_resumed(tmp_path: Path) -> None:
    items = [Item("train", "ab"[i % 2], f"{i}.png", encoded(noise(200, 200, i), quality=95)) for i in range(60)]

    def stop(done: int) -> None:
        if done == 50:
            raise KeyboardInterrupt

    first: dict[str, Any] = {"times": "monday", "understood": read_as("ab")}
    options, tuesday = Options(shard_mib=1), {"times": "tuesday"}
    cases: dict[str, tuple[dict[str, Any], Any, bool]] = {
        "same": ({}, "times", True),
        "times": (tuesday, "times", False),
        "copied": (tuesday, "names", True),
        "content": (tuesday, "content", False),
        "labels": ({"understood": read_as("abc")}, "times", False),
    }
    for name, (more, identity, goes_on) in cases.items():
        with pytest.raises(KeyboardInterrupt):
            shards.prepare(source_of(items, **first), tmp_path / name, options, 2, stop)
        went_on: list[int] = []
        said: list[str] = []
        source = source_of(items, **(first | more))
        shards.prepare(source, tmp_path / name, options, 2, lambda done: None, went_on.append, identity=identity, says=said.append)
        assert bool(went_on) == goes_on, name
        assert bool(said) != goes_on and all("are of another source or version, or of other options; it begins again" in s for s in said)


def test_a_run_takes_shards_of_copied_files_for_the_same(tmp_path: Path) -> None:
    for day in ("monday", "tuesday"):
        prepare(photos(tmp_path / "photos", times=day), tmp_path / day)
    assert (tmp_path / "monday/manifest.json").read_bytes() != (tmp_path / "tuesday/manifest.json").read_bytes()
    assert manifest_digest(tmp_path / "monday") == manifest_digest(tmp_path / "tuesday")
    prepare(photos(tmp_path / "photos", swap=True), tmp_path / "swapped")
    assert manifest_digest(tmp_path / "swapped") != manifest_digest(tmp_path / "monday")


def test_the_same_picture_in_two_classes_is_said_and_listed(tmp_path: Path) -> None:
    shown = [(0, "cat"), (1, "dog"), (0, "dog"), (1, "dog"), (2, None), (2, "cat"), (2, "dog"), (3, "cat")]
    items = [Item("train", label, f"{label}/{i}.png", encoded(photo(seed), "PNG")) for i, (seed, label) in enumerate(shown)]
    said: list[str] = []
    manifest = shards.prepare(source_of(items), tmp_path / "out", Options(), 2, lambda done: None, says=said.append)
    assert (manifest.duplicates, manifest.conflicts) == (4, 2)
    assert said == [
        "2 images are copies with another class, the first: dog/2.png (class dog) of cat/0.png (class cat); conflicts.csv lists them"
    ]
    with (tmp_path / "out/conflicts.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["split", "sample", "name", "label", "same_as_split", "same_as_sample", "same_as_name", "same_as_label"],
        ["train", "2", "dog/2.png", "dog", "train", "0", "cat/0.png", "cat"],
        ["train", "6", "dog/6.png", "dog", "train", "5", "cat/5.png", "cat"],
    ]


NAMES = [
    "a.jpg",
    "with\na line.jpg",
    "re\rturn.jpg",
    " space.jpg",
    '"quoted".jpg',
    '"',
    "#1.jpg",
    "back\\nslash.jpg",
    "日本.jpg",
    "l\udce9.jpg",
    "\u2028.jpg",
]


def test_names_come_back_from_their_lists_whatever_is_in_them(tmp_path: Path) -> None:
    write_names(tmp_path, "train", NAMES)
    assert read_names(tmp_path, "train", len(NAMES)) == NAMES
    assert (tmp_path / "names-train.txt").read_bytes().split(b"\n")[:2] == [b"a.jpg", b'"with\\na line.jpg"']
    marks = np.zeros(len(NAMES), np.int64)
    labels.write(tmp_path / "list.txt", np.arange(len(NAMES)), NAMES, {"seed": 0})
    np.testing.assert_array_equal(labels.read(tmp_path / "list.txt", marks, NAMES), np.arange(len(NAMES)))
    (tmp_path / "names-train.txt").write_bytes(b'old \\n name.jpg\n"odd\n')  # of before: such lines are names as they are
    assert read_names(tmp_path, "train", 2) == ["old \\n name.jpg", '"odd']


def test_a_label_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfa.jpg\r\n2\r\n")
    np.testing.assert_array_equal(labels.read(tmp_path / "list.txt", np.zeros(3, np.int64), ["a.jpg", "b.jpg", "c.jpg"]), [0, 2])
