"""Classes and splits from files beside the pictures, and from files of the user's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.io

from simclr.data.sources.reading import essence
from simclr.errors import UserError
from tests.support.folders import WNIDS, made, read


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


def test_parts_of_a_set_are_no_classes_where_a_table_says_more(tmp_path: Path) -> None:
    skin = [f"HAM10000_images_part_{1 + i % 2}/ISIC_{i}.jpg" for i in range(12)]
    table = "lesion_id,image_id,dx\n" + "".join(f"HAM_{i},ISIC_{i},{('nv', 'mel', 'bkl')[i % 3]}\n" for i in range(12))
    found, said, _ = read(made(tmp_path / "a", skin, {"HAM10000_metadata.csv": table}))
    assert found == {"train": {"nv": 4, "mel": 4, "bkl": 4}} and "other classes than the numbered folders" in said
    found, said, _ = read(made(tmp_path / "b", skin))
    assert len(found["train"]) == 2 and "the classes are called like parts of a set" in said
    drivers = [f"c{i % 3}/img_{i}.jpg" for i in range(12)]
    agrees = "subject,classname,img\n" + "".join(f"p1,c{i % 3},img_{i}.jpg\n" for i in range(12))
    found, said, _ = read(made(tmp_path / "c", drivers, {"driver_imgs_list.csv": agrees}))
    assert found == {"train": {"c0": 4, "c1": 4, "c2": 4}} and "driver" not in said


def test_a_table_of_training_pictures_says_nothing_of_test_pictures_that_are_called_alike(tmp_path: Path) -> None:
    pictures = [f"{split}/{i}.jpg" for split in ("train", "test") for i in range(6)]
    rows = "file,label\n" + "".join(f"{i}.jpg,{'ab'[i % 2]}\n" for i in range(6))
    found, said, _ = read(made(tmp_path / "a", pictures, {"train.csv": rows}))
    assert found == {"train": {"a": 3, "b": 3}} and "of train train.csv" in said and "test train.csv" not in said
    assert read(made(tmp_path / "b", pictures, {"labels.csv": rows}))[0] == {"train": {None: 6}, "test": {None: 6}}
    assert read(made(tmp_path / "c", pictures, {"labels.csv": rows.replace("\n", "\ntrain/").removesuffix("train/")}))[0] == {
        "train": {"a": 3, "b": 3}
    }


def test_files_that_are_no_classes(tmp_path: Path) -> None:
    pictures = [f"train/{c}/{i}.jpg" for c in ("a1", "b1", "c1") for i in range(2)] + [f"test/x{i}.jpg" for i in range(3)]
    assert "test" not in read(made(tmp_path / "a", pictures, {"classes.txt": "a1\nb1\nc1\n"}))[0]
    numbers = {"test.txt": "x0.jpg 0\nx1.jpg 1\nx2.jpg 0\n", "classes.txt": "b1\na1\nc1\n"}
    found, said, source = read(made(tmp_path / "b", pictures, numbers))
    assert {i.name: i.label for i in source.items() if i.split == "test"} == {"test/x0.jpg": "b1", "test/x1.jpg": "a1", "test/x2.jpg": "b1"}
    flat = [f"{i}.jpg" for i in range(20)]
    folds = "image,fold\n" + "".join(f"{i}.jpg,{i % 5}\n" for i in range(20))
    ages = "file,age\n" + "".join(f"{i}.jpg,{20 + i % 5}\n" for i in range(20))
    assert read(made(tmp_path / "c", flat, {"kfold.csv": folds}))[0] == {"train": {None: 20}}
    found, said, _ = read(made(tmp_path / "d", flat, {"ages.csv": ages}))
    assert found == {"train": {None: 20}} and "nobody says that its 'age' are classes" in said
    masks = "image,rle\n0.jpg," + "1 " * 100_000 + "\n1.jpg,2\n"
    celeba = "20\nSmiling Young\n" + "".join(f"{i}.jpg  1 -1\n" for i in range(20))
    assert read(made(tmp_path / "e", flat, {"rle.csv": masks, "list_attr.txt": celeba, "wide.csv": "3\na,b,c\n"}))[0] == {
        "train": {None: 20}
    }
    wide = "file,label\n" + "".join(f"{i}.jpg,{'äb'[i % 2]}\n" for i in range(20))
    for encoding in ("utf-16", "latin-1"):
        assert read(made(tmp_path / encoding, flat, {"labels.csv": wide.encode(encoding)}))[0] == {"train": {"ä": 10, "b": 10}}


def test_a_file_for_the_test_split_leaves_train_its_folders(tmp_path: Path) -> None:
    root = made(tmp_path / "a", [f"train/{c}/{i}.jpg" for c in "ab" for i in range(3)] + [f"val/{i}.jpg" for i in range(4)])
    table = tmp_path / "places_val.txt"
    table.write_text("".join(f"{i}.jpg {i % 2}\n" for i in range(4)))
    found, said, _ = read(root, labels=str(table))
    assert found == {"train": {"a": 3, "b": 3}, "test": {"a": 2, "b": 2}} and "0 is a" in said


def test_files_that_differ_are_not_taken_and_said(tmp_path: Path) -> None:
    flat = [f"{i}.jpg" for i in range(12)]
    fine, coarse = ("file,label\n" + "".join(f"{i}.jpg,{'abcdef'[i % n]}\n" for i in range(12)) for n in (6, 2))
    found, said, _ = read(made(tmp_path / "a", flat, {"coarse.csv": coarse, "fine.csv": fine}))
    assert found == {"train": {None: 12}} and "coarse.csv and fine.csv give other classes; --labels FILE says which" in said
    assert read(made(tmp_path / "b", flat, {"one.csv": fine, "two.csv": fine}))[0]["train"]["a"] == 2
    both = "file,category,species\n" + "".join(f"{i}.jpg,{'ab'[i % 2]},{'xyz'[i % 3]}\n" for i in range(12))
    root = made(tmp_path / "c", flat, {"birds.csv": both, **{f"log{i}.txt": "x" for i in range(60)}})
    found, said, _ = read(root)
    assert found == {"train": {"a": 6, "b": 6}} and "by path, column category" in said and "has the columns species too" in said
    assert set(read(root, labels=str(root / "birds.csv"), label_columns=("file", "species"))[0]["train"]) == {"x", "y", "z"}
    for name in ("sampleSubmission.csv", "my_predictions.csv"):
        assert read(made(tmp_path / name, flat, {name: fine}))[0] == {"train": {None: 12}}


def test_a_file_for_train_leaves_the_test_split_its_folders(tmp_path: Path) -> None:
    root = made(tmp_path / "a", [f"train/t{i}.jpg" for i in range(6)] + [f"val/{c}/{i}.jpg" for c in ("cat", "dog") for i in range(2)])
    table = "file,label\n" + "".join(f"t{i}.jpg,{('cat', 'dog')[i % 2]}\n" for i in range(6))
    made(tmp_path, [], {"mine.csv": table})
    expected = {"train": {"cat": 3, "dog": 3}, "test": {"cat": 2, "dog": 2}}
    assert read(root, labels=str(tmp_path / "mine.csv"))[0] == expected
    assert read(made(root, [], {"train.csv": table}))[0] == expected


def test_a_flag_of_test_pictures(tmp_path: Path) -> None:
    root = made(tmp_path / "a", [f"a/{i}.jpg" for i in range(4)])
    for head, values in (("is_test", "0001"), ("is_train", "1110")):
        made(tmp_path, [], {"s.csv": f"file,{head}\n" + "".join(f"{i}.jpg,{value}\n" for i, value in enumerate(values))})
        assert read(root, split_from=str(tmp_path / "s.csv"))[0] == {"train": {None: 3}, "test": {None: 1}}


def test_what_is_no_path_is_a_user_error(tmp_path: Path) -> None:
    for wrong in ("~nobody-here/x.csv", "x" * 300):
        for field in ("labels", "split_from"):
            with pytest.raises(UserError, match=r"no such user here|is no path"):
                read(tmp_path, **{field: wrong})
    with pytest.raises(UserError, match="--label-columns names columns of a file, and neither"):
        read(tmp_path, label_columns=("a", "b"))


def test_a_partition_is_no_class(tmp_path: Path) -> None:
    faces = {"list_eval_partition.txt": "".join(f"{i:06}.jpg {i % 3}\n" for i in range(30))}
    assert read(made(tmp_path, [f"img_align_celeba/{i:06}.jpg" for i in range(30)], faces))[0] == {"train": {None: 30}}


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
    assert found == {"train": {None: 10}} and "labels.csv names 6 of 10 pictures and was not taken" in said
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


def test_a_file_of_classes_that_changed_is_seen(tmp_path: Path) -> None:
    """Also where each class keeps its number of pictures."""
    root, lines = made(tmp_path, [f"{i}.jpg" for i in range(4)]), ["a", "a", "b", "b"]
    found = []
    for order in (lines, lines, lines[::-1]):
        made(root, [], {"labels.csv": "file,label\n" + "".join(f"{i}.jpg,{label}\n" for i, label in enumerate(order))})
        found.append(essence(read(root)[2].understood))
    assert found[0] == found[1] != found[2] and found[0]["splits"] == found[2]["splits"]
