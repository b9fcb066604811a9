"""The labels of shards in S3 from their tables alone, a few thousandths of their bytes: for a process that reads no picture."""

from __future__ import annotations

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simclr.data.ffcv.reader import HEAD_BYTES, SAMPLE_BYTES, open_shard, tables_at
from simclr.data.manifest import Manifest, Shard
from simclr.data.s3.answers import Changed, Damaged
from simclr.data.s3.store import Store
from simclr.data.s3.uri import Address, Corrupt

_AT_ONCE = 8  # shards


def labels(place: Address, manifest: Manifest, split: str, store: Store) -> NDArray[np.int64]:
    """(n,) label of every image of a split of the shards at `place`, as `loader.labels` has them of a copy: −1 = unlabelled.

    Raises Damaged for a shard of another size than the manifest says, and Corrupt where tables contradict themselves or the manifest. The
    sha256 of a shard is of all its bytes, so it is not checked here; who trains on the shards fetches them and checks it.
    """
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="tables") as pool:
        found = list(pool.map(lambda shard: _of_shard(place / shard.name, Path(folder), shard, manifest, store), manifest.splits[split]))
    return np.concatenate(found).astype(np.int64)


def _of_shard(place: Address, folder: Path, shard: Shard, manifest: Manifest, store: Store) -> NDArray[np.int64]:
    path, reason = folder / shard.name, ""
    for _ in range(store.attempts):
        try:
            _fetch_tables(place, path, shard, store)
            return open_shard(path, shard, manifest)[1]
        except (Changed, Corrupt) as error:  # bytes that were changed on their way, or the object was
            reason = str(error).replace(str(path), str(place)).partition(";")[0]
        finally:
            path.unlink(missing_ok=True)
    raise Damaged(f"the tables of {place} failed {store.attempts} times, the last time with: {reason}; upload it again")


def _fetch_tables(place: Address, path: Path, shard: Shard, store: Store) -> None:
    """A file of the shard's size at `path`, with its tables and, in place of its pictures, a hole. Raises Changed."""
    store.require_size(place, shard.bytes)
    etag = store.look(place).etag
    with path.open("x+b") as file:
        file.truncate(shard.bytes)

        def fetch(begin: int, end: int) -> None:
            """S3 has a checksum of the whole object and of no part, so the bytes are fetched twice: a wrong label would be believed."""
            begin, end = min(begin, shard.bytes), min(end, shard.bytes)
            if begin < end:
                store.fetch_part(place, etag, begin, end, file.fileno(), lambda amount: None)
                first = os.pread(file.fileno(), end - begin, begin)
                store.fetch_part(place, etag, begin, end, file.fileno(), lambda amount: None)
                if os.pread(file.fileno(), end - begin, begin) != first:
                    raise Changed("bytes that differ from try to try")

        guessed = HEAD_BYTES + SAMPLE_BYTES * shard.samples
        fetch(0, guessed)
        samples_end, table = tables_at(path, shard)
        fetch(guessed, samples_end)
        fetch(table, shard.bytes)
