"""Pictures as a person would see them: decoded, upright, RGB. The one place that opens them."""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError, _imaging

from simclr.errors import UserError
from simclr.extras import command, has

# Pillow tells a format by the content, whatever the file's name is. Some of its readers start programs (EPS: Ghostscript), follow paths
# or read what is no picture, so the formats are named. TGA has no signature and comes last.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA")
MOST_PIXELS = 89_478_485
"""256 MiB of RGB in each thread."""
# What Pillow and its libraries print of a damaged file does not name the file, so a user cannot act on it. What matters is raised, too.
warnings.filterwarnings("ignore", module="PIL")
logging.getLogger("PIL").setLevel(logging.CRITICAL)
Image.MAX_IMAGE_PIXELS = None  # `limits` has it, and a flag moves it; Pillow's own is fixed and stops at twice as many
_ORIENTATION = 0x0112
_STRIP_PIXELS = 4 << 20
_HEIF = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_MARKER = re.compile(rb"\xff+([^\x00\xff])")
_ALONE = frozenset(bytes([kind]) for kind in (0x01, *range(0xD0, 0xD8)))  # markers without a length
_START_OF_SCAN = b"\xda"
_MOST_SEGMENTS, _MOST_BETWEEN = 1 << 16, 1 << 16


class Unreadable(UserError):
    """A picture that cannot be used; the message is the reason."""


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Use it around the reading calls of Pillow and its like, and around nothing else. For a damaged file they raise nearly anything
    (struct.error, IndexError, zlib.error …), which becomes Unreadable here. An exception of our own code is a bug."""
    try:
        yield
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0].partition(" <_io.")[0]  # without the stream's address in memory
        raise Unreadable(reason or type(error).__name__) from None


def opened(data: bytes | Path) -> Image.Image:
    """The picture in a file, its pixels not decoded yet. Raises Unreadable if it is of none of FORMATS, nor HEIC where pillow-heif is
    installed (the extra `images`)."""
    if isinstance(data, Path):
        with reading():
            data = data.read_bytes()
    if data[:3] == b"\xff\xd8\xff":
        _require_segments(data)
    with reading():
        try:
            return Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError:
            if data[4:8] != b"ftyp" or data[8:12] not in _HEIF:
                raise
        if not has("pillow_heif"):
            raise Unreadable(f"HEIC needs pillow-heif ({command('images')})")
        import pillow_heif

        pillow_heif.register_heif_opener()
        return Image.open(io.BytesIO(data), formats=["HEIF"])


def _require_segments(data: bytes) -> None:
    """Raise Unreadable for a JPEG of thousands of segments, or with much between two: Pillow looks for the first scan byte by byte."""
    at = 2
    for _ in range(_MOST_SEGMENTS):
        found = _MARKER.search(data, at)
        if (found.end() if found else len(data)) - at > _MOST_BETWEEN:
            break
        if found is None or found[1] == _START_OF_SCAN:
            return
        at = found.end()
        if found[1] not in _ALONE:
            at += max(int.from_bytes(data[at : at + 2]), 2)
    raise Unreadable("its segments are no JPEG's")


def _silence_libtiff() -> None:
    """Pillow lets libtiff print its errors on standard error, and has no way to say otherwise. The library is asked itself, which Pillow's
    own has loaded; one that has no such name prints on. It waits for a switch in Pillow."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(None)


_silence_libtiff()


def name_formats_for_libraries() -> None:
    """Have every `Image.open` of this process, also those in other libraries, try FORMATS alone: torchvision's datasets open files
    themselves, and name no formats. `Image.ID` is the list of what is tried; `init` fills it once."""
    Image.init()
    Image.ID[:] = [name for name in Image.ID if name in (*FORMATS, "HEIF")]


def upright(image: Image.Image) -> Image.Image:
    """EXIF rotation applied, and decoded. Returns the same object if it was upright. Raises Unreadable if Pillow cannot decode it."""
    with reading():
        if image.getexif().get(_ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
        image.load()
    return image


def upright_rgb(image: Image.Image) -> Image.Image:
    """Of a picture of at most 8 bits: EXIF rotation applied, transparency over white, grey, palette and CMYK converted.

    Returns the same object if nothing had to be done. Raises Unreadable if Pillow cannot decode it.
    """
    image = upright(image)
    if image.mode == "RGB":
        return image
    with reading():  # the palette or the transparency may be invalid
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            return _over_white(image)
        return image.convert("RGB")


def _over_white(image: Image.Image) -> Image.Image:
    """Some rows at a time: as a whole, the picture would be in memory four times."""
    whole, rows = Image.new("RGB", image.size), max(_STRIP_PIXELS // image.width, 1)
    for top in range(0, image.height, rows):
        part = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
        white = Image.new("RGBA", part.size, (255, 255, 255, 255))
        whole.paste(Image.alpha_composite(white, part).convert("RGB"), (0, top))
    return whole


_RAW = "raw files of a camera; export them as JPEG or PNG"
_VIDEO = "videos; write their frames as JPEG or PNG, in a folder for each class"
_ARRAYS = "arrays; write them as PNG or TIFF, or give `simclr embed` an .npy of uint8 (n, H, W, 3)"
_UNREAD = {
    **dict.fromkeys((".heic", ".heif"), f"need pillow-heif ({command('images')})"),
    **dict.fromkeys((".cr2", ".cr3", ".nef", ".arw", ".dng", ".orf", ".rw2", ".raf"), _RAW),
    **dict.fromkeys((".mp4", ".avi", ".mov", ".mkv", ".webm", ".mpg", ".mpeg"), _VIDEO),
    **dict.fromkeys((".npy", ".npz", ".h5", ".hdf5", ".mat", ".pkl"), _ARRAYS),
    ".svg": "drawings; render them as PNG",
    **dict.fromkeys((".eps", ".ps", ".pdf", ".ai"), "pages; render them as PNG"),
    **dict.fromkeys((".psd", ".xcf", ".kra"), "files of a painting program; export them as PNG"),
    **dict.fromkeys((".exr", ".hdr"), "of high dynamic range; write them as TIFF of floats"),
    **dict.fromkeys((".dcm", ".nii"), "medical images; write their slices as PNG or TIFF of 16 bits"),
    **dict.fromkeys((".svs", ".ndpi", ".mrxs", ".scn", ".czi", ".lif"), "slides of a microscope; cut them into tiles of PNG or TIFF"),
    **dict.fromkeys((".jxl", ".ico", ".fits"), "of a format that is not read; write them as PNG"),
}


def unread(ending: str) -> str:
    """Why files with this ending (".svg"), which are pictures to their owner, are not read, and what to do; "" where they are no
    pictures."""
    return _UNREAD.get(ending.lower(), "")
