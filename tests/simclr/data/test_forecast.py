"""What a dry run says would be written: from real encodings of a sample."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from simclr.data.encode import encode
from simclr.data.forecast import forecast
from simclr.data.options import Options
from simclr.data.sources.source import Data, Item
from simclr.data.survey import Choice
from tests.support.pictures import saved
from tests.support.sources import source_of, source_of_files

PIXELS = np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8)
FILES: dict[str, Data] = {
    "a.jpg": saved(Image.fromarray(PIXELS), "JPEG"),
    "b.png": saved(Image.fromarray(PIXELS[:80]), "PNG"),
    "c.png": saved(Image.fromarray(PIXELS).convert("L"), "PNG"),
    "d.gif": saved(Image.fromarray(PIXELS[:, :64]).convert("P"), "GIF"),
    "e.jpg": saved(Image.fromarray(PIXELS), "JPEG")[:200],
    "f.jpg": b"no picture",
}


def test_a_sample_is_encoded_as_shards_would_hold_it() -> None:
    found = forecast(source_of_files(FILES), Options(), 1)
    stored = [len(encode(Item("train", None, name, data), "jpeg", 500, 90).stored) for name, data in list(FILES.items())[:4]]
    assert found.bytes_each == sum(stored) / 4 and found.timed == 6 and found.choice.kind == "jpeg" and found.seconds_each > 0
    assert found.formats == Counter({"JPEG": 1, "PNG": 1, "PNG (L)": 1, "GIF (P)": 1, "not readable": 2})
    assert (found.heights, found.widths) == ((80, 90), (64, 70))
    assert [name for name, _ in found.skipped] == ["e.jpg", "f.jpg"] and "cannot identify" in found.skipped[1][1]
    said = found.lines(6)
    assert said[0] == "  of 6 images looked at: not readable 2, JPEG 1, PNG 1, PNG (L) 1, GIF (P) 1; 64 to 70 × 80 to 90 px as stored"
    assert said[1].startswith("  2 of them cannot be read, the first: e.jpg: ")
    assert said[2] == f"  would write about {1.02 * sum(stored) / 1024:,.1f} KiB of JPEG in about 1 shard"


def test_a_reduced_picture_counts_as_it_is_stored() -> None:
    found = forecast(source_of_files(FILES), Options(max_side_px=45, jpeg_quality=50), 1)
    stored = [len(encode(Item("train", None, name, data), "jpeg", 45, 50).stored) for name, data in list(FILES.items())[:4]]
    assert found.bytes_each == sum(stored) / 4 and (found.heights, found.widths) == ((45, 45), (32, 39))


def test_pixels_are_raw_and_their_bytes_exact() -> None:
    found = forecast(source_of([Item("train", None, str(i), PIXELS[:32, :24]) for i in range(5)]), Options(), 1)
    assert found.choice.kind == "raw" and found.bytes_each == 32 * 24 * 3 and found.formats == {"pixels": 5} and not found.skipped
    assert found.lines(5)[0] == "  of 5 images looked at: pixels 5; 24 × 32 px as stored"


@pytest.mark.parametrize(
    ("images", "splits", "written"),
    [
        (100_000, 1, "9.7 GiB of JPEG in about 10 shards"),
        (100_000, 20, "9.7 GiB of JPEG in about 20 shards"),  # each split has shards of its own
        (1_000, 2, "99.6 MiB of JPEG in about 2 shards"),
        (1, 1, "102.0 KiB of JPEG in about 1 shard"),
    ],
)
def test_shards_are_counted_upwards_and_by_split(images: int, splits: int, written: str) -> None:
    found = forecast(source_of_files(FILES), Options(), 1)
    found = dataclasses.replace(found, bytes_each=100 * 1024.0, skipped=(), shard_mib=1024)
    assert found.lines(images, splits)[-2] == f"  would write about {written}"


@pytest.mark.parametrize(
    ("seconds_each", "threads", "said"),
    [
        (0.4, 4, "27.8 h on this machine with 4 threads (400.0 ms"),
        (0.0004, 1, "7 min on this machine with 1 thread (0.4 ms"),
        (0.00001, 1, "10 s on this machine"),
    ],
)
def test_time_is_said_in_its_unit(seconds_each: float, threads: int, said: str) -> None:
    found = dataclasses.replace(forecast(source_of_files(FILES), Options(), 1), seconds_each=seconds_each, threads=threads)
    assert found.lines(1_000_000)[-1].startswith(f"  would take about {said}")
    per_image = f"; {1000 * seconds_each / threads:.2f} ms an image with {threads} thread{'s' * (threads > 1)}"
    assert found.lines(None)[-1].endswith(per_image) and "KiB an image" in found.lines(None)[-1]


def test_a_range_of_deep_pixels_is_said() -> None:
    found = forecast(source_of_files(FILES), Options(), 1)
    choice = Choice("jpeg", 256, {"integers": (0.0, 4095.0)}, "", (), 1000.0, 0)
    assert "  integers of more than 8 bits: 0 becomes black, 4095 white, in all pictures" in dataclasses.replace(
        found, choice=choice
    ).lines(6)
