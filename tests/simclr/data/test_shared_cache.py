"""A cache that users share, and folders where others may write: nothing of theirs is taken for ours, and nothing of ours is lost."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import stat
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from simclr import files
from simclr.data.manifest import read_manifest
from simclr.data.s3 import hashed, remote
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
    home = Path(tempfile.mkdtemp(prefix="simclr-home-"))
    monkeypatch.setenv("HOME", str(home))
    yield folder
    shutil.rmtree(home)
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
        (0o777, 0, r"other users may replace what lies in \S+ \(mode 777\), and \S+/theirs is not yours; `chmod \+t` it"),
        (0o2775, 0, r"other users may replace what lies in \S+ \(mode 2775\)"),
        (0o755, OTHER, rf"\S+ belongs to uid {OTHER}, who could change the copies in it; set SIMCLR_CACHE to"),
        (0o1777, OTHER, rf"belongs to uid {OTHER}"),
    ],
)
def test_a_folder_whose_content_others_can_replace_is_refused(shared: Path, mode: int, owner: int, sentence: str) -> None:
    os.chown(shared, owner, -1)
    shared.chmod(mode)
    (shared / "theirs").touch()
    os.chown(shared / "theirs", OTHER, -1)
    with pytest.raises(UserError, match=sentence), locked(copy_of(PLACE, "shards")):
        pass
    assert stat.S_IMODE(shared.stat().st_mode) == mode
    if owner == 0:  # the advice helps
        shared.chmod(mode | stat.S_ISVTX)
        with locked(copy_of(PLACE, "shards")):
            pass


@as_root
def test_a_folder_of_roots_that_all_may_write_is_not_this_users_to_close(shared: Path) -> None:
    shared.chmod(0o777)
    sentence = r"other users may replace what lies in \S+ \(mode 777\), which is root's; set SIMCLR_CACHE to a folder of your own"
    with another_user(), pytest.raises(UserError, match=sentence), locked(copy_of(PLACE, "shards")):
        pass


@pytest.mark.parametrize("mode", [0o775, 0o2775, 0o777])
def test_a_folder_that_is_this_users_alone_is_closed_with_a_word(shared: Path, mode: int) -> None:
    """As `mkdir` makes it under umask 002, or within a project's folder."""
    shared.chmod(mode)
    said = rf"{shared} was open to other users \(mode {mode:o}\) and is closed now"
    with pytest.warns(RuntimeWarning, match=said), locked(copy_of(PLACE, "shards")):
        pass
    assert stat.S_IMODE(shared.stat().st_mode) == mode & ~0o022
    with warnings.catch_warnings(), locked(copy_of(PLACE, "shards")):
        warnings.simplefilter("error")


def test_what_lies_in_a_folder_that_was_open_is_hashed(s3: Proxy, patterns: Path, shared: Path) -> None:
    """Others may have put this user's own shards under each other's names."""
    remote.push(patterns, PLACE, silent, _store())
    copy, _ = fetched()
    shared.chmod(0o777)
    altered(copy / "train-00000.beton")  # this user's own file, of the right size
    with pytest.warns(RuntimeWarning, match="is closed now"):
        _, said = fetched()
    assert said == [f"hashing 2 shards of {copy} first ({_mib(copy)} MiB), since no manifest says that they are whole"]
    assert same(patterns, copy) and fetched()[1] == []


def test_a_disk_that_keeps_no_permissions_is_said_and_its_shards_are_hashed(
    s3: Proxy, patterns: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As exFAT, CIFS or WSL's /mnt/c: everything may be written by everybody, whatever is asked. None can be mounted in a test."""
    remote.push(patterns, PLACE, silent, _store())
    monkeypatch.setattr(hashed, "_SETTLED_NS", 0)
    real = os.mkdir
    with monkeypatch.context() as disk:
        disk.setattr(os, "mkdir", lambda path, mode=0o777, **more: (real(path, **more), real_chmod(path, 0o777))[0])
        real_chmod = os.chmod
        disk.setattr(os, "chmod", lambda *args, **more: None)
        disk.setattr(os, "fchmod", lambda *args: None)
        real_chmod(shared, 0o777)
        with pytest.warns(RuntimeWarning, match=rf"every user may write to {shared}, and its disk keeps no permissions: shards there are"):
            copy, said = fetched()
        assert said == [] and same(patterns, copy) and copy.stat().st_mode & 0o022
        real_chmod(Path.home(), 0o700)
        for folder in (".cache", ".cache/simclr-hashed"):  # on another disk
            (Path.home() / folder).mkdir()
            real_chmod(Path.home() / folder, 0o700)
        altered(copy / "train-00000.beton")  # only the folder is open: a file of this user's may have come from elsewhere
        with pytest.warns(RuntimeWarning, match="keeps no permissions"):
            assert len(fetched()[1]) == 1 and same(patterns, copy)
            assert len(fetched()[1]) == 1 and fetched()[1] == []


@as_root
@pytest.mark.parametrize("at", ["user", "shards", "copy"])
def test_no_link_below_the_folder_of_copies_is_followed(shared: Path, tmp_path: Path, at: str) -> None:
    """Its owner may turn it to a folder of theirs later, when it has been looked at."""
    shared.chmod(0o1777)
    copy = copy_of(PLACE, "shards")
    link = {"user": cache(), "shards": cache() / "shards", "copy": copy}[at]
    for target in (tmp_path / "ours", tmp_path / "nothing"):
        (tmp_path / "ours").mkdir(exist_ok=True)
        link.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        link.symlink_to(target)
        os.lchown(link, OTHER, -1)
        with pytest.raises(UserError, match=rf"{link} is a link or a file, where this user's folder of copies is wanted"), locked(copy):
            pass
        assert list((tmp_path / "ours").iterdir()) == [] and not (tmp_path / "nothing").exists()
        link.unlink()
    if at != "copy":
        link.touch()
        with pytest.raises(UserError, match=rf"{link} is a link or a file"), locked(copy):
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


@pytest.fixture
def squashed(s3: Proxy, patterns: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy on a disk that gives all users one owner, as NFS does where it squashes: another owner stands for ours there, as no such
    disk can be had in a test."""
    remote.push(patterns, PLACE, silent, _store())
    copy, _ = fetched()
    for path in (shared, *shared.rglob("*")):
        os.chown(path, OTHER, -1)
    monkeypatch.setattr(files, "owner_on", lambda folder: OTHER)
    monkeypatch.setattr(hashed, "_SETTLED_NS", 0)
    return copy


@as_root
def test_where_users_have_one_owner_one_process_hashes_for_all(squashed: Path, patterns: Path) -> None:
    said = [f"hashing 2 shards of {squashed} first ({_mib(squashed)} MiB), since others can have written them"]
    done: list[tuple[int, int]] = []
    lines: list[str] = []
    remote.fetch(PLACE, squashed, lambda *of: done.append(of), _store(), says=lines.append)
    total = sum(shard.bytes for shard in read_manifest(squashed).shards)
    assert lines == said and done[0] == (0, total) and done[-1] == (total, total)  # the bar goes as bytes are hashed
    assert len(done) > 2
    (note,) = (Path.home() / ".cache/simclr-hashed").iterdir()
    assert stat.S_IMODE(note.stat().st_mode) == 0o600 and stat.S_IMODE(note.parent.stat().st_mode) == 0o700
    assert fetched()[1] == []
    shard = squashed / "train-00000.beton"
    times = shard.stat().st_atime_ns, shard.stat().st_mtime_ns
    altered(shard)
    os.utime(shard, ns=times)  # the time of the file itself tells
    (one,) = fetched()[1]
    assert one.startswith("hashing 1 shards") and same(patterns, squashed)
    os.chown(shard, OTHER, -1)
    fetched()
    note.write_text("{")  # damaged: it is made anew
    assert fetched()[1] == said and fetched()[1] == []
    os.chown(note, OTHER, -1)  # of somebody else's: it says nothing
    assert fetched()[1] == said and fetched()[1] == []


@as_root
def test_without_a_home_folder_of_its_own_each_process_hashes_and_says_so(squashed: Path) -> None:
    for mode, owner in ((0o775, 0), (0o755, OTHER)):
        Path.home().chmod(mode)
        os.chown(Path.home(), owner, -1)
        first, second = fetched()[1]
        assert first.startswith("hashing 2 shards") and second.startswith("each process hashes them anew, since the disk of ")
    assert not (Path.home() / ".cache/simclr-hashed").is_dir() or not list((Path.home() / ".cache/simclr-hashed").iterdir())


def test_a_shard_that_has_just_changed_is_not_noted(shared: Path) -> None:
    """It may change once more within the tick of the disk's clock, and have the same times."""
    word, shard = hashed.Hashed(shared), shared / "train-00000.beton"
    shard.touch()
    word.add(shard, found := hashed.stamp(shard.stat()), "0" * 64)
    assert word.known == {}
    word.add(shard, [*found[:-1], found[-1] - 3_000_000_000], "0" * 64)
    assert list(word.known) == [shard.name] and not word.has(shard, "0" * 64)  # the times are others than the file has
    word.known[shard.name] = [*found, "0" * 64]
    assert word.has(shard, "0" * 64) and not word.has(shard, "1" * 64)


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
