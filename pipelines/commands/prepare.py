"""`simclr prepare`: images → shards."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

import tyro

from pipelines.parts.run import Where, run
from pipelines.runs import sync
from pipelines.terminal import Bar, say, show
from simclr import files
from simclr.cores import cores
from simclr.data import shards
from simclr.data.manifest import Manifest
from simclr.data.pixels import unread
from simclr.data.s3.uri import address
from simclr.data.sources import videos
from simclr.data.sources.open import betons_at, open_source
from simclr.data.sources.reading import Reading, rows_of
from simclr.data.sources.source import Source
from simclr.errors import UserError
from simclr.text import printable


@dataclass(frozen=True)
class Args:
    """Write the images of a source as FFCV shards with a manifest. The same source and options give the same bytes."""

    source: str
    """A folder or archive (tar, zip) of split/class/file, class/file or files alone, a folder of archives, WebDataset shards
    (train-{000..146}.tar), Parquet, .beton files; on disk, and folders and archives also at s3://bucket/prefix; a dataset's name
    (cifar10, torchvision:NAME); patterns[:train=4000,test=1000,size=32,seed=0,coloured,captions]; or videos of them,
    rotating-patterns[:train=400,test=100,frames=10,size=32,seed=0,coloured]."""
    out: Path | None = None
    """Directory or s3://bucket/prefix for the shards: new, empty, or holding the same dataset already."""
    reading: Annotated[Reading, tyro.conf.arg(name="")] = field(default_factory=Reading)
    options: Annotated[shards.Options, tyro.conf.arg(name="")] = field(default_factory=shards.Options)
    identity: shards.Identity = "times"
    """What tells that a source is still the one that shards were made from. times: names, sizes and modification times; names: names and
    sizes, for files that were copied; content: their bytes too, which are all read."""
    threads: int = cores()
    """Threads that decode and encode in this process; of other processes --cpus-per-worker says it."""
    where: Annotated[Where, tyro.conf.arg(name="")] = field(default_factory=Where)
    dry_run: bool = False
    """Say what was understood, what would be written and how long it would take, and write nothing."""


def main(args: Args) -> None:
    if args.dry_run:
        show(dry_run(args))
        return
    manifest = prepare(args)
    per_split = ", ".join(f"{split} {manifest.examples(split):,}" for split in manifest.splits)
    show(f"{sync.shown(_out(args))}: {per_split} images, {len(manifest.classes) or 'no'} classes, {manifest.kind}")


def prepare(args: Args) -> Manifest:
    """Shards of `args.source` in `args.out`, made now or found there."""
    out = _out(args)
    if betons := betons_at(args.source):
        return _register(betons, args, out)
    source = open_source(args.source, args.reading)
    found = shards.held(source, out, args.options, args.identity)
    if found is not None:
        say(f"{sync.shown(out)} holds these shards already; nothing to do")
        return found
    return _write(args, source)


def dry_run(args: Args) -> str:
    """What would be prepared, for people."""
    from simclr.data.forecast import forecast

    if betons := betons_at(args.source):
        linked = (f"  {path} would be linked as the {split} split; nothing is encoded again" for split, path in betons.items())
        return "\n".join([told(_described(betons, args)), "", *linked])
    source = open_source(args.source, args.reading)
    found = forecast(source, args.options, max(args.threads, 1))
    return "\n".join([told(source), "", *map(printable, found.lines(source.total, len(rows_of(source.understood))))])


def told(source: Source) -> str:
    """What was understood of a source: splits, classes, examples, what is left out and what may not be meant so."""
    understood: dict[str, Any] = source.understood
    if not understood:
        return f"{source.spec}: {source.total or 'some'} images"
    lines = [f"{source.spec}: {f'{source.total:,} images' if source.total is not None else 'images are counted as they are read'}"]
    lines += [f"  splits   {understood['splits_by']}", f"  classes  {understood['classes_by']}"]
    lines += [f"  videos   {videos.counted(understood['videos'])}"] if "videos" in understood else []
    lines += [""]
    table = [("split", "images", "labelled", "classes", "smallest", "largest")]
    for row in rows_of(understood):
        share = f"{100 * row.labelled / max(row.images, 1):.4g} %"
        ends = printable(row.smallest), printable(row.largest)
        cells = (f"{row.images:,}", share, *ends) if row.images else ("?", "?", "?", "?")
        table.append((row.split, *cells[:2], f"{row.classes:,}", *cells[2:]))
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines += ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    for split in understood["splits"].values():
        if split["examples"]:
            lines += ["", *(f"  {name}  →  {label if label is not None else 'no class'}" for name, label in split["examples"])]
    left = dict(understood["left_out"])
    if left:
        kinds = [f"{count:,} {ending}{f' ({why})' if (why := unread(ending)) else ''}" for ending, count in _most(left)]
        lines += ["", f"  left out: {', '.join(kinds)}"]
    return "\n".join(map(printable, [*lines, *(f"  note: {note}" for note in understood["notes"])]))


def _most(left: dict[str, int]) -> list[tuple[str, int]]:
    """Kinds that are pictures to their owner, the most frequent others, and the rest in one."""
    ordered = sorted(left.items(), key=lambda kv: (not unread(kv[0]), -kv[1]))
    rest = sum(count for _, count in ordered[8:])
    return [*ordered[:8], *([("others", rest)] if rest else [])]


def _out(args: Args) -> Path:
    if args.out is None:
        raise UserError("where to? give --out DIR, or --dry-run to see what would be written")
    files.require_folders_name(args.out)
    return args.out


def _described(betons: dict[str, Path], args: Args) -> Source:
    """What FFCV files hold. Raises UserError for a flag that would change nothing."""
    from simclr.data.sources.beton import described

    idle = [
        f"--{f.name.replace('_', '-')}"
        for given, usual in ((args.reading, Reading()), (args.options, shards.Options()), (args.where, Where()))
        for f in fields(usual)
        if getattr(given, f.name) != getattr(usual, f.name)
    ] + ["--identity"] * (args.identity != "times")
    if idle:
        raise UserError(f"{args.source} is linked as it is, so {', '.join(idle)} would change nothing; leave that out")
    return described(betons)


def _register(betons: dict[str, Path], args: Args, out: Path) -> Manifest:
    from simclr.data.sources.beton import register

    if address(out) is not None:
        raise UserError(f"{sync.shown(out)}: .beton files are linked in place, so --out must be on this machine's disk")
    say(told(_described(betons, args)))
    manifest = register(betons, out, say)
    say(f"{', '.join(str(path) for path in betons.values())}: linked as they are, not encoded again")
    return manifest


def _write(args: Args, source: Source) -> Manifest:
    out = _out(args)
    say(told(source))
    with Bar("prepare", source.total) as bar:

        def resumed(done: int) -> None:
            bar.resume_at(done)
            say(f"going on with {sync.shown(out)} behind the {done:,} images that it holds already")

        manifest = shards.prepare(
            source,
            out,
            args.options,
            max(args.threads, 1),
            bar.update,
            resumed,
            identity=args.identity,
            says=say,
            elsewhere=None if args.where.here else shards.Elsewhere(run=functools.partial(run, where=args.where), reading=args.reading),
        )
    if manifest.duplicates:
        copies = "image is a copy" if manifest.duplicates == 1 else "images are copies"
        say(f"{manifest.duplicates:,} {copies} of others, and so each other's negatives; {sync.shown(out)}/duplicates.csv lists them")
    if manifest.skipped:
        say(f"skipped, because they could not be read: {manifest.skipped:,}; {sync.shown(out)}/skipped.csv names them")
    return manifest
