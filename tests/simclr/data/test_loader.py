"""Batches: the images of a step, their pixels, damaged shards, failures and an early end."""

from __future__ import annotations

import io
import itertools
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from simclr import keyed
from simclr.config import Config, Resize, SimCLR, Train, Views
from simclr.data import loader, shards
from simclr.data.ffcv.decode import decode
from simclr.data.ffcv.resize import KINDS
from simclr.data.loader import Batch
from simclr.data.manifest import read_manifest
from simclr.data.sources.open import open_source
from simclr.data.sources.source import Item, Source
from simclr.errors import UserError
from simclr.views.draw import centre_boxes, crop_boxes
from simclr.views.preprocessing import Preprocessing
from tests.support.resize import reference
from tests.support.sources import source_of

# isort: split
from ffcv.reader import Reader
from ffcv.types import HeaderType

RAW, PHOTOS = 900, 40
SIZE = 24
SEEN, CENTRE = Preprocessing.of(Views(size_px=32)), Preprocessing.of(Views(size_px=70))


def prepare(source: Source, out: Path) -> Path:
    shards.prepare(source, out, shards.Options(shard_mib=1), 2, lambda count: None)
    return out


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """900 + 50 patterns of 32 px in three shards."""
    return prepare(open_source(f"patterns:train={RAW},test=50"), tmp_path_factory.mktemp("raw") / "out")


def photo(seed: int) -> bytes:
    """A smooth picture with some noise, of one of several sizes, about 60 kB."""
    random = np.random.default_rng(seed)
    height, width = 150 + 10 * (seed % 5), 220 - 15 * (seed % 3)
    coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    noisy = np.asarray(coarse).astype(int) + random.integers(-40, 41, (height, width, 3))
    buffer = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=98, subsampling=0)
    return buffer.getvalue()


def picture(seed: int) -> np.ndarray:
    """Its pixels. FFCV decodes with the fast DCT, Pillow with the exact one: a few levels apart, here and there."""
    exact = np.asarray(Image.open(io.BytesIO(photo(seed))))
    fast = decode(photo(seed), *exact.shape[:2])
    assert fast is not None and np.abs(fast.astype(int) - exact).mean() < 3
    return fast


def photographs() -> Source:
    return source_of([Item("train", None, f"{i}.jpg", photo(i)) for i in range(PHOTOS)], "photographs")


@pytest.fixture(scope="module")
def jpeg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 unlabelled photographs of 15 sizes in several shards."""
    return prepare(photographs(), tmp_path_factory.mktemp("jpeg") / "out")


def config(batch_size: int, seed: int = 3, resize: Resize = "bicubic") -> Config:
    return SimCLR(seed=seed, train=Train(batch_size=batch_size), views=Views(size_px=SIZE, resize=resize))


def take(data: Path, batch_size: int, first: int, count: int, rank: int = 0, world: int = 1, threads: int = 1) -> list[Batch]:
    stream = loader.batches(config(batch_size), data, first, rank, world, threads)
    found = [Batch(b.step, b.epoch, (b.images[0].clone(),), b.ids, b.labels) for b in itertools.islice(stream, count)]
    stream.close()
    return found


# ── The images of a step ───────────────────────────────────────────────────────────────────────────────────────────


def test_an_epoch_is_the_keyed_permutation_and_its_images_are_those_of_the_source(raw: Path) -> None:
    assert len(read_manifest(raw).splits["train"]) == 3
    items = [item for item in open_source(f"patterns:train={RAW},test=50").items() if item.split == "train"]
    classes = read_manifest(raw).classes
    found = take(raw, 100, 0, 18)
    for epoch in (0, 1):
        mine = [b for b in found if b.epoch == epoch]
        assert [b.step for b in mine] == list(range(9 * epoch, 9 * epoch + 9))
        ids = torch.cat([b.ids for b in mine])
        np.testing.assert_array_equal(ids, keyed.permutation(3, epoch, RAW))
        assert sorted(ids.tolist()) == list(range(RAW))
    for batch in found[:9]:
        np.testing.assert_array_equal(batch.images[0], np.stack([np.asarray(items[i].data) for i in batch.ids]))
        assert [classes[label] for label in batch.labels] == [items[i].label for i in batch.ids]


@pytest.mark.parametrize("kind", ["raw", "jpeg"])
def test_a_step_is_the_same_after_a_resume_on_other_ranks_and_threads(kind: str, request: pytest.FixtureRequest) -> None:
    data = request.getfixturevalue(kind)
    whole = take(data, 12, 0, 8)
    for got, expected in zip(take(data, 12, 5, 3, threads=2), whole[5:], strict=True):
        assert (got.step, got.epoch) == (expected.step, expected.epoch)
        assert torch.equal(got.images[0], expected.images[0]) and torch.equal(got.ids, expected.ids)
    ranks = [take(data, 12, 5, 3, rank, 3) for rank in range(3)]
    for step in range(3):
        for name in ("ids", "labels"):
            assert torch.equal(torch.cat([getattr(rank[step], name) for rank in ranks]), getattr(whole[5 + step], name))
        assert torch.equal(torch.cat([rank[step].images[0] for rank in ranks]), whole[5 + step].images[0])


def test_starting_late_costs_nothing_more(raw: Path) -> None:
    take(raw, 10, 0, 1)  # compiled now
    began = time.perf_counter()
    (batch,) = take(raw, 10, 10**9, 1)
    assert time.perf_counter() - began < 1
    assert (batch.step, batch.epoch) == (10**9, 10**9 // 90)


@pytest.mark.parametrize("kind", KINDS)
def test_photographs_give_both_views_crops(jpeg: Path, kind: Resize) -> None:
    assert len(read_manifest(jpeg).splits["train"]) > 1
    pictures = [picture(i) for i in range(PHOTOS)]
    stream = loader.batches(config(PHOTOS, resize=kind), jpeg, 2, 0, 1)
    batch = next(stream)
    stream.close()
    assert batch.images[0].shape == (PHOTOS, 2, SIZE, SIZE, 3) and batch.images[0].dtype == torch.uint8
    assert (batch.labels == -1).all()
    ids = batch.ids.numpy()
    boxes = crop_boxes(config(PHOTOS).views, 3, 2, ids, np.array([pictures[i].shape[:2] for i in ids]))
    for row, sample in enumerate(ids):
        for view in range(2):
            expected = reference(pictures[sample], boxes[row, view], SIZE, kind)
            assert np.abs(batch.images[0][row, view].numpy() - expected).max() <= 1


# ── Evaluation ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_in_order_gives_each_image_once(raw: Path) -> None:
    assert torch.cat([b.ids for b in loader.in_order(raw, "test", SEEN, 16)]).tolist() == list(range(50))
    some = torch.cat([b.ids for b in loader.in_order(raw, "test", SEEN, 16, limit=10)]).tolist()
    assert some == sorted(set(some)) and len(some) == 10
    # Not every fifth image: where classes take turns, these would be of two classes out of ten.
    assert len({i % 5 for i in some}) == 5
    ranks = [torch.cat([b.ids for b in loader.in_order(raw, "test", SEEN, 16, rank=rank, world=3)]).tolist() for rank in range(3)]
    assert [len(rank) for rank in ranks] == [16, 17, 17] and list(itertools.chain(*ranks)) == list(range(50))
    assert list(loader.in_order(raw, "test", SEEN, 16, limit=1, rank=0, world=2)) == []
    with pytest.raises(UserError, match="no split 'val', only train, test"):
        loader.in_order(raw, "val", SEEN, 16)


def test_photographs_are_cropped_in_the_middle(jpeg: Path) -> None:
    (batch,) = loader.in_order(jpeg, "train", CENTRE, PHOTOS)
    assert batch.images[0].shape == (PHOTOS, 70, 70, 3)
    assert picture(0).shape == (150, 220, 3)  # 0.875 × 150 = 131 px, at (10, 45)
    assert centre_boxes(np.array([[150, 220]])).tolist() == [[10, 45, 131, 131]]
    assert np.abs(batch.images[0][0].numpy() - reference(picture(0), np.array([10, 45, 131, 131]), 70)).max() <= 1


# ── Damage, failure, end ───────────────────────────────────────────────────────────────────────────────────────────


def change(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def metadata_at(path: Path, sample: int, name: str) -> int:
    """The offset in a shard of a field of a sample's metadata."""
    reader = Reader(str(path))
    rows = HeaderType.itemsize + reader.field_descriptors.nbytes
    fields = reader.metadata.dtype.fields
    inner, outer = fields["f0"]
    return int(rows + sample * reader.metadata.dtype.itemsize + outer + inner.fields[name][1])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("data_ptr", 2**63 + 5),
        ("data_ptr", 2**64 - 8),
        ("data_ptr", 10**9),
        ("height", 60_000),
        ("width", 0),
        ("mode", 1),
    ],
)
def test_a_pointer_or_size_that_leaves_the_file_is_a_user_error(tmp_path: Path, name: str, value: int) -> None:
    data = prepare(photographs(), tmp_path / "out")
    path = data / "train-00001.beton"
    change(path, metadata_at(path, 3, name), value.to_bytes({"data_ptr": 8, "mode": 1}.get(name, 2), "little"))
    with pytest.raises(UserError, match=r"train-00001\.beton: sample 3 is damaged"):
        loader.batches(config(8), data, 0, 0, 1)


@pytest.mark.parametrize("name", [n for n in HeaderType.names if n != "page_size"])  # only FFCV's own caches read it
@pytest.mark.parametrize("value", [b"\x00", b"\xff"])
def test_a_damaged_header_is_a_user_error(tmp_path: Path, name: str, value: bytes) -> None:
    out = prepare(photographs(), tmp_path / "out")
    kind, at = HeaderType.fields[name]
    change(out / "train-00000.beton", at, value * kind.itemsize)
    with pytest.raises(UserError, match=r"train-00000\.beton is damaged"):
        loader.batches(config(8), out, 0, 0, 1)


@pytest.mark.parametrize("damage", [bytes(64), b"\xff\xd8" * 32])
def test_a_damaged_jpeg_is_named_in_the_callers_thread(tmp_path: Path, damage: bytes) -> None:
    data = prepare(photographs(), tmp_path / "out")
    first = read_manifest(data).splits["train"][0].samples
    path = data / "train-00001.beton"
    change(path, int(Reader(str(path)).metadata["f0"]["data_ptr"][2]), damage)
    with pytest.raises(UserError, match=r"train-00001\.beton: sample 2 is damaged: its JPEG cannot be decoded"):
        for _ in loader.in_order(data, "train", CENTRE, 8):
            pass
    assert not loading()
    good = loader.in_order(data, "train", CENTRE, first)  # the first shard's images: their own batch is whole
    assert len(next(good).ids) == first
    good.close()


def loading() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "loader"]


def test_closing_ends_the_thread(raw: Path) -> None:
    stream = loader.batches(config(16), raw, 0, 0, 1)
    next(stream)
    assert loading()
    began = time.perf_counter()
    stream.close()
    assert time.perf_counter() - began < 1 and not loading()


def test_a_batch_stays_as_it_is_until_the_next_is_asked_for(raw: Path) -> None:
    stream = loader.batches(config(16), raw, 0, 0, 1)
    for _ in range(12):
        batch = next(stream)
        before = batch.images[0].clone()
        time.sleep(0.01)  # meanwhile the thread fills every other slot
        assert torch.equal(batch.images[0], before)
    stream.close()


def test_two_loaders_on_two_threads_each_do_not_collide(raw: Path, jpeg: Path) -> None:
    """numba's workqueue layer aborts the whole process when two threads enter parallel code at once."""
    streams = [loader.batches(config(40), data, 0, 0, 1, threads=2) for data in (raw, jpeg)]
    seen = [[next(stream).images[0].clone() for stream in streams] for _ in range(20)]
    for stream in streams:
        stream.close()
    for number, data in enumerate((raw, jpeg)):
        alone = loader.batches(config(40), data, 0, 0, 1)
        assert all(torch.equal(next(alone).images[0], batches[number]) for batches in seen)
        alone.close()


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda data: loader.batches(config(RAW + 1), data, 0, 0, 1), "batch_size 901 is larger than the training split"),
        (lambda data: loader.batches(config(10), data, 0, 0, 11), "batch_size 10 has no image for each of 11 workers"),
        (lambda data: loader.batches(config(10), data / "no", 0, 0, 1), "no directory"),
    ],
)
def test_a_batch_or_split_that_does_not_fit_is_a_user_error_at_once(raw: Path, call: Callable[[Path], object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        call(raw)


# ── Shard groups, and the process's own cache ──────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def five_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 90 photographs in five shards or more."""
    out = tmp_path_factory.mktemp("five") / "out"
    noise = np.random.default_rng(0)
    items = [Item("train", None, f"{i}", noise.integers(0, 256, (160, 170, 3), dtype=np.uint8)) for i in range(90)]
    shards.prepare(source_of(items, "noise"), out, shards.Options(kind="jpeg", shard_mib=1), 2, lambda done: None)
    assert len(read_manifest(out).splits["train"]) >= 4
    return out


def grouped(groups: int, batch_size: int = 8, cache: str = "page") -> Config:
    made = config(batch_size)
    return replace(made, train=replace(made.train, shard_groups=groups, cache=cache))  # type: ignore[arg-type]


def drawn(made: Config, data: Path, steps: int, rank: int, world: int) -> list[Batch]:
    stream = loader.batches(made, data, 0, rank, world)
    found = [replace(b, images=(b.images[0].clone(),)) for b in itertools.islice(stream, steps)]
    stream.close()
    return found


def test_a_worker_reads_its_own_groups_shards_and_the_batch_is_the_same_for_any_number_of_workers(
    five_shards: Path, tmp_path: Path
) -> None:
    manifest = read_manifest(five_shards)
    whole = manifest.splits["train"]
    per_epoch = grouped(2).steps_per_epoch(manifest.examples("train", 2))
    batches_of = {}
    for world in (2, 4):
        ranks = []
        for rank in range(world):
            # A node with the group's shards alone.
            node = tmp_path / f"{world}-{rank}"
            node.mkdir()
            for file in (five_shards / "manifest.json", *(five_shards / s.name for s in whole[rank * 2 // world :: 2])):
                (node / file.name).symlink_to(file)
            ranks.append(drawn(grouped(2), node, per_epoch + 1, rank, world))
        batches_of[world] = [
            (torch.cat([r[step].ids for r in ranks]), torch.cat([r[step].images[0] for r in ranks])) for step in range(per_epoch + 1)
        ]
    for (ids, images), (other_ids, other_images) in zip(batches_of[2], batches_of[4], strict=True):
        assert torch.equal(ids, other_ids) and torch.equal(images, other_images)
    epoch = torch.cat([ids for ids, _ in batches_of[2][:per_epoch]]).tolist()
    assert len(set(epoch)) == len(epoch) == per_epoch * 8
    group_of = np.repeat([i % 2 for i in range(len(whole))], [s.samples for s in whole])
    for ids, _ in batches_of[2]:
        assert group_of[ids[:4]].tolist() == [0] * 4 and group_of[ids[4:]].tolist() == [1] * 4
    # The images are those of the ungrouped dataset: same sample, same crops.
    one = {int(i): image for b in drawn(grouped(1), five_shards, 90 // 8, 0, 1) for i, image in zip(b.ids, b.images[0], strict=True)}
    first = {int(i): image for ids, images in batches_of[2][:per_epoch] for i, image in zip(ids, images, strict=True)}
    shared = one.keys() & first.keys()
    assert len(shared) > 60 and all(torch.equal(one[i], first[i]) for i in shared)


def test_groups_that_do_not_fit_are_a_user_error(five_shards: Path) -> None:
    with pytest.raises(UserError, match="shard_groups 2 is more than 1 workers; use 1 or fewer, or more workers"):
        next(loader.batches(grouped(2), five_shards, 0, 0, 1))
    with pytest.raises(UserError, match="make no 40 groups; prepare with a smaller --shard-mib"):
        read_manifest(five_shards).examples("train", 40)


def test_evaluation_of_groups_gives_each_image_once(five_shards: Path) -> None:
    ids = [torch.cat([b.ids for b in loader.in_order(five_shards, "train", SEEN, 16, None, 1, r, 4, groups=2)]).tolist() for r in range(4)]
    assert sorted(i for part in ids for i in part) == list(range(90))


def test_the_process_cache_gives_the_same_and_needs_no_file_afterwards(five_shards: Path, tmp_path: Path) -> None:
    for file in five_shards.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    stream = loader.batches(grouped(1, cache="process"), tmp_path, 0, 0, 1)
    first = next(stream)
    for file in tmp_path.glob("*.beton"):
        os.truncate(file, 0)  # with a mapping, this would crash
    found = [first.images[0].clone(), *(b.images[0].clone() for b in itertools.islice(stream, 10))]
    stream.close()
    for ours, page in zip(found, drawn(grouped(1), five_shards, 11, 0, 1), strict=True):
        assert torch.equal(ours, page.images[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_arrive_on_the_device_whole(raw: Path) -> None:
    device = torch.device("cuda")
    expected = take(raw, 64, 0, 20)
    stream = loader.on_device(loader.batches(config(64), raw, 0, 0, 1), device)
    for ours in expected:
        batch = next(stream)
        torch.cuda._sleep(10_000_000)  # the step's time: the next batches arrive meanwhile
        assert (
            batch.images[0].device.type == "cuda"
            and torch.equal(batch.images[0].cpu(), ours.images[0])
            and torch.equal(batch.ids, ours.ids)
        )
    stream.close()


def test_a_compiler_that_loses_its_table_compiles_anew(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numba raises KeyError now and then while it compiles; seen in some whole runs of these tests, cause unknown."""
    config = SimCLR(train=Train(batch_size=24), views=Views(size_px=16))
    expected = next(loader.batches(config, photographs, 0, 0, 1)).images[0].clone()

    def lost(*_: object) -> None:
        raise KeyError("a signature")

    monkeypatch.setitem(loader._kept, (loader.Crops, False), lost)
    stream = loader.batches(config, photographs, 0, 0, 1)
    with pytest.warns(RuntimeWarning, match="numba lost a key, and the decoder is compiled anew"):
        assert torch.equal(next(stream).images[0], expected)
    assert loader._kept[loader.Crops, False] is not lost
    stream.close()
