"""Names by the million: their order, their hashes and their memory; and listings of S3 that are cut into ranges."""

from __future__ import annotations

import gc
import hashlib
import os
import pickle
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from simclr.data.s3.listing import Disordered
from simclr.data.s3.store import Store
from simclr.data.s3.uri import Address
from simclr.data.sources import layout, names
from simclr.data.sources.folder import folder_tree, walk
from simclr.data.sources.names import Kept, Packed, Sorted
from simclr.data.sources.reading import Reading
from simclr.data.sources.s3 import s3_prefix
from simclr.errors import UserError
from tests.support.bucket import Bucket, store_of
from tests.support.s3 import Proxy

PLACE = Address("photos", "pets")
# S3 sorts whole keys, where - and . stand before /; a source sorts by the parts of a path.
FOLDERS = ("a", "a-1", "a.b", "a/b", "ab", "train/cat", "train/cat-2", "train/dog", "val/é", "日本")


def keys(each: int = 37) -> dict[str, tuple[int, str]]:
    """Pictures, a marker of each folder, texts, a file server's thumbnails, and objects beside the prefix."""
    found = {f"pets/{folder}/{i:03}.jpg": (9, f'"{folder} {i}"') for folder in FOLDERS for i in range(each)}
    found |= {f"pets/{folder}/": (0, '"marker"') for folder in FOLDERS}
    found |= {"pets/": (0, '"marker"'), "pets-2/other.jpg": (9, '"other"'), "pets/.x/1.jpg": (9, '"x"'), "pets/@eaDir/1.jpg": (9, '"y"')}
    return found | {"pets/z.txt": (3, '"text"'), "pets/a/README": (3, '"none"'), "pets/big.jpg": (2 << 30, '"big"')}


def hashed(parts: list[str]) -> str:
    return hashlib.sha256(b"".join(os.fsencode(part) + b"\0" for part in parts)).hexdigest()[:16]


def in_order(listed: list[str]) -> list[str]:
    return sorted(listed, key=lambda name: name.split("/"))


def named(tree: object) -> list[str]:
    return [name for part in tree.parts for name in part.names]  # type: ignore[attr-defined]


def test_names_and_hashes_of_a_folder_are_those_of_its_sorted_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The formulas are those that manifests of November were written by."""
    monkeypatch.setattr("simclr.data.sources.folder.PART_IMAGES", 16)
    paths = [f"{folder}/{i}.jpg" for folder in FOLDERS for i in range(5)] + [os.fsdecode(b"a/\xff.jpg")]
    for at, path in enumerate(paths):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"x" * at)
        os.utime(tmp_path / path, ns=(at, at + 10**9))
    (tmp_path / "gone.jpg").symlink_to("nowhere")
    (tmp_path / "notes.txt").write_text("")
    tree = folder_tree(tmp_path, walk(tmp_path))
    expected = in_order([*paths, "gone.jpg"])
    assert named(tree) == expected and [len(part.names) for part in tree.parts] == [16, 16, 16, 4]
    sizes = {path: at for at, path in enumerate(paths)} | {"gone.jpg": -1}
    assert tree.identity == hashed([f"{name} {sizes[name]}" for name in expected])
    assert tree.times == hashed([str(sizes[name] + 10**9 if name != "gone.jpg" else 0) for name in expected])
    assert tree.ignored == {".txt": 1} and list(tree.texts) == ["notes.txt"]


@pytest.mark.parametrize("obeys_start", [True, False])
@pytest.mark.parametrize("run", [50, 1 << 16])
def test_a_prefix_listed_side_by_side_is_the_one_listed_page_by_page(run: int, obeys_start: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the names fit the memory at once or wait in a file, and also where a server does not begin behind a key."""
    monkeypatch.setattr(names, "_RUN", run)
    monkeypatch.setattr(names, "_IN_MEMORY_BYTES", 500)
    given = keys()
    bucket = Bucket(given, obeys_start=obeys_start)
    tree = s3_prefix(PLACE, store_of(bucket))
    expected = in_order([f"{folder}/{i:03}.jpg" for folder in FOLDERS for i in range(37)])
    assert named(tree) == expected
    assert tree.identity == hashed([f"{name} {given[f'pets/{name}'][1]}" for name in expected]) and tree.times == ""
    assert list(tree.ignored.items()) == [("none", 1), (".txt", 1)] and list(tree.junk.items()) == [(".x", 1), ("@eaDir", 1)]
    assert tree.notes == ("s3://photos/pets/big.jpg has 2,048 MiB, too much for a picture in memory, and was left out",)
    starts = {asked["StartAfter"] for asked in bucket.asked if "StartAfter" in asked}
    assert len(starts) >= len(FOLDERS) or not obeys_start  # more ranges than threads
    alone = s3_prefix(PLACE, store_of(Bucket(given, page=1000)))
    assert (alone.identity, named(alone)) == (tree.identity, expected)


def test_ranges_give_each_object_once() -> None:
    store = store_of(Bucket(keys()))
    found = [listed.name for listed in store.listed_side_by_side(PLACE, 10**6)]
    assert sorted(found) == [listed.name for listed in store.listing(PLACE)] and len(found) > 370


def test_ranges_of_a_real_endpoint_give_each_object_once(s3: Proxy) -> None:
    """moto's server, asked for pages of seven keys."""
    store, place = Store(threads=4, pause_s=0), Address("photos", "ranges")
    listed = [f"{folder}/{i}.jpg" for folder in FOLDERS[:8] for i in range(6)]
    for name in (*listed, "", "a/"):
        store.client.put_object(Bucket="photos", Key=f"ranges/{name}", Body=b"x")
    whole = store.client.list_objects_v2
    store.client.list_objects_v2 = lambda **asked: whole(MaxKeys=7, **asked)
    s3.log.clear()
    assert sorted(found.name for found in store.listed_side_by_side(place, 10**6)) == sorted(listed)
    assert len([path for _, path, _ in s3.log if "start-after" in path]) >= 8


def test_a_short_listing_is_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = Bucket({f"pets/{c}/{i}.jpg": (1, "x") for c in "ab" for i in range(4)})
    assert len(named(s3_prefix(PLACE, store_of(bucket)))) == 8
    assert len(bucket.asked) == 1


def test_a_flat_listing_has_no_place_to_be_cut_at() -> None:
    bucket = Bucket({f"pets/{i:03}.jpg": (1, "x") for i in range(95)})
    assert len(named(s3_prefix(PLACE, store_of(bucket)))) == 95
    assert len(bucket.asked) == 11  # ten pages, and one look for folders


def test_pages_of_ranges_are_bounded_and_must_ascend() -> None:
    store = store_of(Bucket(keys()))
    with pytest.raises(UserError, match="s3://photos/pets holds more than 100 objects, which is no such directory"):
        list(store.listed_side_by_side(PLACE, 100))
    again = Bucket(keys())
    whole = again.list_objects_v2
    again.list_objects_v2 = lambda **asked: whole(**{k: v for k, v in asked.items() if k != "ContinuationToken"})  # type: ignore[method-assign]
    with pytest.raises(Disordered):
        list(store_of(again).listed_side_by_side(PLACE, 10**6))
    with pytest.raises(UserError, match="does not end: the server repeats itself"):
        s3_prefix(PLACE, store_of(again))


def test_of_records_with_one_name_the_last_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "_RUN", 7)
    chance, sorted_, last = random.Random(0), Sorted(), {}
    for number in range(200):
        name = f"{chance.choice('ab-')}/{chance.choice('xyz')}{chance.randrange(9)}"
        last[name] = str(number)
        sorted_.add((name, str(number), ""))
    assert list(sorted_) == [(name, last[name], "") for name in in_order(list(last))]


def test_packed_names_are_a_tuple_of_names() -> None:
    given = ("a/1.jpg", os.fsdecode(b"\xff/\x80.jpg"), "日本/é\n.jpg", 'b"\\.jpg')
    kept = Kept(in_memory_bytes=100)
    for packed in (Packed(given), *(Packed(given, kept) for _ in range(3))):
        assert packed == given and given == packed and tuple(packed) == given and hash(packed) == hash(given) and packed != given[:2]
        assert (len(packed), packed[1], packed[-1], packed[1:3], "b" in packed) == (4, given[1], given[3], given[1:3], False)
        assert pickle.loads(pickle.dumps(packed)) == given
    assert kept.file is not None


def test_names_do_not_stay_in_memory_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither while they are understood nor behind it: Python has far fewer objects than there are names."""
    monkeypatch.setattr(names, "_RUN", 1024)
    count = 12_000
    bucket = Bucket({f"pets/train/n{i // 1000:05}/n{i:07}.jpg": (1, f'"{i:032}"') for i in range(count)}, page=1000)
    store, seen = store_of(bucket), []

    def judged(*given: object, judge: Callable[..., object] = layout._judged) -> object:
        seen.append(sys.getallocatedblocks())
        return judge(*given)

    monkeypatch.setattr(layout, "_judged", judged)
    gc.collect()
    before = sys.getallocatedblocks()
    source, _ = layout.understand(s3_prefix(PLACE, store), Reading())
    gc.collect()
    seen.append(sys.getallocatedblocks())
    assert source.total == count and len(seen) == 2
    assert max(seen) - before < 0.2 * count, seen
