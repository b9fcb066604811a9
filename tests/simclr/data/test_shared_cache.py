"""A cache that users share, and folders where others may write: nothing of theirs is taken for ours, and nothing of ours is lost."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from simclr import files
from simclr.data.manifest import read_manifest
from simclr.data.s3 import remote
from simclr.data.s3.store import Store
from simclr.data.s3.uri import Address, cache, copy_of, locked
from simclr.errors import UserError
from tests.simclr.data.test_remote import same, silent
from tests.support.s3 import Proxy

OTHER = 65534
PLACE = Address("photos", "some/shards")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user, as root can")


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of copies, which every user of the machine can reach."""
    folder = Path(tempfile.mkdtemp(prefix="simclr-shared-"))
    monkeypatch.setenv("SIMCLR_CACHE", str(folder))
    yield folder
    shutil.rmtree(folder)


@contextlib.contextmanager
def another_user() -> Iterator[None]:
    os.seteuid(OTHER)
    try:
        yield
    finally:
        os.seteuid(0)


@functools.cache
def _store() -> Store:
    return Store()


def fetched(copy: Path | None = None) -> tuple[Path, list[str]]:
    """The copy, after fetching, and what was said."""
    said: list[str] = []
    copy = copy or copy_of(PLACE, "shards")
    remote.fetch(PLACE, copy, silent, _store(), says=said.append)
    return copy, said


def altered(path: Path) -> bytes:
    """Change one byte of the file, and return what it was."""
    whole = path.read_bytes()
    path.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    return whole


# ── A folder for all users ─────────────────────────────────────────────────────────────────────────────────────────


@as_root
def test_each_user_of_a_shared_folder_has_a_copy_that_no_other_can_change(s3: Proxy, patterns: Path, shared: Path) -> None:
    remote.push(patterns, PLACE, silent, _store())
    shared.chmod(0o1777)
    here = copy_of(PLACE, "shards")
    planted = shared / here.relative_to(cache())
    shutil.copytree(patterns, planted)  # the right manifest, and a shard with other pixels, where everybody's copy was
    altered(planted / "train-00000.beton")
    for path in (shared / "shards").rglob("*"):
        os.chown(path, OTHER, -1)
    with another_user():
        theirs, _ = fetched()
    ours, _ = fetched()
    assert ours == here == shared / "uid-0" / planted.relative_to(shared) and theirs.is_relative_to(shared / f"uid-{OTHER}")
    assert same(patterns, ours) and same(patterns, theirs)
    for user, top in ((0, ours), (OTHER, theirs)):
        for folder in (top, *top.parents[: len(top.relative_to(shared).parts) - 1]):
            assert (folder.stat().st_uid, stat.S_IMODE(folder.stat().st_mode)) == (user, 0o700), folder


@as_root
@pytest.mark.parametrize(
    ("mode", "owner", "sentence"),
    [
        (0o777, 0, r"other users may replace what lies in \S+ \(mode 777\); `chmod go-w` it if it is yours alone"),
        (0o775, 0, r"other users may replace what lies in \S+ \(mode 775\)"),
        (0o755, OTHER, rf"\S+ belongs to uid {OTHER}, who could change the copies in it; set SIMCLR_CACHE to"),
        (0o1777, OTHER, rf"belongs to uid {OTHER}"),
    ],
)
def test_a_folder_whose_content_others_can_replace_is_refused(shared: Path, mode: int, owner: int, sentence: str) -> None:
    shared.chmod(mode)
    os.chown(shared, owner, -1)
    with pytest.raises(UserError, match=sentence), locked(copy_of(PLACE, "shards")):
        pass
    assert stat.S_IMODE(shared.stat().st_mode) == mode
    if owner == 0:  # the advice helps
        shared.chmod(mode & ~0o022)
        with locked(copy_of(PLACE, "shards")):
            pass


@as_root
def test_a_folder_of_somebody_elses_within_is_refused_and_an_open_one_is_closed(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = copy_of(PLACE, "shards")
    copy.mkdir(parents=True)
    (shared / "shards").chmod(0o777)  # made by an earlier version under another umask
    with locked(copy):
        assert stat.S_IMODE((shared / "shards").stat().st_mode) == 0o755
    copy.parent.chmod(0o777)
    (copy / "manifest.json").touch()
    os.chown(copy / "manifest.json", OTHER, -1)
    with pytest.raises(UserError, match=rf"manifest.json, in this user's folder of copies, belongs to uid {OTHER}"), locked(copy):
        pass
    assert stat.S_IMODE(copy.parent.stat().st_mode) == 0o777  # else the next command would trust it
    shutil.rmtree(copy.parent)
    copy.mkdir(parents=True)
    os.chown(copy.parent, OTHER, -1)
    with pytest.raises(UserError, match=rf"{copy.parent}, in this user's folder of copies, belongs to uid {OTHER}"), locked(copy):
        pass


def test_the_usual_folder_is_closed_without_a_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """~/.cache/simclr of a user whose umask is 002, and one that is a link to a fast disk."""
    monkeypatch.delenv("SIMCLR_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "fast").mkdir()
    (tmp_path / "fast").chmod(0o775)
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache/simclr").symlink_to(tmp_path / "fast")
    with locked(copy := copy_of(PLACE, "shards")):
        pass
    assert copy.is_relative_to(tmp_path / ".cache/simclr") and stat.S_IMODE((tmp_path / "fast").stat().st_mode) == 0o755


# ── Shards that lie here ───────────────────────────────────────────────────────────────────────────────────────────


@as_root
def test_a_shard_that_somebody_else_owns_is_fetched_again(s3: Proxy, patterns: Path, shared: Path) -> None:
    remote.push(patterns, PLACE, silent, _store())
    copy, _ = fetched()
    shard = copy / "train-00000.beton"
    altered(shard)
    os.chown(shard, OTHER, -1)
    assert fetched() == (copy, []) and same(patterns, copy) and shard.stat().st_uid == 0
    shard.unlink()
    shard.symlink_to(patterns / shard.name)  # what a link points to may be changed elsewhere
    fetched()
    assert not shard.is_symlink() and same(patterns, copy)
    local = copy / "manifest.json"  # a manifest of somebody else's vouches for nothing
    altered(shard)
    os.chown(local, OTHER, -1)
    assert fetched()[1] == [f"hashing 2 shards of {copy} first ({_mib(copy)} MiB), since no manifest says that they are whole"]
    assert same(patterns, copy) and local.stat().st_uid == 0


def test_shards_that_others_may_have_written_are_hashed_once(s3: Proxy, patterns: Path, shared: Path) -> None:
    remote.push(patterns, PLACE, silent, _store())
    copy, _ = fetched()
    assert fetched()[1] == []
    for shard in copy.glob("*.beton"):
        shard.chmod(0o664)
    altered(copy / "train-00000.beton")
    assert fetched()[1] == [f"hashing 2 shards of {copy} first ({_mib(copy)} MiB), since others can have written them"]
    assert same(patterns, copy)
    assert fetched()[1] == []  # from now on nobody can
    assert not [shard for shard in copy.glob("*.beton") if shard.stat().st_mode & 0o022]


def test_on_a_disk_that_gives_all_users_one_owner_shards_are_hashed_each_time(
    s3: Proxy, patterns: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As NFS does where it squashes: here another owner stands for ours, as no such disk can be had in a test."""
    remote.push(patterns, PLACE, silent, _store())
    copy, _ = fetched()
    owner, user = shared.stat().st_uid, os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    monkeypatch.setattr(files, "_owner_on", lambda folder: owner)
    monkeypatch.setattr(files, "only_own", lambda found: found.st_uid == user + 1)
    altered(copy / "train-00000.beton")
    for _ in range(2):
        assert len(fetched()[1]) == 1 and same(patterns, copy)


def test_a_download_that_somebody_else_began_is_not_gone_on_with(s3: Proxy, tmp_path: Path) -> None:
    """Its log claims parts that are not there; the object has no checksum of ours, so nothing but the owner tells."""
    store = Store(part_bytes=1 << 10, threads=2)
    store.client.put_object(Bucket="photos", Key="images.tar", Body=bytes(range(256)) * 16)
    found = store.look(Address("photos", "images.tar"))
    partial, log = tmp_path / ".images.tar.partial", tmp_path / ".images.tar.parts"
    victim = tmp_path / "victim"
    victim.write_text("precious")
    partial.symlink_to(victim)
    log.write_text(f'["\\"{found.etag.strip(chr(34))}\\"", 4096, 1024]\n0\n1\n2\n3\n')
    store.download(Address("photos", "images.tar"), tmp_path / "images.tar")
    assert (tmp_path / "images.tar").read_bytes() == bytes(range(256)) * 16 and victim.read_text() == "precious"


@as_root
def test_parts_of_another_users_count_for_nothing(s3: Proxy, tmp_path: Path) -> None:
    store = Store(part_bytes=1 << 10, threads=2)
    store.client.put_object(Bucket="photos", Key="images.tar", Body=bytes(range(256)) * 16)
    found = store.look(Address("photos", "images.tar"))
    partial, log = tmp_path / ".images.tar.partial", tmp_path / ".images.tar.parts"
    partial.write_bytes(bytes(4096))
    log.write_text(f'["\\"{found.etag.strip(chr(34))}\\"", 4096, 1024]\n0\n1\n2\n3\n')
    for path in (partial, log):
        os.chown(path, OTHER, -1)
    store.download(Address("photos", "images.tar"), tmp_path / "images.tar")
    assert (tmp_path / "images.tar").read_bytes() == bytes(range(256)) * 16


def _mib(copy: Path) -> str:
    return f"{sum(shard.bytes for shard in read_manifest(copy).shards) / 2**20:,.0f}"
