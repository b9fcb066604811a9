"""One image of a source → its bytes in a shard, or the reason why it cannot be used."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from simclr.data.depth import Rule, Values
from simclr.data.limits import ROOM, affordable
from simclr.data.pixels import Unreadable, reading
from simclr.data.raster import Rgb, as_rgb, file_bytes, measured, opened_file, pillow_image, rgb_of
from simclr.data.sources.source import Data, Item
from simclr.extras import has

if TYPE_CHECKING or has("ffcv"):  # the small install embeds pictures without it
    from simclr.data.ffcv.decode import decode

PAGE = 1 << 21
"""Bytes: FFCV's smallest page. An image lies within one page."""
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
    """64-bit hash of the file's content, unchanged: equal for copies; 0 = there is none."""
    skipped: str = ""
    grey: bool = False
    """One channel, repeated to three."""
    rescaled: bool = False
    """It had more than 8 bits."""
    clipped: bool = False
    """More than 1 % of its pixels lay outside the range."""
    high: float = 0.0
    """The largest integer before it was rescaled."""


@dataclass(frozen=True, slots=True)
class Looked:
    """What is known about an image without encoding it; `skipped` is the reason why it cannot be used."""

    height: int = 0
    width: int = 0
    """As a shard would store it."""
    values: Values | None = None
    """Its pixels, if they have more than 8 bits."""
    skipped: str = ""


def encode(item: Item, kind: Literal["raw", "jpeg"], max_side_px: int, jpeg_quality: int, rule: Rule | None = None) -> Encoded:
    """Decode, turn upright, convert to RGB by `rule`, reduce, and encode as `kind`; or say why not.

    A JPEG that needs no change is stored as it is, if the loader's own decoder accepts it.
    """
    rule, digest = rule or Rule(), 0
    try:
        if isinstance(item.data, np.ndarray):
            digest, found = _digest(item.data.tobytes()), _reduced(Rgb(Image.fromarray(item.data)), max_side_px)
        else:
            data = file_bytes(item.data, rule)
            digest = _digest(data)
            opened = pillow_image(data)
            if opened is not None:
                affordable(opened, data, rule.max_pixels)
            # The loader's decoder gives three channels in their own order.
            as_is = _decoded_as_stored(opened, data, max_side_px) if kind == "jpeg" and opened and rule.bands in (None, (1, 2, 3)) else None
            if as_is is not None:
                return Encoded(item, data, True, as_is.shape[0], as_is.shape[1], _moments(as_is), digest)
            with ROOM.for_pixels(_drafted(opened, max_side_px)):
                found = _reduced(as_rgb(data, opened, rule), max_side_px)
        image = found.image
        width, height = image.size
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
    done = (found.grey, found.rescaled, found.clipped, found.high)
    return Encoded(item, stored, kind == "jpeg", height, width, _moments(pixels), digest, "", *done)


@dataclass(frozen=True, slots=True)
class Decoded:
    """Pixels of an image file, and what was done to them."""

    pixels: NDArray[np.uint8]
    """(H, W, 3)."""
    rescaled: bool = False
    """They had more than 8 bits."""
    clipped: bool = False
    """More than 1 % of them lay outside the range."""


def decoded(file: bytes | Path, rule: Rule) -> Decoded:
    """An image file upright, as 8-bit RGB by `rule`: by the loader's decoder where a shard would hold the file as it is, which is a level
    or two from Pillow's; where FFCV is not installed, by Pillow. Raises Unreadable."""
    data, image = opened_file(file, rule)
    if image is not None and rule.bands in (None, (1, 2, 3)):
        as_is = _decoded_as_stored(image, data, max(image.size))
        if as_is is not None:
            return Decoded(as_is)
    found = rgb_of(data, image, rule)
    return Decoded(np.asarray(found.image), found.rescaled, found.clipped)


def look(item: Item, max_side_px: int, rule: Rule) -> Looked:
    """An image's size in a shard; its pixels are decoded only if they have more than 8 bits."""
    try:
        if isinstance(item.data, np.ndarray):
            height, width, values = item.data.shape[0], item.data.shape[1], None
        else:
            data = file_bytes(item.data, rule)
            opened = pillow_image(data)
            if opened is not None:
                affordable(opened, data, rule.max_pixels)
            with ROOM.for_pixels(_drafted(opened, max_side_px)):
                height, width, values = measured(data, opened, rule)
    except Unreadable as error:
        return Looked(skipped=str(error))
    width, height = _fitted(width, height, max_side_px)
    return Looked(height, width, values)


def digest_of(data: Data, rule: Rule) -> int:
    """The digest that `encode` gives the picture; 0 for a file that cannot be read."""
    try:
        return _digest(data.tobytes() if isinstance(data, np.ndarray) else file_bytes(data, rule))
    except Unreadable:
        return 0


def _drafted(opened: Image.Image | None, max_side_px: int) -> int:
    """Have a far larger JPEG decoded at a smaller scale. Returns the pixels that are in memory at once while it is decoded."""
    if opened is None:
        return 0
    whole = opened.width * opened.height
    with reading():
        opened.draft(None, (max_side_px, max_side_px))
    return whole if opened.info.get("progressive") else opened.width * opened.height


def _reduced(found: Rgb, max_side_px: int) -> Rgb:
    size = _fitted(found.image.width, found.image.height, max_side_px)
    return found if size == found.image.size else replace(found, image=found.image.resize(size, Image.Resampling.BOX))


def _fitted(width: int, height: int, max_side_px: int) -> tuple[int, int]:
    scale = max_side_px / max(width, height)
    return (width, height) if scale >= 1 else (max(round(width * scale), 1), max(round(height * scale), 1))


def _digest(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _decoded_as_stored(opened: Image.Image, data: bytes, max_side_px: int) -> NDArray[np.uint8] | None:
    """Pixels (H, W, 3) of a file that may go into a shard byte for byte: an upright RGB JPEG, not too large, that the loader's own
    decoder accepts. That decoder refuses errors that Pillow forgives (stray bytes before a marker, a missing end)."""
    if not has("ffcv") or opened.format != "JPEG" or opened.mode != "RGB" or max(opened.size) > max_side_px or len(data) > PAGE:
        return None
    with reading():
        turned = opened.getexif().get(ExifTags.Base.Orientation, 1) != 1
    return None if turned else decode(data, opened.height, opened.width)


def _moments(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """(2, 3): per channel mean and mean square, in [0, 1], of some 4,000 evenly spaced pixels."""
    rows = pixels.reshape(-1, 3)
    some = rows[:: max(len(rows) // _SAMPLED, 1)].astype(np.float64) / 255
    return np.stack([some.mean(0), (some**2).mean(0)])
