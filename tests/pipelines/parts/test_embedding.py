"""`simclr embed`: each picture once, whoever embeds it and whatever is killed meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.parts import embedding
from pipelines.parts.plan import plan, reader
from simclr import files
from simclr.data.depth import Rule
from simclr.data.feature_parts import About, FeatureParts, open_features, write_failed
from simclr.data.options import Options
from simclr.data.s3 import lease
from simclr.data.s3.store import Store
from simclr.data.s3.uri import Address
from simclr.data.sources import prepared
from simclr.data.sources.portions import Portion
from simclr.data.sources.reading import Reading
from simclr.data.sources.source import Item
from simclr.errors import UserError
from simclr.evaluation import decoding
from simclr.views.preprocessing import Preprocessing
from tests.simclr.data.test_archives import packed
from tests.support.bucket import Bucket, store_of
from tests.support.command import Run
from tests.support.paths import ROOT
from tests.support.processes import alive, children
from tests.support.s3 import Proxy

COLUMNS = ("id", "split", "path", "sha256", "label", "width", "height")


def photos(folder: Path, count: int, classes: int = 2) -> Path:
    """Pictures of several sizes, class by class."""
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / "train" / f"class{i % classes}" / f"{i:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (24 + i % 5, 32 + i % 3, 3), np.uint8)).save(path)
    return folder


def rows(table: FeatureParts) -> dict[int, tuple[Any, ...]]:
    """id → the other small columns and the feature."""
    small = table.table(COLUMNS)
    features = np.concatenate([block for _, block in table.blocks()])
    return {one[0]: (*one[1:], feature) for *one, feature in zip(*(small[name] for name in COLUMNS), features, strict=True)}


def same(a: dict[Any, tuple[Any, ...]], b: dict[Any, tuple[Any, ...]]) -> float:
    """The largest difference of features; all else must be equal."""
    assert a.keys() == b.keys() and all(a[i][:-1] == b[i][:-1] for i in a)
    return max(float(np.abs(a[i][-1] - b[i][-1]).max()) for i in a)


def test_parts_files_shards_and_archives_give_the_same_rows(simclr: Run, published: Path, tmp_path: Path) -> None:
    photos(tmp_path / "photos", 150)
    assert simclr("embed", published, "photos", "--out", "parts")[0] == 0
    table = open_features(tmp_path / "parts")
    found = rows(table)
    assert list(found) == list(range(150)) and len(table.parts) == 3 and table.about.encoder and table.about.preprocessing["size_px"] == 32
    assert {row[3] for row in found.values()} == {"class0", "class1"} and found[0][4:6] == (32, 24)
    assert simclr("embed", published, "photos", "--out", "one.parquet")[0] == 0
    assert same(found, rows(open_features(tmp_path / "one.parquet"))) == 0 and not (tmp_path / ".one.parquet.parts").exists()
    subprocess.run(["tar", "cf", tmp_path / "photos.tar", "-C", tmp_path / "photos", "train"], check=True)
    assert simclr("embed", published, "photos.tar", "--out", "tar")[0] == 0
    packed = {row[1]: row[2:] for row in rows(open_features(tmp_path / "tar")).values()}  # in the archive's own order
    assert same({row[1]: row[2:] for row in found.values()}, packed) < 1e-6
    assert simclr("prepare", "--source", "photos", "--out", "shards", "--kind", "jpeg", "--jpeg-quality", "100")[0] == 0
    assert simclr("embed", published, "shards", "--out", "again")[0] == 0
    stored = rows(open_features(tmp_path / "again"))  # other bytes of the same pictures
    assert {i: (*row[:2], *row[3:6]) for i, row in stored.items()} == {i: (*row[:2], *row[3:6]) for i, row in found.items()}
    assert simclr("embed", published, "photos", "--out", "half", "--dtype", "float16")[0] == 0
    half = open_features(tmp_path / "half")
    assert half.about.dtype == "float16" and 0 < same(found, rows(half)) < 1e-2


def test_the_same_command_goes_on_and_another_one_is_refused(simclr: Run, published: Path, tmp_path: Path) -> None:
    photos(tmp_path / "photos", 150)
    (tmp_path / "photos/train/class0/bad.png").write_bytes(b"\x89PNG no picture")
    command = ("embed", published, "photos", "--out", "parts")
    code, out, err = simclr(*command)
    assert code == 0 and "parts: 150 × 64 features" in out and "1 file is no image that can be read" in err and "bad.png" in err
    assert "cpu waited for pictures" in err
    whole, states = rows(open_features(tmp_path / "parts")), {p.name: p.stat().st_mtime_ns for p in (tmp_path / "parts").iterdir()}
    assert open_features(tmp_path / "parts").failures()[0]["path"] == "train/class0/bad.png"
    code, _, err = simclr(*command)
    assert code == 0 and "holds these features already; nothing to do" in err
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "parts").iterdir()} == states
    (tmp_path / "parts/part-00001.parquet").unlink()
    assert "going on with parts: 2 of 3 parts are there" in simclr(*command)[2]
    assert same(whole, rows(open_features(tmp_path / "parts"))) == 0
    code, _, err = simclr(*command, "--dtype", "float16")
    assert code == 2 and "parts holds features with another dtype; use another --out" in err
    Image.new("RGB", (40, 40)).save(tmp_path / "photos/train/class1/new.png")
    code, _, err = simclr(*command)
    assert code == 2 and "with another images (or they have changed since)" in err
    code, _, err = simclr("embed", published, "photos", "--out", "photos")
    assert code == 0 or "is not empty" in err
    code, _, err = simclr("embed", published, "photos", "--out", "s3://photos/x.npz")
    assert code == 2 and "in S3 features are parts below a prefix" in err


def test_another_embed_is_kept_out_of_a_prefix(simclr: Run, s3: Proxy, published: Path, tmp_path: Path) -> None:
    photos(tmp_path / "own", 1)
    register = lease.Register(Store(), Address("photos", "embed-alone/.parts/writer.json"))
    with lease.alone(lease.Lease(register, "s3://photos/embed-alone"), "wait", print):
        code, _, err = simclr("embed", published, tmp_path / "own", "--out", "s3://photos/embed-alone")
    assert code == 2 and "s3://photos/embed-alone is being written by" in " ".join(err.split()), err


def test_two_datasets_whose_shards_are_called_alike(simclr: Run, s3: Proxy, published: Path, tmp_path: Path) -> None:
    for seed in (1, 2):
        assert simclr("prepare", "--source", f"patterns:train=20,test=4,seed={seed}", "--out", f"s3://photos/twins/{seed}")[0] == 0
    code, out, _ = simclr("embed", published, "s3://photos/twins/1", "s3://photos/twins/2", "--out", "twins")
    assert code == 0 and "48 × 64 features" in out
    found = rows(open_features(tmp_path / "twins"))
    assert list(found) == list(range(48)) and len({row[2] for row in found.values()}) == 48


def test_one_embed_at_a_time_and_nothing_of_an_earlier_one_stays(simclr: Run, published: Path, tmp_path: Path) -> None:
    photos(tmp_path / "photos", 3)
    (tmp_path / "out").mkdir()
    with files.locked(tmp_path / "out/.embedding-lock"):
        code, _, err = simclr("embed", published, "photos", "--out", "out")
    assert code == 2 and "another embed is writing to out; wait for it, or use another --out" in err
    about = About(encoder="x", preprocessing={}, source="", d=64, key="of another job that was killed")
    for number in (0, 7):
        write_failed(tmp_path / f"out/failed-{number:05d}.parquet", about, [(9, "train", "old.png", None, "the file is empty")])
    assert simclr("embed", published, "photos", "--out", "out")[0] == 0
    assert open_features(tmp_path / "out").failures() == [] and len(open_features(tmp_path / "out")) == 3


def test_the_driver_keeps_a_few_bytes_of_each_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """So its memory is as good as the same at ten times the pictures."""
    sizes = {}
    for count in (1_000, 10_000):
        keys = {f"photos/n{i // 1300:08}/n{i // 1300:08}_{i:09}.JPEG": (110_000, f'"{i:032x}"') for i in range(count)}
        store = store_of(Bucket(keys, page=1000))
        monkeypatch.setattr("simclr.data.s3.store.Store", lambda store=store, **_: store)
        monkeypatch.setattr(prepared, "manifest_of", lambda spec: None)
        tracemalloc.start()
        planned = plan(["s3://pretended/photos"], Reading(), Options())
        sizes[count] = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert planned.total == count and sum(len(Portion.from_dict(p["portion"]).names) for p in planned.parts) == count
    assert sizes[10_000] - sizes[1_000] < 9_000 * 40


def test_a_plan_carries_the_identity_of_its_sources(tmp_path: Path) -> None:
    archive = packed(tmp_path / "a.tar", {f"{i}.jpg": b"x" * 100 for i in range(3)})
    planned = plan([str(archive)], Reading(), Options(value_range=(0, 1)))
    portion = Portion.from_dict(planned.parts[0]["portion"])
    assert len(list(reader(planned.sources[0], Reading(), tmp_path)(portion))) == 3
    packed(archive, {f"{i}.jpg": b"y" * 100 for i in range(3)})
    with pytest.raises(UserError, match=r"sees another .*/a.tar than was listed"):
        list(reader(planned.sources[0], Reading(), tmp_path)(portion))


# ── Who decodes ────────────────────────────────────────────────────────────────────────────────────────────────────


class Local:
    """A decoding process without a process."""

    def __init__(self, memory: int, told: tuple[Any, ...]) -> None:
        self.how, self.x, self.asked = told[:2], decoding._mapped(memory, told[2]), 0

    def ask(self, first: int, items: list[Item]) -> Any:
        self.asked += 1
        return decoding._answered(lambda at, item: decoding._placed(self.x, at, item, *self.how), first, items)


def test_threads_and_processes_write_the_same_bytes(simclr: Run, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos(tmp_path / "photos", 150)
    (tmp_path / "photos/train/class0/00050.png").write_bytes(b"\x89PNG no picture")
    monkeypatch.setattr(decoding, "_Process", Local)
    original, made = embedding._decoders, []

    def decoders(how: str) -> Callable[..., Any]:
        def chosen(settings: Any, *rest: Any) -> Any:
            made.append(original(settings | {embedding.DECODERS: how}, *rest))
            return made[-1]

        return chosen

    for at, (how, cores) in enumerate((("threads", 1), ("threads", 3), ("processes", 2), ("processes", 4))):
        monkeypatch.setattr(embedding, "_decoders", decoders(how))
        assert simclr("embed", published, "photos", "--out", f"{at}", "--cpus-per-worker", cores, "--batch-size", "7")[0] == 0
    assert [type(one).__name__ for one in made] == ["Threads", "Threads", "Processes", "Processes"]
    assert [len(one._all) for one in made[2:]] == [1, 3] and all(one.asked for one in made[3]._all)
    written = [{path.name: path.read_bytes() for path in (tmp_path / f"{at}").iterdir()} for at in range(4)]
    assert len(written[0]) == 5 and written[0] == written[1] == written[2] == written[3]
    for one in made[2:]:
        one._all.clear()


def test_processes_decode_for_a_gpu_that_waits_for_many(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("Threads", "Processes"):
        monkeypatch.setattr(decoding, name, lambda count, *how, name=name: (name, count))
    how = (Preprocessing(size_px=32, centre_crop=1, resize="area", mean=(0.0,) * 3, std=(1.0,) * 3), Rule())

    def chosen(device: str, threads: int, **more: Any) -> Any:
        return embedding._decoders({"threads": threads, "batch_size": 64, **more}, device, *how)

    assert chosen("cuda", 16) == chosen("cuda", 16, images=None) == chosen("cuda", 16, images=10_000) == ("Processes", 15)
    assert chosen("cuda", 16, images=100) == chosen("cpu", 16) == ("Threads", 16) and chosen("cuda", 2) == ("Threads", 2)
    assert chosen("cpu", 1, decoders="processes") == ("Processes", 1)

    def refuse(*given: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(decoding, "Processes", refuse)
    assert chosen("cuda", 16) == ("Threads", 16)
    assert "decoded in threads, since no processes can be started for it: No space left on device" in capsys.readouterr().err


# ── On Ray's actors, with everything killed ────────────────────────────────────────────────────────────────────────


def started(words: list[str], log: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with log.open("w") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "pipelines.cli", *words], cwd=log.parent, env=environment, stdout=out, stderr=out, start_new_session=True
        )


def waited(process: subprocess.Popen[bytes], log: Path, when: Callable[[], bool]) -> None:
    until = time.monotonic() + 200
    while not when():
        assert process.poll() is None and time.monotonic() < until, log.read_text()
        time.sleep(0.05)


def actors(pid: int) -> list[int]:
    """Processes below `pid` that embed."""
    found = []
    for child in children(pid):
        try:
            title = Path(f"/proc/{child}/cmdline").read_bytes()
        except OSError:
            continue
        if b"MapWorker" in title or b"_Actor" in title:
            found.append(child)
    return found


@pytest.mark.cluster
def test_two_thousand_objects_with_a_worker_and_then_the_driver_killed(s3: Proxy, published: Path, tmp_path: Path) -> None:
    store = Store(threads=8)
    local = photos(tmp_path / "photos", 2000)
    paths = sorted(path for path in local.rglob("*.png"))
    list(store.pool.map(lambda path: store.upload(path, Address("photos", f"two-thousand/photos/{path.relative_to(local)}")), paths))

    def parts() -> int:
        return sum(o.name.startswith("part-") for o in store.listing(Address("photos", "two-thousand/features")))

    words = ["embed", str(published), "s3://photos/two-thousand/photos", "--out", "s3://photos/two-thousand/features", "--workers", "2"]
    log = tmp_path / "log"
    process = started(words, log)
    waited(process, log, lambda: parts() >= 3)
    below = children(process.pid)
    embedding = actors(process.pid)
    assert embedding, log.read_text()
    os.kill(embedding[0], 9)
    now = parts()
    waited(process, log, lambda: parts() >= min(now + 6, 30))
    done = parts()
    process.kill()
    process.wait()
    until = time.monotonic() + 100
    while any(alive(pid) for pid in below):
        assert time.monotonic() < until
        time.sleep(0.2)
    assert done < 32 == -(-2000 // 64)
    again = started(words, log)
    assert again.wait(300) == 0 and "parts are there" in log.read_text(), log.read_text()
    found = rows(open_features("s3://photos/two-thousand/features"))
    assert list(found) == list(range(2000))
    assert started(["embed", str(published), str(local), "--out", "here"], log).wait(300) == 0, log.read_text()
    assert same(found, rows(open_features(tmp_path / "here"))) < 1e-6
    s3.log.clear()
    third = started(words, log)
    assert third.wait(100) == 0 and "nothing to do" in log.read_text()
    assert not [path for method, path, _ in s3.log if method in ("PUT", "POST", "DELETE")]
