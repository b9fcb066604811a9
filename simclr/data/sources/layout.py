"""From the names of a tree's pictures to splits and classes, and the words that say what was understood."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from simclr.data.sources import label_files
from simclr.data.sources.masks import without_masks
from simclr.data.sources.name_tables import Pictures
from simclr.data.sources.plan import Plan, above_of, labelled
from simclr.data.sources.reading import HOW, Reading, Split, Understood
from simclr.data.sources.source import Item, Part, Source, Tree, digest, ending
from simclr.data.sources.splits import KINDS, Folders, Kind, split_depth, split_of
from simclr.errors import UserError

_EXAMPLES = 5
_MOST_TEXTS = 50
_WNID = re.compile(r"n\d{8}")
_DRAWERS = frozenset(
    ("part", "parts", "folder", "dir", "batch", "chunk", "images", "image", "img", "set", "split", "shard", "group", "page")
)


def understand(tree: Tree, reading: Reading) -> tuple[Source, Understood]:
    """The source of a tree's pictures, each with its split and class, and what was understood. Raises UserError if there is no picture."""
    tree = without_masks(tree)
    names = [name for part in tree.parts for name in part.names or (f"{part.name}/",)]
    if not names:
        left = tree.ignored + tree.junk
        found = f"{left.total()} other files ({', '.join(sorted(left)[:5])})" if left else "nothing"
        raise UserError(f"no images in {tree.spec}, only {found}; expected pictures, as split/class/file, class/file or files alone")
    notes = list(tree.notes)
    folders: dict[str, int] = Counter(name.rpartition("/")[0] for name in names)
    plan, how_split = _splits(tree, reading, names, folders, notes)
    how_labelled = _classes(tree, reading, plan, names, folders, notes)
    splits = _judged(plan, names, notes)

    def read(part: Part) -> Iterator[Item]:
        for name, data in tree.read(part):
            split = plan.split[plan.kind(name)]
            if split is not None:
                yield Item(split, plan.label(name), name, data)

    left_out = {kind for kind, split in plan.split.items() if split is None}
    parts: Sequence[Part] = tree.parts
    if left_out:
        parts = [
            dataclasses.replace(part, names=wanted) if part.names else part
            for part in tree.parts
            if (wanted := tuple(name for name in part.names if plan.kind(name) not in left_out))
            or (not part.names and plan.kind(f"{part.name}/") not in left_out)
        ]
    counted = all(part.names for part in tree.parts)
    understood = Understood(
        splits=splits,
        how_split=how_split,
        how_labelled=how_labelled,
        notes=tuple(notes),
        counted=counted,
        ignored=tree.ignored - Counter(ending(path) for path in set(plan.used)),
        junk=tree.junk,
    )
    source = Source(
        spec=tree.spec,
        parts=parts,
        read=read,
        total=sum(len(part.names) for part in parts) if counted else None,
        identity=tree.identity,
        times=tree.times,
        understood=understood.to_dict() | {"asked": reading.to_dict(), "values": _digest(plan)},
    )
    return source, understood


def _splits(tree: Tree, reading: Reading, names: Sequence[str], folders: Mapping[str, int], notes: list[str]) -> tuple[Plan, str]:
    if reading.split_from == "none":
        return Plan(None), "none: all pictures train, as --split-from says"
    depth, words, doubtful = split_depth({above_of(folder): count for folder, count in folders.items()})
    if reading.split_from in ("auto", "folder"):
        if reading.split_from == "folder" and depth is None:
            why = doubtful or "use a file of splits, or a fraction"
            raise UserError(f"--split-from folder: no folder of {tree.spec} is called like a split (train, val, test …); {why}")
        if doubtful:
            notes.append(doubtful)
        if depth is None:
            return _listed(tree, names, notes)
        named = {above[depth] for folder in folders if len(above := above_of(folder)) > depth}
        beside = sorted(named - words.keys())
        if beside and "train" not in words.values():
            notes.append(f"beside the splits' folders there are others, whose pictures train: {_some(beside)}")
        elif lost := sum(count for folder, count in folders.items() if len(above := above_of(folder)) <= depth or above[depth] in beside):
            where = f"{_some(beside)}; in the train folder they would train" if beside else "no folder"
            notes.append(f"beside the splits' folders, and left out: {_pictures(lost)} in {where}")
        kinds = [(kind, [name for name in sorted(named) if words.get(name) == kind]) for kind in KINDS]
        return Plan(depth, words), "folder: " + ", ".join(f"{_some(names_of)} = {kind}" for kind, names_of in kinds if names_of)
    path = Path(reading.split_from).expanduser()
    plan = Plan(depth, words)
    if path.is_file():
        _require_names(tree, "--split-from FILE")
        taken = label_files.splits_of(str(path), path.read_bytes(), Pictures(names), reading.label_columns)
        unknown = sorted({value for value in taken.values.values() if split_of(value)[0] is None})
        if unknown:
            raise UserError(f"{path} has the split {unknown[0]!r}; expected train, val or test")
        plan.split_values = taken.values
        missing = len(names) - len(taken.values)
        if missing:
            notes.append(f"not in {path.name}, so in the training split: {_pictures(missing)}")
        return plan, f"{path.name}, which names {len(taken.values):,} of {len(names):,} pictures"
    plan.share = float(reading.split_from)
    plan.split["test"] = None  # the folders of other splits; what is held out counts as val
    return plan, f"{plan.share:g} of the training pictures are held out, chosen by a hash of their names"


def _listed(tree: Tree, names: Sequence[str], notes: list[str]) -> tuple[Plan, str]:
    """Splits by lists of names beside the pictures, as Food-101's meta/test.txt; without such, all train."""
    plan = Plan(None)
    if tree.stated:
        return plan, "none: all pictures train"
    found = label_files.lists_of_splits(_few_texts(tree), Pictures(names))
    for kind, lists in found.items():
        if len(lists) > 1:
            paths = [taken.path for taken in lists]
            notes.append(f"{_some(paths)} each list a {kind} split, and none was taken; --split-from FILE says which")
    taken = {kind: lists[0] for kind, lists in found.items() if len(lists) == 1 and kind != "train"}
    if not taken:
        if "train" in found:
            some = found["train"][0]
            notes.append(
                f"{some.path} lists {len(some.values):,} of {_pictures(len(names))}; all train, --split-from takes a table of splits"
            )
        return plan, "none: all pictures train"
    plan.split_values = {name: kind for kind, of in taken.items() for name in of.values}
    plan.used += [of.path for lists in found.values() for of in lists if len(lists) == 1]
    return plan, "list: " + ", ".join(f"{of.path} = {kind} ({len(of.values):,})" for kind, of in taken.items()) + "; the rest trains"


def _few_texts(tree: Tree) -> dict[str, Callable[[], bytes]]:
    """Files that may hold labels, without those of folders that have one for each picture: boxes, or captions."""
    crowded = Counter(path.rpartition("/")[0] for path in tree.texts)
    return {path: text for path, text in tree.texts.items() if crowded[path.rpartition("/")[0]] <= _MOST_TEXTS}


def _classes(tree: Tree, reading: Reading, plan: Plan, names: Sequence[str], folders: Mapping[str, int], notes: list[str]) -> str:
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
        words = _from_files(tree, plan, names, words, notes)
    return words


def _from_the_users_file(
    tree: Tree, reading: Reading, plan: Plan, names: Sequence[str], folders: Mapping[str, int], notes: list[str]
) -> str:
    """Classes from --labels FILE. Splits of which it names no picture have those of their folders."""
    _require_names(tree, "--labels FILE")
    path = Path(reading.labels).expanduser()
    which = label_files.of_which(path.name, {plan.kind(name) for name in names})
    taken = label_files.given(str(path), path.read_bytes(), Pictures(n for n in names if plan.kind(n) in which), reading.label_columns)
    _say_several(taken, notes)
    spoken = {plan.kind(name) for name in (*taken.values, *taken.several)}
    words = f"{path.name}, by {taken.by}"
    missing = sum(1 for name in names if plan.kind(name) in spoken) - len(taken.values) - len(taken.several)
    if missing:
        notes.append(f"not in {path.name}, so without a class: {_pictures(missing)}")
    if "train" not in spoken:
        of = ", ".join(sorted(spoken))
        words = f"{_folder_levels(plan, folders, True, notes)}; of {of} {words}"
        classes = {label for name in names if plan.kind(name) == "train" and (label := plan.label(name)) is not None}
        numbered = label_files.as_classes(taken, _few_texts(tree), classes)
        if numbered is None:
            raise UserError(f"{path} has numbers, and nobody says which class of train each is; write the classes' names into it")
        taken = numbered
    notes.extend(taken.notes)
    plan.values, plan.only_values = taken.values, spoken
    return words


def _require_names(tree: Tree, flag: str) -> None:
    """A file can name only pictures that are known before they are read."""
    if unknown := [part.name for part in tree.parts if not part.names]:
        raise UserError(
            f"{flag}: the pictures of {unknown[0]}, an archive in an archive, are known only when they are read; unpack it first"
        )


def _folder_levels(plan: Plan, folders: Mapping[str, int], guess: bool, notes: list[str]) -> str:
    """Decide at which depth the class's folder lies, in each split."""
    found: dict[Kind, Counter[Folders]] = {}
    for folder, count in folders.items():
        kind, above = plan.divided(folder)
        found.setdefault(kind, Counter())[above] += count
    level = _telling(found.get("train", Counter()))
    if level is None and plan.how == "parent" and found.get("train"):
        level = 0
    plan.level = dict.fromkeys(found, level)
    if level is None:
        return "none: no folder tells training pictures apart"
    classes = {above[level] for above in found["train"] if len(above) > level}
    deeper = {above for above in found["train"] if len(above) > level + 1}
    if guess and len(classes) > 1 and deeper and all(len(name) == 1 for name in classes):
        plan.how = "path"  # a/abbey, b/bakery: the letter is a drawer, no class
        classes = {"/".join(above[level:]) for above in found["train"] if len(above) > level}
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
    if plan.how == "folder" and len({above[level:] for above in deeper}) > len({above[level] for above in deeper}):
        notes.append(
            f"the folders below the classes' count for nothing, as {'/'.join(sorted(deeper)[0][level:])}; --labels path makes each a class"
        )
    if plan.how == "parent":
        merged = Counter(above[-1] for above in found["train"] if above)
        alike = sorted(name for name, times in merged.items() if times > 1)
        if alike:
            notes.append(
                f"folders that are called alike are one class: {_some(alike)} ({merged[alike[0]]} folders); --labels path tells them apart"
            )
    lone = sum(count for above, count in found["train"].items() if labelled(above, plan.how, level) is None)
    if lone:
        notes.append(f"without a class, because they lie in no class's folder: {_pictures(lone)} of train")
    example = next("/".join(above) for above in sorted(found["train"]) if len(above) > level)
    shown = {"folder": f"the folder at depth {level + 1} below the split", "path": f"all folders from depth {level + 1} below the split"}
    return (
        f"{shown.get(plan.how, 'the folder that holds the file')}, as {labelled(tuple(example.split('/')), plan.how, level)} of {example}/"
    )


def _telling(folders: Mapping[Folders, int]) -> int | None:
    """The first depth whose folders have at least two names."""
    for depth in range(max((len(above) for above in folders), default=0)):
        if len({above[depth] for above in folders if len(above) > depth}) > 1:
            return depth
    return None


def _instead_of_drawers(tree: Tree, plan: Plan, names: Sequence[str], words: str, notes: list[str]) -> str:
    """Folders that differ by a number only (part_1, part_2) may be drawers: a file that gives their pictures other classes counts then."""
    train = [name for name in names if plan.kind(name) == "train" and not name.endswith("/")]
    classes = {label for name in train if (label := plan.label(name)) is not None}
    alike = {re.sub(r"\d+", "", label) for label in classes}
    if len(classes) < 2 or len(alike) > 1 or all(_WNID.fullmatch(label) for label in classes):
        return words
    taken = label_files.disagreeing(_few_texts(tree), Pictures(train), plan.label)
    if taken is None:
        if _DRAWERS & set(re.findall("[a-z]+", min(alike).lower())):
            notes.append(f"the classes are called like parts of a set ({_some(sorted(classes))}); --labels FILE or none, if they are")
        return words
    _say_several(taken, notes)
    plan.values, plan.used = taken.values, [*plan.used, taken.path]
    plan.only_values.add("train")
    notes.append(f"{taken.path} names the pictures with other classes than the numbered folders ({_some(sorted(classes))}), and counts")
    return f"{taken.path}, by {taken.by}"


def _from_files(tree: Tree, plan: Plan, names: Sequence[str], words: str, notes: list[str]) -> str:
    """Classes of the kinds that have none by their folders, from files beside them."""
    texts = _few_texts(tree)
    if not texts:
        return words
    everything = Pictures(names)
    by_kind: dict[Kind, list[str]] = {}
    labelled_by: dict[Kind, set[str]] = {}
    for name in names:
        kind, label = plan.kind(name), plan.label(name)
        if label is None:
            by_kind.setdefault(kind, []).append(name)
        else:
            labelled_by.setdefault(kind, set()).add(label)
    for kind in sorted(by_kind, key=lambda kind: kind != "train"):
        if kind in labelled_by and len(by_kind[kind]) < 0.5 * sum(1 for name in names if plan.kind(name) == kind):
            continue
        classes = labelled_by.get("train", set()) if kind != "train" else set()
        own = [name for name in by_kind[kind] if not name.endswith("/")]
        meant = _Meant(plan, kind, frozenset(by_kind.keys() | labelled_by.keys()), everything, Pictures(own))
        taken, near = label_files.guessed(texts, own, meant, classes)
        if taken is None:
            notes.extend([near] if near else [])
            continue
        plan.values |= taken.values
        plan.used += [taken.path, *taken.also]
        notes.extend(taken.notes)
        _say_several(taken, notes)
        labelled_by.setdefault(kind, set()).update(taken.values.values())
        words += f"; of {kind} {taken.path}, by {taken.by}"
    return words


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


def _judged(plan: Plan, names: Sequence[str], notes: list[str]) -> dict[str, Split]:
    """Decide which kinds are the test split; the splits that result."""
    classes: dict[Kind, Counter[str | None]] = {}
    examples: dict[Kind, list[tuple[str, str | None]]] = {}
    per_kind = Counter(plan.kind(name) for name in names)
    at: Counter[Kind] = Counter()
    for name in names:
        kind = plan.kind(name)
        label = plan.label(name)
        classes.setdefault(kind, Counter())[label] += 0 if name.endswith("/") else 1
        if at[kind] % max(per_kind[kind] // _EXAMPLES, 1) == 0 and len(examples.setdefault(kind, [])) < _EXAMPLES:
            examples[kind].append((name, label))
        at[kind] += 1
    known = {label for label in classes.get("train", ()) if label is not None}
    share = {kind: 1 - found[None] / max(found.total(), 1) if found.total() else float(any(found)) for kind, found in classes.items()}
    if len(known) == 1 and "train" not in plan.only_values:
        known = set()
    if plan.share and "test" in classes:
        notes.append(f"{_pictures(classes['test'].total())} in other splits' folders are left out, as --split-from says")
    if "pred" in classes:
        notes.append(f"{_pictures(classes['pred'].total())} to predict are left out")
    judged: list[Kind] = [kind for kind in ("val", "test") if kind in share and plan.split[kind] is not None]
    with_classes = [kind for kind in judged if share[kind] > 0]
    for kind in judged:
        if kind not in with_classes and (known or with_classes):
            plan.split[kind] = None
            instead = f"{with_classes[0]} is the test split" if with_classes else "--labels FILE gives them some"
            notes.append(
                f"{_pictures(classes[kind].total())} of {kind}: without classes they can judge nothing and are left out; {instead}"
            )
    if known and judged and not with_classes:
        notes.append("without a test split training is not scored as it goes; --split-from 0.1 holds out a tenth of the training pictures")
    if len([kind for kind in judged if plan.split[kind]]) == 2:
        notes.append(f"val ({classes['val'].total():,}) and test ({classes['test'].total():,} pictures) together are the test split")
    splits: dict[str, Split] = {}
    for kind, found in sorted(classes.items(), key=lambda kv: KINDS.index(kv[0])):
        split = plan.split[kind]
        if split is None:
            continue
        before = splits.get(split, Split(Counter(), ()))
        before.classes.update(found)
        splits[split] = Split(before.classes, (*before.examples, *examples[kind])[:_EXAMPLES])
    if known and "test" in splits and not any(name.endswith("/") for name in names):
        strange = {label: n for label, n in splits["test"].classes.items() if label is not None and label not in known}
        if strange:
            of = sum(splits["test"].classes.values())
            notes.append(
                f"{sum(strange.values()):,} of {of:,} test pictures are of {len(strange):,} classes that no training picture has "
                f"({_some(sorted(strange))}): they can only be judged wrong"
            )
    return splits


def _digest(plan: Plan) -> str:
    """A hash of all that files and data say of single pictures; "" where folders say everything."""
    stated = (*sorted(plan.values.items()), *sorted((plan.split_values or {}).items()))
    return digest(*(f"{name}\0{value}" for name, value in stated)) if stated else ""


def _say_several(taken: label_files.Taken, notes: list[str]) -> None:
    if taken.several:
        notes.append(
            f"{taken.path} states several classes for {_pictures(len(taken.several))}, as for {taken.several[0]}; a picture has one or "
            "none, so these have none; docs/data.md says how to use several"
        )


def _pictures(count: int) -> str:
    return f"{count:,} picture{'s' * (count != 1)}"


def _some(names: Sequence[str], most: int = 3) -> str:
    """The first names, and how many more."""
    more = len(names) - most
    return ", ".join(re.sub(r"\s+", " ", name) for name in names[:most]) + (f" and {more:,} more" if more > 0 else "")
