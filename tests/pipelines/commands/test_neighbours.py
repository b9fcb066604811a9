"""`simclr neighbours`: rows and pictures that are looked for, what is found, and the page; and the pictures behind rows of any source."""

from __future__ import annotations

import csv
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from pipelines.commands import embed as embedding
from pipelines.evaluation.originals import thumbnails
from simclr.data.feature_parts import About, open_features
from simclr.data.sources.prepared import names_of
from simclr.encoder.directory import write_encoder
from simclr.methods.simclr import build_model
from tests.support import command as commands
from tests.support.command import refused
from tests.support.features import at_angles, write
from tests.support.s3 import Proxy
from tests.support.small import TINY


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, photographs: Path) -> Path:
    """A folder with an encoder, 24 photographs in two classes, a copy of one, and their features."""
    root = tmp_path_factory.mktemp("made")
    write_encoder(build_model(TINY).encoder.state_dict(), TINY, root / "encoder", {})
    for i in range(24):
        path = root / "photos" / ("cat" if i % 2 else "dog") / f"{i:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(photographs.parent / f"{i:03}.jpg", path)
    shutil.copy(root / "photos/cat/003.jpg", root / "photos/dog/copy.jpg")
    embedding.main(embedding.Args(encoder=root / "encoder", images=(str(root / "photos"),), out=root / "features"))
    return root


def of(source: str) -> About:
    return About(encoder="ab", preprocessing={}, source=source, d=2)


def neighbours(simclr: commands.Run, *words: object) -> str:
    code, out, err = simclr("neighbours", *words)
    assert code == 0, err
    return out + err


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_nearest_of_rows_by_path_and_by_id(simclr: commands.Run, made: Path, tmp_path: Path) -> None:
    """As the cosines of all rows say; a row is not its own neighbour, its copy is."""
    said = neighbours(simclr, made / "features", "cat/003.jpg", "0", "--k", "4", "--out", tmp_path / "n.csv")
    rows = table(tmp_path / "n.csv")
    opened = open_features(made / "features")
    h, names = opened.take(np.arange(25)), opened.table(["path"])["path"]
    unit = h / np.linalg.norm(h, axis=1, keepdims=True)
    for query, own in (("cat/003.jpg", names.index("cat/003.jpg")), (names[0], 0)):
        cosines = unit @ unit[own]
        cosines[own] = -1
        found = [row for row in rows if row["query"] == query]
        assert [row["path"] for row in found] == [names[i] for i in np.argsort(-cosines, kind="stable")[:4]]
        assert [float(row["cosine"]) for row in found] == pytest.approx(sorted(cosines, reverse=True)[:4], abs=2e-6)
        assert [row["rank"] for row in found] == ["1", "2", "3", "4"]
    assert rows[0]["path"] == "dog/copy.jpg" and rows[0]["label"] == "dog" and rows[0]["cosine"] == "1.0"
    assert "     1  1.0000  dog/copy.jpg  dog" in said
    neighbours(simclr, made / "features", "cat/003.jpg", "--k", "4", "--out", tmp_path / "n.parquet")
    assert pyarrow.parquet.read_table(tmp_path / "n.parquet").column("path").to_pylist() == [row["path"] for row in rows[:4]]


def test_pictures_are_seen_as_the_rows_were(simclr: commands.Run, made: Path, tmp_path: Path) -> None:
    """A file, a folder and a row at once; a picture that is among the rows finds itself."""
    (tmp_path / "mine").mkdir()
    shutil.copy(made / "photos/cat/005.jpg", tmp_path / "mine/holiday.jpg")
    (tmp_path / "mine/broken.jpg").write_bytes(b"no picture")
    words = (made / "features", made / "photos/dog/006.jpg", tmp_path / "mine", "cat/003.jpg", "--encoder", made / "encoder", "--k", "3")
    said = neighbours(simclr, *words, "--out", tmp_path / "n.csv")
    first = {row["query"]: row for row in table(tmp_path / "n.csv") if row["rank"] == "1"}
    assert {Path(name).name: row["path"] for name, row in first.items()} == {
        "006.jpg": "dog/006.jpg",
        "holiday.jpg": "cat/005.jpg",
        "003.jpg": "dog/copy.jpg",
    }
    assert all(float(row["cosine"]) > 1 - 1e-5 for row in first.values())
    assert "1 file is no image that can be read and was left out; the first: broken.jpg" in said
    neighbours(simclr, *words, "--out", tmp_path / "n.html")
    page = (tmp_path / "n.html").read_text()
    assert page.count("<img ") == 12 and "default-src 'none'" in page and "not to be read here" not in page


def test_more_than_there_are_is_said(simclr: commands.Run, tmp_path: Path) -> None:
    write(tmp_path / "h", at_angles([0, 10, 20, 100]), ["a", "b", "c", "d"])
    said = neighbours(simclr, tmp_path / "h", "b")
    assert "--k is 10, and there are 3 other rows: all are listed" in said and said.count("\n  ") >= 3
    write(tmp_path / "one", at_angles([0]), ["a"], parts=1)
    refused(simclr("neighbours", tmp_path / "one", "a"), "has one row, which has no other for a neighbour")


def test_what_does_not_fit_is_refused(simclr: commands.Run, made: Path, tmp_path: Path) -> None:
    h, picture = made / "features", made / "photos/cat/003.jpg"
    refused(simclr("neighbours", h), "which pictures")
    refused(
        simclr("neighbours", h, "bird.jpg"),
        "has no row with the path or id 'bird.jpg'; expected one as 'cat/001.jpg' or 0, or, with --encoder",
    )
    refused(simclr("neighbours", h, picture), "is no row of .*; to look for pictures give --encoder")
    refused(simclr("neighbours", h, "0", "--k", "0"), "--k is 0; expected at least 1")
    refused(simclr("neighbours", h, "0", "--out", "n.pdf"), r"expected a name that ends with .html, .csv, .parquet")
    other = build_model(TINY.from_dict(TINY.to_dict() | {"seed": 1})).encoder.state_dict()
    write_encoder(other, TINY, tmp_path / "other", {})
    refused(
        simclr("neighbours", h, picture, "--encoder", tmp_path / "other"),
        "is not the encoder that made the features",
        "cosines of two encoders mean nothing",
    )
    (tmp_path / "text.jpg").write_bytes(b"no picture")
    (tmp_path / "empty").mkdir()
    shutil.copy(tmp_path / "text.jpg", tmp_path / "empty")
    refused(
        simclr("neighbours", h, tmp_path / "empty", "--encoder", made / "encoder"), "none of the pictures can be read; the first: text.jpg"
    )
    write(tmp_path / "twice", at_angles([0, 1, 2]), ["a", "a", "b"])
    refused(simclr("neighbours", tmp_path / "twice", "a"), "2 rows of .* have the path 'a'; name one by its id: 0, 1")


def test_pictures_of_any_source_are_found_again(made: Path, tmp_path: Path, photographs: Path, patterns: Path, s3: Proxy) -> None:
    """Of a folder, an archive, objects in S3, shards with and without names, files named one by one."""
    from simclr.data.s3.store import Store

    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        tar.add(made / "photos", "photos")
    for name in ("cat/003.jpg", "dog/004.jpg"):
        Store().client.put_object(Bucket="photos", Key=f"raw/{name}", Body=(made / "photos" / name).read_bytes())
    one = made / "photos/cat/003.jpg"
    with Image.open(one) as opened:
        pixels = np.asarray(opened.convert("RGB")).astype(int)
    sources = {
        str(made / "photos"): "cat/003.jpg",
        "s3://photos/raw": "cat/003.jpg",
        f"{tmp_path / 'photos.tar'}": "photos/cat/003.jpg",
        str(photographs): "003.jpg",
        str(one): str(one),
    }
    for source, path in sources.items():
        found = thumbnails(of(source), [(3, "train", path), (4, "train", "nothing.jpg")])
        assert list(found) == [0] and np.abs(found[0] - pixels).max() < 8, source
    raw = thumbnails(of(str(patterns)), [(0, "train", "train/0"), (240, "test", "test/0"), (1, "train", "train/7")])
    assert sorted(raw) == [0, 1] and raw[0].shape == raw[1].shape == (32, 32, 3) and not np.array_equal(raw[0], raw[1])
    assert thumbnails(of("it's"), [(0, "train", "a.jpg")]) == {}  # damaged, or another's
    assert thumbnails(of("torchvision:CIFAR10 /nowhere"), [(0, "train", "a.jpg")]) == {}  # nothing is downloaded for a page
    assert (
        thumbnails(of(str(made / "photos/dog")), [(0, "train", "../cat/003.jpg"), (0, "train", str(one))]) == {}
    )  # features may come from others


def test_pictures_of_more_than_8_bits_are_seen_as_the_rows_were(simclr: commands.Run, made: Path, tmp_path: Path) -> None:
    """The rows' set has 16 bits; the query alone would be taken for 10 bits, and be far from its own copy."""
    rng = np.random.default_rng(0)
    (tmp_path / "deep").mkdir()
    for i, most in enumerate((1000, 1000, 60000)):
        Image.fromarray(rng.integers(0, most, (40, 40)).astype(np.uint16)).save(tmp_path / f"deep/{i}.png")
    code, _, err = simclr("embed", made / "encoder", "deep", "--out", "rows")
    assert code == 0 and "3 images were rescaled to 8 bits, integers from 0 (black) to 65,535 (white), 16 bits, by a sample" in err
    neighbours(simclr, "rows", "deep/1.png", "--encoder", made / "encoder", "--k", "3", "--out", tmp_path / "n.html")
    neighbours(simclr, "rows", "deep/1.png", "--encoder", made / "encoder", "--k", "3", "--out", tmp_path / "n.csv")
    assert {row["path"]: row["cosine"] for row in table(tmp_path / "n.csv")}["1.png"] == "1.0"
    assert "not to be read here" not in (tmp_path / "n.html").read_text()


def test_names_of_shards_are_looked_up_by_sample_id(photographs: Path, patterns: Path) -> None:
    assert names_of(photographs, "train", [239, 0, 7]) == ["239.jpg", "000.jpg", "007.jpg"]
    assert names_of(patterns, "test", [3]) == [""]
