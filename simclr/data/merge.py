"""From the notes of a prepare's parts to lists and manifest, one note after the other: the memory does not grow with the images."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from simclr.data.agreement import joined_content
from simclr.data.copies import copies, shown, write_copies, write_list
from simclr.data.depth import Rule
from simclr.data.manifest import Manifest, write_names
from simclr.data.note import SPLITS, Note
from simclr.data.options import Options, stated
from simclr.data.shard_parts import Refused
from simclr.data.sources.reading import counted
from simclr.data.sources.source import Source
from simclr.data.survey import Choice


@dataclass(frozen=True, slots=True)
class Found:
    """What the notes say of classes and content."""

    classes: dict[str, Counter[str | None]]
    """Split → class → samples; None = those without one."""
    content: str
    """For `Manifest.content`."""

    @property
    def names(self) -> tuple[str, ...]:
        """The sorted classes; a single one tells nothing apart."""
        labels = {label for of in self.classes.values() for label in of if label is not None}
        return tuple(sorted(labels)) if len(labels) > 1 else ()


def found_in(source: Source, notes: Sequence[Note]) -> Found:
    """Raises Refused where there are not enough images to train on."""
    classes: dict[str, Counter[str | None]] = {split: Counter() for split in SPLITS}
    hashed: dict[str, Any] = {}
    for note in notes:
        split, label, digest, reason = note.columns("split", "label", "digest", "reason")
        names = [*note.about.labels, None]
        for number, of in enumerate(SPLITS):
            mine = split == number
            if mine.any():
                hashed.setdefault(of, hashlib.sha256()).update(digest[mine].astype("<u8").tobytes())
            numbers, counts = np.unique(label[mine & (reason == "")], return_counts=True)
            classes[of].update({names[number]: int(count) for number, count in zip(numbers, counts, strict=True)})
    count = sum(of.total() for of in classes.values())
    if count < 2 or not classes["train"]:
        skipped = sum(note.about.skipped for note in notes)
        first = next((": ".join(note.about.first[0]) for note in notes if note.about.first), "")
        why = f" ({skipped} could not be read, the first: {first})" if skipped else ""
        usable = f"{count} usable image{'s' * (count != 1)}"
        raise Refused(f"{source.spec} has {usable} to train on{why}; contrasting needs at least 2")
    return Found(classes, joined_content({of: digest.hexdigest() for of, digest in hashed.items()}))


def merged(
    source: Source,
    options: Options,
    choice: Choice,
    rule: Rule,
    notes: Sequence[Note],
    found: Found,
    versions: dict[str, str],
    folder: Path,
) -> tuple[Manifest, str]:
    """The manifest of all shards, and a sentence on copies with other classes, or "". The lists are written into `folder`."""
    abouts = [note.about for note in notes]
    splits = {split: shards for split in SPLITS if (shards := tuple(shard for about in abouts for shard in about.of(split)))}
    examples = {split: found.classes[split].total() for split in SPLITS}
    pairs = copies(notes, examples)
    conflict = write_copies(folder, notes, pairs, examples)
    write_list(folder / "skipped.csv", ("name", "reason"), _skipped(notes))
    for split in splits:
        if not any(split in about.nameless for about in abouts):
            write_names(folder, split, _names(notes, split))
    mean, square = np.sum([about.sums for about in abouts], 0) / examples["train"]
    heights, widths = ([side for about in abouts for side in getattr(about, name)] for name in ("height_px", "width_px"))
    counts: dict[str, Any] = {name: sum(about.counts[name] for about in abouts) for name in abouts[0].counts}
    pixels = counts | {"ranges": {kind: [*known] for kind, known in rule.ranges.items()}, "stated": rule.stated}
    manifest = Manifest(
        splits=splits,
        classes=found.names,
        kind=choice.kind,
        height_px=(min(heights), max(heights)),
        width_px=(min(widths), max(widths)),
        mean=tuple(round(float(m), 6) for m in mean),  # type: ignore[arg-type]
        std=tuple(round(float(s), 6) for s in np.sqrt(np.maximum(square - mean**2, 0))),  # type: ignore[arg-type]
        source=source.spec,
        identity=source.identity,
        times=source.times,
        content=found.content,
        understood=counted(source.understood, found.classes),
        options=stated(options),
        captions=source.captioned,
        skipped=sum(about.skipped for about in abouts),
        duplicates=len(pairs.same),
        conflicts=len(pairs.conflicts),
        pixels=pixels if any(counts.values()) else {},
        videos=_videos(notes) if source.videos else {},
        versions=versions,
    )
    return manifest, shown(len(pairs.conflicts), conflict)


def _videos(notes: Sequence[Note]) -> dict[str, tuple[int, ...]]:
    """For `Manifest.videos`: split → id of the first frame of each video."""
    firsts: dict[str, list[int]] = {}
    ids = Counter[str]()
    before: dict[str, str] = {}
    for video, split, samples, *_ in _runs(notes):
        if before.get(split) != video:  # a video may go on in the next part
            firsts.setdefault(split, []).append(ids[split])
        before[split] = video
        ids[split] += samples
    return {split: tuple(firsts[split]) for split in SPLITS if split in firsts}


def uneven(notes: Sequence[Note]) -> str:
    """A sentence on videos whose frames differ in size; "" where there is none."""
    runs = _runs(notes)
    found = {name: (a, b) for (name, *a), (other, *b) in itertools.pairwise(runs) if name == other and a[2:] != b[2:]}
    if not found:
        return ""
    name, (one, two) = next(iter(found.items()))
    return (
        f"{len(found):,} video{'s have' if len(found) != 1 else ' has'} frames of several sizes, as {name} of {one[3]} × {one[2]} and "
        f"{two[3]} × {two[2]} px; each is cropped by its own size, but is this one video?"
    )


def _runs(notes: Sequence[Note]) -> Iterator[tuple[str, str, int, int, int]]:
    for note in notes:
        yield from note.about.videos


def _skipped(notes: Sequence[Note]) -> Iterator[tuple[str, str]]:
    """Name and reason of each image that could not be used: the training split's first."""
    for number in range(len(SPLITS)):
        for note in notes:
            if note.about.skipped:
                split, name, reason = note.columns("split", "name", "reason")
                yield from zip(*(column[(split == number) & (reason != "")].tolist() for column in (name, reason)), strict=True)


def _names(notes: Sequence[Note], split: str) -> Iterator[str]:
    for note in notes:
        of, name, reason = note.columns("split", "name", "reason")
        yield from name[(of == SPLITS.index(split)) & (reason == "")].tolist()
