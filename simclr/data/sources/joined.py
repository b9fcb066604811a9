"""Several trees as one: the loose files of a folder and the archives in it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from simclr.data.sources.source import Data, Part, Tree, digest
from simclr.errors import UserError


def joined(spec: str, trees: Sequence[Tree]) -> Tree:
    """One tree of all parts, in their order. A picture whose name an earlier tree has is left out, and a note says so: an archive beside
    the folder that was unpacked from it gives each picture once.

    Raises UserError if two archives whose pictures are not known yet are called alike."""
    if len(trees) == 1:
        return dataclasses.replace(trees[0], spec=spec)
    parts: list[Part] = []
    holder: dict[str, int] = {}  # a picture, or a part without names → its tree
    alone = [tree for tree in trees if tree.parts]  # one alone shares no name with others, and its names stay packed
    notes = [note for tree in trees for note in tree.notes]
    texts: dict[str, Callable[[], bytes]] = {}
    stated: dict[str, str] = {}
    ignored, junk = Counter[str](), Counter[str]()
    twice: list[str] = []
    for index, tree in enumerate(trees):
        for part in tree.parts:
            if len(alone) == 1:
                parts.append(part)
                continue
            if not part.names:
                if holder.setdefault(f"{part.name}/", index) != index:
                    raise UserError(f"{spec} has two archives {part.name}; give the folder of one of them, or move one away")
                parts.append(part)
                continue
            new = tuple(name for name in part.names if name not in holder)
            twice += [name for name in part.names if name in holder] if len(new) < len(part.names) else []
            holder.update(dict.fromkeys(new, index))
            if new:
                parts.append(part if len(new) == len(part.names) else dataclasses.replace(part, names=new))
        texts = dict(tree.texts) | texts
        stated = dict(tree.stated) | stated
        ignored, junk = ignored + tree.ignored, junk + tree.junk
    if twice:
        notes.append(f"{len(twice):,} pictures are in two archives or folders called alike, as {twice[0]}; each counts once")
    silent = sum(1 for part in parts for name in part.names if name not in stated) if stated else 0
    if silent and (some := [tree.spec for tree in trees if tree.stated]):
        notes.append(f"{silent:,} pictures state no class in data, as {len(stated):,} others do ({some[0]}), and have none")

    def read(part: Part) -> Iterator[tuple[str, Data]]:
        return trees[holder[part.names[0] if part.names else f"{part.name}/"]].read(part)

    def captions() -> dict[str, Any]:
        found: dict[str, Any] = {}
        for tree in trees:
            found = dict(tree.captions()) | found
        return found

    return Tree(
        spec=spec,
        parts=parts,
        read=alone[0].read if len(alone) == 1 else read,
        stated=stated,
        captions=captions,
        worded=frozenset().union(*(tree.worded for tree in trees)),
        texts=texts,
        ignored=ignored,
        junk=junk,
        identity=digest(*(tree.identity for tree in trees)),
        times=digest(*(tree.times for tree in trees)) if all(tree.times for tree in trees) else "",
        notes=tuple(dict.fromkeys(notes)),
        loose=len(alone) == 1 and alone[0].loose,
    )
