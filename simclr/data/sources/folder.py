"""Images in a folder: split/class/file, class/file, or files alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from simclr.data.sources.source import IMAGE_SUFFIXES, Item, Source, digest, ending, is_image, place
from simclr.errors import UserError


def folder_source(root: Path) -> Source:
    """The source of the images below the directory `root`. Raises UserError if there are none."""
    present = [p for p in root.rglob("*") if p.is_symlink() or not p.is_dir()]
    states = {p.relative_to(root).as_posix(): p.stat().st_size if p.exists() else -1 for p in present}
    return file_source(str(root), states, lambda chosen: (root / name for name in chosen))  # read where they are encoded


def file_source(spec: str, states: Mapping[str, object], read: Callable[[list[str]], Iterator[bytes | Path]]) -> Source:
    """The source of the files in `states`: name (split/class/file) → a mark that changes with the content (a size, an ETag). `read` gives
    the bytes of the named files, in their order."""
    names = list(states)
    images = sorted((name for name in names if is_image(name)), key=PurePosixPath)
    ignored = Counter(ending(name) for name in names if not is_image(name))
    if not images:
        found = f"{ignored.total()} other files ({', '.join(sorted(ignored)[:5])})" if ignored else "nothing"
        raise UserError(f"no images in {spec}, only {found}; expected files that end with {' '.join(sorted(IMAGE_SUFFIXES))}")
    flat = all("/" not in name for name in images)

    def items() -> Iterator[Item]:
        for name, data in zip(images, read(images), strict=True):
            split, label = place(PurePosixPath(name).parts)
            yield Item(split, None if flat else label, name, data)

    return Source(spec, len(images), items, digest(*(f"{name} {states[name]}" for name in images)), ignored)
