"""Samples are looked up in the mapped shards: as the shards have them, at no memory for each, and held against the manifest each time."""

from __future__ import annotations

import os
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ffcv.types import ALLOC_TABLE_TYPE

from simclr.data import loader, memory
from simclr.data.ffcv.reader import IMAGE, open_in_place, open_shard
from simclr.data.manifest import read_manifest, write_manifest
from simclr.data.s3.uri import Corrupt
from simclr.data.samples import Samples, Shards
from simclr.errors import UserError
from tests.simclr.test_train import config

COPIES = 60


def copy_of(data: Path, out: Path) -> Path:
    out.mkdir()
    for file in data.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    return out


def opened(data: Path, groups: int = 1, group: int = 0) -> Shards:
    return Shards(data, read_manifest(data), "train", groups, (group,), False)


@pytest.fixture(scope="module")
def many(patterns: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty shards of 240 patterns each."""
    out = tmp_path_factory.mktemp("many")
    manifest = read_manifest(patterns)
    (one,) = manifest.splits["train"]
    links = tuple(replace(one, name=f"train-{number:05}.beton") for number in range(COPIES))
    for link in links:
        os.link(patterns / one.name, out / link.name)
    write_manifest(out, replace(manifest, splits={"train": links}))
    return out


def assert_as_stored(found: Samples, data: Path, shards: Shards, which: np.ndarray, own: np.ndarray) -> None:
    manifest = read_manifest(data)
    for row, (shard, sample) in enumerate(zip(which.tolist(), own.tolist(), strict=True)):
        image, label, size = open_shard(data / shards.shards[shard].name, shards.shards[shard], manifest)
        for name in ("mode", "height", "width"):
            assert found.images[name][row] == image[name][sample]
        assert found.labels[row] == label[sample] and found.bytes[row] == size[sample]
        assert found.sizes[row].tolist() == [image["height"][sample], image["width"][sample]]
        at, length = int(found.images["data_ptr"][row]), int(size[sample])
        with (data / shards.shards[shard].name).open("rb") as file:
            assert shards.region[at : at + length].tobytes() == os.pread(file.fileno(), length, int(image["data_ptr"][sample]))


@pytest.mark.parametrize("groups", [1, 3])
def test_samples_are_as_their_shards_have_them(many: Path, groups: int) -> None:
    for group in range(groups):
        shards = opened(many, groups, group)
        assert len(shards) == 240 * COPIES // groups
        rows = np.array([0, len(shards) - 1, 239, 240, 241, 100, 100])
        found = shards.find(rows)
        assert found.rows.tolist() == rows.tolist()
        assert found.ids.tolist() == [240 * (row // 240 * groups + group) + row % 240 for row in rows.tolist()]
        assert_as_stored(found, many, shards, rows // 240, rows % 240)
        assert found[np.array([2, 1])].ids.tolist() == found.ids[[2, 1]].tolist()
    assert np.array_equal(np.concatenate([part.labels for part in opened(many).all()]), loader.labels(many))


def test_photographs_of_a_table_in_any_order_are_found(photographs: Path, tmp_path: Path) -> None:
    data = copy_of(photographs, tmp_path / "shuffled")
    (shard,) = read_manifest(data).splits["train"]
    before = open_in_place(data / shard.name, shard, read_manifest(data))
    assert before[3].place is None
    content = bytearray((data / shard.name).read_bytes())
    table = np.frombuffer(content, ALLOC_TABLE_TYPE, offset=before[3].size_at - ALLOC_TABLE_TYPE.fields["size"][1])
    table[:] = table[np.random.default_rng(0).permutation(len(table))]
    (data / shard.name).write_bytes(content)
    rows = np.array([5, 0, 239, 17])
    found = opened(data).find(rows)
    assert found.bytes.tolist() == before[2][rows].tolist() and len(set(found.bytes.tolist())) > 1
    assert_as_stored(found, data, opened(data), np.zeros(4, int), rows)


def test_an_image_takes_no_memory_of_a_process(many: Path) -> None:
    """It took 45 bytes in each rank."""
    opened(many)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        split = loader._Split(many, "train", 1)
        assert tracemalloc.get_traced_memory()[0] - before < 6 * len(split)  # the numbers and names of sixty shards
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("what", "value"), [("data_ptr", 1 << 63), ("data_ptr", 10**9), ("height", 0), ("mode", 7), ("label", 10), ("size", 1 << 40)]
)
def test_what_is_written_to_a_shard_while_it_is_read_is_not_followed(patterns: Path, tmp_path: Path, what: str, value: int) -> None:
    data = copy_of(patterns, tmp_path / "written")
    shards = opened(data)
    (shard,) = shards.shards
    layout = open_in_place(data / shard.name, shard, read_manifest(data))[3]
    shards.find(np.arange(240))
    with (data / shard.name).open("r+b") as file:
        if what == "size":
            file.seek(layout.size_at + 3 * ALLOC_TABLE_TYPE.itemsize)
        else:
            file.seek(3 * layout.step + (layout.label_at if what == "label" else layout.image_at + IMAGE.fields[what][1]))
        file.write(value.to_bytes({"mode": 1, "height": 2}.get(what, 8), "little"))
    with pytest.raises(Corrupt, match=r"train-00000\.beton: sample 3 is damaged: its place, size or label contradicts the file") as found:
        shards.find(np.array([9, 3, 4]))
    assert found.value.shard == shard.name
    shards.find(np.array([2, 4]))


def mappings() -> int:
    return Path("/proc/self/maps").read_bytes().count(b"\n")


def test_a_shard_is_one_mapping(many: Path) -> None:
    """The system counts a gap between two as one more."""
    region = opened(many).region
    first, last = region.ctypes.data, region.ctypes.data + len(region)
    starts = [int(line.partition("-")[0], 16) for line in Path("/proc/self/maps").read_text().splitlines()]
    assert sum(first <= start < last for start in starts) == COPIES


def test_more_shards_than_the_system_maps_are_a_sentence(many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "max_map_count"
    monkeypatch.setattr(memory, "_LIMIT", limit)
    limit.write_text(f"{mappings() + memory._SPARE_MAPPINGS + COPIES // 2}\n")
    said = r"60 shards are too many to map: this system allows a process [\d,]+ mappings \(vm\.max_map_count\), of which [\d,]+ are in use"
    with pytest.raises(UserError, match=said + r".*; prepare with a larger --shard-mib, train with more --train\.shard-groups, or"):
        loader.batches(config(), many, 0, 0, 1)
    opened(many, 3, 0)
    limit.unlink()
    opened(many)
