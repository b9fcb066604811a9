"""The images of a folder, an archive and a named dataset: split, class, order, and the error for a missing source."""

from __future__ import annotations

import io
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simclr.data.encode import encode
from simclr.data.s3.store import Store
from simclr.data.s3.uri import Address
from simclr.data.sources.open import betons_at, open_source
from simclr.data.sources.patterns import CLASSES, render
from simclr.data.sources.portions import elsewhere, portions, reader
from simclr.data.sources.source import Part, Source
from simclr.data.sources.torchvision import DATASETS
from simclr.errors import UserError
from tests.support.items import told
from tests.support.s3 import Proxy

NAMES = ("test/cat/b.png", "train/cat/a.png", "train/dog/c.png", "train/dog/._c.png", "train/.DS_Store", "train/dog/notes.txt")


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 7), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def folder(root: Path, names: tuple[str, ...]) -> Path:
    for shade, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(shade))
    return root


def archive(path: Path, names: tuple[str, ...]) -> Path:
    with tarfile.open(path, "w:" + ("xz" if path.suffix == ".xz" else "gz" if path.suffix == ".gz" else "")) as file:
        for shade, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size = len(png(shade))
            file.addfile(member, io.BytesIO(png(shade)))
    return path


def listed(source: Source) -> list[tuple[str, str | None, str]]:
    return [(item.split, item.label, item.name) for item in source.items()]


def test_a_folder_and_an_archive_of_it_give_the_same_images(tmp_path: Path) -> None:
    expected = [("test", "cat", NAMES[0]), ("train", "cat", NAMES[1]), ("train", "dog", NAMES[2])]
    source = open_source(str(folder(tmp_path / "photos", NAMES)))
    assert listed(source) == listed(source) == expected
    assert source.total == 3
    assert source.understood["left_out"] == {"hidden": 2, ".txt": 1}
    for suffix in (".tar", ".tar.gz", ".tar.xz"):
        packed = open_source(str(archive(tmp_path / f"photos{suffix}", NAMES)))
        assert listed(packed) == listed(packed) == expected
        assert packed.total == 3
        assert packed.understood["left_out"] == {"hidden": 2, ".txt": 1}
        assert [item.data for item in packed.items()] == [item.data.read_bytes() for item in source.items()]  # type: ignore[union-attr]


def test_a_prefix_and_an_archive_in_s3_give_the_images_of_the_folder(s3: Proxy, tmp_path: Path) -> None:
    names = (*NAMES, *(f"train/dog/{i:03}.png" for i in range(80)), "train/dog-2/a.png")  # more than are read ahead
    here = open_source(str(folder(tmp_path / "photos", names)))
    bucket, store = Address("photos"), Store(pause_s=0)
    for name in names:
        store.upload(tmp_path / "photos" / name, bucket / "pets" / name)
    store.upload(tmp_path / "photos" / NAMES[0], bucket / "pets-2/of-another-prefix.png")
    store.upload(archive(tmp_path / "photos.tar.gz", names), bucket / "pets.tar.gz")
    s3.quiet()
    s3.rate, s3.kinds = 0.1, ("503", "reset before", "truncated", "flipped")
    there, packed = open_source("s3://photos/pets/"), open_source("s3://photos/pets.tar.gz")
    assert (there.spec, there.total, there.understood["splits"]) == ("s3://photos/pets", here.total, here.understood["splits"])
    expected = [replace(item, data=item.data.read_bytes()) for item in here.items()]  # type: ignore[union-attr]
    assert list(there.items()) == expected
    assert s3.faults.total() > 0
    assert sorted(i.name for i in packed.items()) == sorted(i.name for i in here.items()) and packed.total == here.total
    del packed
    assert not list(Path(os.environ["SIMCLR_CACHE"]).rglob("pets*"))  # the archive, fetched to be read once, is deleted
    s3.quiet()
    for spec, sentence in (
        ("s3://photos/nothing", "no images in s3://photos/nothing, only nothing"),
        ("s3://photos/nothing.tar", "there is no s3://photos/nothing.tar"),
        ("s3://nowhere/pets", "there is no bucket nowhere"),
    ):
        with pytest.raises(UserError, match=sentence):
            open_source(spec)


def test_a_large_text_in_s3_is_not_fetched_for_classes(s3: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simclr.data.sources.s3.MOST_TEXT_BYTES", 4)
    bucket, store = Address("photos"), Store(pause_s=0)
    folder(tmp_path, NAMES)
    (tmp_path / "few.csv").write_bytes(b"a,b")
    (tmp_path / "many.csv").write_bytes(b"a,b\n1,2\n")
    for name in (*NAMES[:3], "few.csv", "many.csv"):
        store.upload(tmp_path / name, bucket / "labels" / name)
    (note,) = open_source("s3://photos/labels").understood["notes"]
    assert note.startswith("s3://photos/labels/many.csv has 0 MiB and was not looked at for classes")


def test_a_flat_folder_is_unlabelled(tmp_path: Path) -> None:
    assert listed(open_source(str(folder(tmp_path, ("b.png", "a.png"))))) == [("train", None, "a.png"), ("train", None, "b.png")]


def test_a_broken_link_is_an_image_to_be_skipped(tmp_path: Path) -> None:
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (item,) = open_source(str(tmp_path)).items()
    assert encode(item, "jpeg", 500, 90).skipped == "the file cannot be read: No such file or directory"


def test_the_patterns_source_gives_rendered_images() -> None:
    source = open_source("patterns:train=30,test=7,size=16,seed=5")
    items = list(source.items())
    images, labels = render(np.arange(37), 5, 16)
    assert [item.split for item in items] == ["train"] * 30 + ["test"] * 7
    assert [item.label for item in items] == [CLASSES[label] for label in labels]
    assert all(np.array_equal(item.data, image) for item, image in zip(items, images, strict=True))
    assert source.total == 37
    assert open_source("patterns").spec == "patterns:train=4000,test=1000,size=32,seed=0,coloured=0"
    assert open_source("patterns:coloured").spec.endswith("coloured=1")


def test_a_torchvision_dataset_is_read_by_its_name() -> None:
    source = open_source("torchvision:FakeData")  # random images made by torchvision itself: no download
    first = next(source.items())
    assert (source.total, first.split, np.asarray(first.data).shape) == (1000, "train", (224, 224, 3))
    *_, last = portions(source, 7)
    assert last.first == 994
    assert told(reader(elsewhere("torchvision:FakeData"))(last)) == told(source.read(Part("train", source.parts[-1].names[-6:])))


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("cifar1", "did you mean cifar10 or cifar100"),
        ("no/such/folder", "there is no such file or folder"),
        ("torchvision:CIFAR11", "nearest: CIFAR10, CIFAR100"),
        ("patterns:size=4", "at least 8"),
        ("patterns:train=1", "at least 2"),
        ("patterns:shade=3", "expected train=NUMBER, test=NUMBER"),
    ],
)
def test_a_missing_source_is_a_user_error(spec: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        open_source(spec)


def test_folders_and_files_without_images_are_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="only nothing; expected pictures, as split/class/file"):
        open_source(str(tmp_path))
    (tmp_path / "notes.txt").write_text("no image, no archive")
    with pytest.raises(UserError, match=r"only 1 other files \(\.txt\)"):
        open_source(str(tmp_path))
    with pytest.raises(UserError, match="is no archive and no table"):
        open_source(str(tmp_path / "notes.txt"))


def test_what_lies_beside_loose_pictures_and_is_not_opened_is_said(tmp_path: Path) -> None:
    archive(folder(tmp_path, ("assets/logo.png", "assets/plot.png")) / "train.tar", NAMES)
    (tmp_path / "huge.csv").write_bytes(b"")
    os.truncate(tmp_path / "huge.csv", 65 << 20)
    notes = open_source(str(tmp_path)).understood["notes"]
    assert "train.tar beside loose pictures: not opened; to read that instead, give it, or its folder, as the source" in notes
    assert "huge.csv has 65 MiB and was not looked at for classes; --labels huge.csv does it" in notes


def test_ffcv_files_are_found_by_their_splits(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    train, val = tmp_path / "one/train_500_0.50_90.ffcv", tmp_path / "one/val_500_0.50_90.ffcv"
    train.touch()
    assert betons_at(str(train)) == betons_at(str(train.parent)) == {"train": train}
    val.touch()
    assert betons_at(str(train)) == betons_at(str(train.parent)) == {"train": train, "test": val}
    assert betons_at(str(val)) == {"train": val} and betons_at(str(tmp_path)) == betons_at("patterns") == {}
    (tmp_path / "one/other.beton").touch()
    with pytest.raises(UserError, match=r"of which other\.beton is of no split by its name"):
        betons_at(str(train.parent))


def test_a_folder_that_is_called_like_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "imagenet", NAMES)
    with pytest.raises(UserError, match=r"is a dataset's name and a folder here; say torchvision:ImageNet or \./imagenet"):
        open_source("imagenet")
    assert open_source("./imagenet").total == 3


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.xz"])
def test_a_cut_or_damaged_archive_is_a_user_error(tmp_path: Path, suffix: str) -> None:
    path = archive(tmp_path / f"photos{suffix}", NAMES)
    whole = path.read_bytes()
    for keep in (len(whole) // 3, len(whole) // 2) if suffix != ".tar" else (512, 1000, 1024, 1300, 2048):
        path.write_bytes(whole[:keep])  # in a header, in an image, and between two
        with pytest.raises(UserError, match="ends early or is damaged"):
            list(open_source(str(path)).items())
    if suffix == ".tar":
        path.write_bytes(whole[:1024] + b"?" * 512 + whole[1536:])
        with pytest.raises(UserError, match="ends early or is damaged"):
            list(open_source(str(path)).items())


def test_the_table_states_splits_that_add_up() -> None:
    assert DATASETS["cifar10"].splits == {"train": 50_000, "test": 10_000}
    for name, dataset in DATASETS.items():
        assert dataset.classes > 1 and min(dataset.std) > 0 and "train" in dataset.splits, name


def test_a_source_that_changed_has_another_identity(tmp_path: Path) -> None:
    here = folder(tmp_path / "photos", NAMES)
    packed = archive(tmp_path / "photos.tar", NAMES)
    before = [open_source(str(place)).identity for place in (here, packed)]
    assert all(before) and before == [open_source(str(place)).identity for place in (here, packed)]
    next(here.rglob("*.png")).write_bytes(b"another picture")
    packed = archive(tmp_path / "photos.tar", NAMES[:2])
    assert all(a != b for a, b in zip(before, [open_source(str(place)).identity for place in (here, packed)], strict=True))
