"""`simclr verify`: checks that shards are whole."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pipelines.runs import sync
from pipelines.terminal import Bar, show
from simclr.data.manifest import read_manifest
from simclr.data.s3 import uri as s3_uri
from simclr.errors import UserError

_SHOWN = 3


@dataclass(frozen=True)
class Args:
    """Read every byte and every image of prepared shards again, and compare each shard with the manifest."""

    data: Annotated[Path, tyro.conf.Positional]
    """Directory of prepared shards."""
    threads: int = os.cpu_count() or 1
    """Threads that decode."""


def main(args: Args) -> None:
    from simclr.data.verify import verify

    data = sync.shards(args.data)
    total = sum(shard.bytes for shard in read_manifest(data, look=False).shards)
    lines, damaged = [], 0
    with Bar("verify", total >> 20, "MiB", "MiB/s") as bar:
        for found in verify(data, max(args.threads, 1), lambda done: bar.update(done >> 20)):
            more = f"; and {len(found.wrong) - _SHOWN} more" if len(found.wrong) > _SHOWN else ""
            state = f"damaged: {'; '.join(found.wrong[:_SHOWN])}{more}" if found.wrong else "whole"
            lines.append(f"{found.shard.name}  {found.shard.bytes / 2**20:8,.1f} MiB  {found.shard.samples:9,} images  {state}")
            damaged += bool(found.wrong)
    show("\n".join(lines))
    if damaged and s3_uri.address(args.data) is not None:
        (data / "manifest.json").unlink()  # so that the next command checks this copy and fetches damaged shards again
        raise UserError(f"{damaged} of {len(lines)} shards of this machine's copy are damaged; they are fetched again by the next command")
    if damaged:
        raise UserError(f"{damaged} of {len(lines)} shards of {args.data} are damaged; prepare or fetch the data again")
