"""The quota of a node's copies: what nobody uses goes, what is in use stays, and nothing is ever taken by half."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from simclr.data.manifest import read_manifest
from simclr.data.s3 import pins, quota, remote, uri
from simclr.data.s3.store import Store
from simclr.data.s3.uri import Address, copy_of
from simclr.data.verify import damaged
from simclr.errors import UserError
from tests.simclr.data.test_remote import same, silent
from tests.support.s3 import Proxy

OLD, NEW, THIRD = (Address("photos", name) for name in ("sets/old", "sets/new", "sets/third"))
RUN = "s3://lab/runs/one"


@pytest.fixture
def size(s3: Proxy, patterns: Path) -> int:
    """Bytes of each of three datasets in S3."""
    store = _store()
    for place in (OLD, NEW, THIRD):
        remote.push(patterns, place, silent, store)
    return sum(shard.bytes for shard in read_manifest(patterns).shards)


@functools.cache
def _store() -> Store:
    return Store()


def allow(size: float, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("SIMCLR_CACHE_GIB", f"{size / 2**30:.12f}")


def fetched(place: Address, last_used: float | None = None, store: Store | None = None) -> list[str]:
    """What was said. The copy is there then, and no process uses it."""
    said: list[str] = []
    copy = copy_of(place, "shards")
    remote.fetch(place, copy, silent, store or _store(), says=said.append)
    if last_used is not None:
        os.utime(copy / "manifest.json", (last_used, last_used))
    return said


def here(place: Address) -> bool:
    copy = copy_of(place, "shards")
    return copy.exists() and damaged(copy) == []


def process(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


@contextlib.contextmanager
def used(place: Address) -> Iterator[subprocess.Popen[str]]:
    """A process of a run that uses the dataset."""
    copy = str(copy_of(place, "shards"))
    code = f"import pathlib, time; from simclr.data.s3 import pins; pins.hold(pathlib.Path({copy!r}), {str(place)!r}, {RUN!r});"
    found = process(f"{code} print('held', flush=True); time.sleep(600)")
    assert found.stdout is not None and found.stdout.readline() == "held\n"
    try:
        yield found
    finally:
        found.kill()
        found.communicate()


def test_the_dataset_that_nobody_uses_goes(size: int, patterns: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allow(size / 0.6, monkeypatch)
    assert fetched(OLD, last_used=1e9) == []
    (said,) = fetched(NEW)
    assert f"evicted from {uri.cache()}, to make room for the shards of {NEW}: {copy_of(OLD, 'shards')} (" in said
    assert "last used on 09 September 2001" in said
    assert not copy_of(OLD, "shards").exists() and same(patterns, copy_of(NEW, "shards"))
    assert fetched(NEW) == []  # nothing is needed: nothing goes


def test_the_least_recently_used_goes_first_and_no_more_than_is_needed(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    allow(2.5 * size, monkeypatch)
    fetched(OLD, last_used=1e9)
    fetched(NEW, last_used=2e9)
    pins.hold(copy_of(THIRD, "shards"), THIRD, RUN)  # it is not there yet: that is no use of another
    with pins.all_locked(copy_of(OLD, "shards")):
        pins._touch(copy_of(OLD, "shards"), str(OLD))  # used now: so NEW is the one that was used longer ago
    os.utime(copy_of(NEW, "shards") / "manifest.json", (1.5e9, 1.5e9))
    assert str(copy_of(NEW, "shards")) in fetched(THIRD)[0]
    assert here(OLD) and here(THIRD) and not copy_of(NEW, "shards").exists()


def test_a_dataset_in_use_stays_and_its_run_is_named(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    allow(size / 0.6, monkeypatch)
    fetched(OLD)
    with used(OLD) as reader, pytest.raises(UserError) as refused:
        fetched(NEW)
    sentence = str(refused.value)
    assert f"{OLD} (" in sentence and f"is in use by {RUN} (pid {reader.pid} on {os.uname().nodename}, since " in sentence
    assert "SIMCLR_CACHE_GIB" in sentence and "wait for it, or end it" in sentence and f"for the shards of {NEW}" in sentence
    assert here(OLD)
    # It was killed: its pin has ended with it.
    assert "evicted" in fetched(NEW)[0] and here(NEW) and not copy_of(OLD, "shards").exists()
    assert not list(copy_of(OLD, "shards").parent.glob("*.pin-*"))


def test_a_pin_is_seen_whatever_the_dataset_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIMCLR_CACHE", str(tmp_path / "cache"))
    for name in ("data[1]", "a?b*", "plain"):
        place = Address("photos", f"sets/{name}")
        copy = copy_of(place, "shards")
        uri.own(copy)
        copy.mkdir()
        with used(place):
            assert [pin.by for pin in pins.pins(copy)] == [RUN], name


def test_room_is_left_for_what_another_process_fetches(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    allow(size / 0.6, monkeypatch)
    coming = copy_of(OLD, "shards")
    pins.hold(coming, OLD, RUN)
    coming.mkdir()
    quota.make_room(coming, size, "for its shards")
    with pytest.raises(UserError, match=rf"{OLD} \(\d MiB\) is in use by {RUN}"):
        fetched(NEW)


def test_nothing_goes_for_what_would_not_fit_all_the_same(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor for what a manifest only claims."""
    fetched(OLD)
    allow(0.9 * size, monkeypatch)
    with pytest.raises(UserError, match=r"no room left in \S+: it may have \d MiB \(SIMCLR_CACHE_GIB\)"):
        fetched(NEW)
    assert here(OLD)
    allow(1.5 * size, monkeypatch)
    odd = copy_of(THIRD, "shards").parent / "short"
    odd.parent.mkdir(parents=True)
    odd.write_bytes(b"short")
    _store().upload(odd, NEW / "train-00000.beton")
    with pytest.raises(UserError, match=f"{NEW}/train-00000.beton has 5 bytes, expected"):
        fetched(NEW, store=Store())  # it ends with the first that fails
    assert here(OLD)


def test_a_kill_in_the_middle_of_an_eviction_leaves_no_half_dataset(size: int, patterns: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allow(size / 0.6, monkeypatch)
    fetched(OLD)
    old = copy_of(OLD, "shards")
    killed = process(
        "import os, pathlib, signal; from simclr.data.s3 import quota\n"
        "def half(folder, **how):\n"
        "    next(pathlib.Path(folder).glob('train-*.beton')).unlink()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "quota.shutil.rmtree = half\n"
        f"quota.make_room(pathlib.Path({str(copy_of(NEW, 'shards'))!r}), {size}, 'for a test')\n"
    )
    assert killed.wait(timeout=60) == -signal.SIGKILL
    (rest,) = old.parent.glob(f"{pins.GONE}*")
    assert not old.exists() and (rest / "manifest.json").exists() and not (rest / "train-00000.beton").exists()
    fetched(NEW)
    assert here(NEW) and not rest.exists() and not old.exists()  # the next start has removed the rest
    fetched(OLD)
    assert same(patterns, old)


def test_several_that_need_room_at_once_do_not_fight(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    allow(2.5 * size, monkeypatch)
    fetched(OLD)
    said: list[str] = []

    def fetch(place: Address) -> None:
        pins.hold(copy_of(place, "shards"), place, RUN)
        said.extend(fetched(place))

    both = [threading.Thread(target=fetch, args=(place,)) for place in (NEW, THIRD)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert here(NEW) and here(THIRD) and not copy_of(OLD, "shards").exists() and len(said) == 1


def test_a_full_disk_ends_no_job_whose_neighbours_dataset_can_go(
    size: int, patterns: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real file system of 1.6 datasets, if the machine lets us mount it, and no quota that would tell earlier."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(1.6 * size)}", "tmpfs", str(tmp_path)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a file system here")
    try:
        monkeypatch.setenv("SIMCLR_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("SIMCLR_CACHE_GIB", "1000")
        fetched(OLD)
        fetched(NEW)
        assert same(patterns, copy_of(NEW, "shards")) and not copy_of(OLD, "shards").exists()
        with used(NEW), pytest.raises(UserError, match=rf"no space left on the disk of \S+: \d MiB free, .* in use by {RUN}"):
            fetched(OLD)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_quota_that_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("0", "-1", "much", "1e3", "nan", "inf", "9" * 400):
        monkeypatch.setenv("SIMCLR_CACHE_GIB", text)
        with pytest.raises(UserError, match=r"\$SIMCLR_CACHE_GIB is .*; expected a number of GiB above 0, as 500"):
            quota.limit(tmp_path)
    for text, found in (("500", 500 << 30), ("0.5", 1 << 29), (".5", 1 << 29), ("", int(0.8 * shutil.disk_usage(tmp_path).total))):
        monkeypatch.setenv("SIMCLR_CACHE_GIB", text)
        assert quota.limit(tmp_path) == found


def test_no_link_is_followed_and_no_run_goes(size: int, patterns: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched(OLD, last_used=1e9)
    old, run = copy_of(OLD, "shards"), copy_of(Address("lab", "runs/one"), "runs")
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "state").write_bytes(bytes(1000))
    outside = tmp_path / "mine"
    outside.mkdir()
    (outside / "large.beton").write_bytes(bytes(size))
    linked = old.parent.with_name("0" * 16)
    linked.mkdir()
    (linked / "set").symlink_to(outside)
    (old / "further").symlink_to(outside)
    allow(1.5 * size, monkeypatch)
    assert "evicted" in fetched(NEW)[0]
    assert not old.exists() and (outside / "large.beton").exists() and (linked / "set").is_symlink()
    assert (run / "checkpoints" / "state").exists()


def test_features_go_as_shards_do(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, file = (copy_of(Address("photos", name), "features") for name in ("features", "all.parquet"))
    for path in (parts / "part-00000.parquet", file):
        path.parent.mkdir(parents=True)
        path.write_bytes(bytes(size // 2))
    with pins.all_locked(file):
        pins._touch(file, "s3://photos/all.parquet")
    os.utime(parts, (1e9, 1e9))
    allow(1.6 * size, monkeypatch)
    assert str(parts) in fetched(NEW)[0] and not parts.exists() and file.exists()
    allow(1.2 * size, monkeypatch)
    pins.hold(copy_of(NEW, "shards"), NEW, RUN)
    said: list[str] = []
    quota.make_room(parts, size // 8, "for a test", said.append)
    assert "s3://photos/all.parquet" in said[0] and not file.exists() and here(NEW)
