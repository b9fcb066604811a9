"""Small pictures with large costs are left out with a reason before they are decoded, shards with such refused. `tests/attack` measures
memory and time of the same files at full size."""

from __future__ import annotations

import ast
import io
import lzma
import resource
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, UnidentifiedImageError

from simclr.data import limits, pixels, raster, tasks
from simclr.data.depth import Rule
from simclr.data.encode import decoded, encode
from simclr.data.ffcv import decode
from simclr.data.options import Options
from simclr.data.pixels import MOST_PIXELS, Unreadable
from simclr.data.sources import beton
from simclr.data.sources.source import Item, bundles
from simclr.data.unpack import unpacked_bits
from simclr.errors import UserError
from simclr.views.preprocessing import Preprocessing
from tests.attack import archives, images
from tests.support.paths import ROOT
from tests.support.pictures import saved

RULE = Rule(ranges={"integers": (0.0, 255.0)}, stated=True)
BANDED = Rule(ranges=RULE.ranges, stated=True, bands=(1, 1, 1))


def reason(data: bytes, rule: Rule = RULE) -> str:
    """Why `prepare` leaves a picture out; `embed` does so for the same reason."""
    return encode(Item("train", None, "a", data), "jpeg", 500, 90, rule).skipped


# What reads a file of somebody else's → the files that may call it. Each of them stands with its limit in this page or in `test_pixels`.
DOORS = {
    "Image.open": {"simclr/data/pixels.py"},
    "pillow_heif.register_heif_opener": {"simclr/data/pixels.py"},
    "cv2.imdecode": {"simclr/data/raster.py"},  # of PNG alone, by its first eight bytes: so not of EXR, HDR or what GDAL reads
    "tifffile.TiffFile": {"simclr/data/raster.py"},
    "imdecode": {"simclr/data/ffcv/decode.py"},
    "tarfile.TarFile": {"simclr/data/sources/tar.py"},
    "zipfile.ZipFile": {"simclr/data/sources/zip.py", "simclr/data/arrays.py"},
    "pyarrow.parquet.ParquetFile": {"simclr/data/sources/parquet.py", "simclr/data/feature_parts.py", "simclr/data/note.py"},
    "pyarrow.ipc.open_file": {"simclr/data/sources/parquet.py"},
    "pyarrow.ipc.open_stream": {"simclr/data/sources/parquet.py"},
    "scipy.io.loadmat": {"simclr/data/sources/label_files.py"},
    "np.load": {"pipelines/parts/plan.py", "pipelines/commands/report.py", "pipelines/commands/demo.py"},
    "tarfile.open": {"pipelines/bench/prepare.py"},  # what it has just written
    "library.ImageFolder": {"simclr/data/tasks.py"},
}
# Their reading calls that no file may use: they choose a format, a program or a pickle by themselves.
NOWHERE = (
    *("cv2.imread", "cv2.imreadmulti", "cv2.imdecodemulti", "tifffile.imread", "imageio", "torchvision.io", "read_image", "pil_loader"),
    *("default_loader", "np.fromregex", "np.genfromtxt", "np.loadtxt", "pickle.load", "pickle.loads", "joblib.load", "tarfile.is_tarfile"),
    *("shutil.unpack_archive", "ElementTree", "minidom", "xml.sax", "h5py", "pandas", "pyarrow.csv", "pyarrow.json", "pyarrow.dataset"),
)


def test_every_door_through_which_a_file_comes_in_is_known() -> None:
    found: dict[str, set[str]] = {}
    for path in (p for room in ("simclr", "pipelines", "tune") for p in (ROOT / room).rglob("*.py")):
        tree = ast.parse(path.read_text())
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names}
        called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        for word in NOWHERE if "bench" not in path.parts else ():  # a benchmark reads what it has written
            assert not any(f".{word}." in f".{name}." for name in (*called, *names)), (path, word)
        for name in called & DOORS.keys():
            found.setdefault(name, set()).add(path.relative_to(ROOT).as_posix())
    assert found | {"library.ImageFolder": {"simclr/data/tasks.py"}} == DOORS
    assert "library.ImageFolder" in (ROOT / "simclr/data/tasks.py").read_text()


# ---------------------------------------------------------------- pictures


def test_a_jpeg_of_a_hundred_scans_is_read_and_of_more_is_not(tmp_path: Path) -> None:
    for make in (images.scans, images.sequential_scans):
        assert reason(make(limits.MOST_SCANS, 64, 64)) == ""
        more = make(limits.MOST_SCANS + 1, 64, 64)
        assert "it has 101 scans of its 4,096 pixels, each of which is a pass over all; encoders write about ten" in reason(more)
        (tmp_path / "a.jpg").write_bytes(more)
        with pytest.raises(Unreadable, match="it has 101 scans"):
            decoded(tmp_path / "a.jpg", RULE)
        assert decode.decode(more, 64, 64) is None and decode.decode(images._sound()["progressive.jpg"], 64, 64) is not None
    tiff = images.strip(64, 64, images.scans(101, 64, 64), packing=7, photometric=6, samples=3)
    assert "it has 101 scans" in reason(tiff)


def test_a_large_jpeg_may_have_fewer_scans() -> None:
    """By its header alone: 19 passes over 178 million pixels take as long as 38 over the half of them."""
    limits._few_scans(20, MOST_PIXELS, MOST_PIXELS)
    limits._few_scans(10, 2 * MOST_PIXELS, MOST_PIXELS)
    for scans, count in ((21, MOST_PIXELS), (11, 2 * MOST_PIXELS)):
        with pytest.raises(Unreadable, match=f"it has {scans} scans"):
            limits._few_scans(scans, count, MOST_PIXELS)


def test_the_loader_counts_scans_as_prepare_does() -> None:
    for name, data in images._sound().items():
        if name.endswith(".jpg"):
            assert decode.passes(np.frombuffer(data, np.uint8)) == limits.scans_in(data) == (10 if "progressive" in name else 1), name
    for data in (images.scans(40, 64, 64), images.sequential_scans(7, 64, 64)):
        assert decode.passes(np.frombuffer(data, np.uint8)) == limits.scans_in(data)
    progressive = images.scans(12, 64, 64)
    assert limits.scans_in(progressive + b"\xff\xda" * 500) == 12  # a video behind a telephone's picture
    draw = np.random.default_rng(0)
    for _ in range(300):
        damaged = images._HOW[int(draw.integers(len(images._HOW)))](progressive, draw)
        decode.passes(np.frombuffer(damaged, np.uint8))  # no place outside it is read
        assert limits.scans_in(damaged) <= max(damaged.count(b"\xff\xda"), 1)


def test_a_shard_of_somebody_else_with_too_many_scans_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "train.beton").write_bytes(archives._shard_of(images.scans(101, 64, 64), 64, 64))
    with pytest.raises(UserError, match="the JPEG of sample 0 cannot be decoded"):
        beton.register({"train": tmp_path / "train.beton"}, tmp_path / "out")
    (tmp_path / "large.beton").write_bytes(archives._shard_of(images.scans(12, 64, 64), 65_535, 65_535))
    with pytest.raises(UserError, match=r"sample 0 has 4,294,836,225 pixels; expected at most 178,956,970"):
        beton.described({"train": tmp_path / "large.beton"})


def test_a_thread_of_the_loader_has_room_for_one_picture_at_most() -> None:
    crops = decode.Crops(((1, 8),))
    crops.metadata = np.array([(65_535, 65_535)], [("height", "<u2"), ("width", "<u2")])
    with pytest.raises(UserError, match="an image of the shards has 4,294,836,225 pixels"):
        crops.scratch_bytes  # noqa: B018


@pytest.mark.parametrize("between", [bytes(4 << 20), b"\xff" * (4 << 20), b"\xff\xd0" * (2 << 20), b"\xff\xe0\0\2" * (1 << 20)])
def test_a_jpeg_without_a_picture_is_not_searched_byte_by_byte(monkeypatch: pytest.MonkeyPatch, between: bytes) -> None:
    sound = io.BytesIO()
    Image.new("RGB", (40, 40), "red").save(sound, "JPEG")
    assert pixels.opened(sound.getvalue()).size == (40, 40)
    monkeypatch.setattr(Image, "open", lambda *given, **named: pytest.fail("Pillow got it"))
    with pytest.raises(pixels.Unreadable, match="its segments are no JPEG's"):
        pixels.opened(b"\xff\xd8\xff\xe0\0\2" + between + sound.getvalue()[2:])


def test_no_option_makes_shards_that_the_loader_refuses() -> None:
    crops = decode.Crops(((1, 8),))
    side = Options(max_side_px=13_377, max_pixels=400_000_000).max_side_px
    crops.metadata = np.array([(side, side)], [("height", "<u2"), ("width", "<u2")])
    assert crops.scratch_bytes == 3 * 13_377**2
    with pytest.raises(UserError, match="--max-side-px is 13378; expected at most 13377"):
        Options(max_side_px=13_378)
    crops.metadata = np.array([(side + 1, side + 1)], [("height", "<u2"), ("width", "<u2")])
    with pytest.raises(UserError, match="prepare the data again, with --max-side-px 13377 or less"):
        crops.scratch_bytes  # noqa: B018


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: images.tile(64, 64, 40_000, images.zeros(1 << 20), packing=8), "its 40,000 × 40,000 pixels would fill the memory"),
        (lambda: images.strip(64, 64, images.zeros(300 << 20), packing=8, bits=16, samples=3, photometric=2), "unpacks to more than"),
        (lambda: images.strip(4096, 4096, images.zeros(1 << 20), packing=8, samples=100), "its 1,600 MiB would fill the memory"),
        (lambda: images.strip(9459, 9459, images.zeros(1 << 20), packing=8, bits=64, format=3), "its 683 MiB would fill the memory"),
        (lambda: images._png(9459, 9459, 16, 6, b""), "its 1,024 MiB would fill the memory: --max-pixels 178945362 reads it"),
        (lambda: images._bmp_rle(9459, 9459, b"\1\0\0\0" * 99), "stand in it as run lengths, which takes minutes"),
        (lambda: b"P3 9459 9459 255 1 2 3", "stand in it as numbers in letters"),
        (lambda: b"P6 9459 9459 1023 ", "stand in it as values of another range"),
        (lambda: images._webp(16_383, 5_000), "its 16,383 × 5,000 pixels would fill the memory: --max-pixels 131064000 reads it"),
        (lambda: images._jp2_lies(9459, 9459, 9459), "its 9,459 × 9,459 pixels would fill the memory"),
        (lambda: images._gif(65_535, 65_535), "its 65,535 × 65,535 pixels would fill the memory"),
        (lambda: images._EPS, "cannot identify image file"),
        (lambda: images._SVG, "cannot identify image file"),
    ],
)
def test_a_picture_is_left_out_before_it_is_decoded(make: Callable[[], bytes], why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make()
    Image.init()  # some of its plugins load a picture of theirs
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    assert why in reason(data)


def test_strips_that_share_bytes_are_refused_and_each_is_unpacked_to_its_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """All strips of a TIFF may point at the same bytes, and each may unpack to far more than its row."""
    large = images.zeros(64 << 20)
    assert "its 20 pieces share bytes" in reason(images.shared(10, 20, large, packing=8, samples=4))
    packer = lzma.compress(bytes(32 << 20), preset=0)
    for packing, stored in ((8, large), (34925, packer)):
        one, peak = images.strip(10, 1, stored, packing=packing, samples=4), _peak_bytes()
        assert "a piece of it unpacks to more than the 40 bytes that it should hold" in reason(one, BANDED)
        assert _peak_bytes() - peak < 8 << 20
    sound = np.random.default_rng(0).integers(0, 9, (5, 7, 4), dtype=np.uint8)
    for packing, packed in ((8, zlib.compress(sound.tobytes() + bytes(999))), (34925, lzma.compress(sound.tobytes() + bytes(999)))):
        found = raster.raster_of(images.strip(7, 5, packed, packing=packing, samples=4), None, BANDED)
        assert found is not None
        np.testing.assert_array_equal(found.values, sound)  # rows behind the picture's end are no damage
        for damaged in (packed[:-1], packed[: len(packed) // 2]):
            assert "ends early" in reason(images.strip(7, 5, damaged, packing=packing, samples=4), BANDED)
    monkeypatch.setattr(raster, "_MOST_PIECES", 19)
    assert "its 20 pieces share bytes, or are far too many" in reason(images.shared(10, 20, b"\0\0", samples=4))


def test_runs_of_bytes_are_unpacked_as_libtiff_does_and_within_their_piece() -> None:
    draw = np.random.default_rng(3)
    picture = np.repeat(draw.integers(0, 256, (40, 30), dtype=np.uint8), draw.integers(1, 9, 30), axis=1)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "TIFF", compression="packbits")
    with Image.open(io.BytesIO(buffer.getvalue())) as image:
        places, counts = image.tag_v2[273], image.tag_v2[279]
    pieces = b"".join(buffer.getvalue()[at : at + count] for at, count in zip(places, counts, strict=True))
    np.testing.assert_array_equal(unpacked_bits(pieces, out=picture.size).reshape(picture.shape), picture)
    np.testing.assert_array_equal(unpacked_bits(pieces, out=99), picture.reshape(-1)[:99])
    assert unpacked_bits(b"\x80" * 9 + b"\xfea\x02bc", out=9).tobytes() == b"aaabc"
    side = 3000  # tifffile alone makes a list of 36 million numbers
    peak = _peak_bytes()
    found = raster.raster_of(images.strip(side, side, b"\x81\x07" * (side**2 * 4 // 128), packing=32773, samples=4), None, BANDED)
    assert found is not None and found.values.shape == (side, side, 4) and (found.values == 7).all()
    assert _peak_bytes() - peak < 5 * side**2 * 4


def test_tiles_far_wider_than_the_picture_are_refused() -> None:
    assert "would fill the memory" in reason(images.tile(1, 1 << 20, 4096, images.zeros(1 << 10), packing=8, samples=2), BANDED)


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def test_a_damaged_tile_size_is_a_reason() -> None:
    """Of 4,518 mutated pictures one ended in a TypeError: its tile's width had become several numbers."""
    tiff = images._sound()["tiles.tif"]
    at = tiff.index(b"\x42\x01") + 4  # the count of tag 322
    assert reason(tiff) == "it has 4 bands: --bands 3 2 1 would take the third, second and first as red, green and blue"
    assert reason(tiff[:at] + b"\2" + tiff[at + 1 :])


def test_transparency_is_laid_over_white_in_strips_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(1)
    image = Image.fromarray(draw.integers(0, 256, (37, 23, 4), dtype=np.uint8))
    palette = image.convert("RGB").quantize(8)
    palette.info["transparency"] = bytes([0, 99, 255])
    deep = draw.integers(0, 1 << 16, (37, 23, 4)).astype(np.uint16)
    clear = np.where(np.arange(37)[:, None, None] < 20, np.uint16(65_535), deep[..., 3:])
    whole = [np.asarray(pixels.upright_rgb(one)) for one in (image, palette)] + [
        raster._over_white((deep[..., :3] >> 8).astype(np.uint8), clear)
    ]
    monkeypatch.setattr(pixels, "_STRIP_PIXELS", 23 * 5)
    monkeypatch.setattr(raster, "_STRIP_PIXELS", 23 * 5)
    strips = [np.asarray(pixels.upright_rgb(one)) for one in (image, palette)] + [
        raster._over_white((deep[..., :3] >> 8).astype(np.uint8), clear)
    ]
    for one, other in zip(whole, strips, strict=True):
        np.testing.assert_array_equal(one, other)
    rgba = np.asarray(image, np.int64)
    expected = (rgba[..., :3] * rgba[..., 3:] + 255 * (255 - rgba[..., 3:])) / 255
    assert np.abs(whole[0] - expected).max() <= 1


def test_a_large_picture_is_prepared_one_colour_at_a_time_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    preprocessing = Preprocessing(size_px=32, centre_crop=0.875, resize="area", mean=(0.0,) * 3, std=(1.0,) * 3)
    picture = np.random.default_rng(2).integers(0, 256, (1, 190, 260, 3), dtype=np.uint8)
    whole = preprocessing(torch.from_numpy(picture))
    monkeypatch.setattr("simclr.views.preprocessing._LARGE_PX", 100)
    torch.testing.assert_close(preprocessing(torch.from_numpy(picture)), whole, rtol=0, atol=1e-6)


def test_threads_share_the_memory_for_large_pictures() -> None:
    room = limits.Room(10 << 20)
    order: list[str] = []
    with room.for_pixels(8 << 20):
        waits = threading.Thread(target=lambda: _entered(room, 5 << 20, "large", order))
        waits.start()
        _entered(room, 1 << 20, "photograph", order)  # waits for nothing
        order.append("left")
    waits.join(10)
    assert order == ["photograph", "left", "large"] and room.taken == 0
    with room.for_pixels(99 << 20):  # alone
        assert room.taken == 99 << 20


def _entered(room: limits.Room, count: int, name: str, order: list[str]) -> None:
    with room.for_pixels(count):
        order.append(name)


def test_files_are_read_ahead_by_their_bytes() -> None:
    items = [Item("train", None, str(i), bytes(size)) for i, size in enumerate((1, 9, 1, 1, 1, 30, 1))]
    assert [[len(i.data) for i in bundle] for bundle in bundles(iter(items), 3, 10)] == [[1, 9], [1, 1, 1], [30], [1]]  # type: ignore[arg-type]


# ---------------------------------------------------------------- libraries that open pictures themselves


def test_the_datasets_of_the_transfer_suite_reach_no_ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *given, **more: pytest.fail("Ghostscript was called"))
    Image.init()
    ids = [*Image.ID]
    try:
        root = tmp_path / "birdsnap"
        for part in ("train", "test"):
            (root / part / "wren").mkdir(parents=True)
            (root / part / "wren" / "a.jpg").write_bytes(images._EPS)
        (root / "train" / "wren" / "b.jpg").write_bytes(saved(Image.new("RGB", (8, 8)), "JPEG"))
        rows = tasks.open_task("birdsnap", tmp_path, download=False)
        assert rows is not None and rows["train"][1][0].size == (8, 8)
        with pytest.raises(UserError, match=r"image 0 of Birdsnap under .* cannot be read: cannot identify image file"):
            rows["train"][0]
        with pytest.raises(UnidentifiedImageError):  # and so does every other reader of the process
            Image.open(io.BytesIO(images._EPS))
    finally:
        Image.ID[:] = ids
