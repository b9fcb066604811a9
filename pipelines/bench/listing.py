"""`simclr bench listing`: what listing a bucket of very many pictures costs, which is only pretended: seconds, and memory at its peak."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.bench.result import Row
from simclr.errors import UserError

_PAGE, _IN_A_FOLDER = 1000, 1300  # keys of an answer, and of a class, as S3 and ImageNet have them


def listing(keys: Sequence[int], answer_ms: float, trials: int) -> list[Row]:
    """Print and return, for each number of keys, seconds and MiB of listing a prefix, of understanding its names, and of cutting it into
    portions of 1,024, each in a process of its own; and keys/s of the listing alone, one page after the other and side by side, where
    each answer takes `answer_ms`. Each trial anew."""
    if min(keys, default=0) < 1:
        raise UserError(f"--keys is {' '.join(map(str, keys)) or 'empty'}; expected numbers of keys, at least 1")
    rows: list[Row] = []
    print(f"{'keys':>12} {'answer':>8} {'listing':>20} {'seconds':>9} {'keys/s':>10} {'peak, MiB':>10}")
    for count, trial in itertools.product(keys, range(trials)):
        for how, latency in (("planned", 0.0), ("one after the other", answer_ms), ("side by side", answer_ms)):
            done = subprocess.run(
                [sys.executable, "-m", "pipelines.bench.listing", str(count), str(latency), how], capture_output=True, text=True
            )
            if done.returncode:
                raise RuntimeError(done.stderr)
            row = json.loads(done.stdout.splitlines()[-1])
            print(f"{count:>12,} {latency:>5g} ms {how:>20} {row['seconds']:>9.1f} {row['keys_per_s']:>10,.0f} {row['peak_mib']:>10,.0f}")
            rows.append({"name": how, "keys": count, "trial": trial, "answer_ms": latency} | row)
    return rows


class _Keys(Sequence[str]):
    """Ascending keys of `count` pictures in folders of classes, made when they are asked for."""

    def __init__(self, count: int) -> None:
        self.many = count

    def __len__(self) -> int:
        return self.many

    def __getitem__(self, at: Any) -> Any:
        folder = f"n{at // _IN_A_FOLDER:08}"
        return f"photos/train/{folder}/{folder}_{at:09}.JPEG"


class _Bucket:
    """The part of an S3 client that lists, over `keys`; each answer takes `latency_s`."""

    def __init__(self, keys: Sequence[str], latency_s: float) -> None:
        self.keys, self.latency_s = keys, latency_s

    def list_objects_v2(self, Bucket: str, Prefix: str, StartAfter: str = "", ContinuationToken: str = "", Delimiter: str = "") -> Any:
        time.sleep(self.latency_s)
        at = int(ContinuationToken) if ContinuationToken else max(bisect.bisect_right(self.keys, StartAfter), 0)
        contents: list[dict[str, Any]] = []
        folders: list[dict[str, str]] = []
        at = max(at, bisect.bisect_left(self.keys, Prefix))
        while at < len(self.keys) and self.keys[at].startswith(Prefix) and len(contents) + len(folders) < _PAGE:
            key = self.keys[at]
            inner, slash, _ = key[len(Prefix) :].partition("/")
            if Delimiter and slash:
                folders.append({"Prefix": f"{Prefix}{inner}/"})
                at = bisect.bisect_left(self.keys, f"{Prefix}{inner}0")  # the letter behind the slash
                continue
            contents.append({"Key": key, "Size": 110_000, "ETag": f'"{hashlib.md5(key.encode(), usedforsecurity=False).hexdigest()}"'})
            at += 1
        more = at < len(self.keys) and self.keys[at].startswith(Prefix)
        return {"Contents": contents, "CommonPrefixes": folders, "IsTruncated": more, "NextContinuationToken": str(at)}


def _measured(count: int, answer_ms: float, how: str) -> dict[str, Any]:
    from simclr.data.s3.store import Store
    from simclr.data.s3.uri import Address
    from simclr.data.sources.layout import understand
    from simclr.data.sources.portions import portions
    from simclr.data.sources.reading import Reading
    from simclr.data.sources.s3 import s3_prefix

    store, place = Store(threads=16), Address("pretended", "photos")
    store.access.client = _Bucket(_Keys(count), answer_ms / 1e3)
    before, began = _kib("VmRSS"), time.perf_counter()
    more: dict[str, Any] = {}
    if how == "planned":
        source, _ = understand(s3_prefix(place, store), Reading())
        more = {"understood_s": time.perf_counter() - began}
        plan = [portion.to_dict() for portion in portions(source, 1024)]
        more |= {"portions": len(plan), "portions_mib": sum(len(part["pictures"]) for part in plan) / 2**20}
        found = source.total
    else:
        found = sum(1 for _ in (store.listed if how == "one after the other" else store.listed_side_by_side)(place, count))
    seconds = time.perf_counter() - began
    if found != count:
        raise RuntimeError(f"{found} of {count} keys were listed")
    return {"seconds": seconds, "keys_per_s": count / seconds, "peak_mib": (_kib("VmHWM") - before) / 1024} | more


def _kib(name: str) -> int:
    """Of this process's memory. getrusage's peak would begin with that of the process which started this one."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0])


if __name__ == "__main__":
    print(json.dumps(_measured(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3])))
