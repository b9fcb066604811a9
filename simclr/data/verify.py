"""Whether shards match their manifest: every byte is hashed again, every image decoded again."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simclr.data.ffcv.decode import decode
from simclr.data.ffcv.reader import open_shard
from simclr.data.manifest import Manifest, Shard, read_manifest
from simclr.data.outputs import enter, scratch_for
from simclr.data.s3.uri import address
from simclr.errors import UserError

_ROWS = 256  # images that a thread takes at a time


@dataclass(frozen=True, slots=True)
class Verified:
    """The result for one shard."""

    shard: Shard
    wrong: tuple[str, ...]
    """Its faults; empty = whole."""


def verify(directory: Path, threads: int = 1, progress: Callable[[int], None] = lambda done: None) -> Iterator[Verified]:
    """Each shard of `directory` in turn; progress gets the bytes that were read. Raises UserError where there is no manifest."""
    manifest = read_manifest(directory, look=False)
    done = 0
    with ThreadPoolExecutor(threads, thread_name_prefix="verify") as pool:
        for shard in manifest.shards:
            yield Verified(shard, tuple(_wrong(directory / shard.name, shard, manifest, pool)))
            progress(done := done + shard.bytes)


def _wrong(path: Path, shard: Shard, manifest: Manifest, pool: ThreadPoolExecutor) -> Iterator[str]:
    if not path.is_file():
        yield "it is missing"
        return
    size = path.stat().st_size
    if size != shard.bytes:
        yield f"it has {size:,} bytes, the manifest says {shard.bytes:,}"
        return
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
            yield "its bytes do not have the manifest's sha256"
    try:
        image, _, sizes = open_shard(path, shard, manifest)
    except UserError as error:
        yield str(error)
        return
    if manifest.kind == "raw":  # any bytes are pixels
        return

    def damaged(first: int) -> list[int]:
        rows = [row for row in range(first, min(first + _ROWS, len(image))) if image["mode"][row] == 0]  # any bytes are pixels
        starts = [int(image["data_ptr"][row]) for row in rows]
        with path.open("rb") as file:  # read, not mapped: a file that shrinks meanwhile would kill this process
            files = [os.pread(file.fileno(), int(sizes[row]), at) for row, at in zip(rows, starts, strict=True)]
        return [r for r, data in zip(rows, files, strict=True) if decode(data, int(image["height"][r]), int(image["width"][r])) is None]

    for samples in pool.map(damaged, range(0, len(image), _ROWS)):
        for sample in samples:
            yield f"sample {sample}: its JPEG cannot be decoded"


# ── In another process ─────────────────────────────────────────────────────────────────────────────────────────────


def manifest_of(data: str) -> Manifest:
    """The manifest of shards in a directory or at s3://bucket/prefix. Raises UserError where there is none."""
    at = address(data)
    if at is None:
        return read_manifest(Path(data), look=False)
    from simclr.data.s3 import remote
    from simclr.data.s3.store import Store

    found = remote.manifest_at(at, Store())
    if found is None:
        raise UserError(f"there are no shards at {at} (no manifest.json); give the address that `simclr prepare --out` had")
    return found[0]


def make_verified(settings: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A function that verifies a shard, by its place in the manifest. One in S3 is fetched for that, and removed again. Raises UserError
    where this machine does not see the shards: they are not damaged."""
    enter(settings["from"])
    data, at = Path(settings["data"]), address(settings["data"])
    if at is None and not data.is_dir():
        raise UserError(f"{socket.gethostname()} does not see {data}; give a folder on a disk that all nodes share, or s3://bucket/prefix")
    manifest = manifest_of(settings["data"])
    if hashlib.sha256(manifest.to_json().encode()).hexdigest() != settings["manifest"]:
        raise UserError(f"{socket.gethostname()} sees other shards in {data}; give a folder on a disk that all nodes share")
    pool = ThreadPoolExecutor(settings["threads"], thread_name_prefix="verify")
    if at is None:
        return lambda part: {
            "wrong": list(_wrong(data / manifest.shards[part["shard"]].name, manifest.shards[part["shard"]], manifest, pool))
        }
    from simclr.data.s3.answers import Damaged, Missing
    from simclr.data.s3.store import Store

    scratch, store = scratch_for(at), Store()
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)

    def fetched(part: dict[str, Any]) -> dict[str, Any]:
        shard = manifest.shards[part["shard"]]
        path = scratch / shard.name
        try:
            store.download(at / shard.name, path, shard.bytes)  # checked against what was sent; below, against the manifest
            return {"wrong": list(_wrong(path, shard, manifest, pool))}
        except Missing:
            return {"wrong": ["it is missing"]}
        except Damaged as error:
            return {"wrong": [str(error)]}
        finally:
            for left in (path, *scratch.glob(f".{shard.name}.*")):
                with contextlib.suppress(FileNotFoundError):
                    left.unlink()

    return fetched


def damaged(directory: Path) -> list[str]:
    """Names of the damaged shards of `directory`."""
    return [found.shard.name for found in verify(directory) if found.wrong]
