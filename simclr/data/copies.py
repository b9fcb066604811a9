"""Images whose files are copies of others: each other's negatives in training, and, where their classes differ, a contradiction.

They are found by the hash of their content, some buckets of hashes at a time: what is in memory does not grow with the images.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simclr import files
from simclr.data.note import SPLITS, Note
from simclr.text import cell

_AT_ONCE = 1 << 22  # images of a bucket; each takes some 100 bytes while its copies are looked for


@dataclass(frozen=True, slots=True)
class Sample:
    """An image in the shards."""

    split: str
    number: int
    """Its sample id."""
    name: str
    """In the source; "" where the source gives pixels."""
    label: str | None


@dataclass(frozen=True, slots=True)
class Pairs:
    """Rows (n, 2): places of images among all, the training ones first; a copy, and what it is a copy of. In the order of the copies."""

    same: NDArray[np.int64]
    """With the first image of its content."""
    conflicts: NDArray[np.int64]
    """Where its class is another than that of the first image of its content that has one, with this."""


def copies(notes: Sequence[Note], examples: dict[str, int]) -> Pairs:
    """The copies among the images of a dataset; `examples`: how many a split has."""
    buckets = 1 << max(sum(examples.values()) // _AT_ONCE, 0).bit_length()
    same, conflicts = [np.zeros((0, 2), np.int64)], [np.zeros((0, 2), np.int64)]
    for bucket in range(buckets):
        digest, label, place = _bucket(notes, examples, bucket, buckets)
        order = np.lexsort((place, digest))
        digest, label, place = digest[order], label[order], place[order]
        first = _firsts(digest)
        again = np.flatnonzero(first != np.arange(len(first)))
        same.append(np.stack([place[again], place[first[again]]], 1))
        labelled = label >= 0
        digest, label, place = digest[labelled], label[labelled], place[labelled]
        first = _firsts(digest)
        other = np.flatnonzero(label != label[first])
        conflicts.append(np.stack([place[other], place[first[other]]], 1))
    return Pairs(*(rows[np.argsort(rows[:, 0], kind="stable")] for rows in map(np.concatenate, (same, conflicts))))


def _bucket(
    notes: Sequence[Note], examples: dict[str, int], bucket: int, buckets: int
) -> tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.int64]]:
    """Digest, class and place of the images whose digest is of a bucket."""
    codes: dict[str, int] = {}
    found: list[tuple[Any, Any, Any]] = [(np.zeros(0, np.uint64), np.zeros(0, np.int64), np.zeros(0, np.int64))]
    at = begins(examples)
    for note in notes:
        split, label, digest, reason = note.columns("split", "label", "digest", "reason")
        of_label = np.array([codes.setdefault(name, len(codes)) for name in note.about.labels] + [-1], np.int64)
        for number, name in enumerate(SPLITS):
            rows = np.flatnonzero((split == number) & (reason == ""))
            mine = np.flatnonzero(digest[rows] % np.uint64(buckets) == bucket)
            found.append((digest[rows][mine], of_label[label[rows][mine]], at[name] + mine))
            at[name] += len(rows)
    digests, labels, places = (np.concatenate(of) for of in zip(*found, strict=True))
    return digests, labels, places


def begins(examples: dict[str, int]) -> dict[str, int]:
    """Split → place of its first image among all."""
    return {"train": 0, "test": examples.get("train", 0)}


def _firsts(digest: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The index of the first equal digest, of each in a sorted array."""
    new = np.ones(len(digest), bool)
    new[1:] = digest[1:] != digest[:-1]
    return np.maximum.accumulate(np.where(new, np.arange(len(digest)), 0))


def write_copies(out: Path, notes: Sequence[Note], pairs: Pairs, examples: dict[str, int]) -> tuple[Sample, Sample] | None:
    """Write duplicates.csv and conflicts.csv into `out`, each where it has rows. Returns the first conflict."""
    at = begins(examples)["test"]
    ids = ((*_split_of(a, at), *_split_of(b, at)) for a, b in pairs.same.tolist())
    write_list(out / "duplicates.csv", ("split", "sample", "same_as_split", "same_as_sample"), ids)
    known = _samples(notes, examples, np.unique(pairs.conflicts))
    shown = ((known[a], known[b]) for a, b in pairs.conflicts.tolist())
    head = ("split", "sample", "name", "label", "same_as_split", "same_as_sample", "same_as_name", "same_as_label")
    rows = ((a.split, a.number, a.name, a.label, b.split, b.number, b.name, b.label) for a, b in shown)
    write_list(out / "conflicts.csv", head, rows)
    return (known[pairs.conflicts[0, 0]], known[pairs.conflicts[0, 1]]) if len(pairs.conflicts) else None


def shown(count: int, first: tuple[Sample, Sample] | None) -> str:
    """The sentence for the user about so many conflicts; "" without one."""
    if first is None:
        return ""
    copy, original = ((f"{s.name or f'sample {s.number} of {s.split}'} (class {s.label})") for s in first)
    many = "image is a copy" if count == 1 else "images are copies"
    return f"{count:,} {many} with another class, the first: {copy} of {original}; conflicts.csv lists them"


def write_list(path: Path, head: Sequence[str], rows: Iterable[tuple[object, ...]]) -> int:
    """Write a CSV file, if there are rows. Returns how many."""
    count = 0
    for count, row in enumerate(rows, 1):
        if count == 1:
            file = files.anew(path, newline="", encoding="utf-8", errors="backslashreplace")
            csv.writer(file).writerow(head)
        csv.writer(file).writerow([*map(cell, row)])
    if count:
        file.close()
    return count


def _split_of(place: int, test: int) -> tuple[str, int]:
    return ("train", place) if place < test else ("test", place - test)


def _samples(notes: Sequence[Note], examples: dict[str, int], wanted: NDArray[np.int64]) -> dict[int, Sample]:
    """Place → image, of the `wanted` places, which are sorted."""
    return dict(_found(notes, examples, wanted)) if len(wanted) else {}


def _found(notes: Sequence[Note], examples: dict[str, int], wanted: NDArray[np.int64]) -> Iterator[tuple[int, Sample]]:
    at, test = begins(examples), begins(examples)["test"]
    for note in notes:
        split, label, name, reason = note.columns("split", "label", "name", "reason")
        labels = [*note.about.labels, None]
        for number, of in enumerate(SPLITS):
            rows = np.flatnonzero((split == number) & (reason == ""))
            for place in wanted[np.searchsorted(wanted, at[of]) : np.searchsorted(wanted, at[of] + len(rows))].tolist():
                row = rows[place - at[of]]
                yield place, Sample(*_split_of(place, test), str(name[row]), labels[label[row]])
            at[of] += len(rows)
