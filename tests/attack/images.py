"""Hostile pictures: mutations of sound ones, and bombs made by hand. `use` does with one what `prepare` and `embed` do."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from simclr.data.depth import Rule
from simclr.data.encode import decoded, encode, look
from simclr.data.pixels import MOST_PIXELS, Unreadable
from simclr.data.sources.source import Item

_RULE = Rule(ranges={"integers": (0.0, 4095.0), "floats": (0.0, 1.0)}, stated=True)
_SMALL_BYTES = 1 << 13
_BANDED = Rule(ranges=_RULE.ranges, stated=True, bands=(1, 1, 1))


def use(path: Path) -> None:
    """A picture's way through the survey, `prepare` (as JPEG, and raw with bands chosen) and `embed`."""
    item = Item("train", None, path.name, path)
    look(item, 500, _RULE)
    encode(item, "jpeg", 500, 90, _RULE)
    if path.stat().st_size < _SMALL_BYTES:  # the way of a picture to its bands is the same
        encode(item, "raw", 500, 90, _BANDED)
    with contextlib.suppress(Unreadable):
        decoded(path, _RULE)


def cases(seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """`count` of (file name, content): first the bombs, then mutations drawn by `seed`."""
    made = ((f"{name}-bomb{suffix}", make()) for name, (suffix, make) in BOMBS.items())
    yield from itertools.islice(itertools.chain(made, _mutations(np.random.default_rng(seed))), count)


# ---------------------------------------------------------------- mutations


def _mutations(draw: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    sound = _sound()
    names = list(sound)
    for number in itertools.count():
        name = names[int(draw.integers(len(names)))]
        how = _HOW[int(draw.integers(len(_HOW)))]
        stem, _, suffix = name.rpartition(".")
        yield f"{number}-{stem}-{how.__name__.strip('_')}.{suffix}", how(sound[name], draw)


def _bytes_changed(data: bytes, draw: np.random.Generator) -> bytes:
    changed = bytearray(data)
    for _ in range(int(draw.integers(1, 16))):
        changed[int(draw.integers(len(changed)))] = int(draw.integers(256))
    return bytes(changed)


def _head_changed(data: bytes, draw: np.random.Generator) -> bytes:
    changed = bytearray(data)
    for _ in range(int(draw.integers(1, 6))):
        changed[int(draw.integers(min(len(changed), 300)))] = int(draw.choice([0, 1, 127, 128, 255, draw.integers(256)]))
    return bytes(changed)


def _number_changed(data: bytes, draw: np.random.Generator) -> bytes:
    """A number of two or four bytes, of either order, becomes an extreme one."""
    at = int(draw.integers(max(len(data) - 4, 1)))
    form = str(draw.choice(["<H", ">H", "<I", ">I"]))
    most = (1 << (8 * struct.calcsize(form))) - 1
    number = struct.pack(form, int(draw.choice([0, 1, most, most >> 1, (most >> 1) + 1, most >> 4])))
    return data[:at] + number + data[at + len(number) :]


def _cut(data: bytes, draw: np.random.Generator) -> bytes:
    return data[: int(draw.integers(len(data)))]


def _piece_doubled(data: bytes, draw: np.random.Generator) -> bytes:
    begin = int(draw.integers(len(data)))
    end = min(begin + int(draw.integers(1, 200)), len(data))
    return data[:end] + data[begin:end] * int(draw.integers(1, 50)) + data[end:]


def _piece_lost(data: bytes, draw: np.random.Generator) -> bytes:
    begin = int(draw.integers(len(data)))
    return data[:begin] + data[begin + int(draw.integers(1, 40)) :]


_HOW: tuple[Callable[[bytes, np.random.Generator], bytes], ...] = (
    *(_bytes_changed, _head_changed, _head_changed, _number_changed, _number_changed),
    *(_cut, _piece_doubled, _piece_lost),
)


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _tiff(values: NDArray[Any], **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, **options)
    return buffer.getvalue()


@functools.cache
def _sound() -> dict[str, bytes]:
    """Pictures that are read, of every format, depth and compression that this build of Pillow writes."""
    draw = np.random.default_rng(0)
    pixels = np.kron(draw.integers(0, 256, (6, 8, 4), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
    rgb, rgba = Image.fromarray(pixels[..., :3]), Image.fromarray(pixels)
    palette, grey = rgb.quantize(16), rgb.convert("L")
    frames = [rgb.rotate(angle) for angle in (90, 180)]
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = pixels.astype(np.uint16) * 16
    found = {
        "base.jpg": _saved(rgb, "JPEG"),
        "turned.jpg": _saved(rgb, "JPEG", exif=exif, quality=70),
        "progressive.jpg": _saved(rgb, "JPEG", progressive=True),
        "cmyk.jpg": _saved(rgb.convert("CMYK"), "JPEG"),
        "grey.jpg": _saved(grey, "JPEG"),
        "rgb.png": _saved(rgb, "PNG"),
        "rgba.png": _saved(rgba, "PNG", exif=exif, icc_profile=b"profile" * 9),
        "palette.png": _saved(palette, "PNG", transparency=3),
        "deep.png": _png(96, 64, 16, 6, (deep.repeat(2, 1)[:64, :96] * 16).astype(">u2").tobytes()),
        "sixteen.png": _saved(Image.fromarray(deep[..., 0]), "PNG"),
        "lossy.webp": _saved(rgb, "WEBP"),
        "lossless.webp": _saved(rgba, "WEBP", lossless=True, exif=exif),
        "moving.webp": _saved(rgb, "WEBP", save_all=True, append_images=frames),
        "one.gif": _saved(palette, "GIF"),
        "moving.gif": _saved(rgb, "GIF", save_all=True, append_images=frames),
        "plain.bmp": _saved(rgb, "BMP"),
        "palette.bmp": _saved(palette, "BMP"),
        "plain.tif": _saved(rgb, "TIFF"),
        "pages.tif": _saved(rgb, "TIFF", save_all=True, append_images=frames, compression="tiff_lzw"),
        **{f"{kind}.tif": _saved(rgb, "TIFF", compression=kind) for kind in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")},
        "fax.tif": _saved(rgb.convert("1"), "TIFF", compression="group4"),
        "floats.tif": _tiff(pixels[..., 0].astype(np.float32) / 255),
        "deep.tif": _tiff(deep[..., :3], photometric="rgb", compression="zlib"),
        "tiles.tif": _tiff(deep, photometric="minisblack", planarconfig="contig", tile=(16, 16), compression="zlib"),
        "planes.tif": _tiff(deep.transpose(2, 0, 1), photometric="minisblack", planarconfig="separate"),
        "rgb.ppm": _saved(rgb, "PPM"),
        "grey.pgm": _saved(grey, "PPM"),
        "bits.pbm": _saved(rgb.convert("1"), "PPM"),
        "words.ppm": b"P3\n4 2\n1023\n" + b" ".join(b"%d" % n for n in range(24)),
        "wide.ppm": b"P6\n4 4\n4095\n" + draw.integers(0, 16, 96, dtype=np.uint8).tobytes(),
        "floats.pnm": b"Pf\n4 4\n-1.0\n" + draw.random(16, np.float32).tobytes(),
        "rgb.tga": _saved(rgba, "TGA"),
        "packed.tga": _saved(rgb, "TGA", compression="tga_rle"),
        "boxed.jp2": _saved(rgb, "JPEG2000"),
        "bare.j2k": _saved(rgba, "JPEG2000", no_jp2=True, tile_size=(16, 16), num_resolutions=3),
        "one.avif": _saved(rgba, "AVIF", speed=10, exif=exif),
    }
    if "HEIF" in Image.SAVE:
        found["one.heic"] = _saved(rgb, "HEIF")
    return found


# ---------------------------------------------------------------- bombs


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, bits: int, colours: int, rows: bytes | None = None, more: bytes = b"") -> bytes:
    """A PNG of the pixels `rows`, or of zeros; `more`: chunks ahead of the pixels."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colours]
    stride = -(-width * bits * channels // 8)
    if rows is None:
        packed = zeros(height * (stride + 1))
    else:
        packed = zlib.compress(b"".join(b"\0" + rows[row * stride : (row + 1) * stride] for row in range(height)), 1)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + more + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def scans(times: int, width: int = 4096, height: int = 4096) -> bytes:
    """A progressive JPEG whose last scan is repeated until there are `times`."""
    flat = _saved(Image.new("RGB", (width, height), (90, 120, 30)), "JPEG", progressive=True, quality=50)
    last, whole = flat.rfind(b"\xff\xda"), flat.count(b"\xff\xda")
    return flat[:-2] + flat[last:-2] * (times - whole) + flat[-2:]


def sequential_scans(times: int, width: int = 4096, height: int = 4096) -> bytes:
    """A JPEG that is not progressive, with a scan for each colour, of which the last is repeated."""
    one = _saved(Image.new("L", (width, height), 90), "JPEG", quality=50)
    at = one.find(b"\xff\xc0")
    frame = b"\xff\xc0" + struct.pack(">HBHHB", 8 + 3 * 3, 8, height, width, 3) + bytes([1, 17, 0, 2, 17, 0, 3, 17, 0])
    after = at + 2 + int.from_bytes(one[at + 2 : at + 4])
    begin = one.find(b"\xff\xda")
    coded = one[begin + 10 : -2]
    each = [b"\xff\xda" + struct.pack(">HBBBBBB", 8, 1, number, 0, 0, 63, 0) + coded for number in (1, 2, 3)]
    return one[:at] + frame + one[after:begin] + b"".join(each) + each[2] * (times - 3) + b"\xff\xd9"


def directory(entries: list[tuple[int, int, int, int]], tail: bytes = b"", tall: bool = False) -> bytes:
    """A TIFF with one directory of (tag, type, count, value) and `tail` behind it."""
    packed = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + packed + bytes(4) + tail


def _plane(width: int, height: int, **more: int) -> dict[int, tuple[int, int, int]]:
    """Tags of a picture: tag → (type, count, value)."""
    tags = {"bits": 8, "packing": 1, "photometric": 1, "samples": 1, "rows": height, "format": 1} | more
    named = {256: width, 257: height, 258: tags["bits"], 259: tags["packing"], 262: tags["photometric"], 277: tags["samples"]}
    return {tag: (4, 1, value) for tag, value in (named | {278: tags["rows"], 339: tags["format"]}).items()}


def strip(width: int, height: int, stored: bytes, **more: int) -> bytes:
    """A TIFF of one strip."""
    tags = _plane(width, height, **more)
    at = 8 + 2 + 12 * (len(tags) + 2) + 4
    tags |= {273: (4, 1, at), 279: (4, 1, len(stored))}
    return directory([(tag, *value) for tag, value in tags.items()], stored)


def tile(width: int, height: int, side: int, stored: bytes, **more: int) -> bytes:
    """A TIFF of one tile, of `side` pixels each way."""
    tags = _plane(width, height, **more)
    del tags[278]
    at = 8 + 2 + 12 * (len(tags) + 4) + 4
    tags |= {322: (4, 1, side), 323: (4, 1, side), 324: (4, 1, at), 325: (4, 1, len(stored))}
    return directory([(tag, *value) for tag, value in tags.items()], stored)


def shared(width: int, height: int, stored: bytes, **more: int) -> bytes:
    """A TIFF of a strip for each row, all of which are the same bytes."""
    tags = _plane(width, height, rows=1, **more)
    at = 8 + 2 + 12 * (len(tags) + 2) + 4
    places = struct.pack(f"<{height}I", *[at + 8 * height] * height) + struct.pack(f"<{height}I", *[len(stored)] * height)
    tags |= {273: (4, height, at), 279: (4, height, at + 4 * height)}
    return directory([(tag, *value) for tag, value in tags.items()], places + stored)


def zeros(count: int) -> bytes:
    """`count` zeros, deflated: one block of them again and again, which is faster than to deflate them all."""
    packer = zlib.compressobj(9)
    first = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    whole, rest = divmod(count, 1 << 20)
    if not whole:
        return zlib.compress(bytes(count), 9)
    last = zlib.compressobj(9, zlib.DEFLATED, -15)
    end = last.compress(bytes(rest)) + last.flush()
    return first + block * (whole - 1) + end + struct.pack(">HH", count % 65_521, 1)  # Adler's checksum of zeros


def tags(count: int, claimed: int) -> bytes:
    """A TIFF's directory of so many tags, each of which claims the same `claimed` bytes."""
    return directory([(tag, 1, claimed, 8) for tag in range(1000, 1000 + count)], bytes(claimed))


def _exif_jpeg(exif: bytes) -> bytes:
    """A JPEG with EXIF data of any length, in as many segments as it needs."""
    flat = _saved(Image.new("RGB", (64, 64)), "JPEG")
    pieces = [exif[at : at + 65_000] for at in range(0, len(exif), 65_000)]
    marked = b"".join(b"\xff\xe1" + struct.pack(">H", len(piece) + 8) + b"Exif\0\0" + piece for piece in pieces)
    return flat[:2] + marked + flat[2:]


def _gif(width: int, height: int, frames: int = 1) -> bytes:
    """A GIF whose screen and frames have that size; of a frame there is one pixel."""
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x4c\x01\x00"
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6) + frame * frames + b";"


def _webp(width: int, height: int) -> bytes:
    """A lossless WebP of one colour, which has no bits for a pixel, with another size written into it."""
    small = bytearray(_saved(Image.new("RGBA", (16, 16), (1, 2, 3, 4)), "WEBP", lossless=True, exact=True))
    at = small.find(b"VP8L") + 9
    bits = int.from_bytes(small[at : at + 4], "little") >> 28 << 28
    small[at : at + 4] = (bits | (width - 1) | (height - 1) << 14).to_bytes(4, "little")
    if (x := small.find(b"VP8X")) >= 0:
        small[x + 12 : x + 18] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return bytes(small)


def _jp2(width: int, height: int, mode: str = "RGBA", **options: Any) -> bytes:
    return _saved(Image.new(mode, (width, height)), "JPEG2000", no_jp2=True, **options)


def _jp2_lies(width: int, height: int, side: int) -> bytes:
    """A JPEG 2000 of one tile whose header has another size."""
    data = bytearray(_jp2(64, 64))
    at = data.find(b"\xff\x51") + 6
    data[at : at + 8], data[at + 16 : at + 24] = struct.pack(">II", width, height), struct.pack(">II", side, side)
    return bytes(data)


def _bmp_rle(width: int, height: int, packed: bytes, bits: int = 8) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, 1 if bits == 8 else 2, len(packed), 0, 0, 1 << bits, 0)
    palette = bytes(4 << bits)
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 14 + len(head) + len(palette)) + head + palette + packed


def _bmp(width: int, height: int, bits: int) -> bytes:
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, 0, 0, 0, 0, 0, 0)


def _tga(width: int, height: int, packed: bytes, kind: int = 10) -> bytes:
    return struct.pack("<BBBHHBHHHHBB", 0, 0, kind, 0, 0, 0, 0, 0, width, height, 32, 8) + packed


_SIDE = 9459  # squared, just within MOST_PIXELS
_TWICE = 13_377  # squared, just within twice as many
assert _SIDE**2 <= MOST_PIXELS and _TWICE**2 <= 2 * MOST_PIXELS
_EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n(/tmp/simclr-was-here) (w) file closefile\nshowpage\n%%EOF\n"
_SVG = b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><svg xmlns="http://www.w3.org/2000/svg">&x;</svg>'
BOMBS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "scans": (".jpg", lambda: scans(700)),
    "scans-100": (".jpg", lambda: scans(100, 4000, 4000)),
    "scans-19": (".jpg", lambda: scans(19, 8192, 8192)),
    "scans-sequential": (".jpg", lambda: sequential_scans(700)),
    "scans-in-tiff": (".tif", lambda: strip(4096, 4096, scans(700), packing=7, photometric=6, samples=3)),
    "grey-twice": (".jpg", lambda: _saved(Image.new("L", (_TWICE, _TWICE)), "JPEG")),
    "cmyk-twice": (".jpg", lambda: _saved(Image.new("CMYK", (_TWICE, _TWICE)), "JPEG")),
    "exif-tags": (".jpg", lambda: _exif_jpeg(tags(60_000, 2 << 20))),
    "palette-twice": (".png", lambda: _png(_TWICE, _TWICE, 1, 3, more=chunk(b"PLTE", bytes(6)) + chunk(b"tRNS", b"\x80"))),
    "palette": (".png", lambda: _png(_SIDE, _SIDE, 1, 3, more=chunk(b"PLTE", bytes(6)) + chunk(b"tRNS", b"\x80"))),
    "rgba": (".png", lambda: _png(_SIDE, _SIDE, 8, 6)),
    "rgba-sixteen": (".png", lambda: _png(_SIDE, _SIDE, 16, 6)),
    "rgba-sixteen-within": (".png", lambda: _png(6680, 6680, 16, 6)),
    "grey-sixteen": (".png", lambda: _png(_SIDE, _SIDE, 16, 0)),
    "grey-alpha": (".png", lambda: _png(_SIDE, _SIDE, 8, 4)),
    "declared": (".png", lambda: _png(8, 8, 8, 2).replace(struct.pack(">II", 8, 8), struct.pack(">II", 1 << 30, 1 << 30))),
    "profile": (".png", lambda: _png(8, 8, 8, 2, more=chunk(b"iCCP", b"x\0\0" + zeros(1 << 30)))),
    "text": (".png", lambda: _png(8, 8, 8, 2, more=chunk(b"zTXt", b"x\0\0" + zeros(1 << 30)) * 20)),
    "international": (".png", lambda: _png(8, 8, 8, 2, more=chunk(b"iTXt", b"x\0\1\0\0\0" + zeros(1 << 29)) * 20)),
    "exif": (".png", lambda: _png(8, 8, 8, 2, more=chunk(b"eXIf", tags(60_000, 1 << 20)))),
    "chunks": (".png", lambda: _png(8, 8, 8, 2, more=chunk(b"tEXt", b"a\0b") * 200_000)),
    "animation": (".png", lambda: _png(8, 8, 16, 6, more=chunk(b"acTL", struct.pack(">II", 1 << 31, 0)))),
    "frames": (".gif", lambda: _gif(64, 64, 10_000)),
    "screen": (".gif", lambda: _gif(65_535, 65_535)),
    "screen-within": (".gif", lambda: _gif(_SIDE, _SIDE)),
    "lossless": (".webp", lambda: _webp(16_383, MOST_PIXELS // 16_383)),
    "lossless-most": (".webp", lambda: _webp(16_383, 16_383)),
    "tiled": (".jp2", lambda: _jp2_lies(_SIDE, _SIDE, 16)),
    "one-tile": (".jp2", lambda: _jp2_lies(_SIDE, _SIDE, _SIDE)),
    "flat": (".jp2", lambda: _jp2(6000, 6000)),
    "run-length-wide": (".bmp", lambda: _bmp_rle(MOST_PIXELS, 1, b"\0\2\xff\xff" * 99)),
    "run-length": (".bmp", lambda: _bmp_rle(_SIDE, _SIDE, b"\1\0" * 1_000_000)),
    "run-length-short": (".bmp", lambda: _bmp_rle(1, MOST_PIXELS, b"\1\0\0\0" * 1_000_000, 4)),
    "run-length-lines": (".bmp", lambda: _bmp_rle(_SIDE, _SIDE, b"\1\0\0\0" * _SIDE)),
    "declared-bmp": (".bmp", lambda: _bmp(_SIDE, _SIDE, 32)),
    "declared-tga": (".tga", lambda: _tga(65_535, MOST_PIXELS // 65_535, b"\xff" * 100)),
    "packed-tga": (".tga", lambda: _tga(_SIDE, _SIDE, b"\xff\1\2\3\4" * (_SIDE**2 // 128))),
    "plain": (".ppm", lambda: b"P3 %d %d 255 " % (_SIDE, _SIDE) + b"1 " * 10_000_000),
    "scaled": (".ppm", lambda: b"P6 4000 4000 1023 " + bytes(2 * 3 * 4000 * 4000)),
    "scaled-declared": (".pgm", lambda: b"P5 %d %d 1023 " % (_SIDE, _SIDE)),
    "comment": (".ppm", lambda: b"P3 64 64 255 #" + b"a" * 20_000_000),
    "header": (".ppm", lambda: b"P6" + b" " * 2_000_000 + b"64 64 255 "),
    "tags": (".tif", lambda: tags(60_000, 1 << 20)),
    "one-tag": (".tif", lambda: directory([(256, 4, 0xFFFFFFFF, 8), (257, 4, 0xFFFFFFFF, 8), (273, 4, 0x3FFFFFFF, 8)], bytes(64))),
    "giant-tile": (".tif", lambda: tile(64, 64, 40_000, zeros(1_600_000_000), packing=8)),
    "giant-tile-floats": (".tif", lambda: tile(64, 64, 19_200, zeros(1_600_000_000), packing=8, bits=32, format=3)),
    "lying-strip": (".tif", lambda: strip(64, 64, zeros(4 << 30), packing=8, bits=16, samples=3, photometric=2)),
    "lying-strip-8": (".tif", lambda: strip(64, 64, zeros(4 << 30), packing=8)),
    "shared-strips": (".tif", lambda: shared(10, 200, zeros(240 << 20), packing=8, samples=4)),
    "lying-strips": (".tif", lambda: strip(10, 1, zeros(240 << 20), packing=8, samples=4)),
    "wide-tiles": (".tif", lambda: tile(1, MOST_PIXELS, 20_000, zeros(1 << 20), packing=8, samples=2)),
    "runs": (".tif", lambda: strip(9400, 9400, b"\x81\0" * (9400**2 * 6 // 128), packing=32773, samples=6)),
    "runs-of-nothing": (".tif", lambda: strip(64, 64, b"\x80" * (100 << 20), packing=32773, samples=4)),
    "runs-of-one": (".tif", lambda: strip(5000, 5000, b"\0a" * (5000**2 * 2), packing=32773, samples=2)),
    "samples": (".tif", lambda: strip(4096, 4096, zeros(4096 * 4096 * 100), packing=8, samples=100)),
    "samples-most": (".tif", lambda: strip(4096, 4096, zeros(1 << 20), packing=8, samples=65_535, bits=64)),
    "floats": (".tif", lambda: strip(_SIDE, _SIDE, zeros(8 * _SIDE**2), packing=8, bits=64, format=3)),
    "deep-rgb": (".tif", lambda: strip(_SIDE, _SIDE, zeros(_SIDE**2 * 6), packing=8, bits=16, samples=3, photometric=2)),
    "integers": (".tif", lambda: strip(8190, 8190, zeros(8190**2 * 4), packing=8, bits=32)),
    "script": (".jpg", lambda: _EPS),
    "script-png": (".png", lambda: _EPS),
    "script-tiff": (".tif", lambda: b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 32, len(_EPS)) + bytes(20) + _EPS),
    "page": (".jpg", lambda: b"%PDF-1.7\n1 0 obj<</Type/Catalog/OpenAction<</S/Launch/F(sh)>>>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF"),
    "drawing": (".png", lambda: _SVG),
    "radiance": (".tif", lambda: b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 30000 +X 30000\n" + bytes(64)),
    "openexr": (".png", lambda: b"\x76\x2f\x31\x01" + bytes(400)),
    "icon": (".png", lambda: struct.pack("<HHHBBBBHHII", 0, 1, 1, 0, 0, 0, 0, 1, 32, 1 << 30, 22)),
}
