"""Whether shards that exist already are those of a source and its options."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from simclr import files
from simclr.data.encode import digest_of
from simclr.data.manifest import LISTS, Manifest, read_manifest
from simclr.data.options import Options, stated
from simclr.data.sources.reading import essence, rows_of
from simclr.data.sources.source import Source
from simclr.errors import UserError

NOTES = ".writing-part-"
SHARD = re.compile(r"(train|test)-\d{5,}(-\d+)?\.beton")
Identity = Literal["times", "names", "content"]
"""What tells that a source is the same: names, sizes and modification times; names and sizes; or, beside these, every byte."""


def existing(source: Source, out: Path, options: Options, identity: Identity = "times") -> Manifest | None:
    """The manifest in `out`, if it was made from the same source with the same options; None if `out` is empty or holds an interrupted
    prepare. Raises UserError if it holds something else, or cannot be written."""
    files.require_writable(out)
    if (out / "manifest.json").exists():
        return agreed(read_manifest(out), source, out, options, identity)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; --out names a directory for the shards")
    ours = {path.name for path in unfinished(out)} if out.exists() else set()
    left = sorted(p.name for p in out.iterdir() if p.name not in ours) if out.exists() else []
    if left:
        raise UserError(f"{out} is not empty and no dataset (it holds {', '.join(left[:3])}); use another --out")
    return None


def agreed(manifest: Manifest, source: Source, out: object, options: Options, identity: Identity = "times") -> Manifest:
    """The `manifest` of `out`. Raises UserError if it was not made from the same source with the same options. With identity content,
    every file of the source is read."""
    ours = stated(options)
    if (manifest.source, manifest.options) != (source.spec, ours):
        differ = [f"source {manifest.source}"] if manifest.source != source.spec else []
        differ += [f"{k} {_shown(v)}" for k, v in manifest.options.items() if ours.get(k) != v]
        differ += [f"no --{k.replace('_', '-')}" for k in ours if k not in manifest.options]
        raise UserError(f"{out} already holds shards made with {', '.join(differ)}; use another --out, or remove it")
    if manifest.identity and manifest.identity != source.identity:
        raise UserError(f"{source.spec} has changed since {out} was made from it; use another --out, or remove it")
    _require_understood_alike(manifest, source, out)
    held = sum(manifest.examples(split) for split in manifest.splits) + manifest.skipped
    if source.total not in (None, held):
        raise UserError(f"{out} holds {held:,} images, {source.spec} has {source.total:,} now; use another --out, or remove it")
    if identity == "times" and manifest.times and source.times and manifest.times != source.times:
        raise UserError(
            f"{source.spec} has the names and sizes that {out} was made from, with other modification times; if the files were only "
            "copied, say --identity names; --identity content reads and compares them; if they have changed, use another --out"
        )
    if identity == "content":
        if not manifest.content:
            raise UserError(f"{out} was made before contents were noted; compare with --identity names, or use another --out")
        if content_of(source, options) != manifest.content:
            raise UserError(
                f"files of {source.spec} have other content than when {out} was made from them; use another --out, or remove it"
            )
    return manifest


def content_of(source: Source, options: Options) -> str:
    """The hash of the source's files, each of which is read, for `Manifest.content`."""
    rule = options.rule({})
    return content((item.split, digest_of(item.data, rule)) for item in source.items())


def content(digests: Iterable[tuple[str, int]]) -> str:
    """One hash of (split, digest) of every image; within a split their order counts."""
    of: defaultdict[str, Any] = defaultdict(hashlib.sha256)
    for split, digest in digests:
        of[split].update(digest.to_bytes(8, "little"))
    return joined_content({split: found.hexdigest() for split, found in of.items()})


def joined_content(of: Mapping[str, str]) -> str:
    """One hash of the splits' hashes of their digests, each of 8 bytes, the lowest first."""
    return hashlib.sha256(json.dumps(sorted(of.items())).encode()).hexdigest()


def unfinished(out: Path) -> list[Path]:
    """Files of an unfinished prepare: temporary files, and shards that have their final name but no manifest yet."""
    waiting, named, lists = [], [], []
    for path in out.iterdir():
        if ".writing-" in path.name:
            waiting.append(path)
        elif SHARD.fullmatch(path.name):
            named.append(path)
        elif path.name in LISTS:
            lists.append(path)
    # An earlier version had a note beside each shard.
    ours = any(path.name.startswith(NOTES) or path.name.endswith(".beton.json") for path in waiting)
    return [*waiting, *named, *lists] if ours else waiting


def _require_understood_alike(manifest: Manifest, source: Source, out: object) -> None:
    if manifest.captions != source.captioned:
        raise UserError(f"{out} holds shards that were made with{'out' * source.captioned} captions; use another --out")
    now, before = essence(source.understood), essence(manifest.understood)
    if not now or now == before:
        return
    if ("videos" in now) != ("videos" in before):
        raise UserError(f"{out} holds shards that were made with{'out' * ('videos' in now)} --videos; use another --out")
    ours, theirs = now["splits"], before.get("splits", {})
    if not source.understood.get("counted", True) and manifest.understood:  # what there is of each class is known only when it is read
        there_now = [{label for classes in of.values() for label in classes} for of in (theirs, ours)]
        if source.understood.get("asked") == manifest.understood.get("asked") and there_now[0] <= there_now[1]:
            return
    if not manifest.understood:  # of a manifest from before they were noted the classes alone are known; one class counts as none
        classes = sorted({label for of in ours.values() for label in of})
        classes = classes if len(classes) > 1 else []
        held = {split: manifest.examples(split) for split in manifest.splits}
        listed = {row.split: row.images for row in rows_of(source.understood)}
        as_many = all(0 <= listed.get(split, 0) - held.get(split, 0) <= manifest.skipped for split in {**held, **listed})
        if classes == list(manifest.classes) and (as_many or not source.understood.get("counted", True)):
            return
        there, here = (", ".join(f"{split} {count:,}" for split, count in of.items()) for of in (held, listed))
        if classes != list(manifest.classes):
            there, here = _shown(list(manifest.classes)), _shown(classes)
    elif ours == theirs:
        there, here = "other classes of single images", "with the same numbers of each class"
    else:
        splits = [split for split in {**theirs, **ours} if theirs.get(split) != ours.get(split)]
        there, here = (", ".join(f"{split}: {_counted(of.get(split))}" for split in splits) for of in (theirs, ours))
    raise UserError(f"{out} holds shards whose classes were read otherwise: {there} there, {here} now; use another --out")


def _counted(classes: dict[str, int] | None) -> str:
    return "no such split" if classes is None else f"{sum(classes.values()):,} of {len(classes):,} classes"


def _shown(value: Any) -> str:
    if isinstance(value, list) and len(value) > 3:
        return f"{len(value):,} ({_shown(value[:3])}, …)"
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return (text if len(text) <= 60 else f"{text[:57]}…") or "none"
