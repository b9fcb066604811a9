"""Portions of a source, read by other processes: exactly the items of the source, whatever it is, without a second listing."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from simclr.data.s3.store import Store
from simclr.data.s3.uri import Address
from simclr.data.sources import open as opening
from simclr.data.sources import tar
from simclr.data.sources.open import open_source
from simclr.data.sources.portions import Portion, elsewhere, portions, reader
from simclr.data.sources.reading import Reading
from simclr.errors import UserError
from tests.simclr.data.test_archives import packed
from tests.simclr.data.test_tables import cells, table, written
from tests.simclr.data.test_webdataset import beside, pictures
from tests.support.folders import made, tiny_imagenet
from tests.support.items import told
from tests.support.paths import ROOT
from tests.support.s3 import Proxy

PHOTOS = {f"{split}/{c}/{i}.jpg": f"{split} {c} {i}".encode() for split in ("train", "test") for c in ("cat", "dog") for i in range(7)}
LABELS = "file_name,label\n" + "".join(f"{i}.jpg,{'ab'[i % 2]}\n" for i in range(9))


def sources(root: Path) -> dict[str, tuple[str, dict[str, str]]]:
    """Kind → (spec, how it is read)."""
    shards = [beside(pictures(n), "cls", [3, 7, 3, 7]) for n in (0, 1)]
    for number, files in enumerate(shards):
        (root / "web").mkdir(exist_ok=True)
        packed(root / f"web/train-{number:06}.tar", files)
    inner = {
        f"{c}.tar": packed(root / "x.tar", {f"{c}{i}.jpg": c.encode() * i for i in range(3)}).read_bytes() for c in ("n01", "n02", "n03")
    }
    for number in (0, 1):
        rows = {"image": cells(range(7), [None] * 7), "label": ["a", "b", "a", "b", "a", None, "b"]}
        written(root / f"tables/train-0000{number}.parquet", table(rows))
    made(root / "listed", [f"{i}.jpg" for i in range(9)], {"labels.csv": LABELS})
    made(root / "folders", list(PHOTOS))
    made(root / "masked", [f"{kind}/{i}.png" for kind in ("images", "masks") for i in range(3)])
    made(root / "others", ["train/a/1.jpg", "train/b/2.jpg", "elsewhere/3.jpg"])
    for name in ("one.tar", "one.tar.gz"):
        packed(root / name, PHOTOS)
    with zipfile.ZipFile(root / "one.zip", "w") as file:
        for name, data in PHOTOS.items():
            file.writestr(name, data)
    packed(root / "inner.tar", {"loose/1.jpg": b"1", **inner})
    (root / "labels-of-mine.csv").write_text(LABELS)
    plain: dict[str, str] = {}
    return {
        "folder": (str(root / "folders"), plain),
        "a tenth held out": (str(root / "folders"), {"split_from": "0.3"}),
        "labels in a file beside": (str(root / "listed"), plain),
        "labels in a file of the user's": (str(root / "listed"), {"labels": str(root / "labels-of-mine.csv")}),
        "folders beside the splits'": (str(root / "others"), plain),
        "masks": (str(root / "masked"), plain),
        "splits without classes": (str(tiny_imagenet(root / "tiny")), plain),
        "tar": (str(root / "one.tar"), plain),
        "compressed tar": (str(root / "one.tar.gz"), plain),
        "zip": (str(root / "one.zip"), plain),
        "folder of shards": (str(root / "web"), plain),
        "braces": (str(root / "web/train-{000000..000001}.tar"), plain),
        "tars in a tar": (str(root / "inner.tar"), plain),
        "tables": (str(root / "tables"), plain),
        "table": (str(root / "tables/train-00001.parquet"), plain),
        "patterns": ("patterns:train=30,test=7,size=16", plain),
    }


def test_portions_read_elsewhere_are_the_items_of_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In another process, with another working directory, that has not the user's file of labels."""
    monkeypatch.setattr(tar, "_FEW_INNER", 0)
    root = tmp_path / "sources"
    root.mkdir()
    monkeypatch.chdir(root)
    expected, plans = {}, {}
    for kind, (spec, how) in sources(root).items():
        spec = spec.removeprefix(f"{root}/")
        source = open_source(spec, Reading(**how) if how else None)
        for most in (4, 10**6):
            plan = list(portions(source, most))
            assert [portion.number for portion in plan] == list(range(len(plan)))
            assert all(len(portion.names) <= most for portion in plan)
            plans[f"{kind} {most}"] = {"spec": elsewhere(spec), "portions": [portion.to_dict() for portion in plan]}
            expected[f"{kind} {most}"] = told(source.items())
            if source.total is not None:
                firsts = [portion.first for portion in plan]
                assert firsts == [sum(len(p.names) for p in plan[:at]) for at in range(len(plan))]
    assert [p["first"] for p in plans["tars in a tar 4"]["portions"]] == [0, 1, None, None]
    (root / "labels-of-mine.csv").unlink()
    (tmp_path / "plans.json").write_text(json.dumps(plans))
    code = (
        "import json, sys\n"
        "from simclr.data.sources import tar\n"
        "from simclr.data.sources.portions import Portion, reader\n"
        "from tests.support.items import told\n"
        "tar._FEW_INNER = 0\n"
        "found = {}\n"
        "for kind, plan in json.load(open(sys.argv[1])).items():\n"
        "    read = reader(plan['spec'])\n"
        "    found[kind] = [row for one in plan['portions'] for row in told(read(Portion.from_dict(one)))]\n"
        "print(json.dumps(found))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "plans.json")], cwd="/", env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True
    )
    assert not done.returncode, done.stderr.decode()
    assert json.loads(done.stdout.splitlines()[-1]) == expected


def test_a_prefix_and_an_archive_in_s3_are_read_by_portions(s3: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prefix is not listed again; the archive is fetched once for all who read it on this machine, and gone behind the last."""
    bucket, store = Address("photos"), Store(pause_s=0)
    names = [name for name in PHOTOS if int(name[-5]) < 3]
    made(tmp_path / "pets", names)
    for name in names:
        store.upload(tmp_path / "pets" / name, bucket / "portions" / name)
    store.upload(packed(tmp_path / "pets.tar", PHOTOS), bucket / "portions.tar")
    there, archive = open_source("s3://photos/portions"), open_source("s3://photos/portions.tar")
    plan, of_archive = [Portion.from_dict(json.loads(json.dumps(p.to_dict()))) for p in portions(there, 5)], list(portions(archive, 5))
    expected = told(there.items())
    s3.log.clear()
    read = reader("s3://photos/portions")
    assert told(item for portion in plan for item in read(portion)) == expected
    assert len(s3.log) == len(names) and not any("list-type" in path for _, path, _ in s3.log)
    s3.log.clear()
    readers = [reader("s3://photos/portions.tar") for _ in range(2)]  # each opens it, as two processes do
    read_by_each = [told(item for portion in of_archive for item in one(portion)) for one in readers]
    assert read_by_each == [told(archive.items())] * 2
    assert not [path for method, path, _ in s3.log if method == "GET"]
    (copy,) = Path(os.environ["SIMCLR_CACHE"]).rglob("portions.tar")
    del archive
    del readers[0]
    assert copy.exists()
    del readers
    assert not copy.exists()
    for left, gets in (((tmp_path / "pets.tar").read_bytes(), False), (b"another size", True)):
        copy.write_bytes(left)  # by a process that was killed
        s3.log.clear()
        after = open_source("s3://photos/portions.tar")
        assert told(after.items()) == read_by_each[0]
        assert any(method == "GET" for method, _, _ in s3.log) == gets
        del after
        assert not copy.exists()


@pytest.fixture
def unlisted(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and a folder can be listed no more."""

    def forbid() -> None:
        monkeypatch.setattr(opening, "walk", lambda root: pytest.fail("the folder is listed again"))

    return forbid


def test_loose_pictures_are_read_without_a_listing(tmp_path: Path, unlisted: Callable[[], None]) -> None:
    source = open_source(str(made(tmp_path, list(PHOTOS))))
    plan, expected = list(portions(source, 6)), told(source.items())
    unlisted()
    read = reader(str(tmp_path))
    assert told(item for portion in plan for item in read(portion)) == expected


def test_a_large_archive_is_listed_once_by_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = list(portions(open_source(str(packed(tmp_path / "a.tar", PHOTOS))), 3))
    opened: list[str] = []

    def counted(spec: str, sidecars: bool, tree: Callable[[str, bool], Any] = opening.listed) -> Any:
        opened.append(spec)
        return tree(spec, sidecars)

    monkeypatch.setattr("simclr.data.sources.portions.listed", counted)
    read = reader(str(tmp_path / "a.tar"))
    assert not opened
    for portion in plan:
        assert len(list(read(portion))) == len(portion.names)
    assert len(plan) > 4 and len(opened) == 1


def test_a_compressed_archive_is_unpacked_once_for_its_portions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a process that reads all of them, some, or one again; and where somebody stops within one."""
    source = open_source(str(packed(tmp_path / "a.tar.gz", PHOTOS)))
    plan, expected = list(portions(source, 3)), told(source.items())
    read = reader(str(tmp_path / "a.tar.gz"))
    list(read(plan[0]))
    opened: list[object] = []

    class Counted(tar._Stream):
        def __init__(self, *given: Any) -> None:
            opened.append(given)
            super().__init__(*given)

    monkeypatch.setattr(tar, "_Stream", Counted)
    assert [row for portion in plan[1:] for row in told(read(portion))] == expected[3:]
    assert len(plan) > 8 and not opened
    assert told(read(plan[2])) == expected[6:9]
    next(half := read(plan[4]))
    half.close()
    assert told(read(plan[1])) + told(read(plan[5])) == expected[3:6] + expected[15:18]


def test_who_reads_needs_no_file_of_labels(tmp_path: Path) -> None:
    """The driver read it, and the machine of a worker may not have it."""
    (labels := tmp_path / "mine.csv").write_text("".join(f"{i}.jpg,{'ab'[i % 2]}\n" for i in range(4)))
    made(tmp_path / "photos", [f"{i}.jpg" for i in range(4)])
    reading = Reading(labels=str(labels))
    source = open_source(str(tmp_path / "photos"), reading)
    plain = json.loads(json.dumps(dataclasses.asdict(reading)))
    (portion,), expected = portions(source, 4), told(source.items())
    labels.unlink()
    assert told(reader(source.spec, plain)(portion)) == expected and expected[1][1] == "b"


@pytest.mark.parametrize("packer", ["tar", "parquet"])
def test_a_machine_with_another_copy_of_an_archive_or_table_says_so(tmp_path: Path, packer: str) -> None:
    """Its names may be the same, and its pictures others."""
    path = tmp_path / f"a.{packer}"

    def write(shade: int) -> str:
        if packer == "tar":
            return str(packed(path, {"1.png": bytes([shade]) * 40, "2.png": b"x"}))
        pyarrow.parquet.write_table(pyarrow.table({"image": [b"\x89PNG" + bytes([shade])]}), path)
        return str(path)

    source = open_source(write(1))
    (portion,) = portions(source, 9)
    assert len(list(reader(str(path), None, source.identity)(portion))) == len(portion.names)
    write(2)
    with pytest.raises(UserError, match=f"{socket.gethostname()} sees another {path} than was listed: names, sizes or contents"):
        list(reader(str(path), None, source.identity)(portion))


def test_a_machine_that_does_not_see_the_source_says_which(tmp_path: Path) -> None:
    root, host = made(tmp_path / "photos", list(PHOTOS)), socket.gethostname()
    plan = list(portions(open_source(str(root)), 6))
    root.rename(tmp_path / "moved")
    for spec, portion in ((root, plan[0]), (tmp_path / "a.tar", Portion(0, 0, "a", ("1.jpg",), ("train",), (None,)))):
        with pytest.raises(UserError, match=f"{host} does not see {spec}, where the pictures are read by several machines; give a folder"):
            list(reader(str(spec))(portion))
    root.mkdir()
    with pytest.raises(UserError, match=f"{host} sees none of 6 files in {root} that were listed, as test/cat/0.jpg; give a folder"):
        list(reader(str(root))(plan[0]))
    made(root, [plan[0].names[3]])  # some were removed since: those that are left are read, and the others skipped
    assert len(list(reader(str(root))(plan[0]))) == 6


def test_a_portion_takes_few_letters(tmp_path: Path) -> None:
    names = tuple(f"train/n{i // 500:08}/n{i // 500:08}_{i}.JPEG" for i in range(1024))
    portion = Portion(7, 7168, "s3://photos/train", names, ("train",) * 1024, tuple(name.split("/")[1] for name in names), True)
    plain = json.dumps(portion.to_dict())
    assert Portion.from_dict(json.loads(plain)) == portion and len(plain) < 12 * 1024
    strange = Portion(0, None, "a", (os.fsdecode(b"\xff\n.jpg"), '"é"'), ("train", "test"), (None, "a,b"))
    assert Portion.from_dict(json.loads(json.dumps(strange.to_dict()))) == strange
