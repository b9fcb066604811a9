"""s3:// addresses, and the places of their copies on this machine."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from simclr import files
from simclr.errors import UserError
from simclr.telemetry import progress

_NO_FOLDER = (
    "{folder} is a link or a file, where this user's folder of copies is wanted; remove it, or set SIMCLR_CACHE to a folder of your own"
)
_FOREIGN = (
    "{path}, in this user's folder of copies, belongs to uid {uid}, who could change what is read from it; "
    "remove it, or set SIMCLR_CACHE to a folder of your own"
)


class Unreachable(UserError):
    """Every try failed, for a reason that may pass: the network, the server."""


class Corrupt(UserError):
    """A shard whose bytes contradict themselves or the manifest."""

    def __init__(self, message: str, shard: str) -> None:
        super().__init__(message, shard)
        self.shard = shard
        """Its file's name."""

    def __str__(self) -> str:
        return str(self.args[0])


class Refetched(Exception):
    """A corrupt shard was fetched again: a retry may succeed."""


@dataclass(frozen=True, slots=True)
class Address:
    """s3://bucket/key."""

    bucket: str
    key: str = ""
    """Key of an object, or the prefix of several; no slash at either end."""

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}".rstrip("/")

    def __truediv__(self, name: str) -> Address:
        return Address(self.bucket, f"{self.key}/{name}" if self.key else name)

    @property
    def name(self) -> str:
        """The last part."""
        return self.key.rpartition("/")[2] or self.bucket


def address(place: str | Path) -> Address | None:
    """The address that `place` states, None for a place on disk. A Path, which folds the slashes of s3://, is read too.

    Raises UserError for an address without a bucket. The message does not repeat the text, which may contain a secret key.
    """
    text = str(place)
    if not text.startswith("s3:/"):
        return None
    bucket, _, key = text.removeprefix("s3:").lstrip("/").partition("/")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{1,62}", bucket):
        raise UserError("this S3 address names no bucket; expected s3://bucket/prefix, with credentials in the environment or a profile")
    return Address(bucket, "/".join(part for part in key.split("/") if part not in ("", ".", "..")))


def copy_of(place: Address, kind: str) -> Path:
    """Where this machine keeps this user's copy of `place`: CACHE/KIND/DIGEST/NAME, with `cache()` as CACHE.

    The same address at another endpoint (AWS_ENDPOINT_URL_S3) has another copy.
    """
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    digest = hashlib.sha256(f"{place} {endpoint}".encode()).hexdigest()[:16]
    return cache() / kind / digest / place.name


def cache() -> Path:
    """This user's folder of copies: $SIMCLR_CACHE, by default ~/.cache/simclr. Where that folder is for all users (with a sticky bit, as
    /tmp), it is one of this user's in it, since a copy that another user may write is no copy."""
    folder = _asked()
    shared = folder.is_dir() and folder.stat().st_mode & files.OTHERS_WRITE and folder.stat().st_mode & stat.S_ISVTX
    return folder / f"uid-{os.geteuid()}" if shared else folder


@contextlib.contextmanager
def locked(copy: Path) -> Iterator[None]:
    """One process of this machine at a time works on `copy`; the others wait here. The lock ends with its process. Raises UserError where
    another user may have written there, as `own` does."""
    own(copy)
    with contextlib.ExitStack() as held:
        with progress.within("lock"):
            held.enter_context(files.locked(lock_of(copy), own=True))
        yield


def lock_of(copy: Path) -> Path:
    """The file whose lock a process holds while it works on `copy`."""
    return copy.with_name(f".{copy.name}.lock")


def own(copy: Path) -> None:
    """Make the folders that are to hold `copy`, for this user alone, and see that no other user can have changed what lies there. Raises
    UserError, with what to do.

    The folder of copies itself may be a link that the user made. One below it is refused: who made it could turn it elsewhere later.
    """
    top = _asked() if copy.is_relative_to(cache()) else copy.parent
    top.parent.mkdir(parents=True, exist_ok=True)
    _make(top)
    if not top.is_dir():
        raise UserError(_NO_FOLDER.format(folder=top))
    open_still = [] if _is_closed_top(top) else [top]
    for folder in (folder for folder in (*reversed(copy.parents), copy) if folder != top and folder.is_relative_to(top)):
        if folder != copy:
            _make(folder)
        elif not folder.is_dir() and not folder.is_symlink():  # an archive's copy, or nothing yet
            break
        if not _is_closed(folder, folder.lstat()):
            open_still.append(folder)
    if open_still:
        warnings.warn(
            f"every user may write to {open_still[0]}, and its disk keeps no permissions: shards there are hashed before they are read, "
            "runs and archives are not; if others use this machine, set SIMCLR_CACHE to a disk that keeps them",
            RuntimeWarning,
            stacklevel=2,
        )


def _asked() -> Path:
    return Path(os.environ.get("SIMCLR_CACHE") or "~/.cache/simclr").expanduser().absolute()


def _make(folder: Path) -> None:
    with contextlib.suppress(FileExistsError):  # of whatever kind: it is looked at next
        folder.mkdir(mode=0o700)


def _is_closed_top(folder: Path) -> bool:
    """Whether others cannot replace what lies in the `folder` of copies. One that is this user's, with nothing of anybody else's in it, is
    closed, which is said; one with a sticky bit stays as it is, since others use it on purpose. False where the disk keeps no
    permissions. Raises UserError where others can."""
    found = folder.stat()
    mode, mine = stat.S_IMODE(found.st_mode), folder / "simclr"
    if not files.is_own(found, folder):
        raise UserError(
            f"{folder} belongs to uid {found.st_uid}, who could change the copies in it; set SIMCLR_CACHE to a folder of your own, as "
            f"{folder / f'uid-{os.geteuid()}'}, or to one of root's with a sticky bit (`chmod 1777`), in which each user has one"
        )
    if mode & stat.S_ISVTX or not mode & files.OTHERS_WRITE:
        return True
    if found.st_uid != os.geteuid() and found.st_uid != files.owner_on(folder):
        raise UserError(
            f"other users may replace what lies in {folder} (mode {mode:o}), which is root's; set SIMCLR_CACHE to a folder of your own, as "
            f"{mine}, or let root put a sticky bit on it (`chmod +t`; each user then has a folder in it)"
        )
    if (foreign := _foreign(folder)) is not None:
        raise UserError(
            f"other users may replace what lies in {folder} (mode {mode:o}), and {foreign} is not yours; `chmod +t` it if others use it "
            f"too (each user then has a folder in it), or set SIMCLR_CACHE to a folder of your own, as {mine}"
        )
    closed = _is_closed(folder, found)
    if closed and os.environ.get("SIMCLR_CACHE"):
        warnings.warn(
            f"{folder} was open to other users (mode {mode:o}) and is closed now, as a folder of copies has to be; for one that several "
            "users share, let root make it with a sticky bit (`chmod 1777`)",
            RuntimeWarning,
            stacklevel=3,
        )
    return closed


def _is_closed(folder: Path, found: os.stat_result) -> bool:
    """Whether nobody else may write to `folder`, whose state was `found`, from now on; False where its disk keeps no permissions. Raises
    UserError if it is no folder, or if somebody else owns it, or owns something in it because it was open."""
    if not stat.S_ISDIR(found.st_mode):
        raise UserError(_NO_FOLDER.format(folder=folder))
    if not files.is_own(found, folder.parent):
        raise UserError(_FOREIGN.format(path=folder, uid=found.st_uid))
    if not found.st_mode & files.OTHERS_WRITE:
        return True
    began = files.clock_on(folder)
    _require_nothing_foreign(folder)
    with contextlib.suppress(PermissionError):
        folder.chmod(stat.S_IMODE(found.st_mode) & ~files.OTHERS_WRITE)
    if folder.stat().st_mode & files.OTHERS_WRITE:
        return False
    try:
        _require_nothing_foreign(folder)  # put there between the look and the closing
    except UserError:
        folder.chmod(stat.S_IMODE(found.st_mode))  # else the next command would trust it
        raise
    # Others may have put this user's own files under each other's names, so no manifest vouches for shards any more: they are hashed. A
    # newer one is of another process of this user's, which has found the folder closed.
    for path in _within(folder):
        with contextlib.suppress(FileNotFoundError):
            shards = path.name == "manifest.json" and path.is_relative_to(cache() / "shards")
            if shards and path.lstat().st_ctime_ns < began:
                path.unlink()
    return True


def _require_nothing_foreign(folder: Path) -> None:
    if (path := _foreign(folder)) is not None:
        raise UserError(_FOREIGN.format(path=path, uid=path.lstat().st_uid))


def _foreign(folder: Path) -> Path | None:
    """Something in `folder` that is somebody else's."""
    for path in _within(folder):
        with contextlib.suppress(FileNotFoundError):
            if not files.is_own(path.lstat(), path.parent):
                return path
    return None


def _within(folder: Path) -> Iterator[Path]:
    """Everything below `folder`; what another process of this user's removes meanwhile is passed over, and no link is followed."""
    for inside, folders, names in os.walk(folder):
        yield from (Path(inside, name) for name in (*folders, *names))
