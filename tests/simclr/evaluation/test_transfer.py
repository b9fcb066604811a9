"""The transfer suite on small rendered stand-ins in the datasets' own folder formats, read by torchvision."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import simclr
from pipelines import cli
from pipelines.evaluation import suite
from simclr.config import Encoder, SimCLR, Views
from simclr.data.sources.patterns import render
from simclr.data.tasks import TASKS, VOC_CLASSES, label_of, open_task, pictures, square
from simclr.encoder.directory import write_encoder
from simclr.evaluation.frozen import digest
from simclr.evaluation.transfer_finetune import Tuning, fine_tuned
from simclr.evaluation.transfer_linear import Part, split
from simclr.methods.simclr import build_model


def images(count: int, first: int = 0) -> tuple[list[Image.Image], list[int]]:
    """Rendered patterns of 40 × 32 px, of classes 0, 1, 0, 1, …"""
    ids = np.arange(first, first + 40 * count)
    pixels, labels = render(ids, 0, 40)
    chosen = [int(np.flatnonzero(labels == i % 2)[i // 2]) for i in range(count)]
    return [Image.fromarray(pixels[i][:32]) for i in chosen], [i % 2 for i in range(count)]


def save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def cifar10(root: Path) -> None:
    here = root / "cifar-10-batches-py"
    here.mkdir()
    for name, first, count in (("data_batch_1", 0, 20), ("test_batch", 2000, 10)):
        pictures, labels = images(count, first)
        rows = [np.asarray(p.resize((32, 32))).transpose(2, 0, 1).reshape(-1) for p in pictures]
        (here / name).write_bytes(pickle.dumps({"data": np.stack(rows), "labels": labels}))
    (here / "batches.meta").write_bytes(pickle.dumps({"label_names": ["a", "b"]}))


def dtd(root: Path) -> None:
    for part, first in (("train", 0), ("val", 1000), ("test", 2000)):
        lines = []
        for i, (image, label) in enumerate(zip(*images(8, first), strict=True)):
            lines.append(f"{'ab'[label]}/{'ab'[label]}_{part}{i}.jpg")
            save(image, root / "dtd/dtd/images" / lines[-1])
        path = root / f"dtd/dtd/labels/{part}1.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")


def pets(root: Path) -> None:
    for part, first in (("trainval", 0), ("test", 2000)):
        lines = []
        for i, (image, label) in enumerate(zip(*images(10, first), strict=True)):
            save(image, root / f"oxford-iiit-pet/images/Breed{label}_{first + i}.jpg")
            lines.append(f"Breed{label}_{first + i} {label + 1} 1 1")
        path = root / f"oxford-iiit-pet/annotations/{part}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")


def flowers(root: Path) -> None:
    from scipy.io import savemat

    pictures, labels = images(24)
    for i, image in enumerate(pictures):
        save(image, root / f"flowers-102/jpg/image_{i + 1:05d}.jpg")
    numbers = np.arange(1, 25)
    savemat(root / "flowers-102/setid.mat", {"trnid": numbers[:8], "valid": numbers[8:16], "tstid": numbers[16:]})
    savemat(root / "flowers-102/imagelabels.mat", {"labels": np.array(labels) + 1})


def caltech101(root: Path) -> None:
    pictures, labels = images(70)
    for i, (image, label) in enumerate(zip(pictures, labels, strict=True)):
        save(image, root / f"caltech101/101_ObjectCategories/{['BACKGROUND_Google', 'ant'][label]}/image_{i:04d}.jpg")


def voc2007(root: Path) -> None:
    here = root / "VOCdevkit/VOC2007"
    for part, first in (("train", 0), ("val", 1000), ("test", 2000)):
        names = []
        for i, (image, label) in enumerate(zip(*images(8, first), strict=True)):
            names.append(f"{first + i:06d}")
            save(image, here / f"JPEGImages/{names[-1]}.jpg")
            shown = [("dog", 0) if label else ("cat", 0), ("person", i % 3 == 0)]
            objects = "".join(f"<object><name>{n}</name><difficult>{int(d)}</difficult></object>" for n, d in shown)
            path = here / f"Annotations/{names[-1]}.xml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"<annotation>{objects}</annotation>")
        path = here / f"ImageSets/Main/{part}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(names) + "\n")


def birdsnap(root: Path) -> None:
    for part, first in (("train", 0), ("test", 2000)):
        for i, (image, label) in enumerate(zip(*images(10, first), strict=True)):
            save(image, root / f"birdsnap/{part}/{'ab'[label]}/{i}.png")


def sun397(root: Path) -> None:
    for part, first in (("Training_01", 0), ("Testing_01", 2000)):
        lines = []
        for i, (image, label) in enumerate(zip(*images(10, first), strict=True)):
            lines.append(f"/{('a/abbey', 'b/bakery/shop')[label]}/sun_{part}{i}.jpg")
            save(image, root / "SUN397" / lines[-1][1:])
        (root / f"SUN397/{part}.txt").write_text("\n".join(lines) + "\n")
    (root / "SUN397/ClassName.txt").write_text("/a/abbey\n/b/bakery/shop\n")


MADE = (cifar10, dtd, pets, flowers, caltech101, voc2007, birdsnap, sun397)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Eight of the twelve datasets; torchvision is told to accept their checksums, which are not the real ones."""
    import torchvision.datasets as library

    folder = tmp_path_factory.mktemp("datasets")
    for make in MADE:
        make(folder)
    patch = pytest.MonkeyPatch()
    patch.setattr(library.CIFAR10, "train_list", [["data_batch_1", None]])
    patch.setattr(library.CIFAR10, "test_list", [["test_batch", None]])
    patch.setattr(library.CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": None})
    patch.setattr(library.Flowers102, "_file_dict", {"label": ("imagelabels.mat", None), "setid": ("setid.mat", None)})
    yield folder
    patch.undo()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = SimCLR(encoder=Encoder(depth=8, cifar_stem=True), views=Views(size_px=32))
    path = tmp_path_factory.mktemp("published") / "encoder"
    write_encoder(build_model(config).encoder.state_dict(), config, path, {})
    return path


def test_the_table_is_whole() -> None:
    """Sums of the columns of the paper's Table 8, as they are written down here; the metrics as App. B.8 groups them."""
    assert len(TASKS) == 12
    by_metric = {metric: {name for name, task in TASKS.items() if task.metric == metric} for metric in ("mean_per_class", "map11")}
    assert by_metric == {"mean_per_class": {"aircraft", "pets", "caltech101", "flowers"}, "map11": {"voc2007"}}
    assert {name for name, task in TASKS.items() if task.split == "official"} == {"aircraft", "voc2007", "dtd", "flowers"}


@pytest.mark.parametrize("make", MADE)
def test_torchvision_reads_the_parts(root: Path, make: object) -> None:
    name = make.__name__  # type: ignore[attr-defined]
    parts = open_task(name, root, download=False)
    assert parts is not None
    counts = {part: len(rows) for part, rows in parts.items()}
    expected = {"cifar10": {"train": 20, "test": 10}, "caltech101": {"all": 70}}
    official = {"train": 8, "validation": 8, "test": 8}
    assert counts == expected.get(name, official if TASKS[name].split == "official" else {"train": 10, "test": 10})
    rows = next(iter(parts.values()))
    x, y = next(pictures(rows, range(4), 32, 4, 2))
    assert x.shape == (4, 32, 32, 3) and x.dtype == np.uint8
    assert y.tolist() == [label_of(rows[i][1]) for i in range(4)] if name != "voc2007" else y.shape == (4, 20)


def test_a_voc_annotation_becomes_marks() -> None:
    target = {"annotation": {"object": [{"name": n, "difficult": d} for n, d in (("dog", "1"), ("cat", "0"), ("cat", "1"), ("car", "1"))]}}
    marks = label_of(target)
    assert {VOC_CLASSES[i]: int(marks[i]) for i in np.flatnonzero(marks)} == {"dog": -1, "cat": 1, "car": -1}  # type: ignore[index]


def test_the_crop_is_all_of_the_shorter_side() -> None:
    """A 60 × 40 image whose outer ten columns are black: the middle square has none of them, and reaches the top and bottom rows."""
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, 10:50] = 100
    pixels[:2] = pixels[-2:] = 200
    crop = square(Image.fromarray(pixels), 20)
    assert crop.shape == (20, 20, 3) and crop.min() > 80 and crop[0].min() > 170 and crop[-1].min() > 170


def test_thirty_of_every_class_train_and_none_is_tested() -> None:
    y = torch.tensor([0] * 40 + [1] * 35 + [2] * 100)
    x = torch.arange(175)[:, None]
    parts = split({"all": Part(x, y)}, "thirty_per_class")
    assert torch.bincount(parts.train.y).tolist() == [24, 24, 24] and torch.bincount(parts.validation.y).tolist() == [6, 6, 6]
    assert torch.bincount(parts.test.y).tolist() == [10, 5, 70]
    everything = torch.cat([parts.train.x, parts.validation.x, parts.test.x])[:, 0]
    assert sorted(everything.tolist()) == list(range(175))


def test_the_suite_prints_table_8_and_names_what_is_absent(
    root: Path, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", str(encoder), "--suite", "transfer", "--root", str(root), "--out", str(tmp_path), "--resamples", "100"]
    cli.main([*words, "--only", "cifar10,voc2007", "caltech101", "dtd", "cars"])
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert [line.split("  ")[0] for line in lines[1:5]] == ["CIFAR-10", "VOC 2007", "DTD", "Caltech-101"]
    assert lines[1].split()[-2:] == ["95.3", "95.7"] and lines[2].split()[-2:] == ["84.2", "83.8"]
    assert "absent: Stanford Cars" in lines[-1]
    rows = {row["dataset"]: row for row in json.loads((tmp_path / "transfer.json").read_text())["rows"]}
    assert rows["cifar10"]["train"] == 16 and rows["cifar10"]["validation"] == 4 and rows["cifar10"]["test"] == 10
    assert rows["caltech101"]["train"] == 48 and rows["caltech101"]["test"] == 10 and rows["caltech101"]["value"] > 0.5
    assert {row["dataset"]: row["converged"] for row in rows.values()} == dict.fromkeys(rows, 45)
    assert all(0 <= row["low"] <= row["value"] <= row["high"] <= 1 for row in rows.values())


def test_the_suite_fine_tunes_too(root: Path, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", str(encoder), "--suite", "transfer", "--root", str(root), "--out", str(tmp_path), "--resamples", "100"]
    words += ["--fine-tune", "--tuning-steps", "2", "--rates", "0.05", "--decays", "0"]
    cli.main([*words, "--only", "caltech101,voc2007"])
    assert "fine_tuned" in capsys.readouterr().out
    rows = {(row["dataset"], row["method"]): row for row in json.loads((tmp_path / "transfer.json").read_text())["rows"]}
    assert len(rows) == 4
    tuned = rows["caltech101", "fine_tuned"]
    assert (tuned["lr"], tuned["weight_decay"], tuned["train"], tuned["validation"], tuned["test"]) == (0.05, 0, 48, 12, 10)
    assert 0 <= rows["voc2007", "fine_tuned"]["low"] <= rows["voc2007", "fine_tuned"]["value"] <= 1


def test_fine_tuning_takes_the_rate_that_validates_best_and_leaves_the_encoder_as_it_was(root: Path, encoder: Path) -> None:
    """Two classes that 120 steps tell apart (10 to 12 of 12 validation images, over four seeds of the weights), and a rate that is too
    small to learn anything."""
    published = simclr.load_encoder(encoder)
    before = digest(published)
    rows = open_task("caltech101", root, False)
    assert rows is not None
    score = fine_tuned(published, rows, TASKS["caltech101"], Tuning(steps=120, batch_size=16, rates=(1e-6, 0.1), decays=(0.0,)), 100)
    assert score.lr == 0.1 and score.validation > 0.7 and 0 <= score.low <= score.value <= score.high <= 1
    assert digest(published) == before and not published.training


def test_mistakes_are_user_errors(root: Path, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = ["evaluate", str(encoder), "--suite", "transfer"]
    (tmp_path / "SUN397").mkdir()
    for words, sentence in (
        (start, "give --root DIR"),
        ([*start, "--root", str(root), "--only", "cifar"], "--only cifar: no dataset of the suite; nearest: cifar10"),
        ([*start, "--root", str(tmp_path), "--only", "dtd"], "none of dtd is under"),
        ([*start, "--root", str(tmp_path), "--only", "sun397"], "ClassName.txt is missing"),
        (["evaluate", str(encoder), "--only", "dtd"], "belong to --suite transfer"),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(words)
        assert ended.value.code == 2
        assert sentence in capsys.readouterr().err


def test_names_are_found_in_the_tables_order() -> None:
    assert suite.chosen(("dtd,cifar10",), list(TASKS)) == ["cifar10", "dtd"]
    assert suite.chosen((), list(TASKS)) == list(TASKS)
