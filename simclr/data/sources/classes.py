"""Where the classes of a tree's pictures come from: folders, files beside them, a file of the user's own."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial

from simclr import files
from simclr.data.sources import label_files
from simclr.data.sources.label_files import few_texts
from simclr.data.sources.name_tables import Pictures
from simclr.data.sources.names import Filtered
from simclr.data.sources.plan import Plan, above_of, labelled
from simclr.data.sources.reading import HOW, Reading, pictures, some
from simclr.data.sources.source import Tree
from simclr.data.sources.splits import KINDS, Folders, Kind
from simclr.errors import UserError

_WNID = re.compile(r"n\d{8}")
_DRAWERS = frozenset(
    ("part", "parts", "folder", "dir", "batch", "chunk", "images", "image", "img", "set", "split", "shard", "group", "page")
)


def decide_classes(tree: Tree, reading: Reading, plan: Plan, names: Collection[str], folders: Mapping[str, int], notes: list[str]) -> str:
    """Decide where classes come from; returns how, in words."""
    if reading.labels == "none":
        plan.how = "none"
        return "none, as --labels says"
    if reading.labels not in HOW:
        return _from_the_users_file(tree, reading, plan, names, folders, notes)
    if tree.stated and reading.labels == "auto":
        plan.values, plan.only_values = dict(tree.stated), set(KINDS)
        return "stated by the source itself"
    plan.how = "folder" if reading.labels == "auto" else reading.labels
    words = _folder_levels(plan, folders, reading.labels == "auto", notes)
    if reading.labels == "auto":
        words = _instead_of_drawers(tree, plan, names, words, notes)
        words = _from_files(tree, plan, names, folders, words, notes)
    return words


def _from_the_users_file(
    tree: Tree, reading: Reading, plan: Plan, names: Collection[str], folders: Mapping[str, int], notes: list[str]
) -> str:
    """Classes from --labels FILE. Splits of which it names no picture have those of their folders."""
    require_names(tree, "--labels FILE")
    path = files.user_path(reading.labels)
    which = label_files.of_which(path.name, {plan.kind(name) for name in names})
    taken = label_files.given(str(path), path.read_bytes(), Pictures([n for n in names if plan.kind(n) in which]), reading.label_columns)
    _say_several(taken, notes)
    spoken = {plan.kind(name) for name in (*taken.values, *taken.several)}
    words = f"{path.name}, by {taken.by}"
    missing = sum(1 for name in names if plan.kind(name) in spoken) - len(taken.values) - len(taken.several)
    if missing:
        notes.append(f"not in {path.name}, so without a class: {pictures(missing)}")
    if "train" not in spoken:
        of = ", ".join(sorted(spoken))
        words = f"{_folder_levels(plan, folders, True, notes)}; of {of} {words}"
        classes = {label for name in names if plan.kind(name) == "train" and (label := plan.label(name)) is not None}
        numbered = label_files.as_classes(taken, few_texts(tree), classes)
        if numbered is None:
            raise UserError(f"{path} has numbers, and nobody says which class of train each is; write the classes' names into it")
        taken = numbered
    else:
        _levels_by_classes(plan, _by_kind(plan, folders), set(taken.values.values()), None)
    notes.extend(taken.notes)
    plan.values, plan.only_values = taken.values, spoken
    return words


def require_names(tree: Tree, flag: str) -> None:
    """A file can name only pictures that are known before they are read."""
    if unknown := [part.name for part in tree.parts if not part.names]:
        raise UserError(
            f"{flag}: the pictures of {unknown[0]}, an archive in an archive, are known only when they are read; unpack it first"
        )


def _folder_levels(plan: Plan, folders: Mapping[str, int], guess: bool, notes: list[str]) -> str:
    """Decide at which depth the class's folder lies, in each split."""
    found = _by_kind(plan, folders)
    level = _telling(found.get("train", Counter()))
    if level is None and plan.how == "parent" and any(found.get("train", ())):
        level = 0
    plan.level = dict.fromkeys(found, level)
    if level is None:
        return "none: no folder tells training pictures apart"
    classes = {above[level] for above in found["train"] if len(above) > level}
    deeper = {above for above in found["train"] if len(above) > level + 1}
    drawers = len(classes) > 1 and all(len(name) == 1 for name in classes) and all(len(above) != level + 1 for above in found["train"])
    if guess and drawers:
        plan.how = "path"  # a/abbey, b/bakery: the letter is a drawer, no class
        classes = {"/".join(above[level:]) for above in found["train"] if len(above) > level}
    _levels_by_classes(plan, found, classes, level)
    if plan.how == "folder" and len({above[level:] for above in deeper}) > len({above[level] for above in deeper}):
        notes.append(
            f"the folders below the classes' count for nothing, as {'/'.join(sorted(deeper)[0][level:])}; --labels path makes each a class"
        )
    if plan.how == "parent":
        merged = Counter(above[-1] for above in found["train"] if above)
        alike = sorted(name for name, times in merged.items() if times > 1)
        if alike:
            notes.append(
                f"folders that are called alike are one class: {some(alike)} ({merged[alike[0]]} folders); --labels path tells them apart"
            )
    lone = sum(count for above, count in found["train"].items() if labelled(above, plan.how, level) is None)
    if lone:
        notes.append(f"without a class, because they lie in no class's folder: {pictures(lone)} of train")
    example = next("/".join(above) for above in sorted(found["train"]) if len(above) > level)
    shown = {"folder": f"the folder at depth {level + 1} below the split", "path": f"all folders from depth {level + 1} below the split"}
    return (
        f"{shown.get(plan.how, 'the folder that holds the file')}, as {labelled(tuple(example.split('/')), plan.how, level)} of {example}/"
    )


def _levels_by_classes(plan: Plan, found: Mapping[Kind, Counter[Folders]], classes: set[str], level: int | None) -> None:
    """Decide the depth of the classes' folders in the splits beside train: where most are called like train's `classes`, else as there."""
    for kind in found.keys() - {"train"}:
        depths = range(max(len(above) for above in found[kind]) or 1)
        within = {
            depth: sum(count for above, count in found[kind].items() if labelled(above, plan.how, depth) in classes) for depth in depths
        }
        best = max(within, key=lambda depth: (within[depth], depth == level))
        plan.level[kind] = best if within[best] else level
        others = {labelled(above, plan.how, level) for above in found[kind]}
        if not within[best] and len(others) == 1:
            plan.level[kind] = None  # val/images: one folder around all pictures is no class


def _by_kind(plan: Plan, folders: Mapping[str, int]) -> dict[Kind, Counter[Folders]]:
    """Kind → folders above its pictures, without the split's → pictures."""
    found: dict[Kind, Counter[Folders]] = {}
    for folder, count in folders.items():
        kind, above = plan.divided(folder)
        found.setdefault(kind, Counter())[above] += count
    return found


def _telling(folders: Mapping[Folders, int]) -> int | None:
    """The first depth whose folders have at least two names."""
    for depth in range(max((len(above) for above in folders), default=0)):
        if len({above[depth] for above in folders if len(above) > depth}) > 1:
            return depth
    return None


def _instead_of_drawers(tree: Tree, plan: Plan, names: Collection[str], words: str, notes: list[str]) -> str:
    """Folders that differ by a number only (part_1, part_2) may be drawers: a file that gives their pictures other classes counts then."""
    train = Filtered.of(names, lambda name: plan.kind(name) == "train" and not name.endswith("/"))
    classes = {label for name in train if (label := plan.label(name)) is not None}
    alike = {re.sub(r"\d+", "", label) for label in classes}
    if len(classes) < 2 or len(alike) > 1 or all(_WNID.fullmatch(label) for label in classes):
        return words
    taken = label_files.disagreeing(few_texts(tree), Pictures(train), plan.label)
    if taken is None:
        if _DRAWERS & set(re.findall("[a-z]+", min(alike).lower())):
            notes.append(f"the classes are called like parts of a set ({some(sorted(classes))}); --labels FILE or none, if they are")
        return words
    _say_several(taken, notes)
    plan.values, plan.used = taken.values, [*plan.used, taken.path]
    plan.only_values.add("train")
    notes.append(f"{taken.path} names the pictures with other classes than the numbered folders ({some(sorted(classes))}), and counts")
    return f"{taken.path}, by {taken.by}"


def _from_files(tree: Tree, plan: Plan, names: Collection[str], folders: Mapping[str, int], words: str, notes: list[str]) -> str:
    """Classes of the kinds that have none by their folders, from files beside them."""
    texts = few_texts(tree)
    if not texts:
        return words
    everything = Pictures(names)
    of_kind, bare = Counter[Kind](), Counter[Kind]()
    labelled_by: dict[Kind, set[str]] = {}
    for name in names:
        kind, label = plan.kind(name), plan.label(name)
        of_kind[kind] += 1
        if label is None:
            bare[kind] += 1
        else:
            labelled_by.setdefault(kind, set()).add(label)
    before = plan.copy()
    for kind in sorted(bare, key=lambda kind: kind != "train"):
        if kind in labelled_by and bare[kind] < 0.5 * of_kind[kind]:
            continue
        classes = labelled_by.get("train", set()) if kind != "train" else set()
        own = Filtered.of(names, partial(_is_bare, before, kind))
        meant = _Meant(plan, kind, frozenset(of_kind), everything, Pictures(own))
        taken, near = label_files.guessed(texts, own, meant, classes)
        if taken is None:
            notes.extend([near] if near else [])
            continue
        plan.values |= taken.values
        plan.used += [taken.path, *taken.also]
        notes.extend(taken.notes)
        _say_several(taken, notes)
        labelled_by.setdefault(kind, set()).update(taken.values.values())
        if kind == "train":
            _levels_by_classes(plan, _by_kind(plan, folders), labelled_by["train"], None)
        words += f"; of {kind} {taken.path}, by {taken.by}"
    return words


def _is_bare(plan: Plan, kind: Kind, name: str) -> bool:
    """Whether `name` is a picture of this kind without a class."""
    return plan.kind(name) == kind and plan.label(name) is None and not name.endswith("/")


@dataclass(frozen=True, slots=True)
class _Meant:
    """The pictures that a file may mean, if it is about `kind`: where its name or its folder says that it is, only those; else all, so
    that train/0.jpg of a table is not taken for test/0.jpg."""

    plan: Plan
    kind: Kind
    kinds: frozenset[Kind]
    everything: Pictures
    own: Pictures

    def __call__(self, path: str) -> Pictures | None:
        above = above_of(path.rpartition("/")[0])
        word = self.plan.words.get(above[self.plan.depth]) if self.plan.depth is not None and len(above) > self.plan.depth else None
        which = {word} if word is not None else label_files.of_which(path, self.kinds)
        return (self.own if len(which) == 1 else self.everything) if self.kind in which else None


def _say_several(taken: label_files.Taken, notes: list[str]) -> None:
    if taken.several:
        notes.append(
            f"{taken.path} states several classes for {pictures(len(taken.several))}, as for {taken.several[0]}; a picture has one or "
            "none, so these have none; docs/data.md says how to use several"
        )
