"""FFCV files that somebody else wrote, taken as shards where they lie."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import os
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from simclr import files
from simclr.data.ffcv.decode import decode
from simclr.data.ffcv.reader import Unfit, open_shard, read_rows
from simclr.data.manifest import Manifest, Shard, read_manifest, write_manifest
from simclr.data.pixels import MOST_PIXELS
from simclr.data.sources.members import ends_of
from simclr.data.sources.reading import Split, Understood
from simclr.data.sources.source import Source, digest
from simclr.data.sources.splits import split_of
from simclr.errors import UserError

_RAW_SIDE_PX = 64
_LOOKED_AT = 2048  # images of a file that are decoded
_PIXELS = 4096  # of each of them, for mean and standard deviation
_MOST_CLASSES = 10_000_000  # a larger number is no class's
_EXAMPLES = 5
_AGAIN = "write it again with FFCV, or prepare its pictures from where it was made"
_Rows = tuple[Any, NDArray[np.int64], Any]
"""Image, label and place of each sample."""


def described(paths: Mapping[str, Path]) -> Source:
    """What the metadata of FFCV files, split (train, test) → file, says of splits and classes. The source has no parts: nothing reads it.
    Raises UserError as `register` does, but for what only images show."""
    return _described(paths, _all_rows(paths))


def register(paths: Mapping[str, Path], out: Path, said: Callable[[str], None] = lambda sentence: None) -> Manifest:
    """Make `out` a dataset of existing FFCV files, split (train, test) → file, each of one RGBImageField and at most one IntField, the
    label. They are hard-linked into it, or linked by name where the disk is another (`said` gets the sentence); nothing is copied.

    Every sample's place, size and label is checked, and some 2,000 evenly spaced images of each file are decoded: mean and standard
    deviation are theirs, where `prepare` takes those of all. Classes are called by their numbers. Whole images are pixels where all are
    stored so, in one size of at most 64 px. A second call with the same files gives the manifest that is there. Raises UserError for
    a file that the loader could not read, for `out` with something else in it, and for fewer than two training images.
    """
    _require_files(paths)
    source, identity = ", ".join(str(path) for path in paths.values()), digest(*(ends_of(path) for path in paths.values()))
    files.require_writable(out)
    if (out / "manifest.json").exists():
        found = read_manifest(out)
        if (found.source, found.identity) != (source, identity):
            raise UserError(f"{out} already holds shards made from {found.source}; use another --out, or remove it")
        return found
    rows = _all_rows(paths)
    images = np.concatenate([image for image, _, _ in rows.values()])
    last = max(int(label.max(initial=-1)) for _, label, _ in rows.values())
    classes = last + 1 if last > 0 else 0  # a single class tells nothing apart
    shards = {split: _shard(split, path, len(rows[split][0])) for split, path in paths.items()}
    manifest = Manifest(
        splits={split: (shard,) for split, shard in shards.items()},
        classes=tuple(str(number) for number in range(classes)),
        kind=_kind(images),
        height_px=(int(images["height"].min()), int(images["height"].max())),
        width_px=(int(images["width"].min()), int(images["width"].max())),
        mean=(0.0, 0.0, 0.0),
        std=(0.0, 0.0, 0.0),
        source=source,
        identity=identity,
        understood=_described(paths, rows).understood,
        options={"registered": 1},
        skipped=0,
        versions={name: importlib.metadata.version(name) for name in ("ffcv", "numpy")},
    )
    for split, path in paths.items():
        open_shard(path, shards[split], manifest, _AGAIN)  # before any pointer is followed
    mean, square = [_moments(path, rows[split]) for split, path in paths.items()][list(paths).index("train")]
    mean, std = mean.round(6).tolist(), np.sqrt(np.maximum(square - mean**2, 0)).round(6).tolist()
    _link({shards[split].name: path for split, path in paths.items()}, out, said)
    manifest = dataclasses.replace(manifest, mean=tuple(mean), std=tuple(std))
    write_manifest(out, manifest)
    return manifest


def _require_files(paths: Mapping[str, Path]) -> None:
    if not paths.get("train") or set(paths) - {"train", "test"}:
        raise UserError(f"the splits are {', '.join(paths) or 'none'}; expected train, and test where there is one")
    if missing := [path for path in paths.values() if not path.is_file()]:
        raise UserError(f"there is no file {missing[0]}; expected an FFCV file")


def _all_rows(paths: Mapping[str, Path]) -> dict[str, _Rows]:
    _require_files(paths)
    rows = {split: _rows(path) for split, path in paths.items()}
    if len(rows["train"][0]) < 2:
        raise UserError(f"{paths['train']} has {len(rows['train'][0])} images; contrasting needs at least 2")
    for split, (image, label, _) in rows.items():
        pixels = image["height"].astype(np.int64) * image["width"]
        if len(pixels) and pixels.max() > 2 * MOST_PIXELS:
            raise UserError(
                f"{paths[split]}: sample {int(pixels.argmax())} has {pixels.max():,} pixels; expected at most {2 * MOST_PIXELS:,}; {_AGAIN}"
            )
        if len(label) and label.min() < -1:
            raise UserError(f"{paths[split]} has the label {label.min()}; expected 0 and more, or −1 for an unlabelled image; {_AGAIN}")
        if len(label) and label.max() >= _MOST_CLASSES:
            raise UserError(
                f"{paths[split]} has the label {label.max():,}; expected the number of a class, below {_MOST_CLASSES:,}; {_AGAIN}"
            )
    return rows


def _described(paths: Mapping[str, Path], rows: Mapping[str, _Rows]) -> Source:
    spec = ", ".join(str(path) for path in paths.values())
    notes = []
    if len(paths) == 1 and (kind := split_of(paths["train"].stem)[0]) not in (None, "train"):
        notes.append(
            f"{paths['train'].name} trains, since it was given alone, though it is called like a {kind} split; "
            "give the folder of both for train.beton to train"
        )
    labels = {split: label for split, (_, label, _) in rows.items()}
    everything = np.concatenate(list(labels.values()))
    labelled = everything[everything >= 0]
    if 2 < len(labelled) == len(np.unique(labelled)):
        notes.append(f"no two images of {spec} have the same label: if it is the image's number, scores by classes mean nothing")
    if "test" in labels and (strange := set(labels["test"].tolist()) - set(labels["train"].tolist()) - {-1}):
        notes.append(
            f"{paths['test']} has {len(strange):,} classes that {paths['train']} lacks, as {min(strange)}; they can only be judged wrong"
        )
    splits = {}
    for split, label in labels.items():
        numbers, counts = np.unique(label, return_counts=True)
        of = {str(number) if number >= 0 else None: int(count) for number, count in zip(numbers, counts, strict=True)}
        some = range(0, len(label), max(len(label) // _EXAMPLES, 1))[:_EXAMPLES]
        splits[split] = Split(Counter(of), tuple((f"{split}/{i}", str(label[i]) if label[i] >= 0 else None) for i in some))
    understood = Understood(
        splits=splits,
        how_split="files: " + ", ".join(f"{path.name} = {split}" for split, path in paths.items()),
        how_labelled="the whole number that each file has of an image" if len(labelled) else "none: the files have none",
        notes=tuple(notes),
        counted=True,
    )
    return Source(spec=spec, parts=(), read=lambda part: iter(()), total=len(everything), understood=understood.to_dict())


def _rows(path: Path) -> _Rows:
    try:
        return read_rows(path)
    except Unfit as error:
        raise UserError(f"{path} is no FFCV file of images as the loader reads them ({error}); {_AGAIN}") from None


def _kind(images: Any) -> Literal["raw", "jpeg"]:
    """As `prepare` decides: small images of one size, stored as pixels, are read whole."""
    small = max(images["height"].max(), images["width"].max()) <= _RAW_SIDE_PX
    same = len(np.unique(images["height"])) == len(np.unique(images["width"])) == 1
    return "raw" if small and same and (images["mode"] == 1).all() else "jpeg"


def _shard(split: str, path: Path, samples: int) -> Shard:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return Shard(f"{split}-00000.beton", path.stat().st_size, sha256, samples)


def _moments(path: Path, rows: _Rows) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(3,) and (3,): per channel mean and mean square of pixels in [0, 1], of evenly spaced images and evenly spaced pixels of each."""
    image, _, table = rows
    moments = []
    for row in np.unique(np.linspace(0, len(image) - 1, min(len(image), _LOOKED_AT)).astype(int)):
        at, height, width = (int(image[name][row]) for name in ("data_ptr", "height", "width"))
        with path.open("rb") as file:  # read, not mapped: a file that shrinks meanwhile would kill this process
            data = os.pread(file.fileno(), int(table["size"][row]), at)
        pixels = np.frombuffer(data, np.uint8) if image["mode"][row] == 1 else decode(data, height, width)
        if pixels is None or len(data) < table["size"][row]:
            raise UserError(f"{path}: the JPEG of sample {row} cannot be decoded; {_AGAIN}")
        flat = pixels.reshape(-1, 3)
        some = flat[:: max(len(flat) // _PIXELS, 1)].astype(np.float64) / 255
        moments.append((some.mean(0), (some**2).mean(0)))
    mean, square = np.mean(moments, 0)
    return mean, square


def _link(named: Mapping[str, Path], out: Path, said: Callable[[str], None]) -> None:
    """Give each file its name in `out`, which holds nothing else."""
    out.mkdir(parents=True, exist_ok=True)
    for path in out.iterdir():
        if path.name not in named or not path.samefile(named[path.name]):  # the same: left by a call that was interrupted
            raise UserError(f"{out} is not empty and no dataset (it holds {path.name}); use another --out")
    for name, path in named.items():
        if (out / name).exists():
            continue
        try:
            (out / name).hardlink_to(path.resolve())
        except OSError:  # another disk, or a file of somebody else
            (out / name).symlink_to(path.resolve())
            said(f"{out / name} only points to {path.resolve()}, which must stay where it is: a hard link was not possible")
