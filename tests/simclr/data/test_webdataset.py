"""WebDataset shards: where classes come from, what a shard's number is not, and braces."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from simclr.data.sources.archives import archive_tree, archives_tree, braces_tree
from simclr.data.sources.tar import stem
from simclr.data.sources.webdataset import are_shards, expand
from simclr.errors import UserError
from tests.simclr.data.test_archives import packed, read


def shards(root: Path, files: Mapping[str, Mapping[str, bytes]]) -> dict[str, Path]:
    """Tars of `files`: shard → path → content, as `archives_tree` takes them."""
    return {stem(name): packed(root / name, members) for name, members in files.items()}


def pictures(shard: int, images: int = 4) -> dict[str, bytes]:
    return {f"{shard}{i:03}.jpg": f"picture {shard} {i}".encode() for i in range(images)}


def beside(files: Mapping[str, bytes], kind: str, contents: list[object]) -> dict[str, bytes]:
    """`files`, each followed by its sidecar."""
    given = [text if isinstance(text, bytes) else (json.dumps(text) if kind == "json" else str(text)).encode() for text in contents]
    pairs = [((path, data), (f"{path.partition('.')[0]}.{kind}", text)) for (path, data), text in zip(files.items(), given, strict=True)]
    return dict(member for pair in pairs for member in pair)


@pytest.mark.parametrize("ending", [".tar", ".tar.gz"])
def test_a_cls_states_the_class_and_the_number_of_a_shard_does_not(tmp_path: Path, ending: str) -> None:
    files = {
        f"train-000000{ending}": beside(pictures(0), "cls", [3, "7\n", -1, b"\xef\xbb\xbf0"]),
        f"train-000001{ending}": beside(pictures(1), "cls", [3, 3, "a cat", ""]),
        f"imagenet1k-validation-00{ending}": beside(pictures(2), "cls", [0, 7, 7, 3]),
    }
    tree = archives_tree(str(tmp_path), shards(tmp_path, files))
    expected = {f"train/{path}": data for shard in (0, 1) for path, data in pictures(shard).items()}
    expected |= {f"imagenet1k-validation/{path}": data for path, data in pictures(2).items()}
    assert read(tree) == expected
    stated = {"train/0000.jpg": "3", "train/0001.jpg": "7", "train/0003.jpg": "0", "train/1000.jpg": "3", "train/1001.jpg": "3"}
    stated |= {"train/1002.jpg": "a cat"} | {f"imagenet1k-validation/200{i}.jpg": c for i, c in enumerate("0773")}
    assert tree.stated == stated
    assert not tree.texts and not tree.ignored and not tree.notes


def test_keys_that_every_shard_has_stay_apart(tmp_path: Path) -> None:
    files = {f"{shard:06}.tar": beside({"a/0.jpg": b"%d" % shard, "1.png": b"%d one" % shard}, "cls", [shard, 9]) for shard in (0, 1)}
    tree = archives_tree("", shards(tmp_path, files))
    assert read(tree) == {"a/0.jpg": b"0", "1.png": b"0 one", "a/000001_0.jpg": b"1", "000001_1.png": b"1 one"}
    assert tree.stated == {"a/0.jpg": "0", "1.png": "9", "a/000001_0.jpg": "1", "000001_1.png": "9"}
    alone = archive_tree(tmp_path / "000001.tar")
    assert set(read(alone)) == {"a/0.jpg", "1.png"} and alone.stated == {"a/0.jpg": "1", "1.png": "9"}


def test_pictures_are_read_in_the_order_of_the_archive(tmp_path: Path) -> None:
    """Whatever the order of their sidecars: in a compressed shard each step back unpacks it anew."""
    path = packed(tmp_path / "x.tar.gz", {"2.cls": b"2", "1.cls": b"1", "1.jpg": b"one", "2.jpg": b"two"})
    assert [part.names for part in archive_tree(path).parts] == [("1.jpg", "2.jpg")]


def test_a_json_states_the_class_in_one_of_four_fields(tmp_path: Path) -> None:
    values: list[object] = [
        {"label": 3, "class_name": "dog"},
        {"cls": 3},
        {"class": "cat"},
        {"label": True},
        {"label": [1]},
        b"no json",
        [3],
    ]
    tree = archives_tree("", shards(tmp_path, {"0.tar": beside(pictures(0, 7), "json", values)}))
    assert tree.stated == {"0000.jpg": "dog", "0001.jpg": "3", "0002.jpg": "cat"} and len(read(tree)) == 7
    both = beside(pictures(1), "json", [{"label": 1}] * 4) | {"1000.cls": b"a", "1001.cls": b""}
    tree = archives_tree("", shards(tmp_path, {"1.tar": both}))
    assert tree.stated == {"1000.jpg": "a", "1001.jpg": "1", "1002.jpg": "1", "1003.jpg": "1"}  # a .cls is the surer one


def test_a_txt_that_pictures_share_is_a_class_and_else_a_caption(tmp_path: Path) -> None:
    """Decided over all shards: in one of them every text may stand once."""
    words = shards(tmp_path, {f"{i}.tar": beside(pictures(i), "txt", ["cat", "dog", "cow", "fox"]) for i in (0, 1)})
    assert archives_tree("", words).stated == {f"{s}00{i}.jpg": name for s in (0, 1) for i, name in enumerate(("cat", "dog", "cow", "fox"))}
    alone = archives_tree("", {"0": words["0"]})
    assert not alone.stated and not alone.texts and len(read(alone)) == 4
    assert alone.notes == ("the .txt files of 4 pictures are captions (4 different ones), and no classes; --captions auto keeps them",)
    both = beside(pictures(2), "txt", ["one", "two", "three", "four"]) | {"2000.cls": b"0", "2001.cls": b"1"}
    tree = archives_tree("", shards(tmp_path, {"2.tar": both}))
    assert tree.stated == {"2000.jpg": "0", "2001.jpg": "1"} and tree.notes[0].startswith("the .txt files of 2 pictures are captions")


def test_a_txt_is_no_class_if_it_tells_nothing_apart_or_holds_a_box(tmp_path: Path) -> None:
    """The folders of the pictures then are their classes."""
    folders = {f"{kind}/{i}.jpg": b"x" for kind in ("cat", "dog") for i in range(4)}
    boxes = ["0 0.5 0.5 0.1 0.1", "1 0.5 0.5 0.1 0.1"]
    for contents, what in (([boxes[0]] * 8, "rows of numbers (1"), (boxes * 4, "rows of numbers (2"), (["a photo"] * 8, "captions (1")):
        tree = archives_tree("", shards(tmp_path, {"0.tar": beside(folders, "txt", [*contents])}))
        keeps = "; --captions auto keeps them" if what.startswith("captions") else ""
        assert not tree.stated and tree.notes == (f"the .txt files of 8 pictures are {what} different ones), and no classes{keeps}",)
    tree = archives_tree("", shards(tmp_path, {"0.tar": beside(folders, "txt", ["0", "1"] * 4)}))
    assert set(tree.stated.values()) == {"0", "1"}  # one number is a class's


def test_classes_that_overrule_folders_are_said(tmp_path: Path) -> None:
    folders = {f"{split}/{kind}/{i}.jpg": b"x" for split in ("train", "val") for kind in ("cat", "dog") for i in range(2)}
    json_of = {"label": [{"label": i % 2} for i in range(8)], "alike": [{"label": i // 2 % 2} for i in range(8)]}
    tree = archives_tree("", shards(tmp_path, {"0.tar": beside(folders, "json", [*json_of["label"]])}))
    assert tree.notes == (
        "classes are those that the .json or .txt beside 8 pictures state, not their folders, which tell them apart otherwise: "
        "train/cat/0.jpg is '0'; --labels folder takes the folders",
    )
    assert not archives_tree("", shards(tmp_path, {"0.tar": beside(folders, "json", [*json_of["alike"]])})).notes
    assert not archives_tree("", shards(tmp_path, {"0.tar": beside(folders, "cls", [0, 1] * 4)})).notes  # a .cls is nothing else
    assert "state, not their folders" in archives_tree("", shards(tmp_path, {"0.tar": beside(folders, "txt", ["a", "b"] * 4)})).notes[0]


def test_a_sample_has_one_picture(tmp_path: Path) -> None:
    files = {"a.seg.png": b"mask", "a.jpg": b"a", "a.png": b"mask", "a.cls": b"0", "b.image.webp": b"b", "b.cls": b"1", "meta.csv": b""}
    tree = archives_tree("", shards(tmp_path, {"x.tar": files}))
    assert read(tree) == {"x/a.jpg": b"a", "x/b.image.webp": b"b"} and tree.stated == {"x/a.jpg": "0", "x/b.image.webp": "1"}
    assert tree.ignored == {".seg.png": 1, ".png": 1, ".csv": 1}


def test_numbered_tars_without_sidecars_are_shards_if_they_look_like_it(tmp_path: Path) -> None:
    folders = {f"set/{i}.tar": {"a.jpg": b"%d" % i, "a.xml": b""} for i in (1, 2)}
    assert set(read(archives_tree("", shards(tmp_path, folders)))) == {"set/1/a.jpg", "set/2/a.jpg"}  # they may be classes
    series = {f"part-{i:05}.tar": {"a.jpg": b"%d" % i, "a.xml": b""} for i in (0, 1, 2)}
    tree = archives_tree("", shards(tmp_path, series | {"n01440764.tar": {"a.jpg": b"fish"}}))
    assert read(tree) == {"part/a.jpg": b"0", "part/part-00001_a.jpg": b"1", "part/part-00002_a.jpg": b"2", "n01440764/a.jpg": b"fish"}
    assert tree.notes == ("part-00000 to part-00002 are numbered shards (3): their numbers are no classes",) and tree.ignored == {".xml": 3}
    assert are_shards(["00000", "00001", "00003", "n0001", "a/00002", "9999", "1000"]) == set()
    assert are_shards(["a/data-0004-of-0006", "a/data-0005-of-0006", "b/data-0006-of-0006"]) == {
        "a/data-0004-of-0006",
        "a/data-0005-of-0006",
    }


def test_braces_name_files_as_a_shell_does(tmp_path: Path) -> None:
    assert expand("a/{008..011}.tar") == [f"a/{i}.tar" for i in ("008", "009", "010", "011")]
    assert expand("{2..0}{x,y}") == ["2x", "2y", "1x", "1y", "0x", "0y"]
    assert expand("{train,val}-{9..10}") == ["train-9", "train-10", "val-9", "val-10"]
    assert expand("plain {braces} stay {}") == ["plain {braces} stay {}"]
    assert expand("a{b{1..2}c,d}") == ["ab1c", "ad", "ab2c"]
    with pytest.raises(UserError, match="names 1,000,001 files; expected at most 1,000,000"):
        expand("{0..1000000}")
    shards(tmp_path, {f"{split}-{i:02}.tar": beside({f"{split}{i}.jpg": b"x"}, "cls", [i]) for split in ("train", "val") for i in (0, 1)})
    tree = braces_tree(f"{tmp_path}/{{train,val}}-{{00..01}}.tar")
    assert tree.stated == {f"{split}/{split}{i}.jpg": str(i) for split in ("train", "val") for i in (0, 1)}
    assert len(braces_tree(f"{tmp_path}/train-{{00..00}}.tar").stated) == 1
    with pytest.raises(UserError, match=r"names 3 files, and 1 of them are missing, as .*val-02.tar"):
        braces_tree(f"{tmp_path}/val-{{00..02}}.tar")
    (tmp_path / "val-02.tar.part").write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"val-02.tar.part, which is no tar or zip archive"):
        braces_tree(f"{tmp_path}/val-{{02..02}}.tar.part")
