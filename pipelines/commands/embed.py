"""`simclr embed`: encoder + images → features.npz."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from numpy.typing import NDArray

from pipelines.runs import sync
from pipelines.terminal import Bar, say, show
from simclr import files
from simclr.data.arrays import require_plain_headers
from simclr.data.depth import Rule
from simclr.data.pixels import MOST_PIXELS
from simclr.data.sources.folder import walk
from simclr.errors import UserError

_BATCH = 64
_SAMPLE = 256  # files that decide how pixels of more than 8 bits are scaled


@dataclass(frozen=True)
class Args:
    """Features of image files, with the preprocessing of the encoder's training."""

    encoder: Annotated[Path, tyro.conf.Positional]
    """A published encoder's directory (`simclr pull`, or RUN/encoder), or s3://bucket/prefix of one."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Image files, folders of them, or an .npy file of uint8 images (n, H, W, 3)."""
    out: Path = Path("features.npz")
    """File to write: features (n, d) float32 and names (n,)."""
    value_range: tuple[float, float] | None = None
    """Black and white point of pixels of more than 8 bits and of floats, as `prepare` said or was told for the training images; without
    it a sample of these images decides."""
    bands: tuple[int, int, int] | None = None
    """Which bands are red, green and blue, as for `prepare`."""
    max_pixels: int = MOST_PIXELS
    """A picture with more pixels is left out, as `prepare` does; a JPEG may have twice as many."""


class Junk(UserError):
    """A file that is no image."""


@dataclass(frozen=True)
class _Images:
    names: list[str]
    read: Callable[[int], NDArray[np.uint8]]
    """Index → (H, W, 3). Raises Junk if the file is no image."""
    given: frozenset[str] = frozenset()
    """Names that the user gave: these must be images. Files found in a folder may be junk."""


def main(args: Args) -> None:
    if not args.images:
        raise UserError("which images? give files, folders or an .npy file")
    files.require_writable(args.out)
    images = _open(args)
    import torch

    import simclr

    with sync.directory(args.encoder) as directory:
        encoder = simclr.load_encoder(directory)
    features: list[NDArray[np.float32]] = []
    names: list[str] = []
    junk: list[str] = []
    with Bar("embed", len(images.names)) as bar, torch.inference_mode():
        for begin in range(0, len(images.names), _BATCH):
            ready = []
            for i in range(begin, min(begin + _BATCH, len(images.names))):
                try:
                    pixels = images.read(i)
                except Junk as error:
                    if images.names[i] in images.given:
                        raise
                    junk.append(str(error))
                    continue
                ready.append(encoder.prepared(pixels[None]))  # one by one: 64 photographs at full size take gigabytes
                names.append(images.names[i])
            if ready:
                features.append(encoder(torch.cat(ready)).float().numpy())
            bar.update(len(names) + len(junk))
    if not features:
        raise UserError(f"none of the {len(junk)} files can be read as an image; the first: {junk[0]}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows = np.concatenate(features)
    with files.whole(args.out) as scratch, scratch.open("wb") as file:
        np.savez(file, features=rows, names=np.array(names))
    if junk:
        say(f"{len(junk):,} files are no images that can be read and were left out; the first: {junk[0]}")
    show(f"{args.out}: {len(rows)} × {rows.shape[1]} features")


def _open(args: Args) -> _Images:
    paths = args.images
    if len(paths) == 1 and paths[0].suffix == ".npy":
        return _array(paths[0], args.max_pixels)
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            files_in = walk(path)
            found += [path / name for names in files_in.parts for name in names]
            if files_in.junk:
                say(f"{files_in.junk.total():,} files in {', '.join(sorted(files_in.junk)[:3])} are left out")
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"no file or folder {path}; expected images")
    if not found:
        raise UserError(f"no images in {', '.join(map(str, paths))}")
    rule = _rule(found, args)
    return _Images([str(f) for f in found], lambda i: _read(found[i], rule), frozenset(map(str, paths)))


def _array(path: Path, most: int) -> _Images:
    if not path.is_file():
        raise UserError(f"no file {path}; expected images")
    try:
        require_plain_headers(path)
        array = np.load(path, mmap_mode="r")
    except Exception as error:  # NumPy raises nearly anything for a damaged header; nothing here computes
        raise UserError(f"{path} is no .npy file that can be read ({error}); expected uint8 (n, H, W, 3)") from None
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path} is an .npz file; expected an .npy file of uint8 (n, H, W, 3)")
    if array.ndim != 4 or array.shape[3] != 3 or array.dtype != np.uint8 or not len(array):
        raise UserError(f"{path} holds {array.dtype} {array.shape}; expected uint8 (n, H, W, 3)")
    if array.shape[1] * array.shape[2] > most:
        raise UserError(
            f"{path} holds images of {array.shape[2]:,} × {array.shape[1]:,} pixels, which would fill the memory; "
            f"--max-pixels {array.shape[1] * array.shape[2]} reads them"
        )
    return _Images([str(i) for i in range(len(array))], lambda i: np.asarray(array[i]))


def _read(path: Path, rule: Rule) -> NDArray[np.uint8]:
    from simclr.data.encode import decoded
    from simclr.data.pixels import Unreadable

    try:
        return decoded(path, rule)
    except Unreadable as error:
        raise Junk(f"{path} is no image that can be read ({error}); leave it out") from None


def _rule(paths: list[Path], args: Args) -> Rule:
    """How pictures of more than 8 bits become 8-bit RGB: as stated, or by a sample of these files."""
    from simclr.data.options import Options
    from simclr.data.raster import ranges_of

    options = Options(value_range=args.value_range, bands=args.bands, max_pixels=args.max_pixels)
    return options.rule({} if args.value_range else ranges_of(paths[:: max(len(paths) // _SAMPLE, 1)], options.rule({})))
