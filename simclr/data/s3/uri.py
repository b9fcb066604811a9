"""s3:// addresses, and the places of their copies on this machine."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from simclr import files
from simclr.errors import UserError


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
    with files.locked(copy.with_name(f".{copy.name}.lock"), own=True):
        yield


def own(copy: Path) -> None:
    """Make the folders that are to hold `copy`, for this user alone, and see that no other user can have changed what lies there. Raises
    UserError, with what to do."""
    mine = cache()
    if copy.is_relative_to(mine):
        _require_cache(_asked())
        folders = [folder for folder in (*reversed(copy.parents), copy) if folder.is_relative_to(mine)]
    else:
        folders = [copy.parent, copy]
    folders[0].parent.mkdir(parents=True, exist_ok=True)
    for folder in folders[:-1]:
        folder.mkdir(mode=0o700, exist_ok=True)
    for folder in folders if copy.is_dir() else folders[:-1]:
        _require_own(folder)


def _asked() -> Path:
    return Path(os.environ.get("SIMCLR_CACHE") or "~/.cache/simclr").expanduser().absolute()


def _require_cache(folder: Path) -> None:
    """Raise UserError if others can replace what lies in the `folder` of copies. Its own permissions are the user's to change: others may
    use it on purpose."""
    if not folder.is_dir():
        return
    found = folder.stat()
    writable, sticky = found.st_mode & files.OTHERS_WRITE, found.st_mode & stat.S_ISVTX
    if not files.is_own(found, folder):
        raise UserError(
            f"{folder} belongs to uid {found.st_uid}, who could change the copies in it; set SIMCLR_CACHE to a folder of your own, as "
            f"{folder / f'uid-{os.geteuid()}'}, or to one of root's with a sticky bit (`chmod 1777`), in which each user has one"
        )
    if writable and not sticky and os.environ.get("SIMCLR_CACHE"):
        raise UserError(
            f"other users may replace what lies in {folder} (mode {stat.S_IMODE(found.st_mode):o}); `chmod go-w` it if it is yours alone, "
            f"`chmod +t` it if others use it too (each user then has a folder in it), or set SIMCLR_CACHE to a folder of your own, as "
            f"{folder / 'simclr'}"
        )


def _require_own(folder: Path) -> None:
    """Raise UserError if somebody else owns `folder`, or owns something in it because it was not this user's alone; from now on it is."""
    found = folder.stat()
    everything = folder.rglob("*") if found.st_mode & files.OTHERS_WRITE else ()
    for path in (folder, *everything):
        try:
            state = path.lstat() if path != folder else found
        except FileNotFoundError:  # another process of this user's works here
            continue
        if not files.is_own(state, path.parent):
            raise UserError(
                f"{path}, in this user's folder of copies, belongs to uid {state.st_uid}, who could change what is read from it; "
                "remove it, or set SIMCLR_CACHE to a folder of your own"
            )
    if found.st_mode & files.OTHERS_WRITE:
        with contextlib.suppress(PermissionError):
            folder.chmod(stat.S_IMODE(found.st_mode) & ~files.OTHERS_WRITE)
        if folder.stat().st_mode & files.OTHERS_WRITE:
            raise UserError(f"every user may write to {folder}, and its disk keeps no permissions; set SIMCLR_CACHE to a disk that does")
