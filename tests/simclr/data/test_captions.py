"""Captions: where they are found, what is skipped, that the shards give each image its own, and what damage does."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from simclr.data import loader, shards
from simclr.data.ffcv import reader, writer
from simclr.data.manifest import Manifest, read_manifest
from simclr.data.s3.uri import Corrupt
from simclr.data.sources.open import open_source
from simclr.data.sources.portions import Portion, portions
from simclr.data.sources.portions import reader as portion_reader
from simclr.data.sources.reading import Reading
from simclr.data.sources.source import Item, Source
from simclr.errors import UserError
from tests.simclr.data.test_archives import packed
from tests.support.small import TINY
from tests.support.sources import source_of

# isort: split
from ffcv.fields.basics import IntDecoder
from ffcv.fields.bytes import BytesDecoder
from ffcv.fields.rgb_image import SimpleRGBImageDecoder
from ffcv.loader import Loader, OrderOption

AUTO = Reading(captions="auto")


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def prepared(source: Source, out: Path) -> Manifest:
    return shards.prepare(source, out, shards.Options(max_skipped_pct=60), 2, lambda count: None)


def stored(out: Path, split: str = "train") -> dict[int, str]:
    """Shade of each image, which tells it apart → its caption, as the loader's rows have it."""
    rows = loader._Split(out, split, 1).shards
    found = rows.find(np.arange(len(rows)))
    shades = [int(rows.region[int(at)]) for at in found.images["data_ptr"]]
    return dict(zip(shades, rows.captions(found), strict=True))


# ── Where they are found ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_txt_of_webdataset_is_a_caption_where_captions_are_asked_for(tmp_path: Path) -> None:
    """Also one that is short and repeats, which is a class otherwise; of a picture without one nothing is stored."""
    said = ["a cat", "a dog", "a cat", "a dog", " ein Hund, größer als die Katze\n", ""]
    for number in (0, 1):
        own = {f"{number}{i}.jpg": png(10 * number + i) for i in range(6)}
        files = dict(member for i, one in enumerate(own.items()) for member in (one, (f"{number}{i}.txt", said[i].encode())))
        packed(tmp_path / f"s/{number:06}.tar", files)
    source = open_source(str(tmp_path / "s"), AUTO)
    manifest = prepared(source, tmp_path / "out")
    assert manifest.captions and manifest.classes == () and manifest.skipped == 2 and manifest.examples("train") == 10
    assert stored(tmp_path / "out") == {10 * n + i: said[i].strip() for n in (0, 1) for i in range(5)}
    assert "it has no caption" in (tmp_path / "out/skipped.csv").read_text()
    assert any("2 pictures have no caption; those that would train are skipped" in note for note in manifest.understood["notes"])
    plain = prepared(open_source(str(tmp_path / "s")), tmp_path / "plain")
    assert not plain.captions and "captions" not in (tmp_path / "plain/manifest.json").read_text().partition('"understood"')[0]


def test_without_captions_a_note_says_how_they_are_kept(tmp_path: Path) -> None:
    files = {f"{i}.jpg": png(i) for i in range(4)} | {f"{i}.txt": f"picture number {i} of all".encode() for i in range(4)}
    packed(tmp_path / "a.tar", dict(sorted(files.items())))
    notes = prepared(open_source(str(tmp_path / "a.tar")), tmp_path / "out").understood["notes"]
    assert any(note.endswith("are captions (4 different ones), and no classes; --captions auto keeps them") for note in notes)


def test_captions_of_parquet_are_a_column_of_texts_or_of_lists(tmp_path: Path) -> None:
    for name, column in (("text", ["one", "two ", None, "four"]), ("captions", [["one", "other"], ["", "two"], [], ["four"]])):
        table = pyarrow.table({"image": [png(i) for i in range(4)], name: column, "label": [0, 1, 0, 1]})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet", row_group_size=2)
        manifest = prepared(open_source(str(tmp_path / f"{name}.parquet"), AUTO), tmp_path / name)
        assert stored(tmp_path / name) == {0: "one", 1: "two", 3: "four"}
        assert manifest.classes == ("0", "1") and manifest.skipped == 1


def folder(root: Path) -> Path:
    for split, shades in (("train", range(5)), ("test", range(100, 103))):
        (root / split).mkdir(parents=True)
        for shade in shades:
            (root / split / f"{shade}.png").write_bytes(png(shade))
    return root


def test_a_table_gives_captions_by_name(tmp_path: Path) -> None:
    """As CC3M's and COCO's, with several captions for a picture, a comma in one, and none for the test split."""
    root = folder(tmp_path / "photos")
    table = tmp_path / "said.tsv"
    table.write_text(
        "filepath\ttitle\ntrain/0.png\tred, nearly black\ntrain/1.png\tone\ntrain/1.png\tanother\ntrain/2.png\ttwo\n3.png\tthree\n"
    )
    source = open_source(str(root), Reading(captions=str(table)))
    manifest = prepared(source, tmp_path / "out")
    assert stored(tmp_path / "out") == {0: "red, nearly black", 1: "one", 2: "two"} | (
        {3: "three"} if 3 in stored(tmp_path / "out") else {}
    )
    assert stored(tmp_path / "out", "test") == {100: "", 101: "", 102: ""}
    notes = manifest.understood["notes"]
    assert any("has several captions for 1 picture, as train/1.png; the first one counts" in note for note in notes)
    assert manifest.examples("test") == 3 and manifest.skipped >= 1


def test_a_caption_beside_a_class_is_kept_with_it(tmp_path: Path) -> None:
    """KEY.cls, KEY.txt; also where the caption is the class's very word."""
    files = {}
    for i in range(6):
        files |= {f"{i}.cls": b"cat" if i % 2 else b"dog", f"{i}.png": png(i), f"{i}.txt": (b"dog" if i == 0 else b"number %d" % i)}
    packed(tmp_path / "a.tar", files)
    manifest = prepared(open_source(str(tmp_path / "a.tar"), AUTO), tmp_path / "out")
    assert stored(tmp_path / "out") == {0: "dog"} | {i: f"number {i}" for i in range(1, 6)}
    assert manifest.classes == ("cat", "dog") and (loader.labels(tmp_path / "out") >= 0).all()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.tsv", 'file_name\tcaption\n0.png\t"so he said\n1.png\tone\n2.png\ttwo "quoted" words\n'),
        ("a.jsonl", '{"file_name": "0.png", "caption": ["\\"so he said", "more"]}\n{"file_name": "1.png", "caption": "one"}\n'
                    '{"file_name": "2.png", "caption": "two \\"quoted\\" words"}\n{"file_name": "3.png", "caption": null}\n'),
        ("a.csv", 'file_name,caption\n0.png,"""so he said"\n1.png,one\n2.png,"two ""quoted"" words"\n3.png,\n'),
    ],
)  # fmt: skip
def test_quotation_marks_nulls_and_lists(tmp_path: Path, name: str, text: str) -> None:
    root, table = folder(tmp_path / "photos"), tmp_path / name
    table.write_text(text)
    prepared(open_source(str(root), Reading(captions=str(table))), tmp_path / "out")
    assert stored(tmp_path / "out") == {0: '"so he said', 1: "one", 2: 'two "quoted" words'}


def test_a_quotation_mark_that_nobody_closes_is_an_error(tmp_path: Path) -> None:
    root, table = folder(tmp_path / "photos"), tmp_path / "a.csv"
    table.write_text('file_name,caption\ntrain/0.png,"open\n' + "x" * 200_000)
    with pytest.raises(UserError, match="a quotation mark there is not closed"):
        open_source(str(root), Reading(captions=str(table)))


def test_shards_with_and_without_captions_are_told_apart(tmp_path: Path) -> None:
    prepared(pair_source(), tmp_path / "out")
    with pytest.raises(UserError, match=r"were made without captions|were made with captions"):
        prepared(replace(pair_source(), captioned=False), tmp_path / "out")


def test_columns_of_other_names_are_given(tmp_path: Path) -> None:
    root = folder(tmp_path / "photos")
    table = tmp_path / "said.csv"
    table.write_text("which,words,rating\n" + "".join(f'train/{i}.png,"say {i}",5\n' for i in range(5)))
    manifest = prepared(open_source(str(root), Reading(captions=str(table), caption_columns=("which", "words"))), tmp_path / "out")
    assert (
        stored(tmp_path / "out") == {i: f"say {i}" for i in range(5)} and manifest.understood["asked"]["caption_columns"] == "which words"
    )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"captions": "auto"}, "has captions of none of 8 pictures; expected WebDataset with KEY.txt, or Parquet"),
        ({"captions": "no-such.csv"}, "and there is no such file; expected none, auto or a file of names and captions"),
        ({"captions": "auto", "caption_columns": ("a", "b")}, "--caption-columns names columns of a file"),
    ],
)
def test_what_has_no_captions_is_refused(tmp_path: Path, given: dict[str, object], words: str) -> None:
    root = folder(tmp_path / "photos")
    with pytest.raises(UserError) as refused:
        open_source(str(root), Reading(**given))  # type: ignore[arg-type]
    assert words in str(refused.value)


def test_a_table_of_other_pictures_is_refused(tmp_path: Path) -> None:
    root, table = folder(tmp_path / "photos"), tmp_path / "said.csv"
    table.write_text("file_name,caption\nelse.png,something\n")
    with pytest.raises(UserError, match="has captions of none of 8 pictures; see that its names are those of the pictures"):
        open_source(str(root), Reading(captions=str(table)))
    table.write_text("height,width\n1,2\n")
    with pytest.raises(UserError, match="has no columns of names and captions; expected file_name or filepath beside caption"):
        open_source(str(root), Reading(captions=str(table)))


def test_another_process_gets_the_captions_of_its_portion(tmp_path: Path) -> None:
    root, table = folder(tmp_path / "photos"), tmp_path / "said.csv"
    table.write_text("file_name,caption\n" + "".join(f"train/{i}.png,say {i}\n" for i in range(4)))
    source = open_source(str(root), Reading(captions=str(table)))
    here = {item.name: item for item in source.items()}
    read = portion_reader(source.spec)
    there = {item.name: item for portion in portions(source, 3) for item in read(Portion.from_dict(portion.to_dict()))}
    assert {name: item.caption for name, item in there.items()} == {name: item.caption for name, item in here.items()}
    assert [name for name, item in there.items() if not isinstance(item.data, Path)] == ["train/4.png"]


def test_other_captions_are_another_source(tmp_path: Path) -> None:
    root, table = folder(tmp_path / "photos"), tmp_path / "said.csv"
    found = []
    for word in ("say", "tell"):
        table.write_text("file_name,caption\n" + "".join(f"train/{i}.png,{word} {i}\n" for i in range(5)))
        found.append(open_source(str(root), Reading(captions=str(table))))
    prepared(found[0], tmp_path / "out")
    with pytest.raises(UserError, match="holds"):
        prepared(found[1], tmp_path / "out")


# ── In the shards ──────────────────────────────────────────────────────────────────────────────────────────────────


def pair_source(count: int = 12, caption: str = "number {}", labels: str = "ab") -> Source:
    pixels = np.zeros((8, 8, 3), np.uint8)
    items = [Item("train", labels[i % len(labels)], str(i), pixels + np.uint8(i), caption.format(i)) for i in range(count)]
    return source_of(items, captioned=True)


def test_ffcvs_own_loader_reads_captions(tmp_path: Path) -> None:
    prepared(pair_source(), tmp_path / "out")
    fields = {"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()], "caption": [BytesDecoder()]}
    found = []
    for images, labels, captions in Loader(
        str(tmp_path / "out/train-00000.beton"), batch_size=4, num_workers=1, order=OrderOption.SEQUENTIAL, pipelines=fields
    ):
        for image, label, caption in zip(images, labels.ravel(), captions, strict=True):
            shade = int(image[0, 0, 0])
            assert bytes(caption).startswith(f"number {shade}".encode()) and label == shade % 2
            found.append(shade)
    assert found == list(range(12))


def test_batches_have_the_captions_of_their_images(tmp_path: Path) -> None:
    prepared(pair_source(), tmp_path / "out")
    config = replace(TINY, train=replace(TINY.train, batch_size=5))
    stream = loader.batches(config, tmp_path / "out", 0, 0, 1)
    for _ in range(4):
        batch = next(stream)
        assert batch.captions == tuple(f"number {shade}" for shade in batch.images[0][:, 0, 0, 0].tolist())
    stream.close()
    plain = prepared(replace(pair_source(), captioned=False), tmp_path / "plain")
    assert not plain.captions and next(loader.batches(config, tmp_path / "plain", 0, 0, 1)).captions == ()


def test_long_captions_are_cut_at_a_letter_and_empty_ones_stay_empty(tmp_path: Path) -> None:
    assert writer.stored_caption(" ä" * 3 + "\n") == "ä ä ä".encode() and writer.stored_caption("  ") == b""
    cut = writer.stored_caption("x" + "ä" * reader.MOST_CAPTION_BYTES)
    assert len(cut) == reader.MOST_CAPTION_BYTES - 1 and cut.decode().endswith("ä")
    prepared(pair_source(caption=""), tmp_path / "out")
    assert set(stored(tmp_path / "out").values()) == {""}


def test_new_labels_leave_captions_as_they_are(tmp_path: Path) -> None:
    manifest = prepared(pair_source(), tmp_path / "out")
    before, (shard,) = stored(tmp_path / "out"), manifest.shards
    changed = writer.relabel(tmp_path / "out" / shard.name, np.arange(12) % 2, shard)
    image, labels, _ = reader.open_shard(tmp_path / "out" / shard.name, changed, manifest)
    assert labels.tolist() == [i % 2 for i in range(12)] and len(image) == 12 and stored(tmp_path / "out") == before


@pytest.mark.parametrize("which", ["ptr", "size"])
def test_a_caption_outside_its_shard_is_an_error_before_it_is_read(tmp_path: Path, which: str) -> None:
    manifest = prepared(pair_source(), tmp_path / "out")
    (shard,) = manifest.shards
    path = tmp_path / "out" / shard.name
    _, _, _, layout = reader.open_in_place(path, shard, manifest)
    rows = loader._Split(tmp_path / "out", "train", 1).shards  # mapped while the file was whole
    with path.open("r+b") as file:
        file.seek(layout.caption_at + 3 * layout.step + (8 if which == "size" else 0))
        file.write(np.array([shard.bytes + 1], "<u8").tobytes())
    with pytest.raises(Corrupt, match="sample 3 is damaged"):
        rows.find(np.arange(12))
    with pytest.raises(Corrupt, match=r"its header does not describe|sample 3 is damaged"):
        reader.open_shard(path, shard, manifest)


def test_shards_without_captions_do_not_pass_for_pairs(tmp_path: Path) -> None:
    manifest = prepared(replace(pair_source(), captioned=False), tmp_path / "out")
    with pytest.raises(Corrupt, match="and, of pairs, one BytesField"):
        reader.open_shard(tmp_path / "out" / manifest.shards[0].name, manifest.shards[0], replace(manifest, captions=True))
    assert read_manifest(tmp_path / "out").captions is False


def test_rendered_captions_name_what_is_seen(tmp_path: Path) -> None:
    source = open_source("patterns:captions,train=40,test=10")
    items = list(source.items())
    assert len({item.caption for item in items}) > 20 and all(str(item.label) in item.caption for item in items)
    assert [item.caption for item in items] == [item.caption for item in open_source("patterns:captions,train=40,test=10").items()]
    assert source.spec == "patterns:train=40,test=10,size=32,seed=0,coloured=0,captions=1"
    assert {item.caption for item in open_source("patterns:train=4,test=1").items()} == {""}
    # Dots cover less than half: bright ones lie above the median, dark ones below.
    dots = [item for item in open_source("patterns:captions,train=400,test=10").items() if item.label == "dots"]
    for item in dots:
        pixels = np.asarray(item.data, np.float64)
        ink, ground = ("bright", "dark") if pixels.mean() > np.median(pixels) else ("dark", "bright")
        assert ink in item.caption and ground not in item.caption.partition(ink)[0], item.caption
    assert len(dots) == 41
