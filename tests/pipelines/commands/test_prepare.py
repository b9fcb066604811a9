"""`simclr prepare`: what it says before it works, what `--dry-run` leaves undone, and what stands in the manifest."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
from PIL import Image

from pipelines.commands.prepare import Args, dry_run, main, told
from simclr.data.manifest import read_manifest
from simclr.data.sources import source, tar
from simclr.data.sources.reading import Reading
from simclr.errors import UserError
from tests.simclr.data.test_archives import packed
from tests.support.folders import WNIDS, made, tiny_imagenet
from tests.support.pictures import saved
from tests.support.sources import source_of_files


def jpeg(seed: int, side: int = 64) -> bytes:
    return saved(Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)), "JPEG")


def as_pictures(root: Path, side: int = 64) -> Path:
    for i, path in enumerate(sorted(root.rglob("*.JPEG"))):
        path.write_bytes(jpeg(i, side))
    return root


def under(root: Path) -> set[Path]:
    return set(root.rglob("*"))


TINY_IMAGENET = """\
{root}: 18 images
  splits   folder: train = train, val = val, test = test
  classes  the folder at depth 1 below the split, as n01 of n01/images/; of val val/val_annotations.txt, by name

  split  images  labelled  classes  smallest  largest
  train  12      100 %     3        n01 (4)   n03 (4)
  test   6       100 %     3        n01 (2)   n03 (2)

  train/n01/images/n01_0.JPEG  →  n01
  train/n01/images/n01_2.JPEG  →  n01
  train/n02/images/n02_0.JPEG  →  n02
  train/n02/images/n02_2.JPEG  →  n02
  train/n03/images/n03_0.JPEG  →  n03

  val/images/val_0.JPEG  →  n03
  val/images/val_1.JPEG  →  n01
  val/images/val_2.JPEG  →  n02
  val/images/val_3.JPEG  →  n03
  val/images/val_4.JPEG  →  n01

  left out: 1 .heic (need pillow-heif (pip install 'simclr-cluster[images]')), 5 .txt, 2 in .ipynb_checkpoints/
  note: 5 pictures of test: without classes they can judge nothing and are left out; val is the test split

  of 18 images looked at: JPEG 18; 64 × 64 px as stored
  would write about 220.3 KiB of pixels as they are (raw) in about 2 shards
  would take about TIME on this machine with 2 threads (TIME to encode an image in one), if reading keeps up"""


def test_a_dry_run_says_all_that_was_understood_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(source, "IMAGE_SUFFIXES", source.IMAGE_SUFFIXES - {".heic", ".heif"})  # as without the extra
    root = as_pictures(tiny_imagenet(tmp_path / "tiny-imagenet-200"))
    made(root, ["phone.heic", "train/.ipynb_checkpoints/1.jpg", "train/.ipynb_checkpoints/2.jpg"])
    before = under(tmp_path)
    for out in (None, tmp_path / "out"):
        main(Args(str(root), out, threads=2, dry_run=True))
        said = capsys.readouterr()
        found = re.sub(r"[\d.]+ (s|min) on", "TIME on", re.sub(r"\([\d.]+ ms to", "(TIME to", said.out)).splitlines()
        assert found == TINY_IMAGENET.format(root=root).splitlines() and not said.err
        assert under(tmp_path) == before


def imagenet(root: Path) -> Path:
    """The three files of ImageNet as they are downloaded; the devkit numbers n03 1, n01 2 and n02 3."""
    root.mkdir()
    inner = {}
    for c, wnid in enumerate(WNIDS):
        pictures: dict[str, bytes | str] = {f"{wnid}_{i}.JPEG": jpeg(10 * c + i, 80) for i in range(c + 2)}
        inner[f"{wnid}.tar"] = packed(root / "inner.tar", pictures).read_bytes()
    (root / "inner.tar").unlink()
    packed(root / "ILSVRC2012_img_train.tar", inner)
    packed(root / "ILSVRC2012_img_val.tar", {f"ILSVRC2012_val_0000000{i}.JPEG": jpeg(50 + i, 80) for i in (1, 2, 3)})
    rows: Any = np.array(
        [(i + 1, wnid, 0) for i, wnid in enumerate(WNIDS)], dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")]
    )
    scipy.io.savemat(root / "meta.mat", {"synsets": rows})
    folder = "ILSVRC2012_devkit_t12/data"
    truth = {f"{folder}/ILSVRC2012_validation_ground_truth.txt": b"2\n1\n1\n", f"{folder}/meta.mat": (root / "meta.mat").read_bytes()}
    packed(root / "ILSVRC2012_devkit_t12.tar.gz", truth)
    (root / "meta.mat").unlink()
    return root


def test_imagenet_as_downloaded_becomes_shards_by_one_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What many inner tars hold is known when they were read: the manifest then has numbers, of which the dry run has none."""
    monkeypatch.setattr(tar, "_FEW_INNER", 2)
    args = Args(str(imagenet(tmp_path / "downloads")), tmp_path / "shards", threads=2)
    table = [line.split("  ") for line in dry_run(args).splitlines() if line.startswith(("  train ", "  test "))]
    assert [[cell.strip() for cell in row if cell] for row in table] == [
        ["train", "?", "?", "3", "?", "?"],
        ["test", "3", "100 %", "2", "n01 (1)", "n03 (2)"],
    ]
    assert not (tmp_path / "shards").exists()
    main(args)
    said = capsys.readouterr()
    assert "downloads: images are counted as they are read" in said.err
    assert said.out == f"{tmp_path}/shards: train 9, test 3 images, 3 classes, jpeg\n"
    understood = read_manifest(tmp_path / "shards").understood
    assert understood["splits"]["train"]["classes"] == {"n01": 3, "n02": 4, "n03": 2}
    assert understood["splits"]["test"]["classes"] == {"n01": 1, "n03": 2}
    assert {name: (split["images"], split["labelled"]) for name, split in understood["splits"].items()} == {"train": (9, 9), "test": (3, 3)}
    before = {path: path.stat().st_mtime_ns for path in under(tmp_path)}
    main(args)
    assert f"{tmp_path}/shards holds these shards already; nothing to do" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in under(tmp_path)} == before | {
        tmp_path / "shards": (tmp_path / "shards").stat().st_mtime_ns  # of a lock that came and went
    }


def test_what_is_said_before_the_work_is_what_a_dry_run_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = as_pictures(tiny_imagenet(tmp_path / "tiny"))
    main(Args(str(root), tmp_path / "out", threads=1))
    understood, _, _ = dry_run(Args(str(root), threads=1)).partition("\n\n  of 18 images looked at")
    assert capsys.readouterr().err.startswith(understood + "\n")


def test_names_with_line_breaks_and_of_another_encoding_keep_the_table_whole(tmp_path: Path) -> None:
    for seed, name in enumerate(("new\nline", "caf\udce9")):
        (tmp_path / name).mkdir()
        for i in range(2):
            (tmp_path / name / f"{i}.JPEG").write_bytes(jpeg(2 * seed + i))
    said = dry_run(Args(str(tmp_path), threads=1))
    assert said.encode() and "  new\\nline/0.JPEG  →  new\\nline\n" in said and "  caf\\udce9/0.JPEG  →  caf\\udce9\n" in said
    assert "  train  4       100 %     2        caf\\udce9 (2)  new\\nline (2)\n" in said


def test_pictures_that_are_not_read_are_named_before_other_files(tmp_path: Path) -> None:
    others = [f"{i}.{ending}" for ending in ("md", "py", "xml", "yml", "log", "ini", "cfg", "doc", "zip") for i in range(3)]
    root = as_pictures(made(tmp_path / "photos", ["a.JPEG", "b.JPEG", "c.nef", *others]))
    (line,) = [line for line in dry_run(Args(str(root), threads=1)).splitlines() if "left out" in line]
    assert line.startswith("  left out: 1 .nef (raw files of a camera; export them as JPEG or PNG), 3 .") and line.endswith(", 6 others")


def test_patterns_and_sources_that_say_nothing(tmp_path: Path) -> None:
    said = dry_run(Args("patterns:train=50,test=7", threads=1))
    assert "  test   7       100 %     7        bricks (1)  rings (1)\n\n  of 57 images looked at: pixels 57; 32 × 32 px as stored" in said
    assert told(source_of_files([b"", b""], spec="two")) == "two: 2 images"


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (Args("patterns"), "where to? give --out DIR, or --dry-run to see what would be written"),
        (Args("patterns", reading=Reading(labels="none"), dry_run=True), "patterns has splits and classes of its own; leave out --labels"),
        (Args("patterns", Path("out"), Reading(split_from="0.1")), "patterns has splits and classes of its own; leave out --labels"),
        (Args("nowhere", dry_run=True), "no source at nowhere: there is no such file or folder"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(args: Args, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(sentence)):
        main(args)
    assert not under(tmp_path)
