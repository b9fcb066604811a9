"""From the names of a tree's pictures to splits and classes, and the words that say what was understood."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from simclr import files
from simclr.data.sources import captions, label_files
from simclr.data.sources.classes import decide_classes, require_names
from simclr.data.sources.label_files import few_texts
from simclr.data.sources.masks import without_masks
from simclr.data.sources.name_tables import Pictures
from simclr.data.sources.names import chosen
from simclr.data.sources.plan import Plan, above_of
from simclr.data.sources.reading import Reading, Split, Understood, pictures, some
from simclr.data.sources.source import Item, Part, Source, Together, Tree, captioned, digest, ending
from simclr.data.sources.splits import KINDS, Kind, split_depth, split_of
from simclr.data.sources.videos import by_video, films_left, table
from simclr.errors import UserError

_EXAMPLES = 5
_MOST_LINES, _MOST_CELLS = 4_000_000, 10_000_000  # each takes some 150 bytes of memory
_MOST_READ_BYTES, _READINGS = 512 << 20, 8  # of all texts, and how often they may be read again on average


def understand(tree: Tree, reading: Reading) -> tuple[Source, Understood]:
    """The source of a tree's pictures, each with its split and class, and what was understood. Raises UserError if there is no picture."""
    tree = tree if reading.keep_masks else without_masks(tree)
    if not Together(tree.parts):
        left = tree.ignored + tree.junk
        found = f"{left.total()} other files ({', '.join(sorted(left)[:5])})" if left else "nothing"
        films = f"; {left_films}" if (left_films := films_left(tree.ignored)) else ""
        raise UserError(f"no images in {tree.spec}, only {found}; expected pictures, as split/class/file, class/file or files alone{films}")
    if reading.videos:
        tree = by_video(tree)
    names = Together(tree.parts)
    with_captions, notes = reading.captions != "none", list(tree.notes)
    said = captions.taken(tree, reading, names, notes) if with_captions else {}
    if reading.captions == "auto" and tree.worded:  # a caption is no class
        tree = dataclasses.replace(tree, stated={name: label for name, label in tree.stated.items() if name not in tree.worded})
    modest = _Modest(tree.texts)
    tree = dataclasses.replace(tree, texts={path: functools.partial(modest.read, path) for path in tree.texts})
    folders: dict[str, int] = Counter(map(Plan(None, videos=reading.videos).folder_of, names))
    plan, how_split = _splits(tree, reading, names, folders, notes)
    plan.videos = reading.videos
    how_labelled = decide_classes(tree, reading, plan, names, folders, notes)
    splits = _judged(plan, names, notes)
    videos = {"videos": table(names, lambda name: plan.split[plan.kind(name)])} if reading.videos else {}
    notes += modest.notes()

    def caption_of(name: str) -> str:
        return said.get(name, "")

    def read(part: Part) -> Iterator[Item]:
        for name, data in tree.read(part):
            split = plan.split[plan.kind(name)]
            if split is not None:
                item = Item(split, plan.label(name), name, data, caption_of(name))
                yield captioned(item) if with_captions else item

    left_out = {kind for kind, split in plan.split.items() if split is None}
    parts: Sequence[Part] = tree.parts
    if left_out:
        parts = [
            dataclasses.replace(part, names=wanted) if part.names else part
            for part in tree.parts
            if (wanted := chosen(part.names, lambda name: plan.kind(name) not in left_out))
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
        place=lambda name: (str(plan.split[plan.kind(name)]), plan.label(name)),
        captioned=with_captions,
        caption=caption_of if with_captions else None,
        loose=tree.loose,
        total=sum(len(part.names) for part in parts) if counted else None,
        identity=tree.identity,
        times=tree.times,
        videos=reading.videos,
        understood=understood.to_dict() | {"asked": reading.to_dict(), "values": _digest(plan, said)} | videos,
    )
    return source, understood


@dataclasses.dataclass(slots=True)
class _Modest:
    """Texts of a tree, of which those with too many lines or cells, and all behind the first bytes of them together, read as empty."""

    texts: Mapping[str, Callable[[], bytes]]
    first_bytes: int = 0
    """Of the texts that were read, each once."""
    all_bytes: int = 0
    """Of all readings."""
    seen: set[str] = dataclasses.field(default_factory=set)
    passed_over: dict[str, str] = dataclasses.field(default_factory=dict)
    """Text → why it reads as empty, in the order in which that was found."""

    def read(self, path: str) -> bytes:
        if path in self.passed_over:
            return b""
        if self.first_bytes > _MOST_READ_BYTES or self.all_bytes > _READINGS * _MOST_READ_BYTES:
            self.passed_over[path] = f"the texts read for classes have more than {_MOST_READ_BYTES >> 20} MiB in all"
            return b""
        data = self.texts[path]()
        self.all_bytes += len(data)
        if path not in self.seen:
            self.seen.add(path)
            self.first_bytes += len(data)
        lines, cells = sum(map(data.count, (b"\n", b"\r"))), sum(map(data.count, (b",", b";", b"\t")))
        if lines <= _MOST_LINES and cells <= _MOST_CELLS:
            return data
        self.passed_over[path] = f"it has {lines:,} lines and {cells:,} cells"
        return b""

    def notes(self) -> list[str]:
        """What was passed over, in one sentence; none where nothing was."""
        if not self.passed_over:
            return []
        path, why = next(iter(self.passed_over.items()))
        more = len(self.passed_over) - 1
        others = f", nor {more:,} other text{'s' * (more > 1)}" if more else ""
        return [f"{path} was not looked at for classes, because {why}{others}; --labels FILE takes it"]


def _splits(tree: Tree, reading: Reading, names: Collection[str], folders: Mapping[str, int], notes: list[str]) -> tuple[Plan, str]:
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
            notes.append(f"beside the splits' folders there are others, whose pictures train: {some(beside)}")
        elif lost := sum(count for folder, count in folders.items() if len(above := above_of(folder)) <= depth or above[depth] in beside):
            where = f"{some(beside)}; in the train folder they would train" if beside else "no folder"
            notes.append(f"beside the splits' folders, and left out: {pictures(lost)} in {where}")
        kinds = [(kind, [name for name in sorted(named) if words.get(name) == kind]) for kind in KINDS]
        return Plan(depth, words), "folder: " + ", ".join(f"{some(names_of)} = {kind}" for kind, names_of in kinds if names_of)
    path = files.user_path(reading.split_from)
    plan = Plan(depth, words)
    if path.is_file():
        require_names(tree, "--split-from FILE")
        taken = label_files.splits_of(str(path), path.read_bytes(), Pictures(names), reading.label_columns)
        unknown = sorted({value for value in taken.values.values() if split_of(value)[0] is None})
        if unknown:
            raise UserError(f"{path} has the split {unknown[0]!r}; expected train, val or test")
        plan.split_values = taken.values
        missing = len(names) - len(taken.values)
        if missing:
            notes.append(f"not in {path.name}, so in the training split: {pictures(missing)}")
        return plan, f"{path.name}, which names {len(taken.values):,} of {len(names):,} pictures"
    plan.share = float(reading.split_from)
    plan.split["test"] = None  # the folders of other splits; what is held out counts as val
    what = "videos" if reading.videos else "pictures"
    return plan, f"{plan.share:g} of the training {what} are held out, chosen by a hash of their names"


def _listed(tree: Tree, names: Collection[str], notes: list[str]) -> tuple[Plan, str]:
    """Splits by lists of names beside the pictures, as Food-101's meta/test.txt; without such, all train."""
    plan = Plan(None)
    if tree.stated:
        return plan, "none: all pictures train"
    found = label_files.lists_of_splits(few_texts(tree), Pictures(names))
    for kind, lists in found.items():
        if len(lists) > 1:
            paths = [taken.path for taken in lists]
            notes.append(f"{some(paths)} each list a {kind} split, and none was taken; --split-from FILE says which")
    taken = {kind: lists[0] for kind, lists in found.items() if len(lists) == 1 and kind != "train"}
    if not taken:
        if "train" in found:
            listed = found["train"][0]
            which = f"{len(listed.values):,} of {pictures(len(names))}"
            notes.append(f"{listed.path} lists {which}; all train, and --split-from takes a table of splits")
        return plan, "none: all pictures train"
    plan.split_values = {name: kind for kind, of in taken.items() for name in of.values}
    plan.used += [of.path for lists in found.values() for of in lists if len(lists) == 1]
    return plan, "list: " + ", ".join(f"{of.path} = {kind} ({len(of.values):,})" for kind, of in taken.items()) + "; the rest trains"


def _judged(plan: Plan, names: Collection[str], notes: list[str]) -> dict[str, Split]:
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
        notes.append(f"{pictures(classes['test'].total())} in other splits' folders are left out, as --split-from says")
    if "pred" in classes:
        notes.append(f"{pictures(classes['pred'].total())} to predict are left out")
    judged: list[Kind] = [kind for kind in ("val", "test") if kind in share and plan.split[kind] is not None]
    with_classes = [kind for kind in judged if share[kind] > 0]
    for kind in judged:
        if kind not in with_classes and (known or with_classes):
            plan.split[kind] = None
            instead = f"{with_classes[0]} is the test split" if with_classes else "--labels FILE gives them some"
            notes.append(f"{pictures(classes[kind].total())} of {kind}: without classes they can judge nothing and are left out; {instead}")
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
                f"({some(sorted(strange))}): they can only be judged wrong"
            )
    return splits


def _digest(plan: Plan, said: Mapping[str, str]) -> str:
    """A hash of all that files and data say of single pictures; "" where folders say everything."""
    stated = (*sorted(plan.values.items()), *sorted((plan.split_values or {}).items()))
    stated = (*stated, *((("captions", ""), *sorted(said.items())) if said else ()))
    return digest(*(f"{name}\0{value}" for name, value in stated)) if stated else ""
