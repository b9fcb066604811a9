"""One image of a source → its bytes in a shard, or the reason why it cannot be used."""

from __future__ import annotations

import hashlib
import io
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from simclr.data.ffcv.decode import decode
from simclr.data.pixels import Unreadable, reading, upright_rgb
from simclr.data.sources.source import Item

PAGE = 1 << 21
"""Bytes: FFCV's smallest page. An image lies within one page."""
_MOST_PIXELS = 89_478_485  # 256 MiB of RGB in each thread; Pillow itself refuses twice as many
# Pillow's warnings (corrupt EXIF data, a large image) do not name the file, so a user cannot act on them.
warnings.filterwarnings("ignore", module="PIL")
_SAMPLED = 4096  # pixels of an image from which its moments are computed


@dataclass(frozen=True, slots=True)
class Encoded:
    """An image as a shard stores it, or, in `skipped`, the reason why it cannot be used."""

    item: Item
    stored: bytes
    jpeg: bool
    height: int
    width: int
    moments: NDArray[np.float64]
    """(2, 3): per channel mean and mean square, of pixels in [0, 1]."""
    digest: int = 0
    """64-bit hash of the file's content, unchanged: equal for copies."""
    skipped: str = ""


def encode(item: Item, kind: Literal["raw", "jpeg"], max_side_px: int, jpeg_quality: int) -> Encoded:
    """Decode, turn upright, convert to RGB, reduce, and encode as `kind`; or say why not.

    A JPEG that needs no change is stored as it is, if the loader's own decoder accepts it.
    """
    digest = 0
    try:
        if isinstance(item.data, np.ndarray):
            digest = _digest(item.data.tobytes())
            image = Image.fromarray(item.data)
        else:
            data = item.data if isinstance(item.data, bytes) else _read(item.data)
            if not data:
                raise Unreadable("the file is empty")
            digest = _digest(data)
            with reading():
                opened = Image.open(io.BytesIO(data))
            as_is = _decoded_as_stored(opened, data, max_side_px) if kind == "jpeg" else None
            if as_is is not None:
                return Encoded(item, data, True, as_is.shape[0], as_is.shape[1], _moments(as_is), digest)
            if opened.width * opened.height > _MOST_PIXELS and opened.format != "JPEG":  # a JPEG is decoded at a smaller scale
                raise Unreadable(f"its {opened.width:,} × {opened.height:,} pixels would fill the memory")
            with reading():
                opened.draft(None, (max_side_px, max_side_px))  # decodes a far larger JPEG at a smaller scale
            image = upright_rgb(opened)
        if max(image.size) > max_side_px:
            scale = max_side_px / max(image.size)
            image = image.resize((max(round(image.width * scale), 1), max(round(image.height * scale), 1)), Image.Resampling.BOX)
        pixels = np.asarray(image)
        if kind == "raw":
            stored = pixels.tobytes()
        else:
            buffer = io.BytesIO()
            with reading():  # Pillow writes some of the file's own metadata again
                image.save(buffer, "JPEG", quality=jpeg_quality, subsampling=0)
            stored = buffer.getvalue()
        if len(stored) > PAGE:
            raise Unreadable(f"its {len(stored):,} bytes exceed a page of {PAGE:,}; use a smaller --max-side-px")
    except Unreadable as error:
        return Encoded(item, b"", False, 0, 0, np.zeros((2, 3)), digest, str(error))
    return Encoded(item, stored, kind == "jpeg", image.height, image.width, _moments(pixels), digest)


def decoded(path: Path) -> NDArray[np.uint8]:
    """Pixels (H, W, 3) of an image file, upright: by the loader's decoder where a shard would hold the file as it is, which is a level or
    two from Pillow's. Raises Unreadable."""
    if not (data := _read(path)):
        raise Unreadable("the file is empty")
    with reading():
        opened = Image.open(io.BytesIO(data))
    as_is = _decoded_as_stored(opened, data, max(opened.size))
    return np.asarray(upright_rgb(opened)) if as_is is None else as_is


def _read(path: Path) -> bytes:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe would wait for ever
            raise Unreadable("it is no regular file")
        return path.read_bytes()
    except OSError as error:  # a broken link, a file that may not be read
        raise Unreadable(f"the file cannot be read: {error.strerror}") from None


def _digest(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _decoded_as_stored(opened: Image.Image, data: bytes, max_side_px: int) -> NDArray[np.uint8] | None:
    """Pixels (H, W, 3) of a file that may go into a shard byte for byte: an upright RGB JPEG, not too large, that the loader's
    own decoder accepts. That decoder refuses errors that Pillow forgives (stray bytes before a marker, a missing end)."""
    if opened.format != "JPEG" or opened.mode != "RGB" or max(opened.size) > max_side_px or len(data) > PAGE:
        return None
    with reading():
        turned = opened.getexif().get(ExifTags.Base.Orientation, 1) != 1
    return None if turned else decode(data, opened.height, opened.width)


def _moments(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """(2, 3): per channel mean and mean square, in [0, 1], of some 4,000 evenly spaced pixels."""
    rows = pixels.reshape(-1, 3)
    some = rows[:: max(len(rows) // _SAMPLED, 1)].astype(np.float64) / 255
    return np.stack([some.mean(0), (some**2).mean(0)])
