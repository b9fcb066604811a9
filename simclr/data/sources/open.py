"""Where images come from: a folder, an archive, a table, either of the first two in S3, a torchvision dataset, the built-in patterns."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from simclr import files
from simclr.data.s3.uri import address
from simclr.data.sources.archives import archive_tree, archives_tree, braces_tree, is_archive, is_archive_file
from simclr.data.sources.folder import folder_reader, folder_tree, walk
from simclr.data.sources.joined import joined
from simclr.data.sources.layout import understand
from simclr.data.sources.patterns import patterns_source
from simclr.data.sources.reading import Reading
from simclr.data.sources.rotating import rotating_source
from simclr.data.sources.s3 import s3_archive, s3_prefix, s3_reader
from simclr.data.sources.source import Data, Part, Source, Tree
from simclr.data.sources.splits import split_of
from simclr.data.sources.tar import ARCHIVES, stems
from simclr.data.sources.torchvision import DATASETS, torchvision_source
from simclr.errors import UserError

_FFCV = (".beton", ".ffcv")


def open_source(spec: str, reading: Reading | None = None) -> Source:
    """The source that `spec` names, with splits and classes as `reading` says.

    A folder or archive, on disk or at s3://bucket/prefix; WebDataset shards by a path with braces; Parquet; the name of a dataset
    (`cifar10`, or `torchvision:NAME`), downloaded where there is a network; `patterns`, with options as in
    `patterns:train=4000,test=1000,size=32,seed=0,coloured,captions`; videos of them,
    `rotating-patterns:train=400,test=100,frames=10`. Raises UserError if it is missing, empty, damaged or unknown.
    """
    name, _, options = spec.partition(":")
    own = None
    if name == "patterns":
        own = patterns_source(spec, options)
    elif name == "rotating-patterns":
        own = rotating_source(options)
    elif spec in ("torchvision", "torchvision:"):
        raise UserError("which torchvision dataset? torchvision:NAME, as in torchvision:CIFAR10")
    elif is_named_set(spec):
        if Path(spec).is_dir() and not (Path(spec) / "manifest.json").exists():
            raise UserError(f"{spec} is a dataset's name and a folder here; say torchvision:{DATASETS[spec].torchvision} or ./{spec}")
        own = torchvision_source(spec, options or DATASETS[spec].torchvision)
    if own is None:
        return understand(listed(spec), reading or Reading())[0]
    if reading not in (None, Reading()):
        raise UserError(f"{spec} has splits and classes of its own; leave out --labels, --split-from, --videos and --captions")
    return own


def is_named_set(spec: str) -> bool:
    """Whether `spec` names pictures that lie at no place of the user's: rendered ones, or a set of torchvision's."""
    return spec.partition(":")[0] in ("patterns", "rotating-patterns", "torchvision") or bool(
        spec in DATASETS and DATASETS[spec].torchvision
    )


def listed(spec: str, sidecars: bool = True) -> Tree:
    """The tree of what `spec` names. Without `sidecars` the classes and captions beside pictures of WebDataset are not read."""
    remote = address(spec)
    if remote is not None:
        if is_archive(remote.name):
            return s3_archive(remote, lambda path, called: archive_tree(path, spec=called, sidecars=sidecars))
        return s3_prefix(remote)
    path = files.user_path(spec)
    if path.is_dir():
        return _folder(path, sidecars)
    if path.is_file():
        if path.suffix.lower() == ".parquet":
            from simclr.data.sources.parquet import parquet_tree  # pyarrow takes 0.3 s

            return parquet_tree(path)
        if not is_archive_file(path):
            endings = ", ".join((*ARCHIVES, ".zip", ".parquet"))
            raise UserError(f"{path} is no archive and no table; expected a folder, one of {endings}, or a dataset's name")
        return archive_tree(path, sidecars=sidecars)
    if "{" in spec and "}" in spec:
        return braces_tree(spec, sidecars)
    known = ["patterns", "rotating-patterns", *(n for n, d in DATASETS.items() if d.torchvision)]
    near = difflib.get_close_matches(spec, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"give a folder, an archive or one of {', '.join(known)}"
    raise UserError(f"no source at {spec}: there is no such file or folder and no dataset of that name; {hint}")


def loose_reader(spec: str) -> Callable[[Part], Iterator[tuple[str, Data]]]:
    """What reads the parts of a tree of loose pictures that another process has listed."""
    remote = address(spec)
    return s3_reader(remote) if remote is not None else folder_reader(files.user_path(spec))


def _folder(root: Path, sidecars: bool) -> Tree:
    """The tree of a folder: of its tables, else of its loose pictures, else of its archives."""
    found = walk(root)
    loose = folder_tree(root, found)
    if loose.parts:
        # Beside loose pictures no archive is opened but ImageNet's devkit, which says what their classes are.
        named = stems((name for name in found.others if is_archive(name) and "devkit" in PurePosixPath(name).name), str(root))
        devkits = {prefix: root / name for prefix, name in named.items()}
        closed = [name for name in sorted(found.others) if name not in named.values() and (is_archive(name) or name.endswith(".parquet"))]
        if closed:
            many = f"{closed[0]} and {len(closed) - 1:,} more archives or tables" if len(closed) > 1 else closed[0]
            note = f"{many} beside loose pictures: not opened; to read that instead, give it, or its folder, as the source"
            loose = dataclasses.replace(loose, notes=(*loose.notes, note))
        return joined(str(root), [loose, archives_tree(str(root), devkits)]) if devkits else loose
    tables: list[str] = []
    if any(name.lower().endswith((".parquet", ".arrow")) for name in found.others):
        from simclr.data.sources.parquet import NoPictures, is_parquet_folder, parquet_tree

        tables = sorted(name for name in found.others if is_parquet_folder([name]))
        try:
            if tables:
                return parquet_tree(root)
        except NoPictures:
            if not any(map(is_archive, found.others)):
                raise
    archives = {prefix: root / name for prefix, name in stems(filter(is_archive, sorted(found.others)), str(root)).items()}
    if tables:  # as img2dataset leaves them: beside each shard a table of addresses and captions
        others = f" and {len(tables) - 1:,} other tables" if len(tables) > 1 else ""
        note = f"{tables[0]}{others}: left out, without a column of pictures; the archives beside them are read"
        loose = dataclasses.replace(loose, notes=(*loose.notes, note))
    if not archives:
        return loose
    opened = archives_tree(str(root), archives, None, sidecars)
    for name in archives.values():
        loose.ignored[name.suffix.lower()] -= 1
    return joined(str(root), [dataclasses.replace(loose, ignored=+loose.ignored), opened])


def betons_at(spec: str) -> dict[str, Path]:
    """Split → FFCV file (.beton or .ffcv), where `spec` is such a file or a folder of such, called like their splits; {} for any other
    source. Beside a training file that is given alone, the one of a test split is found."""
    path = files.user_path(spec)
    if path.is_file() and path.suffix.lower() in _FFCV:
        beside = [file for file in _ffcv_files(path.parent) if split_of(file.stem)[0] in ("val", "test")]
        return {"train": path} | ({"test": beside[0]} if split_of(path.stem)[0] == "train" and len(beside) == 1 else {})
    found = _ffcv_files(path) if path.is_dir() else []
    if found and (path / "manifest.json").is_file():
        raise UserError(f"{path} holds prepared shards already; give it as --data")
    named: dict[str, Path] = {}
    for file in found:
        split = {"train": "train", "val": "test", "test": "test"}.get(split_of(file.stem)[0] or ("train" if len(found) == 1 else ""))
        if split is None or split in named:
            raise UserError(
                f"{path} has {', '.join(p.name for p in found[:5])}, of which {file.name} is "
                + ("of no split by its name" if split is None else f"the {split} split as well as {named[split].name}")
                + "; expected train.beton and val.beton or test.beton; move the others away, or give one file"
            )
        named[split] = file
    return named


def _ffcv_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in _FFCV)
