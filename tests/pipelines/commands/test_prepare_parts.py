"""`simclr prepare` by several processes: the bytes of one, on a disk and in S3, also where one of them is killed."""

from __future__ import annotations

import functools
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.commands import prepare
from pipelines.parts.run import Where, run
from simclr.data import note, shards
from simclr.data.manifest import Manifest
from simclr.data.options import Options
from simclr.data.s3.store import Store
from simclr.data.s3.uri import address
from simclr.data.sources.open import open_source
from simclr.data.sources.reading import Reading
from tests.support.s3 import Proxy

Plain = dict[str, Any]
Shards = tuple[Manifest, dict[str, bytes]]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise in splits and classes; two copies of another class, and two files that are no pictures."""
    root = tmp_path_factory.mktemp("pictures")
    for i in range(330):
        folder = root / ("val" if i % 11 == 10 else "train") / "cab"[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        seed = {200: 3, 301: 5}.get(i, i)
        noise = np.random.default_rng(seed).integers(0, 256, (80, 80, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i:03}.jpg", quality=95)
    for i in (50, 250):
        (root / "train" / "cab"[i % 3] / f"{i:03}.jpg").write_bytes(b"no picture")
    return root


def by_one(source: Path, out: Path | str) -> Manifest:
    return prepare.prepare(prepare.Args(str(source), Path(out), options=Options(shard_mib=1), threads=2))


def by(run: Any, source: Path, out: Path | str, told: list[int] | None = None) -> Manifest:
    """By the processes, or what stands for them, of `run`."""
    elsewhere = shards.Elsewhere(run=run, reading=Reading())
    resumed = (told if told is not None else []).append
    return shards.prepare(open_source(str(source)), Path(out), Options(shard_mib=1), 2, lambda done: None, resumed, elsewhere=elsewhere)


def lies_at(out: Path | str) -> dict[str, bytes]:
    at = address(out)
    if at is None:
        return {path.name: path.read_bytes() for path in Path(out).iterdir()}
    store = Store()
    return {o.name: store.read(at / o.name) for o in store.listing(at)}


@pytest.fixture(scope="module")
def one(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """What one process makes of them."""
    out = tmp_path_factory.mktemp("one") / "shards"
    return by_one(pictures, out), lies_at(out)


def test_one_process_makes_several_parts(one: Shards) -> None:
    manifest, found = one
    assert len(manifest.splits["train"]) >= 3 and manifest.skipped == 2 and (manifest.duplicates, manifest.conflicts) == (2, 2)
    assert {name for name in found if not name.endswith(".beton")} == {
        *("manifest.json", "skipped.csv", "duplicates.csv", "conflicts.csv", "names-train.txt", "names-test.txt")
    }


def backwards(most: int, make: Callable[[Plain], Any], settings: Plain, parts: Sequence[Plain]) -> Iterator[tuple[Plain, Plain]]:
    """Makers by turns in this process, the last part first; ends like a killed driver behind `most` parts."""
    makers = [make(json.loads(json.dumps(settings)) | {"threads": 1}) for _ in range(1 if "s3" in settings["out"] else 2)]
    for i, part in enumerate(reversed(parts)):
        if i == most:
            raise KeyboardInterrupt
        yield part, json.loads(json.dumps(makers[i % len(makers)](json.loads(json.dumps(part)))))


@pytest.mark.parametrize("place", ["{}/out", "s3://photos/{}"])
def test_parts_come_in_any_order_and_a_killed_driver_goes_on(s3: Proxy, pictures: Path, one: Shards, tmp_path: Path, place: str) -> None:
    out = place.format(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        by(functools.partial(backwards, 2), pictures, out)
    there = lies_at(out)
    assert "manifest.json" not in there and sum(name.endswith(".parquet") for name in there) == 2
    went_on: list[int] = []
    assert by(functools.partial(backwards, -1), pictures, out, went_on) == one[0]
    assert lies_at(out) == one[1] and 50 < went_on[0] < 300
    s3.log.clear()
    assert by_one(pictures, out) == one[0] and not [path for method, path, _ in s3.log if method in ("PUT", "POST", "DELETE")]


def dying(environment: dict[str, str], grave: str, make: Callable[[Plain], Any], settings: Plain) -> Callable[[Plain], Plain]:
    """The function for parts. The process that is the first to take the second part is killed in the middle of it."""
    os.environ.update(environment)
    work, add, rows = make(settings), note.Writer.add, itertools.count()

    def killed(self: note.Writer, encoded: Any) -> None:
        if next(rows) == 20:
            Path(grave).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        add(self, encoded)

    def works(part: Plain) -> Plain:
        if part["number"] == 1 and not Path(grave).exists():
            note.Writer.add = killed  # type: ignore[method-assign]
        return work(part)

    return works


@pytest.mark.cluster
def test_two_processes_of_ray_make_the_bytes_of_one_though_one_is_killed(s3: Proxy, pictures: Path, one: Shards, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "SIMCLR_"))}

    def on_ray(make: Any, settings: Plain, parts: Sequence[Plain]) -> Iterator[tuple[Plain, Plain]]:
        return run(functools.partial(dying, environment, str(tmp_path / "grave"), make), settings, parts, Where(workers=2))

    assert by(on_ray, pictures, "s3://photos/ray") == one[0]
    assert lies_at("s3://photos/ray") == one[1] and (tmp_path / "grave").exists()


@pytest.mark.cluster
def test_a_command_that_was_killed_goes_on_with_the_parts_that_are_left(pictures: Path, one: Shards, tmp_path: Path) -> None:
    """SIGKILL for the command, with two processes of a Ray of its own, behind its first part; then the same command again."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "pipelines.cli", "prepare", "--source", str(pictures), "--out", str(out), "--shard-mib", "1"]
    killed = subprocess.Popen([*command, "--workers", "2"], stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        ended = time.monotonic() + 120
        while not list(out.glob(".writing-part-*.parquet")):
            assert killed.poll() is None and time.monotonic() < ended
            time.sleep(0.02)
    finally:
        killed.kill()
        killed.wait()
    assert not (out / "manifest.json").exists()
    again = subprocess.run([*command, "--workers", "2"], stderr=subprocess.PIPE, text=True, check=True, timeout=120)
    assert "going on with" in again.stderr and lies_at(out) == one[1]
