"""Splits and classes of folders as people have them: what is understood, and what is said about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io

from simclr.data.sources.folder import folder_tree, walk
from simclr.data.sources.layout import understand
from simclr.data.sources.reading import Reading, essence
from simclr.data.sources.source import Source
from simclr.errors import UserError

WNIDS = ("n03", "n01", "n02")


def made(root: Path, pictures: list[str], texts: dict[str, str | bytes] | None = None) -> Path:
    for name in pictures:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    for name, text in (texts or {}).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


def read(root: Path, **how: Any) -> tuple[dict[str, dict[str | None, int]], str, Source]:
    """({split: {class: pictures}} of the items, all that is said, the source)."""
    source, understood = understand(folder_tree(root, walk(root)), Reading(**how))
    found: dict[str, dict[str | None, int]] = {}
    for item in source.items():
        of = found.setdefault(item.split, {})
        of[item.label] = of.get(item.label, 0) + 1
    assert found == {name: {k: v for k, v in split.classes.items() if v} for name, split in understood.splits.items()}
    assert source.total == sum(sum(of.values()) for of in found.values())
    return found, "\n".join((understood.how_split, understood.how_labelled, *understood.notes)), source


def tiny_imagenet(root: Path) -> Path:
    annotations = "".join(f"val_{i}.JPEG\t{WNIDS[i % 3]}\t0\t32\t44\t62\n" for i in range(6))
    boxes = {f"train/{c}/{c}_boxes.txt": f"{c}_0.JPEG\t0\t0\t63\t63\n" for c in WNIDS}
    return made(
        root,
        [f"train/{c}/images/{c}_{i}.JPEG" for c in WNIDS for i in range(4)]
        + [f"val/images/val_{i}.JPEG" for i in range(6)]
        + [f"test/images/test_{i}.JPEG" for i in range(5)],
        {"val/val_annotations.txt": annotations, "wnids.txt": "\n".join(WNIDS), "words.txt": "n01\tcat\nn02\tdog\nn09\tfox\n", **boxes},
    )


def test_tiny_imagenet_as_it_comes(tmp_path: Path) -> None:
    found, said, source = read(tiny_imagenet(tmp_path))
    assert found == {"train": dict.fromkeys(WNIDS, 4), "test": dict.fromkeys(WNIDS, 2)}
    assert {item.name: item.label for item in source.items()}["val/images/val_1.JPEG"] == "n01"
    assert "as n01 of n01/images/" in said and "of val val/val_annotations.txt" in said
    assert "5 pictures of test: without classes they can judge nothing and are left out; val is the test split" in said


def test_kaggles_imagenet_with_its_solution_file(tmp_path: Path) -> None:
    solution = "\ufeffImageId,PredictionString\n" + "".join(
        f"ILSVRC2012_val_{i:08},n0{i % 3} 1 2 3 4 n0{i % 3} 5 6 7 8 \n" for i in range(6)
    )
    sets = "".join(f"ILSVRC2012_val_{i:08} {i + 1}\n" for i in range(6))  # a picture's number in the set: no class
    found, said, _ = read(
        made(
            tmp_path,
            [f"ILSVRC/Data/CLS-LOC/train/n0{c}/{i}.JPEG" for c in range(3) for i in range(3)]
            + [f"ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_{i:08}.JPEG" for i in range(6)]
            + [f"ILSVRC/Data/CLS-LOC/test/ILSVRC2012_test_{i:08}.JPEG" for i in range(6)],
            {
                "LOC_val_solution.csv": solution,
                "ILSVRC/ImageSets/CLS-LOC/val.txt": sets,
                "LOC_sample_submission.csv": "ImageId,PredictionString\n"
                + "".join(f"ILSVRC2012_test_{i:08},n0{i % 3}\n" for i in range(6)),
            },
        )
    )
    assert found == {"train": {"n00": 3, "n01": 3, "n02": 3}, "test": {"n00": 2, "n01": 2, "n02": 2}}
    assert "LOC_val_solution.csv, by name without ending" in said and "6 pictures of test: without classes" in said


def devkit(root: Path, order: tuple[str, ...], truth: list[int]) -> Path:
    """A devkit whose number i + 1 is the class `order[i]`, and the ground truth of the validation pictures."""
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")]
    rows = np.array([(i + 1, wnid, 0) for i, wnid in enumerate(order)] + [(len(order) + 1, "n99", 3)], dtype=kind)
    folder = root / "ILSVRC2012_devkit_t12" / "data"
    folder.mkdir(parents=True)
    scipy.io.savemat(folder / "meta.mat", {"synsets": rows})
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{number}\n" for number in truth))
    return root


def test_the_devkits_numbers_are_not_those_of_the_sorted_classes(tmp_path: Path) -> None:
    truth = [1, 3, 2, 2, 1, 3]
    made(tmp_path, [f"train/{c}/{i}.JPEG" for c in WNIDS for i in range(2)] + [f"val/ILSVRC2012_val_{i:08}.JPEG" for i in range(6)])
    _, said, source = read(devkit(tmp_path, WNIDS, truth))
    labels = [item.label for item in source.items() if item.split == "test"]
    assert labels == [WNIDS[number - 1] for number in truth] != [sorted(WNIDS)[number - 1] for number in truth]
    assert "meta.mat turns into classes" in said


def test_numbers_without_a_devkit_are_no_classes_and_a_list_of_synsets_is(tmp_path: Path) -> None:
    pictures = [f"train/{c}/{i}.JPEG" for c in WNIDS for i in range(2)] + [f"val/ILSVRC2012_val_{i:08}.JPEG" for i in range(4)]
    made(tmp_path / "a", pictures, {"ILSVRC2012_validation_ground_truth.txt": "1\n3\n2\n2\n"})
    found, said, _ = read(tmp_path / "a")
    assert "test" not in found and "4 pictures of val: without classes" in said and "without a test split" in said
    made(tmp_path / "b", pictures, {"imagenet_2012_validation_synset_labels.txt": "n03\nn01\nn01\nn02\n"})
    assert read(tmp_path / "b")[0]["test"] == {"n03": 1, "n01": 2, "n02": 1}
    made(tmp_path / "c", pictures, {"val.txt": "".join(f"ILSVRC2012_val_{i:08}.JPEG {i % 3}\n" for i in range(4))})
    found, said, _ = read(tmp_path / "c")  # counted from 0: the sorted classes
    assert found["test"] == {"n01": 2, "n02": 1, "n03": 1} and "0 is n01" in said


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


def test_lists_of_splits_beside_the_pictures(tmp_path: Path) -> None:
    food = [f"images/{c}/{i}.jpg" for c in ("pie", "soup") for i in range(6)]
    lists = {
        f"meta/{s}.txt": "".join(f"{c}/{i}\n" for c in ("pie", "soup") for i in of) for s, of in (("train", range(4)), ("test", (4, 5)))
    }
    found, said, source = read(made(tmp_path / "food", food, lists | {"meta/classes.txt": "pie\nsoup\n"}))
    assert found == {"train": {"pie": 4, "soup": 4}, "test": {"pie": 2, "soup": 2}} and "list: meta/test.txt = test (4)" in said
    assert {item.name for item in source.items() if item.split == "test"} == {
        f"images/{c}/{i}.jpg" for c in ("pie", "soup") for i in (4, 5)
    }
    pets = {"annotations/test.txt": "cat_1 1 1 1\ndog_1 2 2 1\n", "annotations/trainval.txt": "cat_0 1 1 1\ndog_0 2 2 1\n"}
    found, _, _ = read(made(tmp_path / "pets", [f"images/{c}_{i}.jpg" for c in ("cat", "dog") for i in range(2)], pets))
    assert found == {"train": {None: 2}, "test": {None: 2}}
    many = {f"labels/test{i}.txt": "a/1.jpg\n" for i in (1, 2)}
    found, said, _ = read(made(tmp_path / "dtd", ["a/1.jpg", "a/2.jpg", "b/3.jpg"], many))
    assert found == {"train": {"a": 2, "b": 1}} and "labels/test1.txt, labels/test2.txt each list a test split, and none was taken" in said


def test_a_partition_is_no_class(tmp_path: Path) -> None:
    faces = {"list_eval_partition.txt": "".join(f"{i:06}.jpg {i % 3}\n" for i in range(30))}
    assert read(made(tmp_path, [f"img_align_celeba/{i:06}.jpg" for i in range(30)], faces))[0] == {"train": {None: 30}}


def test_nested_classes(tmp_path: Path) -> None:
    root = made(tmp_path / "a", ["church/indoor/1.jpg", "church/outdoor/2.jpg", "kitchen/indoor/3.jpg"])
    found, said, _ = read(root)
    assert found == {"train": {"church": 2, "kitchen": 1}} and "--labels path makes each a class" in said
    assert read(root, labels="path")[0] == {"train": {"church/indoor": 1, "church/outdoor": 1, "kitchen/indoor": 1}}
    found, said, _ = read(root, labels="parent")
    assert found == {"train": {"indoor": 2, "outdoor": 1}} and "folders that are called alike are one class: indoor (2 folders)" in said
    assert read(root, labels="none")[0] == {"train": {None: 3}}
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


def test_tables_of_names_and_classes(tmp_path: Path) -> None:
    pictures = [f"train/{i}.jpg" for i in range(12)] + [f"test/{i + 100}.jpg" for i in range(4)]
    breeds = "\ufeffid,breed\r\n" + "".join(f"{i},b{i % 3}\r\n" for i in range(12))
    submission = "id,breed\n" + "".join(f"{i + 100},b{i % 3}\n" for i in range(4))
    found, said, _ = read(made(tmp_path / "a", pictures, {"labels.csv": breeds, "sample_submission.csv": submission}))
    assert found == {"train": {"b0": 4, "b1": 4, "b2": 4}} and "of train labels.csv, by name without ending" in said
    lines = '"od\nd.jpg",x\n"a b.jpg",y\n'
    found, _, _ = read(made(tmp_path / "b", ["od\nd.jpg", "a b.jpg"], {"labels.csv": lines}))
    assert found == {"train": {"x": 1, "y": 1}}
    found, _, _ = read(
        made(
            tmp_path / "c",
            ["in/1.jpg", "in/2.jpg"],
            {"metadata.jsonl": '{"file_name": "in/1.jpg", "label": 0}\n{"file_name": "in/2.jpg", "label": 1}\n'},
        )
    )
    assert found == {"train": {"0": 1, "1": 1}}
    found, _, _ = read(
        made(
            tmp_path / "d", ["1.jpg", "2.jpg"], {"notes.txt": "two pictures\nof a sea\n", "lines.txt": "1.jpg 1\n2.jpg 2\n", "x.csv": "a\n"}
        )
    )
    assert found == {"train": {"1": 1, "2": 1}}


def test_a_file_of_the_users_own(tmp_path: Path) -> None:
    root = made(tmp_path / "a", [f"x/{i}.jpg" for i in range(6)] + [f"y/{i}.jpg" for i in range(6)])
    table = tmp_path / "mine.csv"
    table.write_text("where,sex,kind\n" + "".join(f"x/{i}.jpg,m,k{i % 2}\n" for i in range(6)) + "y/0.jpg,f,k0\n")
    with pytest.raises(UserError, match=r"expected two columns, or a head with known names .*--label-columns"):
        read(root, labels=str(table))
    found, said, _ = read(root, labels=str(table), label_columns=("where", "kind"))
    assert found == {"train": {"k0": 4, "k1": 3, None: 5}} and "not in mine.csv, so without a class: 5 pictures" in said
    with pytest.raises(UserError, match="has no column 'color'; its first line has where, sex, kind"):
        read(root, labels=str(table), label_columns=("where", "color"))
    table.write_text("z/1.jpg,cat\n")
    with pytest.raises(UserError, match=r"names none of the pictures: it has 'z/1.jpg', the source has 'x/0.jpg'"):
        read(root, labels=str(table))
    with pytest.raises(UserError, match="there is no such file; expected auto, folder, parent"):
        read(root, labels="nowhere.csv")


def test_several_classes_a_picture_are_said(tmp_path: Path) -> None:
    table = "file,label\n1.jpg,cat\n1.jpg,dog\n2.jpg,cat\n3.jpg,dog\n3.jpg,dog\n"
    found, said, _ = read(made(tmp_path, ["1.jpg", "2.jpg", "3.jpg"], {"labels.csv": table}))
    assert found == {"train": {"cat": 1, "dog": 1, None: 1}}
    assert "labels.csv states several classes for 1 picture, as for 1.jpg" in said and "docs/data.md" in said


def test_a_table_of_some_pictures_is_not_taken_and_said(tmp_path: Path) -> None:
    table = "file,label\n" + "".join(f"{i}.jpg,{'ab'[i % 2]}\n" for i in range(6))
    root = made(tmp_path, [f"{i}.jpg" for i in range(10)], {"labels.csv": table})
    found, said, _ = read(root)
    assert found == {"train": {None: 10}} and "labels.csv names 6 of 10 pictures and was not taken for their classes" in said
    assert read(root, labels=str(root / "labels.csv"))[0] == {"train": {"a": 3, "b": 3, None: 4}}


def test_splits_from_a_file_or_a_fraction(tmp_path: Path) -> None:
    pictures = [f"{c}/{c}{i}.jpg" for c in "ab" for i in range(100)]
    root = made(tmp_path / "a", pictures)
    listed = tmp_path / "test.txt"
    listed.write_text("".join(f"a/a{i}.jpg\n" for i in range(5)) + "b/b7.jpg\n")
    found, _, source = read(root, split_from=str(listed))
    assert found["test"] == {"a": 5, "b": 1} and {i.name for i in source.items() if i.split == "test"} == set(listed.read_text().split())
    table = tmp_path / "splits.csv"
    table.write_text("name,split\n" + "".join(f"a{i}.jpg,{('train', 'Valid')[i % 2]}\n" for i in range(100)))
    found, said, _ = read(root, split_from=str(table))
    assert (
        found == {"train": {"a": 50, "b": 100}, "test": {"a": 50}} and "not in splits.csv, so in the training split: 100 pictures" in said
    )
    table.write_text("name,split\na1.jpg,later\na2.jpg,train\n")
    with pytest.raises(UserError, match="has the split 'later'; expected train, val or test"):
        read(root, split_from=str(table))
    _, _, one = read(root, split_from="0.2")
    held = {item.name for item in one.items() if item.split == "test"}
    assert 20 <= len(held) <= 60
    made(root, [f"a/new{i}.jpg" for i in range(50)])
    assert held == {i.name for i in read(root, split_from="0.2")[2].items() if i.split == "test" and "new" not in i.name}
    made(root, ["test/a/t.jpg"])
    found, said, _ = read(root, split_from="0.2")
    assert sum(sum(of.values()) for of in found.values()) == 250 and "1 picture in other splits' folders are left out" in said
    for wrong in ("1.5", "0", "often"):
        with pytest.raises(UserError, match="a fraction between 0 and 1"):
            read(root, split_from=wrong)


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


def test_a_file_of_classes_that_changed_is_seen(tmp_path: Path) -> None:
    """Also where each class keeps its number of pictures."""
    root, lines = made(tmp_path, [f"{i}.jpg" for i in range(4)]), ["a", "a", "b", "b"]
    found = []
    for order in (lines, lines, lines[::-1]):
        made(root, [], {"labels.csv": "file,label\n" + "".join(f"{i}.jpg,{label}\n" for i, label in enumerate(order))})
        found.append(essence(read(root)[2].understood))
    assert found[0] == found[1] != found[2] and found[0]["splits"] == found[2]["splits"]


def test_names_and_sizes_alike_but_other_times(tmp_path: Path) -> None:
    made(tmp_path, ["a/1.jpg", "b/1.jpg"])
    before = folder_tree(tmp_path, walk(tmp_path))
    (tmp_path / "a/1.jpg").write_bytes(b"other.p")
    after = folder_tree(tmp_path, walk(tmp_path))
    assert before.identity == after.identity and before.times != after.times
