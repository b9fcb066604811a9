"""`simclr verify`: checks that shards are whole."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from pipelines.parts.run import Where, run
from pipelines.runs import sync
from pipelines.terminal import Bar, show
from simclr.cores import cores
from simclr.data.manifest import Manifest
from simclr.data.s3 import uri as s3_uri
from simclr.errors import UserError

_SHOWN = 3


@dataclass(frozen=True)
class Args:
    """Read every byte and every image of prepared shards again, and compare each shard with the manifest."""

    data: Annotated[Path, tyro.conf.Positional]
    """Directory of prepared shards, or s3://bucket/prefix. Of the latter this machine's copy is verified, and fetched where there is none;
    with --address or --workers, what lies in S3: each worker fetches a shard at a time, and keeps none."""
    threads: int = cores()
    """Threads that decode in this process; of other processes --cpus-per-worker says it."""
    where: Annotated[Where, tyro.conf.arg(name="")] = field(default_factory=Where)


def main(args: Args) -> None:
    from simclr.data.verify import manifest_of

    here = args.where.here
    data = sync.shards(args.data) if here else args.data
    manifest = manifest_of(str(data))
    wrong: dict[int, list[str]] = {}
    done = 0
    with Bar("verify", sum(shard.bytes for shard in manifest.shards) >> 20, "MiB", "MiB/s") as bar:
        for place, found in _verified(args, data, manifest):
            wrong[place] = found
            bar.update((done := done + manifest.shards[place].bytes) >> 20)
    lines = []
    for place, shard in enumerate(manifest.shards):
        found = wrong[place]
        more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        state = f"damaged: {'; '.join(found[:_SHOWN])}{more}" if found else "whole"
        lines.append(f"{shard.name}  {shard.bytes / 2**20:8,.1f} MiB  {shard.samples:9,} images  {state}")
    show("\n".join(lines))
    damaged = sum(map(bool, wrong.values()))
    if damaged and here and s3_uri.address(args.data) is not None:
        (data / "manifest.json").unlink()  # so that the next command checks this copy and fetches damaged shards again
        raise UserError(f"{damaged} of {len(lines)} shards of this machine's copy are damaged; they are fetched again by the next command")
    if damaged:
        raise UserError(f"{damaged} of {len(lines)} shards of {sync.shown(args.data)} are damaged; prepare or fetch the data again")


def _verified(args: Args, data: Path, manifest: Manifest) -> Iterator[tuple[int, list[str]]]:
    """Place in the manifest and faults of each shard, in the order in which they are done."""
    from simclr.data.verify import make_verified, verify

    if args.where.here:
        for place, found in enumerate(verify(data, max(args.threads, 1))):
            yield place, list(found.wrong)
        return
    digest = hashlib.sha256(manifest.to_json().encode()).hexdigest()
    settings = {"data": sync.shown(data), "manifest": digest, "from": str(Path.cwd())}
    for part, result in run(make_verified, settings, [{"shard": place} for place in range(len(manifest.shards))], args.where):
        yield part["shard"], result["wrong"]
