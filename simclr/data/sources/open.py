"""Where images come from: a folder, a tar archive, either of them in S3, a torchvision dataset, the built-in patterns. One
streaming pass each."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import tarfile
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simclr.data.s3.uri import Address, address, copy_of, locked
from simclr.data.sources.datasets import DATASETS
from simclr.data.sources.patterns import CLASSES, render

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm"})
_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2")
_SPLITS = {"train": "train", "training": "train", "test": "test", "val": "test", "valid": "test", "validation": "test"}
_RENDER_BLOCK = 512
_END_BYTES = 1 << 20
_OBJECTS_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Item:
    """One image on its way into a shard."""

    split: str
    """train or test."""
    label: str | None
    """Class name; None = unlabelled."""
    name: str
    """Where it came from, for error lines."""
    data: bytes | Path | NDArray[np.uint8]
    """An encoded file, its path, or pixels (H, W, 3)."""


@dataclass(frozen=True, slots=True)
class Source:
    """A set of images that can be read once from front to back, always in the same order."""

    spec: str
    """What the user asked for; with the options, it identifies the shards made from it."""
    total: int | None
    """Images, where that is known without reading."""
    items: Callable[[], Iterator[Item]]
    identity: str = ""
    """What changes when the source does: of a folder its files' names and sizes, of an archive its size and ends."""
    ignored: Counter[str] = field(default_factory=Counter)
    """Ending → files that are no images by their names; of an archive, those seen so far."""


def open_source(spec: str) -> Source:
    """The source that `spec` names.

    A directory or tar archive of split/class/file, class/file, or files alone (unlabelled), on disk or at s3://bucket/prefix;
    the name of a dataset (`cifar10`, or `torchvision:NAME`), downloaded where there is a network; `patterns`, with options as
    in `patterns:train=4000,test=1000,size=32,seed=0,coloured`. Raises ValueError where it is missing, empty or unknown.
    """
    name, _, options = spec.partition(":")
    if name == "patterns":
        return _patterns(spec, options)
    if spec in ("torchvision", "torchvision:"):
        raise ValueError("which torchvision dataset? torchvision:NAME, as in torchvision:CIFAR10")
    if name == "torchvision" or (spec in DATASETS and DATASETS[spec].torchvision):
        return _torchvision(spec, options or DATASETS[spec].torchvision)
    remote = address(spec)
    if remote is not None:
        return _remote_archive(remote) if remote.name.lower().endswith(_ARCHIVES) else _prefix(remote)
    path = Path(spec).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        if not path.name.lower().endswith(_ARCHIVES) and not tarfile.is_tarfile(path):
            raise ValueError(f"{path} is no tar archive; expected a folder, one of {', '.join(_ARCHIVES)}, or a dataset's name")
        ignored: Counter[str] = Counter()
        return Source(str(path), None, lambda: _archive(path, ignored), _ends(path), ignored)
    known = ["patterns", *(n for n, d in DATASETS.items() if d.torchvision)]
    near = difflib.get_close_matches(spec, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"give a folder, a tar archive or one of {', '.join(known)}"
    raise ValueError(f"no source at {spec}: there is no such file or folder and no dataset of that name; {hint}")


def place(parts: tuple[str, ...]) -> tuple[str, str | None]:
    """(split, class) of a file from the folders above it: split/…/class/file, class/file, or just file."""
    split = "train"
    folders = list(parts[:-1])
    for depth, folder in enumerate(folders):
        if folder.lower() in _SPLITS:
            split = _SPLITS[folder.lower()]
            folders = folders[depth + 1 :]
            break
    return split, folders[-1] if folders else None


def is_image(name: str) -> bool:
    """By its suffix; `._*`, which macOS leaves in archives, and other hidden files are none."""
    path = PurePosixPath(name)
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def _ending(name: str) -> str:
    path = PurePosixPath(name)
    return "hidden" if path.name.startswith(".") else path.suffix.lower() or "none"


# ── Folders and archives, on disk and in S3 ────────────────────────────────────────────────────────────────────────────


def _folder(root: Path) -> Source:
    present = [p for p in root.rglob("*") if p.is_symlink() or not p.is_dir()]
    states = {p.relative_to(root).as_posix(): p.stat().st_size if p.exists() else -1 for p in present}
    return _files(str(root), states, lambda chosen: (root / name for name in chosen))  # read where they are encoded


def _files(spec: str, states: Mapping[str, object], read: Callable[[list[str]], Iterator[bytes | Path]]) -> Source:
    """The source of files with these names (split/class/file), each with what tells its content (a size, an ETag), that `read`
    gives the bytes of, in the order it is asked for."""
    names = list(states)
    images = sorted((name for name in names if is_image(name)), key=PurePosixPath)
    ignored = Counter(_ending(name) for name in names if not is_image(name))
    if not images:
        found = f"{ignored.total()} other files ({', '.join(sorted(ignored)[:5])})" if ignored else "nothing"
        raise ValueError(f"no images in {spec}, only {found}; expected files that end with {' '.join(sorted(IMAGE_SUFFIXES))}")
    flat = all("/" not in name for name in images)

    def items() -> Iterator[Item]:
        for name, data in zip(images, read(images), strict=True):
            split, label = place(PurePosixPath(name).parts)
            yield Item(split, None if flat else label, name, data)

    return Source(spec, len(images), items, _digest(*(f"{name} {states[name]}" for name in images)), ignored)


def _digest(*parts: str | bytes) -> str:
    """16 hex digits of `parts`."""
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update((part if isinstance(part, bytes) else part.encode(errors="surrogateescape")) + b"\0")
    return hashed.hexdigest()[:16]


def _ends(path: Path) -> str:
    """Tells one archive from another without reading all of it: its size, its first and its last MiB."""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(_END_BYTES)
        file.seek(max(size - _END_BYTES, 0))
        return _digest(str(size), first, file.read())


def _prefix(at: Address) -> Source:
    from simclr.data.s3.store import Missing, Store

    store = Store(threads=_OBJECTS_AT_ONCE)

    def one(name: str) -> bytes:
        try:
            return store.read(at / name)
        except Missing:  # since the listing: as a file that cannot be read
            return b""

    def read(chosen: list[str]) -> Iterator[bytes]:
        ahead: deque[Future[bytes]] = deque()
        try:
            for name in chosen:
                ahead.append(store.pool.submit(one, name))
                if len(ahead) == 4 * _OBJECTS_AT_ONCE:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for waiting in ahead:
                waiting.cancel()

    return _files(str(at), {found.name: found.etag for found in store.listing(at)}, read)


def _remote_archive(at: Address) -> Source:
    from simclr.data.s3.store import Store

    store = Store()
    identity = store.look(at).etag
    ignored: Counter[str] = Counter()
    path = copy_of(at, "archives")

    def items() -> Iterator[Item]:
        with locked(path):
            store.download(at, path)
            try:
                yield from _archive(path, ignored, str(at))
            finally:
                path.unlink()

    return Source(str(at), None, items, identity, ignored)


class _Header(tarfile.TarInfo):
    """A header, or an error. tarfile takes a cut or damaged header for the end of the archive: of a half-fetched one it gives
    the first half and says nothing. Only the block of zeros that every tar ends with is the end."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> _Header:
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the stubs leave it out
            raise
        except tarfile.HeaderError as error:
            raise OSError(str(error)) from None


def _archive(path: Path, ignored: Counter[str], spec: str = "") -> Iterator[Item]:
    ignored.clear()
    try:
        with tarfile.open(path, "r|*", tarinfo=_Header) as archive:
            for member in archive:
                if not member.isfile():
                    continue
                if not is_image(member.name):
                    ignored[_ending(member.name)] += 1
                    continue
                parts = tuple(p for p in PurePosixPath(member.name).parts if p not in ("", ".", "/"))
                split, label = place(parts)
                file = archive.extractfile(member)
                yield Item(split, label, member.name, file.read() if file is not None else b"")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{spec or path} ends early or is damaged ({error}); fetch it again") from None


# ── Datasets by name ───────────────────────────────────────────────────────────────────────────────────────────────


def _torchvision(spec: str, name: str) -> Source:
    import torchvision.datasets as library

    classes = {n: c for n, c in vars(library).items() if isinstance(c, type)}
    if name not in classes:
        near = difflib.get_close_matches(name, classes, n=3, cutoff=0.3)
        raise ValueError(f"torchvision has no dataset {name!r}; nearest: {', '.join(near)}")
    signature = inspect.signature(classes[name]).parameters

    def open_split(split: str) -> Any:
        arguments: dict[str, Any] = {}
        if "root" in signature:
            root = Path("~/.cache/simclr/datasets").expanduser() / name
            root.mkdir(parents=True, exist_ok=True)
            arguments["root"] = str(root)
        if "download" in signature:
            arguments["download"] = True
        if "train" in signature:
            arguments["train"] = split == "train"
        elif "split" in signature:
            arguments["split"] = split if name != "ImageNet" or split == "train" else "val"
        try:
            return classes[name](**arguments)
        except Exception as error:
            raise ValueError(
                f"torchvision could not give {name} ({split}): {(str(error).splitlines() or [type(error).__name__])[0]}; "
                "without a network, download it elsewhere and give the folder or archive as --source"
            ) from None

    splits = ("train", "test") if {"train", "split"} & set(signature) else ("train",)
    opened = {split: open_split(split) for split in splits}

    def items() -> Iterator[Item]:
        for split, dataset in opened.items():
            names = getattr(dataset, "classes", None)
            for index in range(len(dataset)):
                image, label = dataset[index]
                if not isinstance(label, int | np.integer) or not hasattr(image, "convert"):
                    raise ValueError(f"torchvision's {name} is no dataset of images with a class each; use another")
                title = names[label] if names and label >= 0 else str(label)
                title = "/".join(title) if isinstance(title, tuple) else str(title)
                yield Item(split, title if label >= 0 else None, f"{split}/{index}", np.asarray(image.convert("RGB")))

    return Source(spec, sum(len(d) for d in opened.values()), items)


def _patterns(spec: str, options: str) -> Source:
    values: dict[str, int] = {"train": 4_000, "test": 1_000, "size": 32, "seed": 0, "coloured": 0}
    for option in filter(None, options.split(",")):
        key, _, value = option.partition("=")
        if key not in values or not (value.isdigit() or (key == "coloured" and not value)):
            raise ValueError(f"patterns has no option {option!r}; expected {', '.join(f'{k}=NUMBER' for k in values)}")
        values[key] = int(value or 1)
    if values["size"] < 8:
        raise ValueError(f"patterns of {values['size']} px show nothing; use size=32, at least 8")
    counts = {"train": values["train"], "test": values["test"]}
    if values["train"] < 2:
        raise ValueError(f"patterns:train={values['train']} leaves nothing to contrast; use at least 2")

    def items() -> Iterator[Item]:
        first = 0
        for split, count in counts.items():
            for begin in range(first, first + count, _RENDER_BLOCK):
                ids = np.arange(begin, min(begin + _RENDER_BLOCK, first + count))
                images, labels = render(ids, values["seed"], values["size"], bool(values["coloured"]))
                for sample, image, label in zip(ids, images, labels, strict=True):
                    yield Item(split, CLASSES[label], f"{split}/{sample}", image)
            first += count  # the test images are other samples than the training images

    stated = ",".join(f"{k}={v}" for k, v in values.items())
    return Source(f"patterns:{stated}", sum(counts.values()), items)
