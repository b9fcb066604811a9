"""Any picture → 8-bit RGB. Here are the pixels that Pillow has no mode for, or would cut to 8 bits by itself: bands that are no colours,
floats, and colours of 16 bits. The door to tifffile and OpenCV."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import stat
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from simclr.data.depth import Rule, Values, decided, kind_of, scaled, values_of
from simclr.data.limits import BYTES_PER_PIXEL, ROOM, affordable, within, within_bytes
from simclr.data.pixels import Unreadable, opened, reading, upright, upright_rgb
from simclr.data.sources.source import Unread
from simclr.data.unpack import inflated, unlzma, unpacked_bits
from simclr.extras import command, has

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_COLOURS = (2, 4, 6)  # colour types RGB, grey with alpha, RGBA
_PNG_KEPT = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_BITS, _PHOTOMETRIC, _ORIENTATION, _SAMPLES, _EXTRA, _FORMAT = 258, 262, 274, 277, 338, 339
_COLOURS = {0: 1, 1: 1, 2: 3}  # TIFF's photometric interpretations: white is zero, black is zero, RGB; others are left to Pillow
_ALPHA = (1, 2)
_SIDEWAYS = (5, 6, 7, 8)
_STRIP_PIXELS = 1 << 20
_CODECS = {**dict.fromkeys((8, 32946, 50013), inflated), 34925: unlzma, 32773: unpacked_bits}  # by TIFF's numbers of compressions
_MOST_PIECES = 1 << 20


@dataclass(frozen=True, slots=True)
class Raster:
    """Pixels as they are in the file, upright."""

    values: NDArray[Any]
    """(H, W, bands)."""
    alpha: bool = False
    """Whether the last band is transparency."""


@dataclass(frozen=True, slots=True)
class Rgb:
    """A picture for the shards, and what was done to it."""

    image: Image.Image
    grey: bool = False
    """One channel, repeated."""
    rescaled: bool = False
    """It had more than 8 bits."""
    clipped: bool = False
    high: float = 0.0
    """The largest integer before it was rescaled."""


def file_bytes(data: bytes | Path | Unread, rule: Rule) -> bytes:
    """The content of a picture's file. Raises Unreadable for an empty one, for what is no regular file, and, before it is read, for one
    larger than a picture within the rule's limit is."""
    if isinstance(data, Unread):
        raise Unreadable(data.reason)
    if isinstance(data, Path):
        try:
            status = data.stat()
            if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
                raise Unreadable("it is no regular file")
            within_bytes(status.st_size, rule.max_pixels)
            data = data.read_bytes()
        except OSError as error:  # a broken link, a file that may not be read
            raise Unreadable(f"the file cannot be read: {error.strerror}") from None
    if not data:
        raise Unreadable("the file is empty")
    return data


def pillow_image(data: bytes) -> Image.Image | None:
    """The file as Pillow opens it; None for a TIFF that Pillow has no mode for. Raises Unreadable for what is no picture."""
    try:
        return opened(data)
    except Unreadable:
        if data[:4] in _TIFF:
            return None
        raise


def raster_of(data: bytes, image: Image.Image | None, rule: Rule) -> Raster | None:
    """The raw pixels of a picture, where Pillow's conversion to RGB would lose some of them, or the rule picks bands; else None."""
    if image is None or image.format == "TIFF":
        tags = {} if image is None else image.tag_v2  # type: ignore[attr-defined]
        photometric, samples = tags.get(_PHOTOMETRIC, 1), tags.get(_SAMPLES, 1)
        alpha = len(tags.get(_EXTRA, ())) == 1 and tags[_EXTRA][0] in _ALPHA
        plain = samples == _COLOURS.get(photometric, samples) + alpha
        deep = max(tags.get(_BITS, (1,))) > 8
        if image is None or (photometric in _COLOURS and (not plain or (deep and samples > 1))):
            return _tiff(data, rule)
        if deep and photometric == 0:
            raise Unreadable("white is its zero, in more than 8 bits; save it with black as zero")
        if image.mode == "I" and tags.get(_BITS) == (32,) and tags.get(_FORMAT, (1,)) == (1,):
            return Raster(np.asarray(upright(image)).view(np.uint32)[..., None])
    elif data[:8] == _PNG and data[24] == 16 and data[25] in _PNG_COLOURS:
        return _png(data, image)
    assert image is not None
    if image.mode.startswith("I") or image.mode == "F":
        return Raster(np.asarray(upright(image))[..., None])
    if rule.bands:
        image = upright(image)
        with reading():
            if image.mode in ("P", "PA", "1"):
                image = image.convert("RGBA" if "transparency" in image.info or image.mode == "PA" else "L" if image.mode == "1" else "RGB")
        pixels = np.asarray(image)
        return Raster(pixels if pixels.ndim == 3 else pixels[..., None])
    return None


def as_rgb(data: bytes, image: Image.Image | None, rule: Rule) -> Rgb:
    """The picture, upright, as 8-bit RGB; `image` is what `pillow_image` gave for `data`.

    Transparency lies over white; one channel is repeated. Raises Unreadable for more bands than three unless the rule picks three, and
    for what cannot be decoded.
    """
    raster = raster_of(data, image, rule)
    if raster is None:
        assert image is not None
        return Rgb(upright_rgb(image), image.mode in ("1", "L", "LA"))
    return _scaled_rgb(raster, rule)


def rgb_of(data: bytes, image: Image.Image | None, rule: Rule) -> Rgb:
    """The file that `opened_file` gave, upright, 8-bit RGB by `rule`, by Pillow's own decoders. A JPEG of more than the
    rule's pixels is decoded at half its size. Raises Unreadable."""
    if image is not None and image.width * image.height > rule.max_pixels:
        with reading():
            image.draft(None, (image.width // 2, image.height // 2))
    with ROOM.for_pixels(image.width * image.height if image is not None else 0):
        return as_rgb(data, image, rule)


def raster_of_image(image: Image.Image, rule: Rule) -> Raster | None:
    """`raster_of` for a picture of Pillow's whose file is not at hand: only what its mode holds."""
    within(image.width, image.height, rule.max_pixels)
    return Raster(np.asarray(upright(image))[..., None]) if image.mode.startswith("I") or image.mode == "F" else None


def pixels_of_image(image: Image.Image, rule: Rule) -> NDArray[np.uint8]:
    """Pixels (H, W, 3) of a picture of Pillow's, upright, 8-bit RGB by `rule`. Raises Unreadable."""
    raster = raster_of_image(image, rule)
    return np.asarray(upright_rgb(image) if raster is None else _scaled_rgb(raster, rule).image)


def _scaled_rgb(raster: Raster, rule: Rule) -> Rgb:
    values, alpha = _colours(raster, rule)
    grey = values.shape[2] == 1
    found = None if kind_of(values) == "" else scaled(values, rule)
    pixels = found.pixels if found else values.astype(np.uint8) * 255 if values.dtype == np.bool_ else values
    if alpha is not None:
        pixels = _over_white(pixels, alpha)
    image = Image.fromarray(np.ascontiguousarray(np.repeat(pixels, 3, 2) if grey else pixels))
    if found is None:
        return Rgb(image, grey)
    return Rgb(image, grey, True, found.clipped, found.high if kind_of(values) == "integers" else 0.0)


def _over_white(pixels: NDArray[np.uint8], alpha: NDArray[Any]) -> NDArray[np.uint8]:
    """(H, W, bands) by the transparency (H, W, 1). Some rows at a time, in doubles."""
    shades, rows = np.empty(pixels.shape, np.uint8), max(_STRIP_PIXELS // pixels.shape[1], 1)
    most = np.iinfo(alpha.dtype).max if alpha.dtype.kind in "ui" else 1
    for at in range(0, len(pixels), rows):
        part, clear = pixels[at : at + rows], alpha[at : at + rows]
        if clear.min() == most:
            shades[at : at + rows] = part
        else:
            shades[at : at + rows] = np.rint(np.clip(255 + (part.astype(np.float64) - 255) * (clear / most), 0, 255))
    return shades


def measured(data: bytes, image: Image.Image | None, rule: Rule) -> tuple[int, int, Values | None]:
    """Height and width as `as_rgb` would give them, and the pixels from which the range of a set is chosen: None where they have 8 bits,
    and then they are not decoded. Raises Unreadable as `as_rgb` does."""
    raster = raster_of(data, image, rule)
    if raster is None:
        assert image is not None
        with reading():
            # Pillow gives the upright size of a TIFF, of others that in the file.
            sideways = image.format != "TIFF" and image.getexif().get(_ORIENTATION, 1) in _SIDEWAYS
        return (image.width, image.height, None) if sideways else (image.height, image.width, None)
    colours, _ = _colours(raster, rule)
    return colours.shape[0], colours.shape[1], values_of(colours) if kind_of(colours) else None


def ranges_of(paths: Iterable[Path], rule: Rule) -> dict[str, tuple[float, float]]:
    """The ranges that a set's pixels of more than 8 bits need, from a sample of its files; unreadable ones count for nothing."""
    sample = []
    for path in paths:
        with contextlib.suppress(Unreadable):
            sample.append(measured(*opened_file(path, rule), rule)[2])
    return decided([values for values in sample if values])


def opened_file(file: bytes | Path, rule: Rule) -> tuple[bytes, Image.Image | None]:
    """The bytes of a file, and the picture as `pillow_image` gives it. Raises Unreadable."""
    data = file_bytes(file, rule)
    image = pillow_image(data)
    if image is not None:
        affordable(image, data, rule.max_pixels)
    return data, image


def _colours(raster: Raster, rule: Rule) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """(H, W, 1 or 3), and the transparency (H, W, 1) where there is one. Raises Unreadable for other bands."""
    values, count = raster.values, raster.values.shape[2]
    if rule.bands:
        if max(rule.bands) > count:
            raise Unreadable(f"it has {count} band{'s' * (count > 1)}, and --bands asks for band {max(rule.bands)}")
        return values[..., [band - 1 for band in rule.bands]], None
    colours = values[..., :-1] if raster.alpha else values
    if colours.shape[2] not in (1, 3):
        raise Unreadable(f"it has {count} bands: --bands 3 2 1 would take the third, second and first as red, green and blue")
    return colours, values[..., -1:] if raster.alpha else None


def _tiff(data: bytes, rule: Rule) -> Raster:
    """The first page of a TIFF."""
    if not has("tifffile"):
        raise Unreadable(f"TIFF of these bands and bits needs tifffile ({command('images')})")
    import tifffile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it says of a damaged file does not name the file
    _unpack_within_limits(tifffile)
    with reading(), tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages.first
        axes, shape = page.axes, tuple(int(side) for side in page.shape)
        alpha = len(page.extrasamples) == 1 and int(page.extrasamples[0]) in _ALPHA
        tag = page.tags.get(_ORIENTATION)
        turn = int(tag.value) if tag else 1
        inverted = int(page.photometric) == 0
        stored = [(int(at), int(count)) for at, count in zip(page.dataoffsets, page.databytecounts, strict=True) if count]
        pieces, segment = math.prod(page.chunked), math.prod(map(int, page.chunks))
        size, packed = int(page.dtype.itemsize if page.dtype else 1), int(page.compression) != 1
    if axes not in ("YX", "YXS", "SYX"):
        raise Unreadable(f"it is no plain picture (axes {axes}, shape {shape})")
    if 0 in shape or not stored or max(at + count for at, count in stored) > len(data):  # tifffile gives zeros for what is missing
        raise Unreadable("it ends early or holds no pixels")
    within(shape[axes.index("X")], shape[axes.index("Y")], rule.max_pixels)
    # Tiles stand over two edges of the picture, and have at most four times its pixels where there are several each way.
    within_bytes(max(math.prod(shape), segment, pieces * segment // 4) * size, rule.max_pixels)
    if pieces > _MOST_PIECES or (packed and sum(count for _, count in stored) > len(data)):
        raise Unreadable(f"its {pieces:,} pieces share bytes, or are far too many; save it again")
    with ROOM.for_pixels(math.prod(shape) * size // BYTES_PER_PIXEL), reading(), tifffile.TiffFile(io.BytesIO(data)) as file:
        values = file.pages.first.asarray()
    if values.shape != shape:
        raise Unreadable(f"its pixels have the shape {values.shape}, its header says {shape}")
    if values.dtype.kind not in "uifb":
        raise Unreadable(f"its pixels are of type {values.dtype}")
    if inverted:
        raise Unreadable("white is its zero; save it with black as zero")
    values = values[..., None] if axes == "YX" else np.moveaxis(values, 0, -1) if axes == "SYX" else values
    return Raster(_turned(values, turn), alpha)


def _unpack_within_limits(tifffile: Any) -> None:
    """Have tifffile unpack by `unpack`, which is told how many bytes a piece has, where its own codecs do not heed that.

    imagecodecs heeds it. `_codecs` is tifffile's own name for its table, from which it takes what is already there. A public way to
    register a codec would do."""
    if not has("imagecodecs"):
        tifffile.TIFF.DECOMPRESSORS._codecs.update(_CODECS)


def _png(data: bytes, image: Image.Image) -> Raster:
    """A PNG of 16-bit colours, of which Pillow would keep the upper 8 bits."""
    try:
        import cv2
    except ImportError:  # it is not there, or the libraries of a desktop are not, which it needs with its windows
        raise Unreadable(f"PNG of 16-bit colours needs OpenCV ({command('train')})") from None

    with reading():
        turn = image.getexif().get(_ORIENTATION, 1)
        image.load()  # OpenCV takes damaged files too
        values = cv2.imdecode(np.frombuffer(_pixels_of(data), np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None or values.dtype != np.uint16 or values.ndim != 3:
        raise Unreadable("OpenCV cannot read its 16-bit colours")
    order = [2, 1, 0, 3][: values.shape[2]]
    return Raster(_turned(values[..., order], turn), values.shape[2] == 4)


def _pixels_of(data: bytes) -> bytes:
    """A PNG without the chunks that change no pixel: of each that is odd, as a colour profile, OpenCV's libpng prints a line on standard
    error. Raises Unreadable where a chunk that it keeps is damaged, of which it would print too."""
    kept, at = [data[:8]], 8
    while at + 12 <= len(data):
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        end = at + 12 + size
        if kind in _PNG_KEPT:
            if zlib.crc32(data[at + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
                raise Unreadable(f"its part {kind.decode()} is damaged")
            kept.append(data[at:end])
        at = end
    if kept[-1][4:8] != b"IEND":
        raise Unreadable("it ends early")
    return b"".join(kept)


def _turned(values: NDArray[Any], orientation: int) -> NDArray[Any]:
    """(H, W, bands) upright, by EXIF's and TIFF's orientation (1 = upright)."""
    if orientation in _SIDEWAYS:
        values = values.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        values = values[::-1]
    if orientation in (2, 3, 6, 7):
        values = values[:, ::-1]
    return values
