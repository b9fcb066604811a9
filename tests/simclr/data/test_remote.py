"""Shards in S3: sent and fetched whole or not at all, once per machine, over a network that fails."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from simclr.data import shards
from simclr.data.manifest import read_manifest
from simclr.data.s3 import remote
from simclr.data.s3.store import Store
from simclr.data.s3.uri import Address
from simclr.data.sources.open import open_source
from simclr.data.verify import damaged
from simclr.errors import UserError
from tests.support.s3 import Proxy

PLACE = Address("photos", "some/shards")


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards of about a MiB."""
    out = tmp_path_factory.mktemp("several") / "shards"
    shards.prepare(open_source("patterns:train=900,test=60,size=32"), out, shards.Options(shard_mib=1), 2, lambda done: None)
    assert len(read_manifest(out).shards) >= 3
    return out


def quick() -> Store:
    return Store(attempts=16, pause_s=0, answer_s=5, part_bytes=256 << 10, threads=4)


def silent(done: int, total: int) -> None: ...


def same(one: Path, other: Path) -> bool:
    names = [p.name for p in one.iterdir()]
    return all((one / n).read_bytes() == (other / n).read_bytes() for n in names) and sorted(names) == sorted(
        p.name for p in other.iterdir()
    )


def gets(s3: Proxy) -> list[str]:
    """Names of the objects whose bytes were requested, each once."""
    return sorted({path.rpartition("/")[2] for method, path, _ in s3.log if method == "GET" and "list-type" not in path})


def test_shards_go_up_and_come_down_over_a_bad_network(s3: Proxy, several: Path, tmp_path: Path) -> None:
    s3.rate, s3.kinds = 0.2, ("500", "503", "reset before", "reset in body", "truncated")
    sent: list[tuple[int, int]] = []
    remote.push(several, PLACE, lambda done, total: sent.append((done, total)), quick())
    got: list[tuple[int, int]] = []
    remote.fetch(PLACE, tmp_path / "copy", lambda done, total: got.append((done, total)), quick())
    assert same(several, tmp_path / "copy") and damaged(tmp_path / "copy") == []
    total = sum(shard.bytes for shard in read_manifest(several).shards)
    assert sent[-1] == got[-1] == (total, total)
    # The manifest is the last object that was written, and it is written when every shard is there.
    sent_to = [
        path for method, path, _ in s3.log if method in ("PUT", "POST") and PLACE.key in path
    ]  # a lease of another test may end late
    written = [path.rpartition("/")[2].partition("?")[0] for path in sent_to]
    assert "manifest.json" in written and set(written[written.index("manifest.json") :]) == {"manifest.json"}


def test_shards_that_are_there_are_neither_sent_nor_fetched_again(s3: Proxy, several: Path, tmp_path: Path) -> None:
    remote.push(several, PLACE, silent, quick())
    s3.quiet()
    remote.push(several, PLACE, silent, quick())
    assert not [method for method, _, _ in s3.log if method in ("PUT", "POST")]
    copy = tmp_path / "copy"
    remote.fetch(PLACE, copy, silent, quick())
    s3.quiet()
    remote.fetch(PLACE, copy, silent, quick())
    assert gets(s3) == ["manifest.json"]

    first, *_, last = read_manifest(copy).shards
    (copy / first.name).unlink()
    remote.fetch(PLACE, copy, silent, quick())
    assert gets(s3) == ["manifest.json", first.name] and same(several, copy)

    # An interrupted fetch has no manifest yet: the hash reveals a shard of the right size with other bytes.
    s3.quiet()
    (copy / "manifest.json").unlink()
    damaged = bytearray((copy / last.name).read_bytes())
    damaged[100] ^= 1
    (copy / last.name).write_bytes(damaged)
    (copy / "old-000.beton").write_bytes(b"of other data")
    remote.fetch(PLACE, copy, silent, quick())
    assert gets(s3) == ["manifest.json", last.name] and same(several, copy)


def test_a_fetch_that_fails_leaves_no_manifest_and_goes_on(s3: Proxy, several: Path, tmp_path: Path) -> None:
    remote.push(several, PLACE, silent, quick())
    s3.quiet()
    s3.cut_after = 9
    copy = tmp_path / "copy"
    with pytest.raises(UserError, match=r"s3://photos/some/shards/\S+ failed 2 times"):
        remote.fetch(PLACE, copy, silent, Store(attempts=2, pause_s=0, part_bytes=256 << 10, threads=2))
    with pytest.raises(UserError, match="no manifest"):
        read_manifest(copy)
    s3.quiet()
    remote.fetch(PLACE, copy, silent, quick())
    assert same(several, copy)
    asked = sum(1 for _, _, part in s3.log if part)
    assert 0 < asked < sum(-(-shard.bytes // (256 << 10)) for shard in read_manifest(several).shards)


def test_two_at_once_fetch_once(s3: Proxy, several: Path, tmp_path: Path) -> None:
    remote.push(several, PLACE, silent, quick())
    s3.quiet()
    fetching = [threading.Thread(target=remote.fetch, args=(PLACE, tmp_path / "copy", silent, quick())) for _ in range(3)]
    for thread in fetching:
        thread.start()
    for thread in fetching:
        thread.join()
    assert same(several, tmp_path / "copy")
    ranges = [(path, part) for _, path, part in s3.log if part]
    assert len(ranges) == len(set(ranges))


def test_other_shards_replace_the_copy(s3: Proxy, several: Path, patterns: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for made in (several, patterns):
        remote.push(made, PLACE, silent, quick())
        remote.fetch(PLACE, copy, silent, quick())
        assert same(made, copy)


def test_a_place_without_a_dataset_is_a_user_error(s3: Proxy, several: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there are no shards at s3://photos/none \(no manifest.json\); `simclr prepare --source"):
        remote.fetch(Address("photos", "none"), tmp_path / "copy", silent, quick())
    with pytest.raises(UserError, match="there is no bucket nowhere"):
        remote.fetch(Address("nowhere"), tmp_path / "copy", silent, quick())
    assert not (tmp_path / "copy").exists()
    text = json.loads((several / "manifest.json").read_text())
    for change, sentence in (({"schema": 99}, "schema 99"), ({"splits": {"train": [_shard("../../evil")]}}, "no file name")):
        odd = tmp_path / "manifest.json"
        odd.write_text(json.dumps(text | change))
        quick().upload(odd, Address("photos", "odd/manifest.json"))
        with pytest.raises(UserError, match=sentence):
            remote.fetch(Address("photos", "odd"), tmp_path / "copy", silent, quick())
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in several.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    name = read_manifest(broken).shards[0].name
    (broken / name).write_bytes(bytes((broken / name).stat().st_size))
    with pytest.raises(UserError, match="does not match its sha256"):
        remote.push(broken, Address("photos", "broken"), silent, quick())
    assert not [o for o in quick().listing(Address("photos", "broken")) if o.name == "manifest.json"]


def _shard(name: str) -> dict[str, object]:
    return {"name": name, "bytes": 1, "sha256": "0", "samples": 1}


def test_a_node_fetches_its_own_groups_shards(s3: Proxy, several: Path, tmp_path: Path) -> None:
    remote.push(several, PLACE, silent, quick())
    manifest = read_manifest(several)
    for group in (0, 1):
        s3.log.clear()
        copy = tmp_path / str(group)
        remote.fetch(PLACE, copy, silent, quick(), 2, group)
        expected = {shard.name for shard in manifest.part(2, group)}
        assert {p.name for p in copy.glob("*.beton")} == expected and expected >= {s.name for s in manifest.splits["test"]}
        assert set(gets(s3)) - {"manifest.json"} == expected
        assert read_manifest(copy, groups=2, group=group) == manifest
    remote.fetch(PLACE, tmp_path / "0", silent, quick(), 2, 1)  # a node with workers of both groups: its shards stay
    assert damaged(tmp_path / "0") == []


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other shards than `several`, of the same names and sizes."""
    out = tmp_path_factory.mktemp("other") / "shards"
    shards.prepare(open_source("patterns:train=900,test=60,size=32,seed=1"), out, shards.Options(shard_mib=1), 2, lambda done: None)
    return out


def test_shards_of_other_data_are_never_taken_for_a_groups(s3: Proxy, several: Path, other: Path, tmp_path: Path) -> None:
    """A node with workers of both groups, and other data at the address since."""
    remote.push(several, PLACE, silent, store := quick())
    copy = tmp_path / "copy"
    for group in (0, 1):
        remote.fetch(PLACE, copy, silent, store, 2, group)
    remote.push(other, PLACE, silent, store)
    assert [shard.bytes for shard in read_manifest(other).shards] == [shard.bytes for shard in read_manifest(several).shards]
    for group in (0, 1):
        remote.fetch(PLACE, copy, silent, store, 2, group)
    assert damaged(copy) == [] and same(other, copy)


def test_a_process_that_reads_no_shard_gets_the_manifest_alone(s3: Proxy, several: Path, other: Path, tmp_path: Path) -> None:
    remote.push(several, PLACE, silent, store := quick())
    copy = tmp_path / "copy"
    s3.quiet()
    assert remote.fetch_manifest(PLACE, copy, store) == read_manifest(several)
    assert gets(s3) == ["manifest.json"] and [path.name for path in copy.iterdir()] == ["manifest.json"]
    remote.fetch(PLACE, copy, silent, store)
    assert same(several, copy)
    s3.quiet()
    remote.fetch_manifest(PLACE, copy, store)  # whole shards stay
    remote.fetch(PLACE, copy, silent, store)
    assert gets(s3) == ["manifest.json"]
    remote.push(other, PLACE, silent, store)
    first = read_manifest(other).shards[0].name
    (copy / first).write_bytes((other / first).read_bytes())  # by chance one is right already
    s3.quiet()
    assert remote.fetch_manifest(PLACE, copy, store) == read_manifest(other)
    said: list[str] = []
    remote.fetch(PLACE, copy, silent, store, says=said.append)  # the manifest alone says nothing of shards that lie beside it
    assert same(other, copy) and first not in gets(s3) and "hashing 5 shards" in said[0].replace(str(len(read_manifest(other).shards)), "5")
    with pytest.raises(UserError, match=r"there are no shards at s3://photos/none \(no manifest.json\)"):
        remote.fetch_manifest(Address("photos", "none"), tmp_path / "none", store)
