"""Labels of shards in S3, from their tables alone."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest

from simclr.data import loader
from simclr.data.ffcv.reader import HEAD_BYTES
from simclr.data.manifest import read_manifest
from simclr.data.s3 import remote, tables
from simclr.data.s3.answers import Damaged
from simclr.data.s3.store import Progress, Store
from simclr.data.s3.uri import Address
from tests.simclr.data.test_remote import quick, silent
from tests.support.s3 import Proxy

PLACE = Address("photos", "tables/shards")


def fetched_bytes(s3: Proxy) -> int:
    ranges = [re.fullmatch(r"bytes=(\d+)-(\d+)", part) for method, path, part in s3.log if method == "GET" and ".beton" in path]
    return sum(int(found[2]) + 1 - int(found[1]) for found in ranges if found is not None)  # a GET without a range is none of these


@pytest.mark.parametrize("which", ["patterns", "photographs"])
def test_labels_are_those_of_the_shards_and_no_picture_is_fetched(s3: Proxy, which: str, request: pytest.FixtureRequest) -> None:
    data: Path = request.getfixturevalue(which)
    remote.push(data, PLACE, silent, store := Store())
    manifest = read_manifest(data)
    s3.quiet()
    for split in manifest.splits:
        found = tables.labels(PLACE, manifest, split, store)
        assert found.dtype == np.int64 and np.array_equal(found, loader.labels(data, split))
    assert all(part for method, path, part in s3.log if method == "GET")
    samples = sum(shard.samples for shard in manifest.shards)
    assert 0 < fetched_bytes(s3) <= 2 * (len(manifest.shards) * 4096 + samples * (tables.SAMPLE_BYTES + 24))


class Noisy(Store):
    """The second time that the rows of samples come, a label of 4 has become a 5: nothing in the tables contradicts that."""

    times = 0

    def fetch_part(self, place: Address, etag: str, begin: int, end: int, file: int, progress: Progress) -> None:
        super().fetch_part(place, etag, begin, end, file, progress)
        self.times += begin == 0
        if begin == 0 and self.times == 2:
            labels = np.frombuffer(os.pread(file, end, 0)[HEAD_BYTES:], np.int64)[2::3]  # of rows of 24 bytes
            os.pwrite(file, b"\5", HEAD_BYTES + 24 * int(np.flatnonzero(labels == 4)[0]) + 16)


def test_bytes_that_change_on_their_way_are_fetched_again(s3: Proxy, patterns: Path) -> None:
    store = Noisy(pause_s=0)
    remote.push(patterns, PLACE, silent, store)
    manifest, expected = read_manifest(patterns), loader.labels(patterns)
    assert np.array_equal(tables.labels(PLACE, manifest, "train", store), expected) and store.times == 4
    s3.rate, s3.kinds = 0.3, ("flipped", "reset in body", "truncated")
    assert np.array_equal(tables.labels(PLACE, manifest, "train", quick()), expected)


def test_tables_that_contradict_the_manifest_are_a_sentence(s3: Proxy, patterns: Path, tmp_path: Path) -> None:
    remote.push(patterns, PLACE, silent, store := quick())
    manifest = read_manifest(patterns)
    (shard,) = manifest.splits["train"]
    broken = bytearray((patterns / shard.name).read_bytes())
    broken[8:16] = (1 << 40).to_bytes(8, "little")  # the number of samples
    (tmp_path / shard.name).write_bytes(broken)
    store.upload(tmp_path / shard.name, PLACE / shard.name)
    with pytest.raises(Damaged, match=f"the tables of {PLACE / shard.name} failed 16 times, the last time with: shard {PLACE}"):
        tables.labels(PLACE, manifest, "train", store)
