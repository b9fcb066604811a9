"""A disk's error is one sentence, and a file under its own name is whole."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import tempfile
import threading
import time
from pathlib import Path

import pytest

from simclr import files
from simclr.errors import UserError


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (errno.ENOSPC, "no space left on the disk that holds runs/x; free some"),
        (errno.EDQUOT, "the disk quota is used up where runs/x lies"),
        (errno.EROFS, "runs/x lies on a disk that is read-only"),
        (errno.EACCES, "no permission for runs/x"),
        (errno.EIO, ""),
    ],
)
def test_a_disk_error_is_one_sentence(code: int, sentence: str) -> None:
    found = files.trouble(OSError(code, "…", "runs/x"))
    assert found.startswith(sentence) and bool(found) == bool(sentence)
    assert files.trouble(ValueError("x")) == ""


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    files.write_text(tmp_path / "a", "old")
    with pytest.raises(OSError, match="full"), files.whole(tmp_path / "a") as scratch:
        scratch.write_text("ne")
        raise OSError("full")
    assert (tmp_path / "a").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a"]
    files.write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new"


def test_a_path_that_cannot_be_made_is_refused_beforehand(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    files.require_writable(tmp_path / "new" / "deep")
    files.require_writable(tmp_path / "file")
    with pytest.raises(UserError, match="is a file; give another path"):
        files.require_writable(tmp_path / "file" / "x")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    with pytest.raises(UserError, match=r"no permission|read-only"):
        files.require_writable(Path("/proc/1/nothing"))


def test_a_name_that_says_another_kind_is_refused_beforehand(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "was.csv").mkdir()
    files.require_file(tmp_path / "new" / "a.HTML", (".html", ".htm"))
    files.require_file(tmp_path / "file")
    files.require_folder(tmp_path / "new" / "v1.5")
    files.require_folder(tmp_path / "was.csv")  # made by somebody who wants it so
    with pytest.raises(UserError, match=r"is a folder, where a file is to be written; name a file in it, as .*/was\.csv/result\.html"):
        files.require_file(tmp_path / "was.csv", (".html",))
    with pytest.raises(UserError, match=r"of no kind that is written here; expected a name that ends with \.html, \.htm"):
        files.require_file(tmp_path / "a.csv", (".html", ".htm"))
    with pytest.raises(UserError, match="is a file, where a folder is to be written"):
        files.require_folder(tmp_path / "file")
    with pytest.raises(UserError, match=r"ends like a file, .*; leave out \.csv, or end it with \.npz or \.parquet"):
        files.require_folder(tmp_path / "f.csv", (".npz", ".parquet"))


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_a_librarys_file_gets_the_permissions_of_any_other(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        (tmp_path / "weights").touch(mode=0o600)
        files.usual_mode(tmp_path / "weights")
        (tmp_path / "other").touch()
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == dict.fromkeys(("weights", "other"), 0o666 & ~umask)


# ── Where others may write too ─────────────────────────────────────────────────────────────────────────────────────


def test_a_lock_is_neither_followed_nor_emptied(tmp_path: Path) -> None:
    """Another user has made a link of the lock's name to a file of ours."""
    victim, lock = tmp_path / "victim", tmp_path / "lock"
    victim.write_text("precious")
    lock.symlink_to(victim)
    with pytest.raises(OSError, match="lock") as refused, files.locked(lock):
        pass
    assert files.trouble(refused.value) == f"{lock} is a link, where a file of our own is wanted; remove it"
    lock.unlink()
    lock.hardlink_to(victim)
    with files.locked(lock):
        assert victim.read_text() == "precious"
    with pytest.raises(UserError, match="is not this user's alone"), files.locked(lock, own=True):
        pass
    lock.unlink()
    os.mkfifo(lock)
    with pytest.raises(UserError, match="is no plain file"), files.locked(lock):  # and nobody waits for its other end
        pass
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EIO])
def test_a_disk_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """NFS without its lock service, Lustre without `-o flock`: who must not write beside another is refused, who only asks goes on."""

    def refused(opened: int, how: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refused)
    with (
        pytest.raises(OSError if code == errno.EIO else UserError, match="" if code == errno.EIO else "lock has no locks; use a folder on"),
        files.locked(tmp_path / "lock"),
    ):
        raise AssertionError
    if code != errno.EIO:
        with files.locked(tmp_path / "lock", wait=False):
            pass


def test_a_lock_that_its_holder_removes_is_held_by_one_of_those_who_waited(tmp_path: Path) -> None:
    inside, most = 0, 0
    lock = threading.Lock()

    def work() -> None:
        nonlocal inside, most
        for _ in range(20):
            with files.locked(tmp_path / "lock"):
                with lock:
                    inside += 1
                    most = max(most, inside)
                time.sleep(0.0005)
                with lock:
                    inside -= 1
                (tmp_path / "lock").unlink()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    with files.locked(tmp_path / "lock"), pytest.raises(BlockingIOError), files.locked(tmp_path / "lock", wait=False):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user, as root can")
def test_another_users_lock_can_be_held_where_a_run_is_shared(tmp_path: Path) -> None:
    """The lock of a run that another user made is read-only for this one."""
    folder = Path(tempfile.mkdtemp(prefix="simclr-shared-"))
    folder.chmod(0o755)
    (folder / "lock").touch(mode=0o644)
    os.seteuid(65534)
    try:
        with files.locked(folder / "lock"), pytest.raises(BlockingIOError), files.locked(folder / "lock", wait=False):
            pass
        with pytest.raises(PermissionError), files.locked(folder / "none"):
            pass
    finally:
        os.seteuid(0)
        shutil.rmtree(folder)
    (tmp_path / "lock").touch()
    os.chown(tmp_path / "lock", 65534, -1)
    with pytest.raises(UserError, match=r"the lock \S+ is not this user's alone \(owner 65534"), files.locked(tmp_path / "lock", own=True):
        pass


def test_a_lock_that_may_only_be_read_is_refused_in_a_sentence_where_nfs_wants_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS stands on fcntl's locks, which refuse an exclusive lock on a file that is open for reading. They take flock's place here."""
    monkeypatch.setattr(files.fcntl, "flock", lambda opened, how: fcntl.lockf(opened, how))
    (tmp_path / "lock").touch()
    with files.locked(tmp_path / "lock"):
        pass
    monkeypatch.setattr(files, "_open_lock", lambda path: files.plain(path, os.O_RDONLY))
    for wait in (True, False):
        with pytest.raises(PermissionError) as refused, files.locked(tmp_path / "lock", wait=wait):
            pass
        assert files.trouble(refused.value) == f"no permission for {tmp_path / 'lock'}; change its permissions, or give another path"


@pytest.mark.parametrize(
    ("umask", "folder", "lock"), [(0o022, 0o755, 0o644), (0o022, 0o2775, 0o664), (0o077, 0o770, 0o660), (0o077, 0o700, 0o600)]
)
def test_whoever_may_write_to_a_folder_may_write_to_its_locks(tmp_path: Path, umask: int, folder: int, lock: int) -> None:
    (tmp_path / "run").mkdir()
    if os.geteuid() == 0:
        os.chown(tmp_path / "run", -1, 4242)  # the group of a project
    (tmp_path / "run").chmod(folder)
    old = os.umask(umask)
    try:
        with files.locked(tmp_path / "run/lock"):
            found = (tmp_path / "run/lock").stat()
    finally:
        os.umask(old)
    assert stat.S_IMODE(found.st_mode) == lock
    assert not lock & 0o020 or found.st_gid == (tmp_path / "run").stat().st_gid


def test_no_link_is_written_through(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / f".a-{os.getpid()}").symlink_to(victim)  # a name that could be guessed
    files.write_text(tmp_path / "a", "new")
    (tmp_path / "b").symlink_to(victim)
    with files.anew(tmp_path / "b") as file:
        file.write("new")
    (tmp_path / "c").hardlink_to(victim)
    for mode in ("w", "r+"):
        (tmp_path / f"link-{mode}").symlink_to(victim)
        with pytest.raises(OSError, match="link"):
            open(tmp_path / f"link-{mode}", mode, opener=files.plain).close()
    with pytest.raises(UserError, match="is another name of a file that lies elsewhere"):
        open(tmp_path / "c", "w", opener=files.plain).close()
    assert victim.read_text() == "precious" and (tmp_path / "a").read_text() == (tmp_path / "b").read_text() == "new"


def test_a_json_file_that_is_too_large_or_too_deep_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with path.open("wb") as file:
        file.truncate(40 << 30)  # it takes no room on the disk
    with pytest.raises(UserError, match=r"a.json is damaged: it has 42,949,672,960 bytes, expected 268,435,456 at most; write it again"):
        files.read_json(path, "write it again")
    path.write_text('{"a":' * 40 + "1" + "}" * 40)
    with pytest.raises(UserError, match=r"a.json is damaged: it is nested more than 32 levels deep; write it again"):
        files.read_json(path, "write it again")
