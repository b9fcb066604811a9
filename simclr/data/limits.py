"""What a picture will cost, told from its header: no decoder is started on one that would take far more memory or time than a photograph
of as many pixels. And the memory that the pictures of all threads share."""

from __future__ import annotations

import contextlib
import math
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from simclr.data.pixels import MOST_PIXELS, Unreadable, reading

BYTES_PER_PIXEL = 6
"""Of the largest picture that is read: RGB of 16 bits, uncompressed."""
MOST_SCANS = 100
"""Each scan of a progressive JPEG is a pass over all of its pixels, and may take a few bytes of the file. Encoders write 3 to about 20;
libtiff stops at 100 as well."""
_SCANS_OF_MOST = 20
"""Scans that a picture of the most pixels may have; a smaller one may have more, for the same time."""
_JPEGS = ("JPEG", "MPO")
_SHARES = {**dict.fromkeys(_JPEGS, 2.0), **dict.fromkeys(("WEBP", "JPEG2000", "AVIF", "HEIF"), 5 / 8)}
"""Of the most pixels. A JPEG is decoded at a smaller scale. The decoders of the others take 25 bytes a pixel."""
_SLOW_SHARE = 8
_SLOW = {"bmp_rle": "run lengths", "ppm": "values of another range than 0 to 255", "ppm_plain": "numbers in letters"}
"""Pillow's decoders that are written in Python and take a microsecond a value."""
_BITS, _PACKING, _SAMPLES, _STRIPS, _TILE_WIDTH, _TILE_HEIGHT, _TILES = 258, 259, 277, 273, 322, 323, 324
_TIFF_JPEG = (6, 7)
_PNG_VALUES = {2: 3, 4: 3, 6: 6}  # colour type → values of a pixel, of 16 bits where these are read as such; alpha needs a second copy
_PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)
_NO_FRAMES = (0xC4, 0xC8, 0xCC)
_MARKER = re.compile(rb"\xff+([^\x00\xff])")
_ALONE = (0x01, *range(0xD0, 0xD8))  # markers without a length
_START_OF_SCAN, _END = 0xDA, 0xD9


def within(width: int, height: int, most: int, share: float = 1) -> None:
    """Raise Unreadable if a picture has more than `most` pixels, or than that share of them."""
    if width * height > share * most:
        needed = math.ceil(width * height / share)
        raise Unreadable(f"its {width:,} × {height:,} pixels would fill the memory: --max-pixels {needed} reads it")


def within_bytes(size: int, most: int) -> None:
    """Raise Unreadable if the pixels of a picture, or its file, have more bytes than those of `most` pixels may have."""
    if size > BYTES_PER_PIXEL * most:
        raise Unreadable(f"its {size / 2**20:,.0f} MiB would fill the memory: --max-pixels {-(-size // BYTES_PER_PIXEL)} reads it")


def affordable(image: Image.Image, data: bytes, most: int) -> None:
    """Raise Unreadable for a picture, as Pillow opened `data`, of more than `most` pixels (or of `_SHARES` of them), or whose
    decoding would take more time or memory than theirs."""
    jpeg = image.format in _JPEGS
    within(image.width, image.height, most, _SHARES.get(str(image.format), 1))
    if jpeg:
        _few_scans(scans_in(data), image.width * image.height, most)
    if image.format == "TIFF":
        _tiff(image, data, most)
    if image.format == "PNG" and data[24:25] == b"\x10":
        within_bytes(image.width * image.height * 2 * _PNG_VALUES.get(data[25], 1), most)
    how = _SLOW.get(image.tile[0].codec_name) if image.tile else None  # type: ignore[attr-defined]
    if how and image.width * image.height > most // _SLOW_SHARE:
        raise Unreadable(
            f"its {image.width:,} × {image.height:,} pixels stand in it as {how}, which takes minutes to read; write it as PNG"
        )


def _few_scans(scans: int, pixels: int, most: int) -> None:
    if scans > MOST_SCANS or scans * pixels > _SCANS_OF_MOST * max(most, pixels // 2):
        raise Unreadable(
            f"it has {scans:,} scans of its {pixels:,} pixels, each of which is a pass over all; encoders write about ten, and up to "
            f"{MOST_SCANS} are read; save it again"
        )


def scans_in(data: bytes) -> int:
    """How often the decoder of a JPEG passes over its pixels: the scans of a progressive one, or of one with a scan for each colour; 1
    for others, of which the first scan is all that is decoded. `ffcv.decode.scans_in` is its twin, which is compiled."""
    at, colours, several = 2, 0, False
    while found := _MARKER.search(data, at):
        kind, at = found[1][0], found.end()
        if kind in _ALONE:
            continue
        if kind == _END:
            break
        if kind == _START_OF_SCAN:
            several = several or data[at + 2 : at + 3] != bytes([colours])
            break
        if 0xC0 <= kind <= 0xCF and kind not in _NO_FRAMES:
            several, colours = kind in _PROGRESSIVE, (data[at + 7 : at + 8] or b"\0")[0]
        at += max(int.from_bytes(data[at : at + 2]), 2)
    if not several:
        return 1
    most = data.count(b"\xff\xda", at - 2)  # markers of scans, and by chance the same bytes within EXIF data or behind the end
    return most if most <= MOST_SCANS else _counted(data, at - 2)


def _counted(data: bytes, at: int) -> int:
    """The scans from the marker at `at` to the end of the JPEG, behind which other pictures or a video may lie."""
    scans = 0
    while found := _MARKER.search(data, at):
        kind, at = found[1][0], found.end()
        if kind == _END:
            break
        scans += kind == _START_OF_SCAN
        if kind not in _ALONE:
            at += max(int.from_bytes(data[at : at + 2]), 2)
    return scans


def _tiff(image: Image.Image, data: bytes, most: int) -> None:
    """A tile may be declared larger than its picture, and each pixel may have thousands of values."""
    tags = image.tag_v2  # type: ignore[attr-defined]
    with reading():  # a damaged tag may have several values, or none
        width, height = (int(tags.get(tag, 0)) for tag in (_TILE_WIDTH, _TILE_HEIGHT))
        samples, bits = int(tags.get(_SAMPLES, 1)), max(map(int, tags.get(_BITS, (1,))))
        bytes_each = 8 if (samples, bits) == (1, 32) else samples * -(-bits // 8)  # numbers of 32 bits are copied once more
        pieces = len(tags.get(_STRIPS, tags.get(_TILES, (0,))))
    within(width, height, most)
    within_bytes(max(image.width * image.height, width * height) * bytes_each, most)
    if tags.get(_PACKING) in _TIFF_JPEG:
        scans = data.count(b"\xff\xda")
        _few_scans(-(-scans // max(pieces, 1)) if scans > MOST_SCANS else scans, image.width * image.height, most)


class TooLarge(Exception):
    """A picture exceeds the room of this process; another one decodes it."""


@dataclass(slots=True)
class Room:
    """Memory for large pictures, which all threads share: a picture waits until those that are being decoded leave room for it."""

    pixels: int
    alone: bool = True
    """Whether a picture that exceeds all of it gets it alone. Else that raises TooLarge."""
    taken: int = 0
    changed: threading.Condition = field(default_factory=threading.Condition)

    @contextlib.contextmanager
    def for_pixels(self, count: int) -> Iterator[None]:
        """Wait for room for so many pixels; one that exceeds all of it gets it alone."""
        if count < _SMALL:
            yield
            return
        if count > self.pixels and not self.alone:
            raise TooLarge
        with self.changed:
            self.changed.wait_for(lambda: not self.taken or self.taken + count <= self.pixels)
            self.taken += count
        try:
            yield
        finally:
            with self.changed:
                self.taken -= count
                self.changed.notify_all()


_SMALL = 4 << 20  # pixels: photographs wait for nothing
_BYTES_EACH = 16  # of a pixel, while it is decoded and converted


def memory_bytes() -> int:
    """Of this machine, or of the container that the process runs in."""
    known = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # no container, or "max"
            known.append(int(Path(path).read_text()))
    return min(known)


ROOM = Room(max(memory_bytes() // 4 // _BYTES_EACH, 2 * MOST_PIXELS))
