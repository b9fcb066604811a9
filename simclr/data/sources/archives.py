"""One archive, or all archives of a folder, as a tree. An archive counts as a folder that is called like it, without its ending."""

from __future__ import annotations

import dataclasses
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

from simclr.data.sources.joined import joined
from simclr.data.sources.members import Listing, below, tree_of
from simclr.data.sources.source import Tree, is_image
from simclr.data.sources.tar import ARCHIVES, is_tar, stems, tar_listing
from simclr.data.sources.webdataset import are_shards, expand, is_webdataset, unnumbered, webdataset_tree
from simclr.data.sources.zip import zip_listing
from simclr.errors import UserError


def is_archive(name: str) -> bool:
    """Whether a file is a tar or a zip archive, by its name."""
    return name.lower().endswith((*ARCHIVES, ".zip"))


def is_archive_file(path: Path) -> bool:
    """Whether a file is a tar or a zip archive, by its name or its content."""
    return is_archive(path.name) or is_tar(path) or zipfile.is_zipfile(path)


def archive_tree(path: Path, prefix: str = "", spec: str = "", sidecars: bool = True) -> Tree:
    """The tree of one archive, tar, zip or WebDataset shard, with `prefix` as the folder above its members. `spec` is what messages call
    it. Without `sidecars` what lies beside pictures of WebDataset is not read. Raises UserError for an archive that is damaged or cannot be
    read."""
    return archives_tree(spec or str(path), {prefix: path}, {prefix: spec or str(path)}, sidecars)


def archives_tree(spec: str, archives: Mapping[str, Path], called: Mapping[str, str] | None = None, sidecars: bool = True) -> Tree:
    """The tree of all `archives` of a folder: path in the folder without its ending (`stem`) → archive. WebDataset shards among them are
    read as one set; so are archives called like shards (`are_shards`). `called`: what messages call each, instead of its path."""
    listings: dict[str, Listing] = {}
    for prefix, path in archives.items():
        found = _flat(prefix, _listing(path, (called or {}).get(prefix, str(path)), len(archives)))
        if twice := sorted(listings.keys() & found.keys()):
            raise UserError(f"{spec} has two archives {twice[0]}; give the folder of one of them, or move one away")
        listings |= found
    samples = {prefix: listing for prefix, listing in listings.items() if is_webdataset(listing.sizes)}
    others = {prefix: listing for prefix, listing in listings.items() if prefix not in samples}
    numbered = are_shards(prefix for prefix, listing in others.items() if not (listing.inner or listing.listed))
    names = unnumbered({prefix: filter(is_image, others[prefix].sizes) for prefix in others if prefix in numbered})
    trees = [tree_of(listing, prefix, names.get(prefix)) for prefix, listing in others.items()]
    whole = joined(spec, [*trees, *([webdataset_tree(spec, samples, sidecars)] if samples else [])])
    if numbered:
        some = sorted(numbered)
        whole = dataclasses.replace(
            whole, notes=(*whole.notes, f"{some[0]} to {some[-1]} are numbered shards ({len(some):,}): their numbers are no classes")
        )
    return whole


def braces_tree(spec: str, sidecars: bool = True) -> Tree:
    """The tree of the shards that a path with braces names, as data/train-{000000..000146}.tar. Raises UserError if one is missing."""
    paths = [Path(name).expanduser() for name in expand(spec)]
    if missing := [path for path in paths if not path.is_file()]:
        raise UserError(
            f"{spec} names {len(paths):,} files, and {len(missing):,} of them are missing, as {missing[0]}; mend the braces, or fetch them"
        )
    if strange := [path for path in paths if not is_archive_file(path)]:
        raise UserError(f"{spec} names {strange[0]}, which is no tar or zip archive; braces stand for shards, as in train-{{000..146}}.tar")
    root = Path(os.path.commonpath([path.parent for path in paths]))
    named = stems((path.relative_to(root).as_posix() for path in paths), spec)
    return archives_tree(spec, {called: root / name for called, name in named.items()}, None, sidecars)


def _flat(prefix: str, listing: Listing) -> dict[str, Listing]:
    """An archive, and those within it that are listed, each by its path without ending."""
    flat = {prefix: listing}
    for called, inner in listing.listed.items():
        flat |= _flat(below(prefix, called), dataclasses.replace(inner, identity=listing.identity, times=listing.times))
    return flat


def _listing(path: Path, spec: str, of: int) -> Listing:
    name = path.name.lower()
    zipped = name.endswith(".zip") or (not name.endswith(ARCHIVES) and zipfile.is_zipfile(path))
    return zip_listing(path, spec) if zipped else tar_listing(path, spec, of)
