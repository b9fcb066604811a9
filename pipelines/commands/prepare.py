"""`simclr prepare`: images → shards."""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from pipelines.runs import sync
from pipelines.terminal import Bar, say
from simclr.data import shards
from simclr.data.manifest import LISTS, Manifest
from simclr.data.s3.uri import Address, address, copy_of, locked
from simclr.data.sources.open import open_source
from simclr.data.sources.source import Source
from simclr.errors import UserError


@dataclass(frozen=True)
class Args:
    """Write the images of a source as FFCV shards with a manifest. The same source and options give the same bytes."""

    source: str
    """A folder or tar archive of split/class/file, class/file or files alone, on disk or at s3://bucket/prefix; a dataset's name
    (cifar10, torchvision:NAME); or patterns[:train=4000,test=1000,size=32,seed=0,coloured]."""
    out: Path
    """Directory or s3://bucket/prefix for the shards: new, empty, or holding the same dataset already."""
    options: Annotated[shards.Options, tyro.conf.arg(name="")] = field(default_factory=shards.Options)
    threads: int = os.cpu_count() or 1
    """Threads that decode and encode."""


def main(args: Args) -> None:
    manifest = prepare(args)
    per_split = ", ".join(f"{split} {manifest.examples(split):,}" for split in manifest.splits)
    print(f"{sync.shown(args.out)}: {per_split} images, {len(manifest.classes) or 'no'} classes, {manifest.kind}")


def prepare(args: Args) -> Manifest:
    """Shards of `args.source` in `args.out`, made now or found there."""
    source = open_source(args.source)
    at = address(args.out)
    if at is not None:
        return _prepare_in_s3(args, source, at)
    found = shards.existing(source, args.out, args.options)
    if found is not None:
        say(f"{args.out} holds these shards already; nothing to do")
        return found
    return _write(args, source)


def _prepare_in_s3(args: Args, source: Source, at: Address) -> Manifest:
    """Write to a directory of this machine's cache, send it, and keep it as the copy that training reads."""
    from simclr.data.s3 import remote
    from simclr.data.s3.store import Store

    store = Store()
    made_from = hashlib.sha256(f"{source.spec} {args.options}".encode()).hexdigest()[:8]
    here, copy = copy_of(at, f"staging/{made_from}"), copy_of(at, "shards")
    found = remote.manifest_at(at, store)
    if found is not None:
        manifest = shards.agreed(found[0], source, at, args.options)
        shutil.rmtree(here, ignore_errors=True)  # left by a prepare that was killed after sending everything
        say(f"{at} holds these shards already; nothing to do")
        return manifest
    # Shards without a manifest are ours, from an incomplete send.
    left = [o.name for o in store.listing(at) if o.name not in LISTS and not o.name.endswith(".beton")]
    if left:
        raise UserError(f"{at} is not empty and no dataset (it holds {', '.join(left[:3])}); use another --out")
    manifest = shards.existing(source, here, args.options) or _write(replace(args, out=here), source)
    with Bar("upload", None, "MiB", "MiB/s") as bar:
        remote.push(here, at, sync.mebibytes(bar), store)
    with locked(copy):
        shutil.rmtree(copy, ignore_errors=True)
        here.rename(copy)
    return manifest


def _write(args: Args, source: Source) -> Manifest:
    with Bar("prepare", source.total) as bar:

        def resumed(done: int) -> None:
            bar.resume_at(done)
            say(f"going on with {args.out} behind the {done:,} images that it holds already")

        manifest = shards.prepare(
            source,
            args.out,
            args.options,
            max(args.threads, 1),
            bar.update,
            resumed,
            lambda done, of: bar.update(bar.done, f"sealing {done >> 20:,} of {of >> 20:,} MiB"),
        )
    if source.ignored:
        kinds = ", ".join(f"{count:,} {ending or 'without ending'}" for ending, count in source.ignored.most_common(5))
        say(f"{source.ignored.total():,} files are no images by their names and were left out: {kinds}")
    if manifest.duplicates:
        say(f"{manifest.duplicates:,} images are copies of others, and so each other's negatives; {args.out}/duplicates.csv lists them")
    if manifest.skipped:
        say(f"{manifest.skipped} images could not be read and were skipped; {sync.shown(args.out)}/skipped.csv names them")
    return manifest
