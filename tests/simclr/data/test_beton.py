"""FFCV files that somebody else wrote: what is taken as it is, what is refused, and what is read from it."""

from __future__ import annotations

import io
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import ffcv.writer
import numpy as np
import pytest
from ffcv.fields import BytesField, FloatField, IntField, RGBImageField
from ffcv.types import ALLOC_TABLE_TYPE, CURRENT_VERSION, TYPE_ID_HANDLER, FieldDescType, HeaderType, get_metadata_type
from numpy.typing import NDArray
from PIL import Image

from pipelines.commands import prepare
from pipelines.html.data import data_table
from pipelines.parts.run import Where
from simclr.config import SimCLR, Train, Views
from simclr.data.loader import batches, in_order, labels
from simclr.data.manifest import read_manifest
from simclr.data.options import Options
from simclr.data.sources.beton import register
from simclr.data.sources.reading import Reading, essence
from simclr.data.verify import verify
from simclr.errors import UserError
from simclr.views.preprocessing import Preprocessing

TYPE_OF = {kind: number for number, kind in TYPE_ID_HANDLER.items()}
Fields = dict[str, Any]
USUAL: Fields = {"image": RGBImageField(), "label": IntField()}


def seen(size_px: int) -> Preprocessing:
    return Preprocessing.of(Views(size_px=size_px))


def pictures(count: int, side: int = 16, seed: int = 0) -> list[NDArray[np.uint8]]:
    """Smooth pictures, each of another colour."""
    draw = np.random.default_rng(seed)
    return [np.kron(draw.integers(0, 256, (2, 2, 3), np.uint8), np.ones((side // 2, side // 2, 1), np.uint8)) for _ in range(count)]


def jpeg(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def beton(
    path: Path,
    images: list[NDArray[np.uint8]],
    given: list[int],
    modes: list[int] | None = None,
    fields: Fields = USUAL,
    page: int = 8 << 20,
    seed: int = 1,
) -> Path:
    """An FFCV file (version 2, as its DatasetWriter lays it out): pages behind the metadata, and a table in the order in which processes
    were done, which here is drawn."""
    modes = modes or [1] * len(images)
    stored = [pixels.tobytes() if mode else jpeg(pixels) for pixels, mode in zip(images, modes, strict=True)]
    metadata = np.zeros(len(images), get_metadata_type(list(fields.values())))
    begin = -(-(HeaderType.itemsize + len(fields) * FieldDescType.itemsize + metadata.nbytes) // page) * page
    order = np.random.default_rng(seed).permutation(len(images))
    places = {int(row): begin + sum(len(stored[before]) for before in order[:at]) for at, row in enumerate(order)}
    descriptors = np.zeros(len(fields), FieldDescType)
    for name, descriptor, (called, field) in zip(metadata.dtype.names, descriptors, fields.items(), strict=True):
        descriptor["type_id"] = TYPE_OF[type(field)]
        descriptor["name"][: len(called)] = np.frombuffer(called.encode(), "<u1")
        descriptor["arguments"][:] = field.to_binary()[0]
        for row, pixels in enumerate(images):
            if isinstance(field, RGBImageField):
                metadata[name][row] = (modes[row], pixels.shape[1], pixels.shape[0], places[row])
            elif isinstance(field, IntField):
                metadata[name][row] = given[row]
    table = np.array([(row, places[row], len(stored[row])) for row in order], ALLOC_TABLE_TYPE)
    content = bytearray(begin) + b"".join(stored[row] for row in order)
    content += bytes(-len(content) % page)
    header = np.zeros(1, HeaderType)
    header["version"], header["num_fields"], header["page_size"] = CURRENT_VERSION, len(fields), page
    header["num_samples"], header["alloc_table_ptr"] = len(images), len(content)
    head = header.tobytes() + descriptors.tobytes() + metadata.tobytes()
    content[: len(head)] = head
    path.write_bytes(bytes(content) + table.tobytes())
    return path


def test_pixels_are_registered_in_place_and_read(tmp_path: Path) -> None:
    """A table in another order, the label before the image, other names, a page of 8 MiB; a hard link, no copy."""
    images, tests = pictures(12), pictures(4, seed=2)
    fields = {"y": IntField(), "x": RGBImageField()}
    given = {"train": [3, 0, 1, 2, 3, 0, 1, 2, 3, 0, -1, 2], "test": [0, 1, 2, 0]}
    paths = {"train": beton(tmp_path / "a.beton", images, given["train"], fields=fields)}
    paths["test"] = beton(tmp_path / "b.beton", tests, given["test"], fields=fields)
    out = tmp_path / "out"
    sentences: list[str] = []
    manifest = register(paths, out, sentences.append)
    assert not sentences and (out / "train-00000.beton").samefile(paths["train"])
    assert (manifest.kind, manifest.classes, manifest.height_px, manifest.width_px) == ("raw", ("0", "1", "2", "3"), (16, 16), (16, 16))
    assert {split: manifest.examples(split) for split in manifest.splits} == {"train": 12, "test": 4}
    everything = np.stack(images).reshape(-1, 3) / 255
    assert np.allclose(manifest.mean, everything.mean(0), atol=1e-6) and np.allclose(manifest.std, everything.std(0), atol=1e-6)
    for split, expected in (("train", images), ("test", tests)):
        assert labels(out, split).tolist() == given[split]
        read = np.concatenate([batch.images[0].numpy().copy() for batch in in_order(out, split, seen(16), 5)])
        assert np.array_equal(read, np.stack(expected))
    assert all(not found.wrong for found in verify(out))
    assert read_manifest(out) == manifest == register(paths, out)  # a second call finds it
    config = SimCLR(views=Views(size_px=16), train=Train(batch_size=6))
    stream = batches(config, out, 0, 0, 1)
    assert sorted(id for _ in range(2) for id in next(stream).ids.tolist()) == list(range(12))
    stream.close()
    (out / "manifest.json").unlink()  # as if it was interrupted
    assert register(paths, out) == manifest
    beton(paths["test"], tests, [0, 1, 2, 1], fields=fields)
    with pytest.raises(UserError, match="already holds shards made from"):
        register(paths, out)


def test_jpegs_beside_pixels_of_several_sizes_are_registered_as_photographs(tmp_path: Path) -> None:
    """FFCV's modes smart and proportion write such files. verify decodes the JPEGs of it, and leaves the pixels alone."""
    images = pictures(4, 80) + pictures(4, 96, seed=3)
    path = beton(tmp_path / "a.beton", images, [0, 1] * 4, [0, 1, 1, 0, 1, 0, 0, 1])
    manifest = register({"train": path}, tmp_path / "out")
    assert (manifest.kind, manifest.height_px, manifest.classes) == ("jpeg", (80, 96), ("0", "1"))
    (batch,) = in_order(tmp_path / "out", "train", seen(48), 8)
    for pixels, found in zip(images, batch.images[0].numpy(), strict=True):
        side = len(pixels)
        cut = round(0.875 * side)
        at = (side - cut) // 2
        plain = Image.fromarray(pixels).crop((at, at, at + cut, at + cut)).resize((48, 48), Image.Resampling.BILINEAR)
        assert np.abs(np.asarray(plain, int)[[4, 4, -5, -5], [4, -5, 4, -5]] - found[[4, 4, -5, -5], [4, -5, 4, -5]]).max() < 6
    assert [found.wrong for found in verify(tmp_path / "out")] == [()]
    content = bytearray(path.read_bytes())
    at = content.index(jpeg(images[3]))
    content[at : at + 20] = bytes(20)
    path.write_bytes(content)
    (found,) = verify(tmp_path / "out")
    assert found.wrong == ("its bytes do not have the manifest's sha256", "sample 3: its JPEG cannot be decoded")
    with pytest.raises(UserError, match="the JPEG of sample 3 cannot be decoded; write it again with FFCV"):
        register({"train": path}, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_labels_may_be_absent_and_are_doubted_where_no_two_are_alike(tmp_path: Path) -> None:
    images = pictures(4)
    bare = beton(tmp_path / "bare.beton", images, [], fields={"image": RGBImageField()})
    assert register({"train": bare}, tmp_path / "bare").classes == () and labels(tmp_path / "bare").tolist() == [-1] * 4
    small = beton(tmp_path / "small.beton", images, [0, 1, 0, 1], [0] * 4)
    assert register({"train": small}, tmp_path / "small").kind == "jpeg"  # of one size, but no pixels
    zeros = beton(tmp_path / "zeros.beton", images, [0] * 4)
    assert register({"train": zeros}, tmp_path / "zeros").classes == ()
    assert all(not found.wrong for found in verify(tmp_path / "zeros"))
    found = register({"train": beton(tmp_path / "index.beton", images, [0, 1, 2, 3])}, tmp_path / "index").understood
    assert len(found["notes"]) == 1 and "no two images of" in found["notes"][0]
    paths = {"train": zeros, "test": beton(tmp_path / "more.beton", images, [0, 5, 5, -1])}
    manifest = register(paths, tmp_path / "more")
    assert manifest.classes == tuple("012345")
    assert manifest.understood["notes"] == [f"{paths['test']} has 1 classes that {zeros} lacks, as 5; they can only be judged wrong"]


def test_what_the_loader_cannot_read_is_refused_with_a_sentence(tmp_path: Path) -> None:
    images, given = pictures(4), [0, 1, 0, 1]
    path = tmp_path / "a.beton"
    odd: list[Fields] = [
        {"image": RGBImageField(), "label": FloatField()},
        {"image": RGBImageField(), "other": RGBImageField()},
        {"image": RGBImageField(), "label": IntField(), "index": IntField()},
        {"image": RGBImageField(), "label": IntField(), "text": BytesField()},
    ]
    for fields in odd:
        with pytest.raises(UserError, match=rf"its fields are image: RGBImageField, .*{type(list(fields.values())[-1]).__name__}"):
            register({"train": beton(path, images, given, fields=fields)}, tmp_path / "out")
    with pytest.raises(UserError, match="has the label -7"):
        register({"train": beton(path, images, [0, -7, 1, 0])}, tmp_path / "out")
    for label, number in ((10_000_000, "10,000,000"), (2**40, "1,099,511,627,776")):
        with pytest.raises(UserError, match=f"has the label {number}; expected the number of a class, below 10,000,000; write it again"):
            register({"train": beton(path, images, [0, label, 1, 0])}, tmp_path / "out")
    with pytest.raises(UserError, match="sample 1 is damaged: its place, size or label contradicts the file; write it again"):
        register({"train": beton(path, images, given, [1, 2, 1, 1])}, tmp_path / "out")
    whole = beton(path, images, given).read_bytes()
    rows = np.memmap(path, get_metadata_type(list(USUAL.values())), "r+", HeaderType.itemsize + 2 * FieldDescType.itemsize, 4)
    rows["f0"]["width"][2] = 15  # fewer than its bytes are
    rows.flush()
    with pytest.raises(UserError, match="sample 2 is damaged: its place, size or label contradicts the file; write it again"):
        register({"train": path}, tmp_path / "out")
    path.write_bytes(whole[: -ALLOC_TABLE_TYPE.itemsize])
    with pytest.raises(UserError, match="another table of samples"):
        register({"train": path}, tmp_path / "out")
    path.write_bytes(whole[:3000])
    with pytest.raises(UserError, match=r"a.beton is no FFCV file of images as the loader reads them"):
        register({"train": path}, tmp_path / "out")
    with pytest.raises(UserError, match="there is no file"):
        register({"train": tmp_path / "gone.beton"}, tmp_path / "out")
    with pytest.raises(UserError, match="the splits are val; expected train"):
        register({"val": path}, tmp_path / "out")
    with pytest.raises(UserError, match="has 1 images; contrasting needs at least 2"):
        register({"train": beton(path, images[:1], [0])}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    for name in ("notes.txt", "train-00000.beton"):
        (tmp_path / "out" / name).write_bytes(whole)
        with pytest.raises(UserError, match=rf"is not empty and no dataset \(it holds {name}\)"):
            register({"train": beton(path, images, given)}, tmp_path / "out")
        (tmp_path / "out" / name).unlink()


def test_where_no_hard_link_is_possible_a_symbolic_one_points_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = beton(tmp_path / "a.beton", pictures(4), [0, 1, 0, 1])

    def refused(self: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(Path, "hardlink_to", refused)
    sentences: list[str] = []
    register({"train": path}, tmp_path / "out", sentences.append)
    assert (tmp_path / "out/train-00000.beton").is_symlink() and "must stay where it is" in sentences[0]
    assert labels(tmp_path / "out").tolist() == [0, 1, 0, 1]
    assert all(not found.wrong for found in verify(tmp_path / "out"))


def test_a_file_of_ffcv_s_own_writer_is_registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Images:
        def __len__(self) -> int:
            return 300

        def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
            return np.full((32, 32, 3), index % 256, np.uint8), index % 7

    monkeypatch.setattr(ffcv.writer, "Process", threading.Thread)  # its processes can hang, and start slowly
    writer = ffcv.writer.DatasetWriter(str(tmp_path / "own.beton"), USUAL, num_workers=1)
    writer.from_indexed_dataset(Images())
    manifest = register({"train": tmp_path / "own.beton"}, tmp_path / "out")
    assert manifest.classes == tuple("0123456") and manifest.kind == "raw"
    read = np.concatenate([batch.images[0].numpy()[:, 0, 0, 0].copy() for batch in in_order(tmp_path / "out", "train", seen(32), 64)])
    assert read.tolist() == [i % 256 for i in range(300)] and labels(tmp_path / "out").tolist() == [i % 7 for i in range(300)]


def test_what_files_hold_is_told_before_and_after_they_are_linked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    beton(tmp_path / "train.beton", pictures(6), [0, 1, 1, 0, 1, -1])
    beton(tmp_path / "val.beton", pictures(4, seed=2), [0, 1, 1, 0])
    args = prepare.Args(str(tmp_path), out=tmp_path / "out", threads=1)
    text = prepare.dry_run(args)
    assert f"{tmp_path}/train.beton, {tmp_path}/val.beton: 10 images" in text and not (tmp_path / "out").exists()
    assert "train  6       83.33 %   2        0 (2)     1 (3)" in text and "test   4       100 %     2        0 (2)     1 (2)" in text
    assert "  train/0  →  0\n" in text and "  train/4  →  1\n" in text
    assert f"{tmp_path}/val.beton would be linked as the test split" in text
    manifest = prepare.prepare(args)
    assert text.partition("\n\n")[0] in capsys.readouterr().err
    assert essence(manifest.understood)["splits"] == {"train": {"0": 2, "1": 3}, "test": {"0": 2, "1": 2}}
    assert '<th scope="row">train</th><td>6</td>' in data_table(manifest.understood)
    alone = prepare.dry_run(prepare.Args(str(tmp_path / "val.beton")))
    assert "note: val.beton trains, since it was given alone, though it is called like a val split" in alone
    assert "note" not in prepare.dry_run(prepare.Args(str(tmp_path / "train.beton")))


def test_flags_that_would_change_nothing_about_a_file_are_refused(tmp_path: Path) -> None:
    path = str(beton(tmp_path / "train.beton", pictures(4), [0, 1, 0, 1]))
    odd = {
        "--labels, --split-from": prepare.Args(path, reading=Reading(labels="folder", split_from="0.1")),
        "--kind, --max-side-px": prepare.Args(path, options=Options(max_side_px=64, kind="raw")),
        "--identity": prepare.Args(path, identity="content"),
        "--workers": prepare.Args(path, where=Where(workers=2)),
    }
    for flags, args in odd.items():
        for call in (prepare.dry_run, prepare.prepare):
            with pytest.raises(UserError, match=f"is linked as it is, so {flags} would change nothing; leave that out"):
                call(replace(args, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
