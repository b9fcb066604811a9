"""Files that are whole under their own name and that nobody else has set as a trap, and a sentence for each error of a disk.

A folder may belong to several users, so no name in it is trusted: a link is not followed where we write, nothing is emptied before the
opened file itself was looked at, and a temporary name cannot be guessed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal

from simclr.errors import UserError

_REASONS = {
    errno.ENOSPC: "no space left on the disk that holds {name}; free some and run the same command again",
    errno.EDQUOT: "the disk quota is used up where {name} lies; free some and run the same command again",
    errno.EROFS: "{name} lies on a disk that is read-only; write somewhere else",
    errno.EACCES: "no permission for {name}; change its permissions, or give another path",
    errno.EPERM: "{name} may not be changed (operation not permitted); give another path",
    errno.ENOTDIR: "a folder in the path {name} is a file; give another path",
    errno.EISDIR: "{name} is a folder where a file is wanted; give another path",
    errno.ELOOP: "{name} is a link, where a file of our own is wanted; remove it",
    errno.ENAMETOOLONG: "the name {name} is too long for this disk; give another path",
}
FULL = (errno.ENOSPC, errno.EDQUOT)
_OF_FILES = (
    *(".parquet", ".npz", ".npy", ".csv", ".tsv", ".json", ".jsonl", ".txt", ".html", ".h5", ".hdf5", ".pkl", ".arrow", ".feather"),
    *(".pt", ".pth", ".pt2", ".onnx", ".safetensors", ".tar", ".zip", ".gz", ".png", ".jpg", ".jpeg", ".pdf"),
)
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
_MOST_DEEP = 32  # levels of a JSON file
MOST_JSON_BYTES = 1 << 28
"""The largest JSON file that is read: a manifest of ten million classes has about half of that."""


def trouble(error: BaseException) -> str:
    """The sentence for an OSError that a user can mend and a retry cannot, or ""."""
    known = isinstance(error, OSError) and error.errno in _REASONS
    # Of a renaming the second name is the one that was asked for.
    return _REASONS[error.errno].format(name=error.filename2 or error.filename or "the output") if known else ""  # type: ignore[attr-defined]


def user_path(text: str) -> Path:
    """The path that a user wrote, with ~ as a home folder. Raises UserError where there can be none of that name."""
    path = Path(text)
    try:
        path = path.expanduser()
        path.exists()
    except RuntimeError:
        raise UserError(f"{text}: there is no such user here; write the path in full") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{text[:60]}{'…' * (len(text) > 60)} is no path ({getattr(error, 'strerror', None) or error})") from None
    return path


def require_writable(path: Path) -> None:
    """Raise UserError if `path` cannot be created. Call it before hours of work, not after; it writes nothing."""
    if path.parts[:1] == ("s3:",):
        raise UserError(f"s3://{'/'.join(path.parts[1:])} is no place on a disk; give a local path here")
    there = next(p for p in [path.absolute(), *path.absolute().parents] if p.exists())
    if there.is_file() and there != path.absolute():
        raise UserError(_REASONS[errno.ENOTDIR].format(name=path))
    if not os.access(there, os.W_OK | (os.X_OK if there.is_dir() else 0)):
        read_only = os.statvfs(there).f_flag & os.ST_RDONLY
        raise UserError(_REASONS[errno.EROFS if read_only else errno.EACCES].format(name=path))


def require_file(path: Path, kinds: Sequence[str] = ()) -> None:
    """Raise UserError unless a file can be written as `path`, with one of the endings `kinds` (".html"; none = any). Call it before hours
    of work; it writes nothing."""
    require_writable(path)
    if path.is_dir():
        inside = path / f"result{next(iter(kinds), '')}"
        raise UserError(f"{path} is a folder, where a file is to be written; name a file in it, as {inside}")
    if kinds and path.suffix.lower() not in kinds:
        raise UserError(f"{path} is of no kind that is written here; expected a name that ends with {', '.join(kinds)}")


def require_folder(path: Path, or_files: Sequence[str] = ()) -> None:
    """Raise UserError unless `path` is a folder or can become one. Call it before hours of work; it writes nothing. `or_files` are endings
    with which the command writes a file instead."""
    require_writable(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file, where a folder is to be written; give another name")
    require_folders_name(path, or_files)


def require_folders_name(path: Path, or_files: Sequence[str] = ()) -> None:
    """Raise UserError where a new folder would be called like a file of a format that others would take it for."""
    if path.suffix.lower() in _OF_FILES and not path.is_dir():
        other = f", or end it with {' or '.join(or_files)}" if or_files else ""
        raise UserError(f"{path} ends like a file, and a folder is to be written; leave out {path.suffix}{other}")


def require_space(path: Path, needed: int, what: str, instead: str) -> None:
    """Raise UserError if the disk that holds, or will hold, `path` has fewer than `needed` bytes free. In the message `what` follows the
    number (for two checkpoints), and `instead` is the alternative to freeing some (use another --out)."""
    there = next(p for p in [path.absolute(), *path.absolute().parents] if p.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise UserError(
            f"no space left on the disk of {path}: {free / 2**20:,.0f} MiB free, {needed / 2**20:,.0f} MiB needed {what}; "
            f"free some, or {instead}"
        )


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`. It becomes `path` at the end, or is removed if the writing failed."""
    scratch = path.with_name(f".{path.name}-{secrets.token_hex(8)}")  # in a shared folder nobody can have made a link of this name
    try:
        yield scratch
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`: the old content or the new, never a part."""
    with whole(path) as scratch:
        scratch.write_text(text, encoding="utf-8", errors="replace")


def usual_mode(path: Path) -> None:
    """Give the file `path` the permissions that any new file gets here. Some libraries write theirs for this user alone, beside others."""
    # The umask cannot be read without changing it for other threads, so an empty file shows it.
    probe = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    opened = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        path.chmod(stat.S_IMODE(os.fstat(opened).st_mode))
    finally:
        os.close(opened)
        probe.unlink()


# ── Where others may write too ─────────────────────────────────────────────────────────────────────────────────────


def private(path: str | Path, flags: int) -> int:
    """An `opener` for `open`, as `plain`; a file that it makes is this user's alone."""
    return plain(path, flags, 0o600)


def plain(path: str | Path, flags: int, mode: int = 0o666) -> int:
    """An `opener` for `open`: no link is followed, and nothing but a plain file is opened; one that has a second name is not emptied."""
    opened = os.open(path, flags & ~os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, mode)
    try:
        found = os.fstat(opened)
        if not stat.S_ISREG(found.st_mode) or (flags & os.O_TRUNC and found.st_nlink > 1):
            what = "no plain file" if not stat.S_ISREG(found.st_mode) else "another name of a file that lies elsewhere"
            raise UserError(f"{path} is {what}, where a file of our own is wanted; remove it")
        if flags & os.O_TRUNC:
            os.ftruncate(opened, 0)
    except BaseException:
        os.close(opened)
        raise
    return opened


def anew(path: Path, mode: Literal["x", "xb"] = "x", **how: Any) -> IO[Any]:
    """`path`, opened to be written from its beginning: what had this name, a link too, only loses it."""
    path.unlink(missing_ok=True)
    return path.open(mode, **how)


def is_own(found: os.stat_result, folder: Path) -> bool:
    """Whether this user or root owns what was `found` in `folder`. A network disk may give what this user writes to another owner, as to
    nobody: then that owner counts as this user."""
    return found.st_uid in (os.geteuid(), 0) or found.st_uid == owner_on(folder)


def only_own(found: os.stat_result) -> bool:
    """Whether nobody but this user and root can have written the file `found`; on a disk that maps users to one owner, never."""
    return stat.S_ISREG(found.st_mode) and found.st_uid in (os.geteuid(), 0) and not found.st_mode & OTHERS_WRITE


def owner_on(folder: Path) -> int:
    """The owner that the disk of `folder` gives to what this user writes."""
    found = _written_on(folder)
    return found.st_uid if found is not None else os.geteuid()


def clock_on(folder: Path) -> int:
    """The time on the disk of `folder`, in nanoseconds as its files have it; 0 where nothing can be written there."""
    found = _written_on(folder)
    return found.st_ctime_ns if found is not None else 0


def _written_on(folder: Path) -> os.stat_result | None:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno())
    except OSError:
        return None


@contextlib.contextmanager
def locked(path: Path, wait: bool = True, own: bool = False, shared: bool = False) -> Iterator[None]:
    """Inside, no other process holds the lock file `path`; if it is `shared`, none but those that share it too. It is made where it is
    missing, and its content is left as it is. It holds on one machine, and on shared disks with locks; it ends with its process.

    Raises BlockingIOError where another process holds it and this one does not `wait`, PermissionError where this user may not hold it,
    and UserError if `path` is a link or no plain file, or, where it has to be our `own`, if it is somebody else's or has a second name.
    """
    for last in (*[False] * 99, True):  # the last: some disks of networks give an open file another number than its name
        opened = _open_lock(path)
        try:
            found = os.fstat(opened)
            if own and (found.st_nlink > 1 or not is_own(found, path.parent)):
                raise UserError(f"the lock {path} is not this user's alone (owner {found.st_uid}, {found.st_nlink} names); remove it")
            try:
                fcntl.flock(opened, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
            except OSError as error:
                if error.errno == errno.EBADF:  # NFS locks for writing alone, and this user may only read the file
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path)) from None
                if error.errno not in _NO_LOCKS:
                    raise
                if wait:  # two would write the same file
                    raise UserError(f"the disk of {path} has no locks; use a folder on another disk") from None
            if last or _is_still(path, found):  # a process that held it may have removed it
                yield
                return
        finally:
            os.close(opened)


def _is_still(path: Path, found: os.stat_result) -> bool:
    try:
        return os.path.samestat(found, path.lstat())
    except FileNotFoundError:
        return False


def _open_lock(path: Path) -> int:
    while True:
        try:
            return plain(path, os.O_RDWR)
        except FileNotFoundError:
            with contextlib.suppress(FileExistsError):  # another process was faster
                opened = plain(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
                _share_lock(opened, path.parent.stat())
                return opened
        except PermissionError:  # another user's, which can be held all the same
            return plain(path, os.O_RDONLY)


def _share_lock(opened: int, folder: os.stat_result) -> None:
    """Whoever may write to the folder may hold the lock: NFS asks for permission to write."""
    group = stat.S_IRGRP | stat.S_IWGRP
    if folder.st_mode & group == group:
        with contextlib.suppress(OSError):  # this user is not in the folder's group; or the disk keeps no permissions
            os.fchown(opened, -1, folder.st_gid)
            os.fchmod(opened, stat.S_IMODE(os.fstat(opened).st_mode) | group)


# ── Reading ────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_text(path: Path, instead: str) -> str:
    """The text in `path`. Raises UserError if it is no UTF-8; `instead` tells the user what to do."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: byte {error.start:,} is no UTF-8 text; {instead}") from None


def require_small(path: Path, instead: str, most: int | None = None) -> None:
    """Raise UserError if `path` has more than `most` bytes, by default more than any JSON file of ours."""
    most = MOST_JSON_BYTES if most is None else most
    if (size := path.stat().st_size) > most:
        raise UserError(f"{path} is damaged: it has {size:,} bytes, expected {most:,} at most; {instead}")


def read_json(path: Path, instead: str) -> dict[str, Any]:
    """The JSON object in `path`. Raises UserError if there is none, or a file that is too large for it; `instead` tells the user what to
    do."""
    require_small(path, instead)
    return json_in(read_text(path, instead), path, instead)


def json_in(text: str | bytes, where: object, instead: str) -> dict[str, Any]:
    """The JSON object in `text`, which comes from `where`. Raises UserError as `read_json` does."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:  # of bytes also UnicodeDecodeError
        raise UserError(f"{where} is damaged: it is no JSON ({error}); {instead}") from None
    if not isinstance(found, dict):
        raise UserError(f"{where} is damaged: it holds no JSON object; {instead}")
    level: list[Any] = [found]
    for _ in range(_MOST_DEEP):  # what copies, shows or writes it calls itself once a level
        inside = (outer.values() if isinstance(outer, dict) else outer for outer in level)
        level = [inner for values in inside for inner in values if isinstance(inner, dict | list)]
    if level:
        raise UserError(f"{where} is damaged: it is nested more than {_MOST_DEEP} levels deep; {instead}")
    return found
