"""Pictures of every kind → 8-bit RGB: opened at one place, by one rule for a whole set; what cannot be read has a reason."""

from __future__ import annotations

import ast
import io
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageOps

from simclr.data import pixels, shards, survey
from simclr.data.depth import Rule
from simclr.data.encode import Looked, encode, look
from simclr.data.manifest import Manifest
from simclr.data.options import Options
from simclr.data.pixels import Unreadable
from simclr.data.sources.source import Data, Item, is_image
from simclr.errors import UserError
from tests.support.embedding import pictures
from tests.support.paths import ROOT
from tests.support.pictures import SHAPE, png, prepared, ramp, reasons, rgb, saved, tiff
from tests.support.sources import source_of, source_of_files


def test_pictures_are_opened_at_one_place_with_the_formats_named() -> None:
    opens = []
    for path in (p for room in ("simclr", "pipelines", "tune") for p in (ROOT / room).rglob("*.py")):
        tree = ast.parse(path.read_text())
        images = {
            alias.asname or alias.name.rpartition(".")[2]
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom | ast.Import)
            for alias in node.names
            if f"{getattr(node, 'module', '')}.{alias.name}".endswith("PIL.Image") or alias.name == "PIL.Image"
        }
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            assert isinstance(call.func, ast.Attribute)
            of = call.func.value.id if isinstance(call.func.value, ast.Name) else ""
            if call.func.attr == "open" and of in images:
                assert "formats" in {keyword.arg for keyword in call.keywords}, path
                opens.append(path.relative_to(ROOT).as_posix())
            assert call.func.attr not in ("imread", "read_image", "default_loader"), path
    assert set(opens) == {"simclr/data/pixels.py"}


def test_what_is_called_like_a_picture_never_reaches_ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 80 80\n%%EndComments\n(%pipe%touch gone) (w) file\n%%EOF\n"
    ran = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *given, **named: ran.append(given) or Image.new("RGB", (80, 80)).im)
    Image.init()
    monkeypatch.setattr(Image, "ID", [*Image.OPEN])  # as it is before `name_formats_for_libraries`
    Image.open(io.BytesIO(page)).load()
    assert len(ran) == 1  # so Pillow would, by itself
    good = saved(Image.fromarray(rgb()), "PNG")
    prepared(tmp_path / "out", {"a.png": good, "b.png": good, "page.jpg": page}, max_skipped_pct=50)
    assert "cannot identify" in reasons(tmp_path / "out")["page.jpg"] and len(ran) == 1
    path = tmp_path / "page.jpg"
    path.write_bytes(page)
    with pytest.raises(pixels.Unreadable, match="cannot identify"):
        pixels.opened(path)


def test_twelve_bits_in_sixteen_keep_their_greys_and_their_brightness(tmp_path: Path) -> None:
    """One divisor for the whole set: a dark picture stays dark."""
    plain = rgb()
    files: dict[str, Data] = {"bright.png": png(ramp(0, 4095)), "dark.png": png(ramp(0, 400)), "plain.png": png(plain)}
    said: list[str] = []
    manifest, found = prepared(tmp_path / "out", files, said.append)
    for name, high in (("bright.png", 4095), ("dark.png", 400)):
        expected = np.rint(ramp(0, high).astype(float) * 255 / 4095)
        np.testing.assert_array_equal(found[name], np.repeat(expected[..., None], 3, 2))
    assert len(np.unique(found["bright.png"])) == 256 and found["dark.png"].max() == 25
    np.testing.assert_array_equal(found["plain.png"], plain)
    assert manifest.pixels == {"ranges": {"integers": [0, 4095]}, "stated": False, "rescaled": 2, "clipped": 0, "grey": 2}
    assert said == [
        "2 images were rescaled to 8 bits, integers from 0 (black) to 4,095 (white), 12 bits, by a sample of the images; "
        "--value-range states another range",
        "2 images were of one channel, which is repeated to three",
    ]
    assert Manifest.from_json(manifest.to_json()).pixels == manifest.pixels


@pytest.mark.parametrize(("high", "white"), [(200, 255), (1000, 1023), (5000, 16383), (16384, 65535), (65535, 65535)])
def test_the_bit_depth_is_that_of_the_largest_value(tmp_path: Path, high: int, white: int) -> None:
    manifest, found = prepared(tmp_path / "out", {"a.tif": tiff(ramp(0, high)), "b.png": png(ramp(0, high / 2))})
    assert manifest.pixels["ranges"] == {"integers": [0, white]}
    assert found["a.tif"].max() == round(high * 255 / white)


def test_floats_and_signed_numbers(tmp_path: Path) -> None:
    """From 0 to 1 as they are; else percentiles of the sample; what is no number is black."""
    hole = ramp(0, 1, np.float32)
    hole[:3], hole[3] = np.nan, np.inf
    manifest, found = prepared(
        tmp_path / "unit", {"a.tif": tiff(ramp(0, 1, np.float32)), "half.tif": tiff(ramp(0, 0.5, np.float16)), "hole.tif": tiff(hole)}
    )
    assert manifest.pixels["ranges"] == {"floats": [0, 1]} and manifest.pixels["clipped"] == 1  # the one with the hole
    np.testing.assert_array_equal(found["a.tif"][..., 1], np.rint(ramp(0, 1, np.float32).astype(float) * 255))
    assert found["half.tif"].max() == 128 and not found["hole.tif"][:4].any() and found["hole.tif"].max() == 255
    low, high = ramp(-1000, 0, np.int16), ramp(0, 3000, np.int16)
    manifest, found = prepared(tmp_path / "signed", {"low.tif": tiff(low), "high.tif": tiff(high)})
    black, white = manifest.pixels["ranges"]["integers"]
    some = np.concatenate([v.reshape(-1)[:: v.size // 4096].astype(float) for v in (low, high)])
    assert (black, white) == pytest.approx(np.percentile(some, [0.1, 99.9]))
    np.testing.assert_array_equal(found["low.tif"][..., 0], np.rint(np.clip((low - black) * 255 / (white - black), 0, 255)))
    assert found["low.tif"].max() == found["high.tif"].min()
    doubles: dict[str, Data] = {
        "a.tif": tiff(ramp(0, 1e6, np.float64)),
        "b.tif": tiff(ramp(0, 1e6, np.float64)),
        "no.tif": tiff(hole * np.nan),
    }
    manifest, _ = prepared(tmp_path / "double", doubles, max_skipped_pct=50)
    assert manifest.pixels["ranges"]["floats"] == pytest.approx([1e3, 999e3], rel=0.02)
    assert "none of its pixels is a number" in reasons(tmp_path / "double")["no.tif"]


def test_embed_reads_them_by_one_rule_too(tmp_path: Path) -> None:
    """By a sample of its own files, or as stated for the training images."""
    (tmp_path / "a.png").write_bytes(png(ramp(0, 4095)))
    (tmp_path / "b.png").write_bytes(png(ramp(0, 400)))
    np.testing.assert_array_equal(dict(pictures(tmp_path))["b.png"][..., 0], np.rint(ramp(0, 400) * (255 / 4095)))
    found = dict(pictures(tmp_path, Options(value_range=(0.0, 400.0))))
    np.testing.assert_array_equal(found["b.png"][..., 2], np.rint(ramp(0, 400) * (255 / 400)))
    with pytest.raises(Unreadable, match="it has 1 band, and --bands asks for band 2"):
        next(pictures(tmp_path / "a.png", Options(bands=(1, 1, 2))))


def test_a_stated_range_holds_for_all(tmp_path: Path) -> None:
    said: list[str] = []
    files: dict[str, Data] = {"a.tif": tiff(ramp(0, 4000)), "b.tif": tiff(ramp(-10, 500, np.float32))}
    manifest, found = prepared(tmp_path / "out", files, said.append, value_range=(100.0, 1100.0))
    assert manifest.options["value_range"] == [100, 1100] and manifest.pixels["stated"] and manifest.pixels["clipped"] == 2
    np.testing.assert_array_equal(found["a.tif"][..., 2], np.rint(np.clip((ramp(0, 4000) - 100.0) * 0.255, 0, 255)))
    assert "as --value-range states" in said[0] and "2 of these had more than 1 % of their pixels outside" in said[1]
    with pytest.raises(UserError, match=r"already holds shards made with value_range 100\.0 1100\.0"):
        prepared(tmp_path / "out", files)
    with pytest.raises(UserError, match="--value-range is 5 5; expected black below white"):
        Options(value_range=(5.0, 5.0))


@pytest.mark.parametrize("kind", ["png", "tif", "planar tif", "compressed tif"])
def test_colours_of_sixteen_bits_keep_their_shades(tmp_path: Path, kind: str) -> None:
    """Pillow alone keeps the upper 8 bits: of 12-bit data, 16 shades."""
    values = ramp(0, 4095, shape=(*SHAPE, 3))
    made: dict[str, Any] = {
        "png": png,
        "tif": tiff,
        "planar tif": lambda v: tiff(np.moveaxis(v, -1, 0), photometric="rgb", planarconfig="separate"),
    }
    made["compressed tif"] = lambda v: tiff(v, compression="zlib")
    write = made[kind]
    _, found = prepared(tmp_path / "out", {"a": write(values), "b": write(values[::-1])})
    np.testing.assert_array_equal(found["a"], np.rint(values * (255 / 4095)))
    np.testing.assert_array_equal(found["b"], found["a"][::-1])


def test_transparency_of_sixteen_bits_lies_over_white(tmp_path: Path) -> None:
    clear = np.full((*SHAPE, 4), 65535, np.uint16)
    clear[..., :3] = 0
    clear[:, 48:, 3] = 0
    for name, data in (("png", png(clear)), ("tif", tiff(clear))):
        _, found = prepared(tmp_path / name, {"a": data, "b": data})
        assert not found["a"][:, :48].any() and (found["a"][:, 48:] == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_deep_pictures_are_upright(orientation: int) -> None:
    plain = rgb(3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    as_png = io.BytesIO()
    Image.fromarray(plain).save(as_png, "PNG", exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(as_png)))
    chunk = as_png.getvalue()
    at = chunk.index(b"eXIf") - 4
    length = int.from_bytes(chunk[at : at + 4], "big") + 12
    deep = png(plain.astype(np.uint16) * 257)
    turned = deep[:33] + chunk[at : at + length] + deep[33:]  # behind the header
    options = Options(value_range=(0.0, 65535.0))
    tags: dict[str, Any] = {"extratags": [(274, "H", 1, orientation, True)]}
    deep_grey = encode(Item("train", None, "a", tiff(plain[..., 1].astype(np.uint16) * 257, **tags)), "raw", 500, 90, options.rule({}))
    np.testing.assert_array_equal(np.frombuffer(deep_grey.stored, np.uint8).reshape(expected.shape)[..., 0], expected[..., 1])
    for data in (turned, tiff(plain.astype(np.uint16) * 257, **tags), tiff(plain, **tags), tiff(plain * np.float32(257), **tags)):
        looked = look(Item("train", None, "a", data), 500, options.rule({}))
        assert (looked.height, looked.width) == expected.shape[:2]
        done = encode(Item("train", None, "a", data), "raw", 500, 90, options.rule({}))
        assert not done.skipped and (done.height, done.width) == expected.shape[:2]
        np.testing.assert_array_equal(np.frombuffer(done.stored, np.uint8).reshape(expected.shape), expected)


def test_a_sample_that_misled_about_the_depth_is_corrected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pictures of the sample have 10 bits, another one 14: the same shards as if it had been known. What was decided is kept."""
    files = {f"{i}.tif": tiff(ramp(0, 9000 if i == 150 else 1000)) for i in range(200)}
    items = [Item("train", None, name, data) for name, data in files.items()]
    said: list[str] = []
    monkeypatch.setattr(survey, "SAMPLE", 50)
    manifest, found = prepared(tmp_path / "misled", source_of(items), said.append, shard_mib=1)
    assert manifest.pixels["ranges"] == {"integers": [0, 16383]} and manifest.pixels["rescaled"] == 200
    assert said[0] == "150.tif has pixels up to 9,000, the images of the sample none above 1,023; it begins again with white at 16,383"
    assert found["0.tif"].max() == round(1000 * 255 / 16383)
    monkeypatch.setattr(survey, "SAMPLE", 200)
    known, _ = prepared(tmp_path / "known", source_of(items), said.append, shard_mib=1)
    monkeypatch.setattr(survey, "SAMPLE", 50)
    assert known.shards == manifest.shards

    def stop(done: int) -> None:
        if done == 190 and len(said) > before:
            raise KeyboardInterrupt

    before = len(said)
    options, out = Options(kind="raw", shard_mib=1), tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        shards.prepare(source_of(items), out, options, 2, stop, says=said.append)
    went_on: list[int] = []
    monkeypatch.setattr(shards, "survey", None)
    again = shards.prepare(source_of(items), out, options, 2, lambda done: None, went_on.append)
    assert again == manifest and went_on and went_on[0] > 40


def test_pixels_that_no_image_of_the_sample_had_are_named_with_the_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "SAMPLE", 2)
    plain, deep = saved(Image.fromarray(rgb()), "PNG"), tiff(ramp(0, 4095))
    items = [Item("train", None, f"{i}.png", deep if i == 2 else plain) for i in range(4)]
    prepared(tmp_path / "out", source_of(items, known=False), max_skipped_pct=50)
    assert reasons(tmp_path / "out") == {
        "2.png": "its pixels are integers, and no image of the sample had such: state black and white as --value-range 0 65535"
    }


def test_bands_are_counted_and_picked(tmp_path: Path) -> None:
    bands = np.stack([np.full(SHAPE, 20 * (i + 1), np.uint8) for i in range(6)], -1)
    plain = {"photometric": "minisblack", "planarconfig": "contig"}
    files: dict[str, Data] = {
        "six.tif": tiff(bands, **plain),
        "planes.tif": tiff(np.moveaxis(bands, -1, 0), photometric="minisblack", planarconfig="separate"),
        "deep.tif": tiff(bands.astype(np.uint16) * 16, **plain),
        "rgbx.tif": tiff(bands[..., :4], photometric="rgb", extrasamples=(0,)),
    }
    two = tiff(bands[..., :2], **plain)
    three = tiff(bands[..., :3], **plain)
    with pytest.raises(
        UserError, match=r"no image that can be read \(4 tried; the first: six.tif: it has 6 bands: --bands 3 2 1 would take"
    ):
        prepared(tmp_path / "out", files)
    _, found = prepared(tmp_path / "out", files | {"two.tif": two, "three.tif": three}, bands=(4, 3, 1), max_skipped_pct=50)
    for name in ("six.tif", "planes.tif", "rgbx.tif"):
        np.testing.assert_array_equal(found[name][0, 0], [80, 60, 20])
    np.testing.assert_array_equal(found["deep.tif"][0, 0], np.rint(np.array([80, 60, 20]) * 16 * 255 / 4095))
    skipped = reasons(tmp_path / "out")
    assert skipped == {f"{n}.tif": f"it has {c} bands, and --bands asks for band 4" for n, c in (("two", 2), ("three", 3))}
    _, found = prepared(tmp_path / "three", {"a.tif": three, "b.tif": three, "two.tif": two}, max_skipped_pct=50)
    np.testing.assert_array_equal(found["a.tif"][0, 0], [20, 40, 60])
    assert "it has 2 bands" in reasons(tmp_path / "three")["two.tif"]
    photo = saved(Image.fromarray(rgb()), "JPEG", quality=100, subsampling=0)
    _, found = prepared(tmp_path / "swapped", {"a.jpg": photo, "b.jpg": photo}, bands=(3, 2, 1))
    np.testing.assert_array_equal(found["a.jpg"], np.asarray(Image.open(io.BytesIO(photo)))[..., ::-1])
    manifest = shards.prepare(source_of_files([photo] * 2), tmp_path / "jpeg", Options(kind="jpeg", bands=(3, 2, 1)), 1, lambda done: None)
    assert manifest.mean == pytest.approx([*(found["a.jpg"].mean((0, 1)) / 255)], abs=0.02)
    with pytest.raises(UserError, match="--bands is 0 1 2; expected three numbers of bands from 1"):
        Options(bands=(0, 1, 2))


def test_without_the_extra_the_reason_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = saved(Image.fromarray(rgb()), "PNG")
    heic = b"\0\0\0\x1cftypheic" + bytes(200)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    prepared(tmp_path / "out", {"a.png": good, "b.png": good, "f.tif": tiff(ramp(0, 1, np.float64)), "p.heic": heic}, max_skipped_pct=60)
    assert reasons(tmp_path / "out") == {
        "f.tif": "TIFF of these bands and bits needs tifffile (pip install 'simclr-cluster[images]')",
        "p.heic": "HEIC needs pillow-heif (pip install 'simclr-cluster[images]')",
    }


def test_formats_that_are_read(tmp_path: Path) -> None:
    import pillow_heif

    image = Image.fromarray(rgb(5))
    kinds = {
        "JPEG": (".jpg", ".JPG", ".jpeg", ".jpe", ".jfif"),
        "PNG": (".png",),
        "JPEG2000": (".jp2", ".j2k"),
        "AVIF": (".avif",),
        "WEBP": (".webp",),
        "PPM": (".ppm", ".pnm"),
        "TGA": (".tga",),
    }
    files: dict[str, Data] = {f"a{suffix}": saved(image, kind) for kind, suffixes in kinds.items() for suffix in suffixes}
    files |= {"grey.pgm": saved(image.convert("L"), "PPM"), "bits.pbm": saved(image.convert("1"), "PPM")}
    heif = pillow_heif.from_pillow(image)
    buffer = io.BytesIO()
    heif.save(buffer, quality=90)
    files |= {"a.heic": buffer.getvalue(), "a.heif": buffer.getvalue()}
    assert all(map(is_image, files))
    manifest, found = prepared(tmp_path / "out", files)
    assert manifest.skipped == 0 and set(found) == set(files) and manifest.pixels["grey"] == 2
    for name, pixels_of in found.items():
        if name.startswith("a"):
            assert np.abs(pixels_of.astype(int) - rgb(5)).mean() < 12, name


@pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow, for damaged tags
def test_damaged_pictures_of_many_bits_are_named_and_never_black() -> None:
    values = ramp(1000, 4095, shape=(*SHAPE, 3))
    rule = Options(value_range=(0.0, 4095.0)).rule({})
    plain = {"photometric": "minisblack", "planarconfig": "contig"}
    kinds = [
        png(values),
        tiff(values),
        tiff(values.astype(np.float64)),
        tiff(values, compression="zlib"),
        tiff(np.repeat(values, 2, 2)[..., :3], **plain),
    ]
    draw = np.random.default_rng(0)
    for data in kinds:
        whole = encode(Item("train", None, "a", data), "raw", 500, 90, rule)
        assert not whole.skipped and min(whole.stored) > 50
        for share in (0.1, 0.3, 0.6, 0.95):
            assert encode(Item("train", None, "a", data[: int(share * len(data))]), "raw", 500, 90, rule).skipped, share
        for _ in range(40):  # any byte of the header or of the end
            changed = bytearray(data)
            changed[int(draw.integers(-300, 300))] = int(draw.integers(0, 256))
            item = Item("train", None, "a", bytes(changed))
            assert encode(item, "raw", 500, 90, rule).skipped or not look(item, 500, rule).skipped


def test_pictures_that_are_not_read_have_a_reason() -> None:
    assert pixels.unread(".heic") == "need pillow-heif (pip install 'simclr-cluster[images]')"
    for ending in (".CR2", ".nef", ".svg", ".psd", ".exr", ".dcm", ".mp4", ".npy", ".h5", ".pdf"):
        assert pixels.unread(ending) and not is_image(f"a{ending}")
    assert pixels.unread(".txt") == pixels.unread("none") == ""


def test_large_pictures_and_files_are_named_with_the_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of gigabytes is not read for that."""
    (tmp_path / "huge.tif").touch()
    with (tmp_path / "huge.tif").open("r+b") as file:
        file.truncate(3 << 30)
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail("read") if path.name == "huge.tif" else read(path))
    good = saved(Image.fromarray(rgb()), "PNG")
    wide = tiff(np.zeros((80, 200, 4), np.uint16), photometric="minisblack", planarconfig="contig")
    files: dict[str, Data] = {
        "a.png": good,
        "b.png": good,
        "huge.tif": tmp_path / "huge.tif",
        "wide.png": png(np.zeros((80, 200), np.uint8)),
        "wide.tif": wide,
    }
    prepared(tmp_path / "out", files, max_skipped_pct=60, max_pixels=72 * 96)
    assert reasons(tmp_path / "out") == {
        "huge.tif": f"its 3,072 MiB would fill the memory: --max-pixels {(3 << 30) // 6} reads it",
        "wide.png": "its 200 × 80 pixels would fill the memory: --max-pixels 16000 reads it",
        "wide.tif": "its 200 × 80 pixels would fill the memory: --max-pixels 16000 reads it",
    }
    bomb = saved(Image.new("1", (16_000, 12_000)), "PNG")
    assert look(Item("train", None, "bomb", bomb), 50, Options(max_pixels=16_000 * 12_000).rule({})) == Looked(38, 50)


def test_libraries_print_nothing_of_a_damaged_file(capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder) -> None:
    """Pillow's libtiff and OpenCV's libpng print by themselves, without the file's name, and Pillow's logger has no handler."""
    packed = bytearray(saved(Image.fromarray(rgb()), "TIFF", compression="tiff_adobe_deflate"))
    packed[8] ^= 255
    samples = bytearray(saved(Image.fromarray(rgb()), "TIFF"))
    at = samples.index(b"\x15\x01\x03\x00")  # SamplesPerPixel, of little endian
    samples[at + 8 : at + 10] = b"\x42\x00"
    deep = png(ramp(0, 65535, shape=(*SHAPE, 3)))
    profile = b"x\0\0" + zlib.compress(b"no profile")
    chunk = len(profile).to_bytes(4, "big") + b"iCCP" + profile + zlib.crc32(b"iCCP" + profile).to_bytes(4, "big")
    odd = deep[:33] + chunk + deep[33:]
    broken = bytearray(deep)
    broken[deep.index(b"IDAT") + 40] ^= 255
    rule = Rule(ranges={"integers": (0, 65535)})
    found = {
        name: encode(Item("train", None, name, bytes(data)), "raw", 512, 90, rule)
        for name, data in {"packed": packed, "samples": samples, "deep": deep, "odd": odd, "short": deep[:-12], "broken": broken}.items()
    }
    assert [name for name, one in found.items() if one.skipped] == ["packed", "samples", "short", "broken"]
    assert found["odd"].stored == found["deep"].stored
    assert capfd.readouterr().err == "" and not recwarn.list
