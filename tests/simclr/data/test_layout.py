"""Splits and classes of folders as people have them: what is understood, and what is said about it."""

from __future__ import annotations

from pathlib import Path

import pytest

from simclr.data.sources.folder import folder_tree, walk
from simclr.data.sources.layout import understand
from simclr.data.sources.reading import Reading
from simclr.errors import UserError
from tests.support.folders import WNIDS, made, read, tiny_imagenet


def test_tiny_imagenet_as_it_comes(tmp_path: Path) -> None:
    found, said, source = read(tiny_imagenet(tmp_path))
    assert found == {"train": dict.fromkeys(WNIDS, 4), "test": dict.fromkeys(WNIDS, 2)}
    assert {item.name: item.label for item in source.items()}["val/images/val_1.JPEG"] == "n01"
    assert "as n01 of n01/images/" in said and "of val val/val_annotations.txt" in said
    assert "5 pictures of test: without classes they can judge nothing and are left out; val is the test split" in said


@pytest.mark.parametrize(
    ("train", "test"),
    [
        *(("Training", "Testing"), ("seg_train/seg_train", "seg_test/seg_test"), ("train", "dev"), ("TRAIN", "eval")),
        *(("train_images", "val-2017"), ("ILSVRC2012_img_train", "ILSVRC2012_img_val"), ("train", "validation")),
        ("imagenet/train", "imagenet/valid"),
    ],
)
def test_folders_called_like_splits(tmp_path: Path, train: str, test: str) -> None:
    found, said, _ = read(made(tmp_path, [f"{split}/{c}/{i}.jpg" for split in (train, test) for c in "ab" for i in range(2)]))
    assert found == {"train": {"a": 2, "b": 2}, "test": {"a": 2, "b": 2}} and "= train" in said


def test_splits_without_classes_and_pictures_to_predict(tmp_path: Path) -> None:
    assert read(made(tmp_path / "coco", ["train2017/1.jpg", "train2017/2.jpg", "val2017/3.jpg"]))[0] == {
        "train": {None: 2},
        "test": {None: 1},
    }
    found, said, _ = read(made(tmp_path / "intel", ["seg_train/a/1.jpg", "seg_train/b/2.jpg", "seg_test/b/3.jpg", "seg_pred/9.jpg"]))
    assert found == {"train": {"a": 1, "b": 1}, "test": {"b": 1}} and "1 picture to predict are left out" in said
    found, said, _ = read(made(tmp_path / "three", [f"{split}/{c}/1.jpg" for split in ("train", "val", "test") for c in "ab"]))
    assert found["test"] == {"a": 2, "b": 2} and "val (2) and test (2 pictures) together are the test split" in said


def test_a_class_that_is_called_like_a_split(tmp_path: Path) -> None:
    found, said, _ = read(made(tmp_path / "a", ["bus/1.jpg", "train/1.jpg", "car/2.jpg"]))
    assert found == {"train": {"bus": 1, "train": 1, "car": 1}} and "the folder train looks like a split and was taken for none" in said
    found, said, _ = read(made(tmp_path / "b", ["test_tube/1.jpg", "beaker/2.jpg"]))
    assert found == {"train": {"test_tube": 1, "beaker": 1}}
    found, said, _ = read(made(tmp_path / "c", ["2019/sea/1.jpg", "2019/test/2.jpg", "2020/x/3.jpg"]))
    assert found == {"train": {"2019": 2, "2020": 1}} and "the folder test looks like a split" in said
    found, _, _ = read(made(tmp_path / "d", [f"{split}/train/{c}/1.jpg" for split in ("train", "test") for c in "ab"]))
    assert found == {"train": {"a": 1, "b": 1}, "test": {"a": 1, "b": 1}}
    assert read(tmp_path / "d", split_from="none", labels="parent")[0] == {"train": {"a": 2, "b": 2}}


def test_splits_below_classes_and_training_pictures_that_are_not_in_a_folder_of_their_own(tmp_path: Path) -> None:
    found, _, _ = read(made(tmp_path / "a", [f"{c}/{split}/1.jpg" for c in ("cat", "dog") for split in ("train", "test")]))
    assert found == {"train": {"cat": 1, "dog": 1}, "test": {"cat": 1, "dog": 1}}
    found, said, _ = read(made(tmp_path / "b", ["cat/1.jpg", "dog/1.jpg", "test/cat/2.jpg", "test/dog/2.jpg"]))
    assert found == {"train": {"cat": 1, "dog": 1}, "test": {"cat": 1, "dog": 1}}
    assert "beside the splits' folders there are others, whose pictures train: cat, dog" in said
    found, said, _ = read(made(tmp_path / "c", ["train/a/1.jpg", "train/b/1.jpg", "test/a/2.jpg", "cover.jpg", "samples/x.jpg"]))
    assert found == {"train": {"a": 1, "b": 1}, "test": {"a": 1}}
    assert "beside the splits' folders, and left out: 2 pictures in samples; in the train folder they would train" in said


def test_an_archive_that_was_unpacked_into_itself_does_not_train_its_test_pictures(tmp_path: Path) -> None:
    """As a set of X-rays that many have: chest_xray/train and again chest_xray/chest_xray/train."""
    pictures = [f"chest_xray/{split}/{c}/{i}.jpeg" for split in ("train", "val", "test") for c in ("NORMAL", "PNEUMONIA") for i in range(2)]
    again = [f"chest_xray/{name}" for name in pictures]
    found, said, _ = read(made(tmp_path, [*pictures, *again, "chest_xray/__MACOSX/._x.jpeg"]))
    assert found == {"train": {"NORMAL": 2, "PNEUMONIA": 2}, "test": {"NORMAL": 4, "PNEUMONIA": 4}}
    assert "left out: 12 pictures in chest_xray" in said


PAIR = [f"{split}/{c}/{i}.jpg" for split in ("train", "valid") for c in "ab" for i in range(3)]


@pytest.mark.parametrize("stray", [["preview.jpg"], ["docs/logo.png"], ["test/test/x.jpg", "test/test/y.jpg"]])
def test_strays_beside_a_folder_of_splits_change_nothing(tmp_path: Path, stray: list[str]) -> None:
    found, said, _ = read(made(tmp_path, [*(f"dataset/{name}" for name in PAIR), *stray]))
    assert found == {"train": {"a": 3, "b": 3}, "test": {"a": 3, "b": 3}} and f"left out: {len(stray)} picture" in said


def test_splits_that_differ_by_the_splits_name_only(tmp_path: Path) -> None:
    found, _, _ = read(made(tmp_path / "gan", [f"{split}/{i}.jpg" for split in ("trainA", "trainB", "testA", "testB") for i in range(2)]))
    assert found == {"train": {None: 4}, "test": {None: 4}}
    market = [f"{split}/{i}.jpg" for split in ("bounding_box_train", "bounding_box_test", "query") for i in range(2)]
    found, said, _ = read(made(tmp_path / "market", market))
    assert found == {"train": {None: 2}, "test": {None: 2}} and "left out: 2 pictures in query" in said
    assert read(made(tmp_path / "mine", [f"my{split}/{c}/1.jpg" for split in ("train", "test") for c in "ab"]))[0]["test"] == {
        "a": 1,
        "b": 1,
    }
    for names in (("valid", "invalid"), ("bullet_train", "test_tube"), ("contest", "detest")):
        found, said, _ = read(made(tmp_path / names[0], [f"{name}/{i}.jpg" for name in names for i in range(2)]))
        assert found == {"train": dict.fromkeys(names, 2)}


def test_masks_are_no_samples(tmp_path: Path) -> None:
    voc = [f"{folder}/{i}.{ending}" for folder, ending in (("JPEGImages", "jpg"), ("SegmentationClass", "png")) for i in range(5)]
    found, said, source = read(made(tmp_path / "voc", voc))
    assert (
        found == {"train": {None: 5}} and "5 pictures in SegmentationClass are called like others and are left out as their masks" in said
    )
    assert source.understood["left_out"] == {"in SegmentationClass/": 5}
    pets = [f"images/cat_{i}.jpg" for i in range(4)] + [f"annotations/trimaps/cat_{i}.png" for i in range(4)]
    assert read(made(tmp_path / "pets", pets))[0] == {"train": {None: 4}}
    assert read(made(tmp_path / "cells", ["images/1.tif", "masks/1_mask.tif"]))[0] == {"train": {None: 1}}
    streets = ["leftImg8bit/train/aachen/a_1_leftImg8bit.png", "gtFine/train/aachen/a_1_gtFine_color.png"]
    assert read(made(tmp_path / "streets", streets))[0] == {"train": {None: 1}}
    assert read(tmp_path / "cells", keep_masks=True)[0] == {"train": {"images": 1, "masks": 1}}
    for classes in (("boxes", "labels", "pallets"), ("asphalt", "ground", "grass"), ("mask", "unmasked"), ("labeled/cat", "labeled/dog")):
        found, said, _ = read(made(tmp_path / classes[0], [f"{name}/{i}.jpg" for name in classes for i in range(3)]))
        assert len(found["train"]) == len(classes) and None not in found["train"], classes
    faces = ["mask/1.jpg", "mask/2.jpg", "no_mask/3.jpg"]  # a class
    assert read(made(tmp_path / "faces", faces))[0] == {"train": {"mask": 2, "no_mask": 1}}


def test_nested_classes(tmp_path: Path) -> None:
    root = made(tmp_path / "a", ["church/indoor/1.jpg", "church/outdoor/2.jpg", "kitchen/indoor/3.jpg"])
    found, said, _ = read(root)
    assert found == {"train": {"church": 2, "kitchen": 1}} and "--labels path makes each a class" in said
    assert read(root, labels="path")[0] == {"train": {"church/indoor": 1, "church/outdoor": 1, "kitchen/indoor": 1}}
    found, said, _ = read(root, labels="parent")
    assert found == {"train": {"indoor": 2, "outdoor": 1}} and "folders that are called alike are one class: indoor (2 folders)" in said
    assert read(root, labels="none")[0] == {"train": {None: 3}}
    assert read(made(tmp_path / "digits", ["0/1.jpg", "1/2.jpg", "1/extra/3.jpg"]))[0] == {"train": {"0": 1, "1": 2}}
    places = ["train/a/abbey/1.jpg", "train/b/bakery/1.jpg", "train/b/bay/2.jpg", "val/a/abbey/3.jpg"]
    assert read(made(tmp_path / "b", places))[0] == {"train": {"a/abbey": 1, "b/bakery": 1, "b/bay": 1}, "test": {"a/abbey": 1}}
    assert read(made(tmp_path / "c", ["train/all/cat/1.jpg", "train/all/dog/1.jpg", "test/cat/2.jpg"]))[0]["test"] == {"cat": 1}


def test_one_folder_names_no_class_and_files_beside_the_classes_have_none(tmp_path: Path) -> None:
    assert read(made(tmp_path / "a", ["photos/1.jpg", "photos/2.jpg"]))[0] == {"train": {None: 2}}
    found, said, _ = read(made(tmp_path / "b", ["cat/1.jpg", "dog/1.jpg", "2.jpg"]))
    assert found == {"train": {"cat": 1, "dog": 1, None: 1}} and "in no class's folder: 1 picture of train" in said


def test_a_test_class_that_training_lacks_is_said(tmp_path: Path) -> None:
    found, said, _ = read(made(tmp_path / "a", ["train/a/1.jpg", "train/b/1.jpg", "test/a/2.jpg", "test/c/2.jpg"]))
    assert found["test"] == {"a": 1, "c": 1} and "1 of 2 test pictures are of 1 classes that no training picture has (c)" in said
    found, said, _ = read(made(tmp_path / "b", ["train/1.jpg", "train/2.jpg", "val/images/3.jpg"]))
    assert found == {"train": {None: 2}, "test": {None: 1}}


def test_junk_folders_are_left_out_and_counted(tmp_path: Path) -> None:
    junk = [
        "a/.ipynb_checkpoints/1.jpg",
        "a/@eaDir/b.jpg/SYNO_1.jpg",
        ".Trash-1000/files/2.jpg",
        "__MACOSX/a/3.jpg",
        "b/.thumbnails/x/4.jpg",
    ]
    source, understood = understand(folder_tree(made(tmp_path, ["a/1.jpg", "b/2.jpg", *junk]), walk(tmp_path)), Reading())
    assert [item.name for item in source.items()] == ["a/1.jpg", "b/2.jpg"]
    assert understood.junk == {".ipynb_checkpoints": 1, "@eaDir": 1, ".Trash-1000": 1, "__MACOSX": 1, ".thumbnails": 1}


def test_links_to_folders_are_followed_and_loops_are_not(tmp_path: Path) -> None:
    made(tmp_path / "imagenet", [f"train/{c}/1.jpg" for c in WNIDS])
    (tmp_path / "subset" / "train").mkdir(parents=True)
    for wnid in WNIDS[:2]:
        (tmp_path / "subset" / "train" / wnid).symlink_to(tmp_path / "imagenet" / "train" / wnid)
    (tmp_path / "subset" / "again").symlink_to(tmp_path / "subset")
    (tmp_path / "subset" / "train" / "n01" / "up").symlink_to(tmp_path)
    found, _, source = read(tmp_path / "subset")
    assert found["train"] == {"n03": 1, "n01": 1}, [item.name for item in source.items()]


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path, ["a/1.jpg", "b/1.jpg"])
    monkeypatch.setattr("os.scandir", lambda path: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(UserError, match=r"cannot be read \(Permission denied\)"):
        walk(tmp_path)


def test_names_and_sizes_alike_but_other_times(tmp_path: Path) -> None:
    made(tmp_path, ["a/1.jpg", "b/1.jpg"])
    before = folder_tree(tmp_path, walk(tmp_path))
    (tmp_path / "a/1.jpg").write_bytes(b"other.p")
    after = folder_tree(tmp_path, walk(tmp_path))
    assert before.identity == after.identity and before.times != after.times


@pytest.mark.parametrize("names", [["1.jpg", "2.jpg"], ["train/1.jpg", "train/2.jpg", "test/cat/3.jpg"]])
def test_pictures_that_lie_in_no_folder_have_no_class_of_their_parent(tmp_path: Path, names: list[str]) -> None:
    found, said, _ = read(made(tmp_path, names), labels="parent")
    assert found["train"] == {None: 2} and "none: no folder tells training pictures apart" in said
