"""WebDataset: tars whose members are samples, KEY.jpg beside KEY.cls, KEY.json or KEY.txt. A key ends at the first dot of the file's name
(github.com/webdataset/webdataset, "The WebDataset Format")."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePosixPath

from simclr.data.sources.joined import joined
from simclr.data.sources.members import Listing, below, tree_of
from simclr.data.sources.name_tables import decoded, is_utf8
from simclr.data.sources.source import IMAGE_SUFFIXES, Tree
from simclr.data.sources.splits import split_of
from simclr.errors import UserError

_SIDECARS = ("cls", "json", "txt")
"""Where a class is looked for, the surest first."""
_FIELDS = ("class_name", "label", "cls", "class")
_FIRST = ("jpg", "jpeg", "webp", "png")
_PICTURES = (*_FIRST, *sorted(suffix[1:] for suffix in IMAGE_SUFFIXES if suffix[1:] not in _FIRST))
"""Of several pictures under one key the first in this order is the sample. The others are masks and the like."""
_MOST_BYTES = 1 << 20
_MOST_LABEL = 100  # characters
_MOST_EXPANDED = 1_000_000
_NUMBERS = re.compile(r"[-+.\deE]+(\s+[-+.\deE]+)+")  # YOLO: a class and a box
_NUMBERED = re.compile(r"(.*?)[-_.]?(\d+)(?:-of-\d+)?", re.DOTALL)

_Samples = dict[str, dict[str, str]]
"""Folder and key → ending → path."""


def is_webdataset(paths: Iterable[str]) -> bool:
    """Whether the files of an archive are samples: at least half of the pictures have a .cls, .json or .txt with the same key."""
    samples = [files for files in _samples(paths).values() if _picture(files)]
    return bool(samples) and 2 * sum(any(kind in files for kind in _SIDECARS) for files in samples) >= len(samples)


def webdataset_tree(spec: str, shards: Mapping[str, Listing], sidecars: bool = True) -> Tree:
    """The tree of WebDataset shards: path of the archive, without its ending → its members. Pictures are called as `unnumbered` says.

    A class is the content of KEY.cls, or a field class_name, label, cls or class of KEY.json, or the content of KEY.txt, if those of all
    shards are short, there are several, and at least two pictures share one on average: otherwise they are captions, and no classes.
    Rows of numbers, as YOLO's boxes, are no classes either. Without `sidecars` none of these files is read.
    """
    samples = {prefix: _samples(shard.sizes) for prefix, shard in shards.items()}
    chosen = {prefix: {_picture(files) for files in samples[prefix].values()} for prefix in shards}
    names = unnumbered({prefix: [path for path in shard.sizes if path in chosen[prefix]] for prefix, shard in shards.items()})
    stated: dict[str, str] = {}
    guessed: set[str] = set()  # pictures whose class stands in a file that may hold other things
    texts: dict[str, str] = {}
    strange: dict[str, bytes] = {}  # texts that are not UTF-8
    trees = []
    for prefix, shard in shards.items():
        name_of = {path: name for name, path in names[prefix].items()}
        keyed = [(name_of[path], files) for files in samples[prefix].values() if (path := _picture(files))]
        for kind in _SIDECARS if sidecars else ():
            beside = {files[kind]: name for name, files in keyed if kind in files and (kind == "txt" or name not in stated)}
            for path, text in shard.read([path for path in shard.sizes if path in beside and shard.sizes[path] <= _MOST_BYTES]):
                if (found := _class(kind, text)) is not None:
                    (texts if kind == "txt" else stated)[beside[path]] = found
                    if kind == "json":
                        guessed.add(beside[path])
                    if kind == "txt" and not is_utf8(text):
                        strange[beside[path]] = text
        used = {path for name, files in keyed for path in (names[prefix][name], *(files[k] for k in _SIDECARS if k in files))}
        left = Counter("." + PurePosixPath(path).name.partition(".")[2].lower() for path in shard.sizes if path not in used)
        trees.append(dataclasses.replace(tree_of(shard, prefix, names[prefix], texts=False), ignored=shard.ignored + left))
    loose = {name: text for name, text in texts.items() if name not in stated}  # what may be a class
    distinct = set(loose.values())
    numbers = bool(texts) and all(_NUMBERS.fullmatch(text) for text in set(texts.values()))
    short = all(len(text) <= _MOST_LABEL and "\n" not in text for text in distinct)
    notes = []
    worded: frozenset[str] = frozenset()
    if 2 <= len(distinct) <= len(loose) / 2 and short and not numbers:
        guessed |= loose.keys()
        worded, stated = frozenset(loose), loose | stated
    elif bare := len(loose):
        what = "rows of numbers" if numbers else "captions"
        keeps = "" if numbers else "; --captions auto keeps them"
        notes.append(f"the .txt files of {bare:,} pictures are {what} ({len(distinct):,} different ones), and no classes{keeps}")
    whole = joined(spec, trees)
    captions = {} if numbers else texts | strange
    notes += _folders_overruled({name: label for name, label in stated.items() if name in guessed})
    return dataclasses.replace(whole, stated=stated, captions=lambda: captions, worded=worded, notes=(*whole.notes, *notes))


def _folders_overruled(stated: Mapping[str, str]) -> list[str]:
    """A note if the folders of pictures, but for the splits', tell them apart otherwise than the classes that files beside them state."""
    folders = {name: tuple(f for f in name.split("/")[:-1] if split_of(f)[0] is None) for name in stated}
    pairs = {(folder, stated[name]) for name, folder in folders.items()}
    several = set(folders.values())
    if len(several) < 2 or len(pairs) == len(several) == len({label for _, label in pairs}):
        return []
    name = next(name for name, folder in folders.items() if folder)
    return [
        f"classes are those that the .json or .txt beside {len(stated):,} pictures state, not their folders, which tell them apart "
        f"otherwise: {name} is {stated[name]!r}; --labels folder takes the folders"
    ]


def unnumbered(archives: Mapping[str, Iterable[str]]) -> dict[str, dict[str, str]]:
    """Archive → name in the tree → path in the archive. The number of a shard is left out of pictures' names, so that it becomes no class;
    what else its name says stays as a folder: train-000012/a.jpg is train/a.jpg, and, where another shard has that too,
    train/train-000012_a.jpg."""
    taken: set[str] = set()
    named: dict[str, dict[str, str]] = {}
    for prefix, paths in archives.items():
        above, _, shard = prefix.rpartition("/")
        match = _NUMBERED.fullmatch(shard)
        folder = below(above, match[1]).strip("/") if match else prefix
        named[prefix] = {}
        for path in paths:
            name = below(folder, path)
            if name in taken:
                inner, _, file = path.rpartition("/")
                name = below(folder, below(inner, f"{shard}_{file}"))
            taken.add(name)
            named[prefix][name] = path
    return named


def are_shards(prefixes: Iterable[str]) -> set[str]:
    """Those archives, by their paths without ending, that are called like shards of one set: two or more in a folder that differ by a
    number of four or more digits, with no number missing. Fewer digits may be classes."""
    series: defaultdict[tuple[str, str, int], dict[int, str]] = defaultdict(dict)
    for prefix in prefixes:
        above, _, shard = prefix.rpartition("/")
        if (match := _NUMBERED.fullmatch(shard)) and len(match[2]) >= 4:
            series[above, match[1], len(match[2])][int(match[2])] = prefix
    whole = [found for found in series.values() if len(found) > 1 and max(found) - min(found) + 1 == len(found)]
    return {prefix for found in whole for prefix in found.values()}


def expand(spec: str) -> list[str]:
    """The names that braces stand for, as in a shell: {000..146} counts, with leading zeros, {a,b} lists. Other braces stay."""
    return list(dict.fromkeys(_expanded(spec)))


def _expanded(spec: str) -> Iterator[str]:
    for braces in re.finditer(r"\{([^{}]*)\}", spec):
        if counted := re.fullmatch(r"(\d+)\.\.(\d+)", braces[1]):
            first, last = int(counted[1]), int(counted[2])
            if abs(last - first) >= _MOST_EXPANDED:
                raise UserError(
                    f"{spec} names {abs(last - first) + 1:,} files; expected at most {_MOST_EXPANDED:,}, as in {{000000..000146}}"
                )
            padded = max(len(counted[1]), len(counted[2])) if "0" in (counted[1][0], counted[2][0]) else 0
            values = [f"{number:0{padded}}" for number in range(first, last + (1 if last >= first else -1), 1 if last >= first else -1)]
        elif "," in braces[1]:
            values = braces[1].split(",")
        else:
            continue
        for value in values:
            yield from _expanded(spec[: braces.start()] + value + spec[braces.end() :])
        return
    yield spec


def _samples(paths: Iterable[str]) -> _Samples:
    found: _Samples = {}
    for path in paths:
        folder, _, file = path.rpartition("/")
        key, _, ending = file.partition(".")
        if key and ending:
            found.setdefault(below(folder, key), {})[ending.lower()] = path
    return found


def _picture(files: Mapping[str, str]) -> str | None:
    """The picture of a sample: the one with a plain ending, or, as in KEY.image.png, the only one."""
    plain = next((files[kind] for kind in _PICTURES if kind in files), None)
    others = [path for ending, path in files.items() if ending.rpartition(".")[2] in _PICTURES]
    return plain or (others[0] if len(others) == 1 else None)


def _class(kind: str, content: bytes) -> str | None:
    """The class, or for a .txt the text, that a sample's file states; None if it states none."""
    text = decoded(content).strip()
    if kind == "json":
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError):
            return None
        values = [fields.get(name) for name in _FIELDS] if isinstance(fields, dict) else []
        values = [value for value in values if isinstance(value, str | int) and not isinstance(value, bool)]
        text = str(next((value for value in values if isinstance(value, str)), values[0] if values else "")).strip()
        text = text.encode(errors="replace").decode()  # JSON may write half a pair of surrogates
    if kind == "cls" and "\n" in text:
        return None
    return text if text and (kind == "txt" or text != "-1") else None
