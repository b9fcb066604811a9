"""Images whose files are copies of others: each other's negatives in training, and, where their classes differ, a contradiction."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from simclr import files
from simclr.data.ffcv.writer import Note
from simclr.text import cell


@dataclass(frozen=True, slots=True)
class Sample:
    """An image in the shards."""

    split: str
    number: int
    """Its sample id."""
    name: str
    """In the source; "" where the source gives pixels."""
    label: str | None


def copies(notes: dict[str, list[Note]]) -> tuple[list[tuple[Sample, Sample]], list[tuple[Sample, Sample]]]:
    """Pairs (a copy, the first sample of its content); and pairs of other classes: (a copy, the first that has a class)."""
    first: dict[int, Sample] = {}
    labelled: dict[int, Sample] = {}
    found, conflicts = [], []
    for digest, sample in _samples(notes):
        if digest in first:
            found.append((sample, first[digest]))
        else:
            first[digest] = sample
        if sample.label is not None and labelled.setdefault(digest, sample).label != sample.label:
            conflicts.append((sample, labelled[digest]))
    return found, conflicts


def write_copies(out: Path, found: Sequence[tuple[Sample, Sample]], conflicts: Sequence[tuple[Sample, Sample]]) -> None:
    """Write duplicates.csv and conflicts.csv into `out`, each where it has rows."""
    head = ("split", "sample", "same_as_split", "same_as_sample")
    write_list(out / "duplicates.csv", head, [(a.split, a.number, b.split, b.number) for a, b in found])
    head = ("split", "sample", "name", "label", "same_as_split", "same_as_sample", "same_as_name", "same_as_label")  # type: ignore[assignment]
    rows = [(a.split, a.number, a.name, a.label, b.split, b.number, b.name, b.label) for a, b in conflicts]
    write_list(out / "conflicts.csv", head, rows)


def shown(conflicts: Sequence[tuple[Sample, Sample]]) -> str:
    """The sentence for the user; "" without conflicts."""
    if not conflicts:
        return ""
    copy, original = ((f"{s.name or f'sample {s.number} of {s.split}'} (class {s.label})") for s in conflicts[0])
    many = "image is a copy" if len(conflicts) == 1 else "images are copies"
    return f"{len(conflicts):,} {many} with another class, the first: {copy} of {original}; conflicts.csv lists them"


def write_list(path: Path, head: Sequence[str], rows: Sequence[tuple[object, ...]]) -> None:
    """Write a CSV file, if there are rows."""
    if rows:
        with files.anew(path, newline="", encoding="utf-8", errors="backslashreplace") as file:
            csv.writer(file).writerows([head, *(map(cell, row) for row in rows)])


def _samples(notes: dict[str, list[Note]]) -> Iterator[tuple[int, Sample]]:
    for split, of in notes.items():
        number = 0
        for note in of:
            named = len(note.names) == len(note.which)
            for i, (digest, which) in enumerate(zip(note.digests, note.which, strict=True)):
                yield digest, Sample(split, number, note.names[i] if named else "", note.labels[which])
                number += 1
