"""A folder of junk among photographs: every file is converted as a person would expect, or named in skipped.csv."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from simclr.data import loader, shards
from simclr.data.manifest import Manifest
from simclr.data.verify import verify
from simclr.errors import UserError
from simclr.recipes import recipe
from tests.support.sources import source_of_folder


def photo(seed: int = 0, height: int = 90, width: int = 120) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(photo(orientation), exif=exif.tobytes())


def readable() -> dict[str, bytes]:
    """Odd pictures that can be read."""
    image, grey = photo(), photo().convert("L")
    clear = image.copy()
    clear.putalpha(grey)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    frames = [photo(i) for i in range(3)]
    good = encoded(image)
    found = {f"turned {i}.jpg": turned(i) for i in range(1, 9)}
    found |= {
        "cmyk.jpg": encoded(image.convert("CMYK")),
        "grey.jpg": encoded(grey),
        "ycbcr.jpg": encoded(image.convert("YCbCr")),
        "progressive.jpg": encoded(image, progressive=True),
        "444.jpg": encoded(image, subsampling=0),
        "worst.jpg": encoded(image, quality=1),
        "tail.jpg": good + b"\0" * 1000 + b"appended by a camera",
        "bad exif.jpg": encoded(image, exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage"),
        "comment.jpg": encoded(image, comment=b"\xff" * 3000),
        "grey.png": encoded(grey, "PNG"),
        "bits.png": encoded(image.convert("1"), "PNG"),
        "palette.png": encoded(image.convert("P"), "PNG"),
        "palette with a hole.png": encoded(image.convert("P"), "PNG", transparency=3),
        "deep.png": encoded(deep, "PNG"),
        "rgba.png": encoded(clear, "PNG"),
        "la.png": encoded(clear.convert("LA"), "PNG"),
        "interlaced.png": encoded(image, "PNG", optimize=True),
        "animated.png": encoded(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        "animated.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "animated.webp": encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "lossless.webp": encoded(clear, "WEBP", lossless=True),
        "pages.tiff": encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:]),
        "cmyk.tif": encoded(image.convert("CMYK"), "TIFF"),
        "lab.tif": encoded(Image.merge("LAB", image.split()), "TIFF"),
        "float.tif": encoded(grey.convert("F"), "TIFF"),
        "long.tif": encoded(grey.convert("I"), "TIFF"),
        "upside.bmp": encoded(image, "BMP"),
        "plain.ppm": encoded(image, "PPM"),
        "png.jpg": encoded(image, "PNG"),
        "jpg.png": good,
        "webp.jpg": encoded(image, "WEBP"),
        "gif.jpeg": encoded(image, "GIF"),
        "UPPER.JPG": encoded(photo(40)),
        "one.png": encoded(Image.new("RGB", (1, 1), "red"), "PNG"),
        "one.jpg": encoded(Image.new("RGB", (1, 1), "red")),
        "line.png": encoded(Image.new("RGB", (3000, 1), "red"), "PNG"),
        "column.jpg": encoded(Image.new("RGB", (1, 3000), "red")),
        "panorama.jpg": encoded(Image.new("RGB", (20_000, 300), "blue")),
        "panorama.png": encoded(Image.new("RGB", (20_000, 30), "blue"), "PNG"),
        "with\na new line.jpg": encoded(photo(41)),
        "-rf.jpg": encoded(photo(42)),
        'quo"te, comma.jpg': encoded(photo(43)),
        "日本 🎉.jpg": encoded(photo(44)),
        "n" * 240 + ".jpg": encoded(photo(45)),
        os.fsdecode(b"latin \xe9\xff.jpg"): encoded(photo(46)),
        "copy of it.jpg": encoded(photo(46)),
    }
    return found


def unreadable() -> dict[str, bytes]:
    """Files that are no pictures, or damaged ones."""
    good, png = encoded(photo(1), quality=95), encoded(photo(2), "PNG")
    found = {f"cut at {share} %.jpg": good[: len(good) * share // 100] for share in (1, 5, 20, 50, 80, 95)}
    found |= {f"cut at {share} %.png": png[: len(png) * share // 100] for share in (1, 50, 90)}
    found |= {
        "empty.jpg": b"",
        "empty.png": b"",
        "text.jpg": b"404 not found",
        "page.png": b"<!doctype html><title>Not found</title>",
        "noise.jpg": np.random.default_rng(0).bytes(5000),
        "header.jpg": good[:4],
        "signature.png": png[:8],
        "zeros.jpg": bytes(3000),
        "without its end.jpg": good[:-2],
        "large.png": encoded(Image.new("1", (10_000, 9_500)), "PNG"),
        "bomb.png": encoded(Image.new("1", (16_000, 12_000)), "PNG"),
        "video.gif": b"\x00\x00\x00\x18ftypmp42",
    }
    return found


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest, set[str], set[str]]:
    """Shards of all these files and a few plain photographs, with the names of files that should be in them and of those that should
    not."""
    root = tmp_path_factory.mktemp("junk")
    folder = root / "photos"
    folder.mkdir()
    good, bad = readable(), unreadable()
    for name, data in (good | bad).items():
        (folder / name).write_bytes(data)
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "round.jpg").symlink_to(folder / "round.jpg")
    (folder / "folder.jpg").mkdir()
    os.mkfifo(folder / "pipe.jpg")
    (folder / "notes.txt").write_text("not counted as an image by its name")
    (folder / ".hidden.jpg").write_bytes(b"")
    source = source_of_folder(folder)
    manifest = shards.prepare(source, root / "shards", shards.Options(max_skipped_pct=100), 2, lambda done: None)
    return root / "shards", manifest, set(good), {*bad, "gone.jpg", "round.jpg", "pipe.jpg"}


def test_each_file_is_used_or_named(prepared: tuple[Path, Manifest, set[str], set[str]]) -> None:
    data, manifest, good, bad = prepared
    assert len(good) + len(bad) >= 60
    with (data / "skipped.csv").open(newline="", encoding="utf-8") as file:
        skipped = dict(list(csv.reader(file))[1:])
    assert set(skipped) == bad and all(skipped.values())
    assert manifest.examples("train") == len(good) and manifest.skipped == len(bad)
    assert "would fill the memory" in skipped["large.png"] and "--max-pixels 192000000 reads it" in skipped["bomb.png"]
    assert "no regular file" in skipped["pipe.jpg"]
    # Two pairs have the same content: an image and its copy, and a JPEG under two endings.
    assert manifest.duplicates >= 1


def test_used_files_are_whole_and_can_be_trained_on(prepared: tuple[Path, Manifest, set[str], set[str]]) -> None:
    data, manifest, good, _ = prepared
    assert not any(found.wrong for found in verify(data, 2))
    assert max(*manifest.height_px, *manifest.width_px) == 500 and min(manifest.height_px) == 1
    config = recipe("imagenet_resnet50")
    config = replace(config, views=replace(config.views, size_px=32), train=replace(config.train, batch_size=8))
    stream = loader.batches(config, data, 0, 0, 1)
    seen = [next(stream) for _ in range(2 * (len(good) // 8))]
    stream.close()
    assert all(batch.images[0].shape == (8, 2, 32, 32, 3) for batch in seen) and len({int(i) for b in seen for i in b.ids}) > 8


def test_too_much_junk_stops_and_says_so(tmp_path: Path) -> None:
    for i in range(49):
        (tmp_path / f"{i}.jpg").write_bytes(encoded(photo(i)))
    (tmp_path / "x.jpg").write_bytes(b"")
    make: Callable[..., Manifest] = lambda **o: shards.prepare(  # noqa: E731
        source_of_folder(tmp_path), tmp_path / "out", shards.Options(**o), 1, lambda done: None
    )
    with pytest.raises(UserError, match=r"1 of 50 images .* more than 1 %; the first: x.jpg: the file is empty.*--max-skipped-pct"):
        make()
    assert make(max_skipped_pct=2.0).skipped == 1
