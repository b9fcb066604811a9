"""A client of S3 that lists a bucket held in memory, in pages of a few keys."""

from __future__ import annotations

import bisect
import functools
from typing import Any

from simclr.data.s3.store import Store


class Bucket:
    """`keys`: key → (bytes, ETag). `obeys_start`: whether StartAfter counts, which some servers do not know."""

    def __init__(self, keys: dict[str, tuple[int, str]], page: int = 10, obeys_start: bool = True) -> None:
        self.objects, self.keys, self.page, self.obeys_start = keys, sorted(keys), page, obeys_start
        self.asked: list[dict[str, str]] = []

    def list_objects_v2(self, **asked: str) -> dict[str, Any]:
        self.asked.append(asked)
        start, token = asked.get("StartAfter", "") if self.obeys_start else "", asked.get("ContinuationToken", "")
        contents: list[dict[str, Any]] = []
        folders: list[str] = []
        prefix = asked["Prefix"]
        at = int(token) if token else max(bisect.bisect_right(self.keys, start), bisect.bisect_left(self.keys, prefix))
        while self._is_below(prefix, at) and len(contents) + len(folders) < self.page:
            key, at = self.keys[at], at + 1
            inner, slash, _ = key[len(prefix) :].partition("/")
            if asked.get("Delimiter") and slash:
                folders.append(f"{prefix}{inner}/")
                at = bisect.bisect_left(self.keys, f"{prefix}{inner}0")  # the letter behind the slash
                continue
            contents.append({"Key": key, "Size": self.objects[key][0], "ETag": self.objects[key][1]})
        within = [{"Prefix": folder} for folder in folders]
        more = self._is_below(prefix, at)
        return {"Contents": contents, "CommonPrefixes": within, "IsTruncated": more, "NextContinuationToken": str(at)}

    def _is_below(self, prefix: str, at: int) -> bool:
        return at < len(self.keys) and self.keys[at].startswith(prefix)


def store_of(bucket: Bucket) -> Store:
    """One for all tests of a process: boto3 takes half a second for a client."""
    store = _store()
    store.access.client = bucket
    return store


@functools.cache
def _store() -> Store:
    return Store(threads=4, attempts=1)
