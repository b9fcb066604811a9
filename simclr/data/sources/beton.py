"""FFCV files that somebody else wrote, taken as shards where they lie."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from simclr import files
from simclr.data.ffcv.decode import decode
from simclr.data.loader import Unfit, open_shard, read_rows
from simclr.data.manifest import Manifest, Shard, read_manifest, write_manifest
from simclr.data.sources.members import ends_of
from simclr.data.sources.source import digest
from simclr.errors import UserError

_RAW_SIDE_PX = 64
_LOOKED_AT = 2048  # images of a file that are decoded
_PIXELS = 4096  # of each of them, for mean and standard deviation
_AGAIN = "write it again with FFCV, or prepare its pictures from where it was made"


def register(paths: Mapping[str, Path], out: Path, said: Callable[[str], None] = lambda sentence: None) -> Manifest:
    """Make `out` a dataset of existing FFCV files, split (train, test) → file, each of one RGBImageField and at most one IntField, the
    label. They are hard-linked into it, or linked by name where the disk is another (`said` gets the sentence); nothing is copied.

    Every sample's place, size and label is checked, and some 2,000 evenly spaced images of each file are decoded: mean and standard
    deviation are theirs, where `prepare` takes those of all. Classes are called by their numbers. Whole images are pixels where all are
    stored so, in one size of at most 64 px. A second call with the same files gives the manifest that is there. Raises UserError for
    a file that the loader could not read, for `out` with something else in it, and for fewer than two training images.
    """
    if not paths.get("train") or set(paths) - {"train", "test"}:
        raise UserError(f"the splits are {', '.join(paths) or 'none'}; expected train, and test where there is one")
    if missing := [path for path in paths.values() if not path.is_file()]:
        raise UserError(f"there is no file {missing[0]}; expected an FFCV file")
    source, identity = ", ".join(str(path) for path in paths.values()), digest(*(ends_of(path) for path in paths.values()))
    files.require_writable(out)
    if (out / "manifest.json").exists():
        found = read_manifest(out)
        if (found.source, found.identity) != (source, identity):
            raise UserError(f"{out} already holds shards made from {found.source}; use another --out, or remove it")
        return found
    rows = {split: _rows(path) for split, path in paths.items()}
    if len(rows["train"][0]) < 2:
        raise UserError(f"{paths['train']} has {len(rows['train'][0])} images; contrasting needs at least 2")
    images = np.concatenate([image for image, _, _ in rows.values()])
    labels = np.concatenate([label for _, label, _ in rows.values()])
    if labels.min() < -1:
        raise UserError(f"{source} has the label {labels.min()}; expected 0 and more, or −1 for an unlabelled image; {_AGAIN}")
    classes = int(labels.max()) + 1 if labels.max() > 0 else 0  # a single class tells nothing apart
    labelled = labels[labels >= 0]
    if 2 < len(labelled) == len(np.unique(labelled)):
        said(f"no two images of {source} have the same label: if it is the image's number, scores by classes mean nothing")
    strange = set(rows["test"][1].tolist()) - set(rows["train"][1].tolist()) - {-1} if "test" in rows else set()
    if strange:
        said(f"{paths['test']} has {len(strange):,} classes that {paths['train']} lacks, as {min(strange)}; they can only be judged wrong")
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


def _rows(path: Path) -> tuple[Any, NDArray[np.int64], Any]:
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


def _moments(path: Path, rows: tuple[Any, NDArray[np.int64], Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(3,) and (3,): per channel mean and mean square of pixels in [0, 1], of evenly spaced images and evenly spaced pixels of each."""
    image, _, table = rows
    stored = np.memmap(path, np.uint8, "r")
    moments = []
    for row in np.unique(np.linspace(0, len(image) - 1, min(len(image), _LOOKED_AT)).astype(int)):
        at, height, width = (int(image[name][row]) for name in ("data_ptr", "height", "width"))
        data = stored[at : at + int(table["size"][row])]
        pixels = np.asarray(data) if image["mode"][row] == 1 else decode(data.tobytes(), height, width)
        if pixels is None:
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
