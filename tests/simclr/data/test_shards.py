"""Shards: FFCV's own loader reads them; their bytes depend on source and options alone; a failure leaves nothing behind."""

from __future__ import annotations

import csv
import errno
import io
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from simclr.data import merge, shard_parts, shards
from simclr.data.ffcv import writer
from simclr.data.ffcv.decode import decode
from simclr.data.manifest import Manifest, read_manifest
from simclr.data.sources.source import Item, Source
from simclr.data.verify import verify
from simclr.errors import UserError
from tests.support.sources import breaking, patterns, source_of, source_of_files

# isort: split
from ffcv.fields.basics import IntDecoder
from ffcv.fields.rgb_image import SimpleRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.reader import Reader


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def prepare(what: Source, out: Path, threads: int = 2, **options: Any) -> Manifest:
    return shards.prepare(what, out, shards.Options(**options), threads, lambda count: None)


def stored(out: Path, split: str = "train") -> list[bytes]:
    """Each sample's bytes, at the place that FFCV's reader gives."""
    found = []
    for shard in read_manifest(out).splits[split]:
        whole = (out / shard.name).read_bytes()
        found += [whole[int(row["ptr"]) : int(row["ptr"]) + int(row["size"])] for row in Reader(str(out / shard.name)).alloc_table]
    return found


def test_the_loader_of_ffcv_reads_them(tmp_path: Path) -> None:
    what = patterns(50, 10, 16)
    manifest = prepare(what, tmp_path / "out")
    assert (manifest.kind, manifest.height_px, manifest.examples("train"), manifest.examples("test")) == ("raw", (16, 16), 50, 10)
    pipelines = {"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]}
    loader = Loader(str(tmp_path / "out/train-00000.beton"), 25, 1, order=OrderOption.SEQUENTIAL, pipelines=pipelines)
    images, labels = zip(*((np.array(image), np.array(label)) for image, label in loader), strict=True)
    items = [item for item in what.items() if item.split == "train"]
    np.testing.assert_array_equal(np.concatenate(images), np.stack([np.asarray(item.data) for item in items]))
    assert [manifest.classes[label] for label in np.concatenate(labels)[:, 0]] == [item.label for item in items]


def test_labels_are_ranks_of_class_names_that_come_in_any_order(tmp_path: Path) -> None:
    manifest = prepare(source_of_files([encoded(noise(80, 80, i)) for i in range(6)], "cab"), tmp_path / "out")
    assert manifest.classes == ("a", "b", "c")
    assert Reader(str(tmp_path / "out/train-00000.beton")).metadata["f1"].tolist() == [2, 0, 1] * 2
    assert prepare(source_of_files([encoded(noise(80, 80, i)) for i in range(2)]), tmp_path / "flat").classes == ()
    assert Reader(str(tmp_path / "flat/train-00000.beton")).metadata["f1"].tolist() == [-1, -1]


def test_the_bytes_are_the_same_whatever_the_threads(tmp_path: Path) -> None:
    what = source_of_files([encoded(noise(150, 200, i), "PNG") for i in range(60)], "xyz")
    one, three = prepare(what, tmp_path / "1", 1, shard_mib=1), prepare(what, tmp_path / "3", 3, shard_mib=1)
    assert one == three and len(one.splits["train"]) > 1
    assert sum(shard.samples for shard in one.splits["train"]) == 60
    assert not any(found.wrong for found in verify(tmp_path / "3"))
    for path in (tmp_path / "1").iterdir():
        assert path.read_bytes() == (tmp_path / "3" / path.name).read_bytes()


def test_no_image_lies_across_two_pages(tmp_path: Path) -> None:
    prepare(source_of_files([encoded(noise(400, 500, i), quality=100) for i in range(12)]), tmp_path / "out")
    table = Reader(str(tmp_path / "out/train-00000.beton")).alloc_table
    assert (table["ptr"] // writer.PAGE == (table["ptr"] + table["size"] - 1) // writer.PAGE).all()
    assert table["ptr"].max() > 2 * writer.PAGE


def test_a_jpeg_that_needs_no_change_is_stored_as_it_is(tmp_path: Path) -> None:
    files = [encoded(noise(100, 120, i), quality=70) for i in range(3)]
    prepare(source_of_files(files), tmp_path / "out")
    assert stored(tmp_path / "out") == files


def test_images_that_need_a_change_are_changed_as_a_person_would_expect(tmp_path: Path) -> None:
    halves = Image.new("RGB", (120, 80), "red")
    halves.paste("blue", (60, 0, 120, 80))
    rotated = Image.Exif()
    rotated[0x0112] = 6  # to be turned a quarter to the right
    files = [
        encoded(halves, quality=95, exif=rotated.tobytes()),
        encoded(Image.new("RGBA", (80, 80), (0, 0, 0, 0)), "PNG"),
        encoded(Image.fromarray(np.full((80, 80), 100 * 257, np.uint16)), "PNG"),
        encoded(Image.new("CMYK", (80, 80), (0, 255, 255, 0)), quality=95),
        encoded(Image.new("L", (80, 80), 77), "PNG"),
        encoded(Image.new("RGB", (2000, 1000), (10, 20, 30))),
    ]
    manifest = prepare(source_of_files(files), tmp_path / "out")
    images = [np.asarray(Image.open(io.BytesIO(data))).astype(int) for data in stored(tmp_path / "out")]
    assert [image.shape for image in images] == [(120, 80, 3), *[(80, 80, 3)] * 4, (250, 500, 3)]
    assert (manifest.height_px, manifest.width_px, manifest.skipped) == ((80, 250), (80, 500), 0)
    for image, (at, colour) in zip(
        [images[0], images[0], *images[1:]],
        [(20, (255, 0, 0)), (100, (0, 0, 255)), *((40, c) for c in [(255,) * 3, (100,) * 3, (255, 0, 0), (77,) * 3, (10, 20, 30)])],
        strict=True,
    ):
        assert abs(image[at, 40] - np.array(colour)).max() <= 4


def test_a_jpeg_that_only_pillow_forgives_is_stored_anew(tmp_path: Path) -> None:
    good = encoded(noise(100, 100))
    scan = good.index(b"\xff\xda")
    stray = good[:scan] + b"\x00\x07" + good[scan:]  # bytes before a marker: libjpeg warns and goes on
    assert decode(good, 100, 100) is not None and decode(stray, 100, 100) is None
    manifest = prepare(source_of_files([good, stray]), tmp_path / "out")
    first, second = stored(tmp_path / "out")
    assert manifest.skipped == 0 and first == good and second != stray
    assert decode(second, 100, 100) is not None


def test_mean_and_standard_deviation_are_those_of_the_pixels(tmp_path: Path) -> None:
    grey = source_of_files([encoded(Image.new("RGB", (8, 8), (shade, 51, 255)), "PNG") for shade in (0, 102)])
    manifest = prepare(grey, tmp_path / "out")
    assert manifest.mean == (0.2, 0.2, 1.0) and manifest.std == (0.2, 0.0, 0.0)


def test_unreadable_images_are_skipped_and_named(tmp_path: Path) -> None:
    good = encoded(noise(90, 90))
    files = [good] * 399
    files[7], files[9], files[11] = b"", b"no image", good[: len(good) // 2]
    manifest = prepare(source_of_files(files), tmp_path / "out")
    assert (manifest.skipped, manifest.examples("train")) == (3, 396)
    with (tmp_path / "out/skipped.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert [row[0] for row in rows] == ["name", "7.jpg", "9.jpg", "11.jpg"] and all(row[1] for row in rows)


@pytest.mark.parametrize(
    ("files", "options", "sentence"),
    [
        ([b"no image"] * 3, {}, r"no image that can be read \(3 tried; the first: 0.jpg: cannot identify"),
        ([], {}, r"no image that can be read \(0 tried\)"),
        ([encoded(noise(9, 9))], {}, "has 1 usable image to train on"),
        ([encoded(noise(9, 9))] * 40 + [encoded(noise(9, 8))], {"kind": "raw"}, "40.jpg has 8 × 9 px, the images before it 9 × 9"),
        ([encoded(noise(900, 900))] * 3, {"kind": "raw", "max_side_px": 900}, "exceed a page"),
    ],
)
def test_bad_sources_are_a_user_error_and_leave_nothing(tmp_path: Path, files: list[bytes], options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        prepare(source_of_files(files), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_what_is_done_stays_where_more_images_cannot_be_read_than_may_be(tmp_path: Path) -> None:
    what = source_of_files([encoded(noise(90, 90))] * 50 + [b""])
    with pytest.raises(UserError, match=r"1 of 51 images of made cannot be read, more than 1 %; .* 50.jpg.*behind the 51 images that are"):
        prepare(what, tmp_path / "out")
    went_on: list[int] = []
    options = shards.Options(max_skipped_pct=2)
    assert shards.prepare(what, tmp_path / "out", options, 2, lambda count: None, went_on.append).skipped == 1
    assert went_on == [51]


def test_small_images_of_several_sizes_are_photographs(tmp_path: Path) -> None:
    assert prepare(source_of_files([encoded(noise(9, 9)), encoded(noise(9, 8))]), tmp_path / "out").kind == "jpeg"


def interrupt(at: int) -> Callable[[int], None]:
    def progress(count: int) -> None:
        if count == at:
            raise KeyboardInterrupt

    return progress


def test_interrupted_before_a_shard_is_full_it_leaves_nothing(tmp_path: Path) -> None:
    what = patterns(300, 30, 16)
    with pytest.raises(KeyboardInterrupt):
        shards.prepare(what, tmp_path / "out", shards.Options(), 2, interrupt(100))
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.writing-train-00000.beton").write_bytes(b"of a prepare that was killed")
    prepare(what, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["manifest.json", "test-00000.beton", "train-00000.beton"]


def mixed(skips: bool = True, **more: Any) -> Source:
    """Ninety PNGs in both splits, by turns, of three classes; one in thirty is no image; one is a copy."""
    items = []
    for i in range(90):
        data = b"no image" if skips and i % 30 == 29 else encoded(noise(150, 200, 3 if i == 50 else i), "PNG")
        items.append(Item("test" if i % 5 == 4 else "train", "cab"[i % 3], f"{i}.png", data))
    return source_of(items, "mixed", **more)


@pytest.mark.parametrize("stop", [40, 75, "ranking", "merging", "naming"])
def test_an_interrupted_prepare_goes_on_behind_its_finished_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int | str) -> None:
    """At any time: the bytes are those of an uninterrupted prepare, and finished work is not repeated."""
    options = shards.Options(shard_mib=1, max_skipped_pct=5)
    whole = shards.prepare(mixed(), tmp_path / "whole", options, 2, lambda count: None)
    assert len(whole.splits["train"]) > 2 and whole.skipped == 3 and whole.duplicates == 1
    out = tmp_path / "out"

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if isinstance(stop, str):
            place = {"ranking": (shard_parts, "relabel"), "merging": (merge, "write_copies"), "naming": (shards, "write_manifest")}[stop]
            patch.setattr(*place, stopped)
        shards.prepare(mixed(), out, options, 2, interrupt(stop) if isinstance(stop, int) else lambda count: None)
    assert list(out.glob(".writing-part-*.parquet")) and not (out / "manifest.json").exists()
    for thread in threading.enumerate():
        if thread.name.startswith("encode"):  # Ctrl-C does not wait for them
            thread.join()
    encoded_again: list[str] = []
    real = shard_parts.encode

    def counted(item: Item, *rest: Any) -> Any:
        encoded_again.append(item.name)
        return real(item, *rest)

    monkeypatch.setattr(shard_parts, "encode", counted)
    went_on: list[int] = []
    assert shards.prepare(mixed(), out, options, 3, lambda count: None, resumed=went_on.append) == whole
    assert went_on and went_on[0] > 10 and len(encoded_again) == 90 - went_on[0]
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in (tmp_path / "whole").iterdir())
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name


def test_shards_of_another_source_are_not_resumed(tmp_path: Path) -> None:
    options = shards.Options(shard_mib=1, max_skipped_pct=5)
    with pytest.raises(KeyboardInterrupt):
        shards.prepare(mixed(), tmp_path / "out", options, 2, interrupt(60))
    went_on: list[int] = []
    manifest = shards.prepare(mixed(False), tmp_path / "out", shards.Options(shard_mib=2), 2, lambda count: None, resumed=went_on.append)
    assert not went_on and manifest.skipped == 0 and not any(found.wrong for found in verify(tmp_path / "out"))
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        *("manifest.json", "duplicates.csv", "conflicts.csv", "names-train.txt", "names-test.txt"),
        *(s.name for split in manifest.splits.values() for s in split),
    }


def test_two_prepares_do_not_write_to_one_directory(tmp_path: Path) -> None:
    def second(count: int) -> None:
        if count > 1:
            return
        with pytest.raises(UserError, match="another prepare is writing to"):
            prepare(mixed(), tmp_path / "out")

    shards.prepare(mixed(False), tmp_path / "out", shards.Options(), 2, second)
    assert read_manifest(tmp_path / "out").examples("train") == 72


def test_links_in_a_shared_folder_are_not_written_through(tmp_path: Path) -> None:
    """Somebody made the folder before us, with links of the names that `prepare` will use."""
    victim, out = tmp_path / "victim", tmp_path / "out"
    victim.write_text("precious")
    out.mkdir()
    (out / ".writing-lock").symlink_to(victim)
    with pytest.raises(OSError, match=r"\.writing-lock"):
        prepare(mixed(False), out)
    (out / ".writing-lock").unlink()
    links = (".writing-train-00000.beton", ".writing-test-00000.beton")
    for name in links:
        (out / name).symlink_to(victim)

    def late(count: int) -> None:
        for name in ("names-train.txt", "names-test.txt", "duplicates.csv"):
            if not (out / name).is_symlink():
                (out / name).symlink_to(victim)

    shards.prepare(mixed(), out, shards.Options(max_skipped_pct=5), 2, late)
    assert victim.read_text() == "precious" and not any(found.wrong for found in verify(out))
    assert not [path for path in out.iterdir() if path.is_symlink()]


def test_copies_are_listed(tmp_path: Path) -> None:
    prepare(mixed(False), tmp_path / "out")
    with (tmp_path / "out/duplicates.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    # The fifty-first image is a copy of the fourth. These are samples of the training split, without every fifth image.
    assert rows == [["split", "sample", "same_as_split", "same_as_sample"], ["train", "40", "train", "3"]]


def test_a_full_disk_is_a_user_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer.os, "fsync", full)
    with pytest.raises(UserError, match="no space left on the disk of"):
        prepare(patterns(20, 5), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda path: os.terminal_size((0, 0)) and type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match="0 MiB free, 1 MiB needed at least"):
        prepare(patterns(400, 5), tmp_path / "out")


def test_existing_shards_are_kept(tmp_path: Path) -> None:
    what = patterns(20, 5)
    manifest = prepare(what, tmp_path / "out")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert prepare(what, tmp_path / "out") == manifest
    with pytest.raises(UserError, match="already holds shards made with jpeg_quality 90"):
        prepare(what, tmp_path / "out", jpeg_quality=80)
    with pytest.raises(UserError, match="already holds shards made with source patterns:train=20"):
        prepare(patterns(21, 5), tmp_path / "out")
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("…")
    with pytest.raises(UserError, match=r"is not empty and no dataset \(it holds thesis.tex\)"):
        prepare(what, tmp_path / "mine")
    with pytest.raises(UserError, match="is a file"):
        prepare(what, tmp_path / "mine/thesis.tex")


def corrupt(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def test_the_manifest_reads_back_and_names_what_is_wrong(tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = prepare(patterns(20, 5), out)
    assert read_manifest(out) == manifest == Manifest.from_json(manifest.to_json())
    with pytest.raises(UserError, match="no split 'val', only train, test"):
        manifest.examples("val")
    corrupt(out / "test-00000.beton", lambda data: data[:5000] + bytes([data[5000] ^ 1]) + data[5001:])
    assert {f.shard.name: f.wrong for f in verify(out)} == {
        "train-00000.beton": (),
        "test-00000.beton": ("its bytes do not have the manifest's sha256",),
    }
    corrupt(out / "test-00000.beton", lambda data: data[:-1])
    with pytest.raises(UserError, match=r"test-00000.beton of .* bytes, the manifest says"):
        read_manifest(out)
    (out / "test-00000.beton").unlink()
    with pytest.raises(UserError, match=r"test-00000.beton .* is missing"):
        read_manifest(out)
    corrupt(out / "manifest.json", lambda data: data.replace(b'"schema": 1', b'"schema": 7'))
    with pytest.raises(UserError, match="schema 7, this version reads 1"):
        read_manifest(out)
    (out / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"has no manifest.json"):
        read_manifest(out)
    with pytest.raises(UserError, match="no directory"):
        read_manifest(tmp_path / "nowhere")


def test_a_source_that_breaks_off_leaves_full_shards_and_a_changed_one_is_not_mixed_in(tmp_path: Path) -> None:
    """A lost network does not invalidate the shards; another archive under the same name does."""
    options, items = shards.Options(shard_mib=1, max_skipped_pct=5), list(mixed().items())

    def no_connection() -> UserError:
        return UserError("s3://… failed 8 times, the last time with no connection")

    def broken() -> Source:
        return breaking(items, 70, no_connection, "mixed", identity="a")

    with pytest.raises(UserError, match="no connection"):
        shards.prepare(broken(), tmp_path / "out", options, 2, lambda done: None)
    went_on: list[int] = []
    again = source_of(items, "mixed", identity="a")
    assert shards.prepare(again, tmp_path / "out", options, 2, lambda done: None, resumed=went_on.append).skipped == 3
    assert went_on and went_on[0] > 10
    changed = source_of(items, "mixed", identity="b")
    with pytest.raises(UserError, match=r"mixed has changed since .* was made from it; use another --out"):
        shards.prepare(changed, tmp_path / "out", options, 2, lambda done: None)
    with pytest.raises(UserError, match="no connection"):
        shards.prepare(broken(), tmp_path / "other", options, 2, lambda done: None)
    went_on.clear()
    shards.prepare(changed, tmp_path / "other", options, 2, lambda done: None, resumed=went_on.append)
    assert not went_on
