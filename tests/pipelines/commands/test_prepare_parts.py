"""`simclr prepare` on several processes: the bytes of one, on a disk and in S3, also where one of them is killed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.commands import prepare
from pipelines.parts.run import Where
from simclr.data.manifest import Manifest
from simclr.data.options import Options
from simclr.data.s3.store import Store
from simclr.data.s3.uri import address
from tests.support.s3 import Proxy


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


def args(source: Path, out: Path | str, workers: int | None = None) -> prepare.Args:
    return prepare.Args(str(source), Path(out), options=Options(shard_mib=1), threads=2, where=Where(workers=workers))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def one(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, dict[str, bytes]]:
    """What one process makes of them."""
    out = tmp_path_factory.mktemp("one") / "shards"
    manifest = prepare.prepare(args(pictures, out))
    return manifest, files(out)


def test_one_process_makes_several_parts(one: tuple[Manifest, dict[str, bytes]]) -> None:
    manifest, found = one
    assert len(manifest.splits["train"]) >= 3 and manifest.skipped == 2 and (manifest.duplicates, manifest.conflicts) == (2, 2)
    assert {name for name in found if not name.endswith(".beton")} == {
        *("manifest.json", "skipped.csv", "duplicates.csv", "conflicts.csv", "names-train.txt", "names-test.txt")
    }


def test_two_processes_make_the_bytes_of_one(
    shared_ray: None, pictures: Path, one: tuple[Manifest, dict[str, bytes]], tmp_path: Path
) -> None:
    assert prepare.prepare(args(pictures, tmp_path / "two", 2)) == one[0]
    assert files(tmp_path / "two") == one[1]


def test_in_s3_lie_the_same_bytes(
    shared_ray: None, s3: Proxy, pictures: Path, one: tuple[Manifest, dict[str, bytes]], tmp_path: Path
) -> None:
    for workers in (None, 2):
        out = f"s3://photos/by/{workers or 1}"
        assert prepare.prepare(args(pictures, out, workers)) == one[0]
        at, store = address(out), Store()
        assert at is not None and {o.name: store.read(at / o.name) for o in store.listing(at)} == one[1]
