"""s3:// addresses, and the places of their copies on this machine."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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
    """Where this machine keeps its copy of `place`: $SIMCLR_CACHE/KIND/DIGEST/NAME, by default below ~/.cache/simclr.

    The same address at another endpoint (AWS_ENDPOINT_URL_S3) has another copy.
    """
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    digest = hashlib.sha256(f"{place} {endpoint}".encode()).hexdigest()[:16]
    return Path(os.environ.get("SIMCLR_CACHE") or "~/.cache/simclr").expanduser().absolute() / kind / digest / place.name


@contextlib.contextmanager
def locked(copy: Path) -> Iterator[None]:
    """One process of this machine at a time works on `copy`; the others wait here. The lock ends with its process."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    with copy.with_name(f".{copy.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
