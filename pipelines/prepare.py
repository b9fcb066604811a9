"""`simclr prepare`: images → shards."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from pipelines.terminal import Bar, say
from simclr.data import shards
from simclr.data.manifest import Manifest
from simclr.data.sources import open_source


@dataclass(frozen=True)
class Args:
    """Write the images of a source as FFCV shards with a manifest. The same source and options give the same bytes."""

    source: str
    """A folder or tar archive of split/class/file, class/file or files alone; a dataset's name (cifar10, torchvision:NAME);
    or patterns[:train=4000,test=1000,size=32,seed=0,coloured]."""
    out: Path
    """Directory for the shards: new, empty, or holding the same dataset already."""
    options: Annotated[shards.Options, tyro.conf.arg(name="")] = field(default_factory=shards.Options)
    threads: int = os.cpu_count() or 1
    """Threads that decode and encode."""


def main(args: Args) -> None:
    manifest = prepare(args)
    per_split = ", ".join(f"{split} {manifest.examples(split):,}" for split in manifest.splits)
    print(f"{args.out}: {per_split} images, {len(manifest.classes) or 'no'} classes, {manifest.kind}")


def prepare(args: Args) -> Manifest:
    """Shards of `args.source` in `args.out`, made now or found there."""
    source = open_source(args.source)
    found = shards.existing(source, args.out, args.options)
    if found is not None:
        say(f"{args.out} holds these shards already; nothing to do")
        return found
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
        say(f"{manifest.skipped} images could not be read and were skipped; {args.out}/skipped.csv names them")
    return manifest
