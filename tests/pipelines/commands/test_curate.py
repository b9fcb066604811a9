"""`simclr curate`: which pictures are listed, for which reasons, in files that other commands take."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simclr.data import labels
from tests.support import command as commands
from tests.support.command import refused
from tests.support.features import at_angles, write

NAMES = ["a.jpg", "b.jpg", "c.jpg", "far.jpg", "e.jpg", "f.jpg"]
ANGLES = [0, 6, 12, 90, 200, 201]  # b is near a and c, and a is not near c; e and f are near


def curate(simclr: commands.Run, *words: object) -> str:
    code, out, err = simclr("curate", *words)
    assert code == 0, err
    return out + err


def listed(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if not line.startswith("#")]


def reasons(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def cosine(degrees: float) -> float:
    return math.cos(math.radians(degrees))


def test_of_a_group_of_near_duplicates_the_largest_picture_stays(simclr: commands.Run, tmp_path: Path) -> None:
    """Or, of equal ones, the first; a chain is one group, and its reasons say so."""
    sizes = [(10, 10), (10, 20), (30, 30), (8, 8), (8, 8), (8, 8)]
    kinds = ["cat", "cat", "dog", None, "cat", "cat"]
    write(tmp_path / "h", at_angles(ANGLES), NAMES, sizes=sizes, labels=kinds)
    said = curate(simclr, tmp_path / "h", "--near-duplicates", str(cosine(7)))
    assert listed(tmp_path / "near-duplicates/list.txt") == ["c.jpg", "far.jpg", "e.jpg"]
    assert "3 of 6 pictures repeat another" in said and "list.txt has the other 3" in said
    found = reasons(tmp_path / "near-duplicates/reasons.csv")
    assert [(row["path"], row["repeats"], row["repeats_id"], row["group"]) for row in found] == [
        ("b.jpg", "c.jpg", "2", "0"),
        ("a.jpg", "c.jpg", "2", "0"),
        ("f.jpg", "e.jpg", "4", "1"),
    ]
    assert [float(row["cosine"]) for row in found] == pytest.approx([cosine(6), cosine(12), cosine(1)], abs=2e-6)
    assert [row["reason"] for row in found] == [
        "near duplicate; another label",
        "connected through others of its group; another label",
        "near duplicate",
    ]
    # What the list keeps, the commands that train find again.
    assert labels.read_subset(tmp_path / "near-duplicates/list.txt", 6, NAMES).tolist() == [2, 3, 4]


def test_copies_have_cosine_one(simclr: commands.Run, tmp_path: Path) -> None:
    h = np.random.default_rng(0).standard_normal((50, 33)).astype(np.float32)
    h[30:] = h[:20] * np.linspace(0.1, 7, 20, dtype=np.float32)[:, None]
    write(tmp_path / "h", h, [f"{i}.png" for i in range(50)])
    curate(simclr, tmp_path / "h", "--near-duplicates", "1")
    assert listed(tmp_path / "near-duplicates/list.txt") == [f"{i}.png" for i in range(30)]


def test_a_long_chain_is_said(simclr: commands.Run, tmp_path: Path) -> None:
    write(tmp_path / "h", at_angles(range(0, 100, 4)), [f"{i}.png" for i in range(25)])
    said = curate(simclr, tmp_path / "h", "--near-duplicates", "0.99")
    assert f"a chain of near duplicates connects pictures of cosine {cosine(96):.2f}; a higher --near-duplicates than 0.99 cuts it" in said


def test_diverse_pictures_are_the_farthest_each_time(simclr: commands.Run, tmp_path: Path) -> None:
    write(tmp_path / "h", at_angles(ANGLES), NAMES)
    found = []
    for seed in range(4):
        said = curate(simclr, tmp_path / "h", "--diverse", "3", "--seed", seed)
        rows = reasons(tmp_path / "diverse/reasons.csv")
        assert sorted(row["path"] for row in rows) == sorted(listed(tmp_path / "diverse/list.txt"))
        assert rows[0]["reason"] == f"drawn by seed {seed}" and rows[0]["distance"] == ""
        chosen = [ANGLES[NAMES.index(row["path"])] for row in rows]
        for place in (1, 2):  # by hand: the least alike to those before
            far = {angle: min(1 - cosine(angle - c) for c in chosen[:place]) for angle in ANGLES}
            assert far[chosen[place]] == pytest.approx(max(far.values()), abs=1e-6)
            assert float(rows[place]["distance"]) == pytest.approx(max(far.values()), abs=2e-6)
        radius = max(min(1 - cosine(angle - c) for c in chosen) for angle in ANGLES)
        assert f"no picture is farther than {radius:.3f} " in said
        found.append(chosen[0])
    assert len(set(found)) > 1  # the seed draws the first
    copies = np.repeat(at_angles([0, 90, 180]), 4, 0)
    write(tmp_path / "copies", copies, [f"{i}.png" for i in range(12)])
    assert "only 3 features differ" in curate(simclr, tmp_path / "copies", "--diverse", "9")
    assert len(listed(tmp_path / "diverse/list.txt")) == 3


def test_outliers_are_far_from_their_nearest(simclr: commands.Run, tmp_path: Path) -> None:
    write(tmp_path / "h", at_angles(ANGLES), NAMES)
    said = curate(simclr, tmp_path / "h", "--outliers", "1", "--k", "2", "--out", tmp_path / "o")
    assert listed(tmp_path / "o/list.txt") == ["a.jpg", "b.jpg", "c.jpg", "e.jpg", "f.jpg"]
    (row,) = reasons(tmp_path / "o/reasons.csv")
    distance = 1 - (cosine(78) + cosine(84)) / 2
    assert (row["path"], row["nearest"], row["nearest_id"]) == ("far.jpg", "c.jpg", "2")
    assert float(row["distance"]) == pytest.approx(distance, abs=2e-6) and float(row["cosine"]) == pytest.approx(cosine(78), abs=2e-6)
    assert f"mean distance {distance:.3f}" in said


def test_shards_without_names_are_listed_by_sample_id_and_one_split_at_a_time(simclr: commands.Run, tmp_path: Path) -> None:
    names = ["train/0", "train/1", "train/2", "test/0"]
    write(tmp_path / "h", at_angles([0, 1, 90, 90]), names, splits=["train"] * 3 + ["test"])
    said = curate(simclr, tmp_path / "h", "--near-duplicates", "0.9")
    assert "1 rows of other splits than train are left out" in said
    assert listed(tmp_path / "near-duplicates/list.txt") == ["0", "2"]
    assert labels.read_subset(tmp_path / "near-duplicates/list.txt", 3, None).tolist() == [0, 2]
    write(tmp_path / "mixed", at_angles([0, 1, 90, 1]), ["a", "b", "c", "d"], splits=["train", "test", "train", "train"], parts=1)
    curate(simclr, tmp_path / "mixed", "--near-duplicates", "0.9")
    assert listed(tmp_path / "near-duplicates/list.txt") == ["a", "c"]
    refused(
        simclr("curate", tmp_path / "h", "--outliers", "1", "--split", "val"),
        "has no image of the val split, only of test, train; give --split test",
    )


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_names_of_others_stay_text(simclr: commands.Run, tmp_path: Path, dtype: str) -> None:
    """In the list they come back, in the table no spreadsheet computes them, on the page they are no markup."""
    names = ["=HYPERLINK(1).jpg", "<img src=x onerror=alert(1)>.jpg", "a\nb.jpg"]
    write(tmp_path / "h", at_angles([0, 1, 2]), names, labels=["@x", "@x", "@x"], dtype=dtype)
    curate(simclr, tmp_path / "h", "--near-duplicates", "0.5")
    out = tmp_path / "near-duplicates"
    assert listed(out / "list.txt") == ["=HYPERLINK(1).jpg"]
    rows = reasons(out / "reasons.csv")
    assert rows[0]["repeats"] == "'=HYPERLINK(1).jpg" and rows[0]["label"] == "'@x" and "a\\nb.jpg" in {row["path"] for row in rows}
    page = (out / "page.html").read_text()
    assert "<img src=x" not in page and "&lt;img src=x" in page and "default-src 'none'" in page
    assert not re.search(r"(?:href|src)=[\"']?(?:https?:)?//", page) and page.count("not to be read here") == 3
    curate(simclr, tmp_path / "h", "--diverse", "3")
    assert labels.read_subset(tmp_path / "diverse/list.txt", 3, names).tolist() == [0, 1, 2]


def test_the_page_has_the_pictures(simclr: commands.Run, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for name, shade in zip(NAMES, (10, 20, 30, 40, 50, 60), strict=True):
        Image.new("RGB", (90, 80), (shade, shade, shade)).save(tmp_path / "photos" / name)
    (tmp_path / "photos/f.jpg").unlink()
    write(tmp_path / "h", at_angles(ANGLES), NAMES, source="photos")
    for way in (("--near-duplicates", "0.99"), ("--diverse", "6"), ("--outliers", "3", "--k", "1")):
        curate(simclr, tmp_path / "h", *way)
        page = (tmp_path / way[0].removeprefix("--") / "page.html").read_text()
        assert page.count("data:image/jpeg") >= 3, way
    assert "not to be read here" in (tmp_path / "diverse/page.html").read_text()  # f.jpg has gone


def test_what_does_not_fit_is_refused(simclr: commands.Run, tmp_path: Path) -> None:
    write(tmp_path / "h", at_angles(ANGLES), NAMES)
    h = tmp_path / "h"
    refused(simclr("curate", h), "give one of --near-duplicates 0.95, --diverse N and --outliers N; here none")
    refused(simclr("curate", h, "--diverse", "2", "--outliers", "2"), "here --diverse and --outliers")
    refused(simclr("curate", h, "--near-duplicates", "95"), "--near-duplicates is 95.0; expected a cosine above 0 and at most 1")
    refused(simclr("curate", h, "--diverse", "7"), "has only 6 rows; ask for fewer")
    refused(simclr("curate", h, "--outliers", "6"), "has 6 rows, and none would be left")
    refused(simclr("curate", h, "--outliers", "2", "--k", "6"), "--k 6: .* each with 5 others; give a smaller --k")
    refused(simclr("curate", tmp_path / "nowhere", "--diverse", "1"), "there are no features at .*nowhere")
    refused(simclr("curate", h, "--diverse", "1", "--out", "s3://lab/x"), "--out s3://lab/x is in S3; expected a directory of this machine")
    broken = at_angles(ANGLES)
    broken[4] = np.nan
    write(tmp_path / "nan", broken, NAMES)
    refused(simclr("curate", tmp_path / "nan", "--diverse", "1"), "has features that are no finite numbers")
    write(tmp_path / "empty", at_angles([]), [])
    refused(simclr("curate", tmp_path / "empty", "--diverse", "1"), "has no rows")
    write(tmp_path / "other", at_angles([1]), ["x.jpg"], encoder="cd" * 32, parts=1)
    (tmp_path / "other/part-00000.parquet").rename(h / "part-00002.parquet")
    refused(simclr("curate", h, "--diverse", "1"), "part-00002.parquet has features of another job than part-00000.parquet")
    assert not any((tmp_path / way).exists() for way in ("near-duplicates", "diverse", "outliers"))


def test_features_without_a_direction_are_said(simclr: commands.Run, tmp_path: Path) -> None:
    h = at_angles(ANGLES)
    h[[1, 4]] = 0
    write(tmp_path / "h", h, NAMES)
    assert "2 features are all zeros: their cosine with every other is taken for 0" in curate(
        simclr, tmp_path / "h", "--near-duplicates", "0.9"
    )
    assert listed(tmp_path / "near-duplicates/list.txt") == ["a.jpg", "b.jpg", "far.jpg", "e.jpg", "f.jpg"]
