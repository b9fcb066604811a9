"""Pairs from time: the law of a frame's neighbour, an order that keeps frames of a video apart, and the pixels of both views."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from simclr import keyed
from simclr.config import Config, Operation, SimCLR, Time, Train, Views
from simclr.data import loader, shards
from simclr.data.loader import Batch
from simclr.data.manifest import read_manifest
from simclr.data.sources.open import open_source
from simclr.data.sources.reading import Reading
from simclr.data.videos import Videos, apart, false_negatives, neighbours, videos_of
from simclr.errors import UserError
from simclr.methods.method import pairs_for, views_for
from simclr.views.draw import Crop, crops_of
from simclr.views.two_views import two_views
from tests.support.resize import reference

LENGTHS = (1, 2, 3, 7, 30, 1, 16)
SPEC = "rotating-patterns:train=24,test=4,frames=10"


def of_lengths(lengths: Sequence[int]) -> Videos:
    return Videos(np.cumsum([0, *lengths[:-1]]), sum(lengths))


def numbered(lengths: Sequence[int]) -> list[int]:
    """The video of each frame, the slow way."""
    return [video for video, length in enumerate(lengths) for _ in range(length)]


# ── The law ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("most", [1, 3, 100])
def test_a_neighbour_is_another_frame_of_the_same_video_within_reach_and_uniform_among_these(most: int) -> None:
    videos, of = of_lengths(LENGTHS), numbered(LENGTHS)
    ids = np.arange(videos.examples)
    assert videos.of(ids).tolist() == of and videos.lengths.tolist() == list(LENGTHS)
    epochs = 2000
    found = np.stack([neighbours(videos, 5, epoch, ids, most) for epoch in range(epochs)])
    for i in ids.tolist():
        allowed = [j for j in ids.tolist() if of[j] == of[i] and 0 < abs(i - j) <= most] or [i]
        values, counts = np.unique(found[:, i], return_counts=True)
        assert set(values.tolist()) <= set(allowed)
        if len(allowed) < 50:
            assert values.tolist() == allowed  # both ends of a video included
            expected = epochs / len(allowed)
            assert np.abs(counts - expected).max() < 5 * math.sqrt(expected) + 1


def test_a_neighbour_is_a_function_of_seed_epoch_and_id_alone() -> None:
    videos = of_lengths(LENGTHS)
    ids = np.arange(videos.examples)
    whole = neighbours(videos, 5, 3, ids, 4)
    some = np.array([50, 3, 12, 50])
    assert neighbours(videos, 5, 3, some, 4).tolist() == whole[some].tolist()
    assert (neighbours(videos, 5, 4, ids, 4) != whole).any() and (neighbours(videos, 6, 3, ids, 4) != whole).any()


def test_a_neighbour_of_a_subset_is_one_of_the_subset() -> None:
    videos, of = of_lengths(LENGTHS), numbered(LENGTHS)
    only = np.array([0, 2, 5, 7, 8, 13, 14, 15, 40, 41, 43, 59])
    found = np.stack([neighbours(videos, 5, epoch, only, 6, only) for epoch in range(500)])
    for place, i in enumerate(only.tolist()):
        allowed = [j for j in only.tolist() if of[j] == of[i] and 0 < abs(i - j) <= 6] or [i]
        assert sorted(set(found[:, place].tolist())) == allowed


def test_no_other_stream_of_random_numbers_has_moved() -> None:
    streams = ("order", "crop", "colour", "weights", "patterns", "subset", "operation", "path", "shuffle", "mask")
    assert [keyed._STREAMS[name] for name in streams] == list(range(10))  # type: ignore[index]


# ── The order ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("lengths", "batch_size", "most"),
    [
        ((10,) * 40, 32, 1),
        ((10,) * 40, 40, 1),
        ((10,) * 40, 41, 2),
        ((3, 9, 1, 12, 5) * 8, 20, 1),
        ((50, 2, 2, 2, 4), 12, 10),
        ((30,), 7, 8),
    ],
)
def test_a_batch_has_as_few_frames_of_a_video_as_an_epoch_allows(lengths: tuple[int, ...], batch_size: int, most: int) -> None:
    videos, of = of_lengths(lengths), np.array(numbered(lengths))
    batches = videos.examples // batch_size
    assert most == math.ceil(max(lengths) / batches)
    orders = []
    for epoch in range(3):
        order = apart(videos, 7, epoch, videos.examples, batch_size)(np.arange(batches * batch_size))
        assert len(set(order.tolist())) == len(order)  # no frame twice
        held = np.array([np.bincount(of[ids], minlength=len(lengths)) for ids in order.reshape(batches, batch_size)])
        assert held.max() <= most and (held.max(0) - held.min(0)).max() <= 1  # each video lies as evenly as whole numbers can
        orders.append(order.tolist())
    assert orders[0] != orders[1] != orders[2]
    again = apart(videos, 7, 1, videos.examples, batch_size)
    assert [int(again(np.array([place]))[0]) for place in range(batches * batch_size)] == orders[1]


def test_every_frame_and_every_batch_take_their_turns() -> None:
    """The frames that are left out, the batch of a frame, and who shares it, differ from epoch to epoch."""
    lengths = (5,) * 13  # 65 frames, 6 batches of 10, 5 frames left out
    videos = of_lengths(lengths)
    batch_of = np.full((600, 65), -1)
    for epoch in range(600):
        order = apart(videos, 0, epoch, 65, 10)(np.arange(60))
        batch_of[epoch, order] = np.arange(60) // 10
    left = (batch_of < 0).mean(0)
    assert np.abs(left - 5 / 65).max() < 5 * math.sqrt(5 / 65 / 600)
    for batch in range(6):
        assert np.abs((batch_of == batch).mean(0) - 10 / 65).max() < 5 * math.sqrt(10 / 65 / 600)
    together = np.array([(batch_of[:, 0] == batch_of[:, other]).mean() for other in range(5, 65)])
    assert together.min() > 0.05 and together.max() < 0.35  # 9 / 60 in the mean


def test_the_expected_number_of_false_negatives_is_exact() -> None:
    videos, of = of_lengths((2, 5, 1, 8)), np.array(numbered((2, 5, 1, 8)))
    counts = []
    for epoch in range(4000):
        batch = of[keyed.permutation(1, epoch, 16)[:6]]
        counts.append((batch[:, None] == batch[None]).sum() - 6)
    assert false_negatives(videos, 6) == pytest.approx(5 / 15 * (2 + 20 + 56) / 16)
    assert np.mean(counts) / 6 == pytest.approx(false_negatives(videos, 6), rel=0.03)


# ── Batches ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 + 4 videos of ten rendered frames."""
    out = tmp_path_factory.mktemp("raw") / "out"
    shards.prepare(open_source(SPEC), out, shards.Options(), 2, lambda count: None)
    return out


def frame(video: int, number: int) -> np.ndarray:
    """A photograph; those of a video differ in brightness, and those of the last one in size, as videos do."""
    height, width = 60 + 8 * (video % 3) + 50 * (video == 4 and number % 2), 80 - 6 * (video % 2)
    image = np.full((height, width, 3), 20 * video, np.uint8)
    image[:, :, 1] = 25 * number
    image[: height // 2, :, 2] = 200
    return image


FRAMES = (6, 1, 9, 4, 8)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for video, count in enumerate(FRAMES):
        for number in range(count):
            path = folder / "frames" / f"v{video}" / f"{number + 7}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(frame(video, number)).save(path)
    source = open_source(str(folder / "frames"), Reading(videos=True))
    shards.prepare(source, folder / "out", shards.Options(), 2, lambda count: None)
    return folder / "out"


def config(batch_size: int, neighbours: int = 3, one_per_video: bool = False) -> SimCLR:
    time = Time(neighbours=neighbours, one_per_video=one_per_video)
    return SimCLR(seed=3, train=Train(batch_size=batch_size), views=Views(size_px=16), time=time)


def crops_for(config: SimCLR) -> tuple[Crop, ...]:
    return (Crop(views=config.views, neighbours=config.time.neighbours),)


def take(
    data: Path, config: SimCLR, first: int, count: int, rank: int = 0, world: int = 1, threads: int = 1, **more: object
) -> list[Batch]:
    stream = loader.batches(config, data, first, rank, world, threads, crops=crops_for(config), **more)  # type: ignore[arg-type]
    found = [replace(b, images=tuple(part.clone() for part in b.images)) for b in itertools.islice(stream, count)]
    stream.close()
    return found


@pytest.mark.parametrize("operations", [None, ("crop", "cutout")])
def test_both_views_of_raw_frames_are_of_two_frames(operations: tuple[Operation, ...] | None, raw: Path) -> None:
    items = [np.asarray(item.data) for item in open_source(SPEC).items() if item.split == "train"]
    settings = config(48)
    settings = replace(settings, views=replace(settings.views, operations=operations))
    (batch,) = take(raw, settings, 7, 1)
    assert batch.epoch == 1 and batch.mates is not None
    assert batch.mates.tolist() == neighbours(videos_of(read_manifest(raw)), 3, 1, batch.ids.numpy(), 3).tolist()
    assert batch.ids.tolist() == keyed.permutation(3, 1, 240)[96:144].tolist()
    whole = [torch.from_numpy(np.stack([items[i] for i in ids])) for ids in (batch.ids, batch.mates)]
    assert all(torch.equal(*pair) for pair in zip(batch.images, whole, strict=True))
    # View 0 is what it is without neighbours, and view 1 what it would be if frame j lay in frame i's place.
    seen = pairs_for(batch, slice(0, 48), settings, torch.device("cpu"), True)
    for view in range(2):
        plain = two_views(whole[view], batch.ids, 1, settings.views, 3).unflatten(0, (2, 48))
        assert torch.equal(seen["views"][view], plain[view])
    some = pairs_for(batch, slice(10, 20), settings, torch.device("cpu"), True)  # as a piece of a batch asks
    assert torch.allclose(some["views"], seen["views"][:, 10:20], atol=1e-6) and torch.equal(some["labels"], seen["labels"][:, 10:20])


def test_both_crops_of_photographs_are_of_two_frames(photographs: Path) -> None:
    manifest, settings = read_manifest(photographs), config(28)
    assert manifest.kind == "jpeg" and manifest.videos == {"train": (0, 6, 7, 16, 20)}
    where = [(video, number) for video, count in enumerate(FRAMES) for number in range(count)]
    (batch,) = take(photographs, settings, 2, 1)
    assert batch.mates is not None and batch.images[0].shape == (28, 2, 16, 16, 3)
    for row, pair in enumerate(zip(batch.ids.tolist(), batch.mates.tolist(), strict=True)):
        for view, sample in enumerate(pair):
            pixels = frame(*where[sample])
            box = crops_of(settings.views, 3, 2, np.array(pair[:1]), np.array([pixels.shape[:2]]), view)[0]
            # JPEG of quality 90 with halved colours, decoded by the fast DCT.
            apart_by = np.abs(batch.images[0][row, view].numpy().astype(int) - reference(pixels, box, 16))
            assert np.median(apart_by) <= 4 and apart_by.mean() < 12
    assert sum(i == j for i, j in zip(batch.ids.tolist(), batch.mates.tolist(), strict=True)) == 1  # the video of one frame


@pytest.mark.parametrize("one_per_video", [False, True])
@pytest.mark.parametrize("kind", ["raw", "photographs"])
def test_a_step_is_the_same_after_a_resume_on_other_ranks_and_threads(
    kind: str, one_per_video: bool, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, settings = request.getfixturevalue(kind), config(10, one_per_video=one_per_video)
    whole = take(data, settings, 0, 8)
    monkeypatch.setattr(loader, "_LOOKED_UP", 20)
    for got, expected in zip(take(data, settings, 5, 3, threads=2), whole[5:], strict=True):
        assert torch.equal(got.ids, expected.ids) and got.mates is not None and torch.equal(got.mates, expected.mates)
        assert all(torch.equal(*pair) for pair in zip(got.images, expected.images, strict=True))
    ranks = [take(data, settings, 5, 3, rank, 3) for rank in range(3)]  # 4, 3 and 3 images
    for step in range(3):
        for name in ("ids", "labels", "mates"):
            assert torch.equal(torch.cat([getattr(rank[step], name) for rank in ranks]), getattr(whole[5 + step], name))
        for part, expected in enumerate(whole[5 + step].images):
            assert torch.equal(torch.cat([rank[step].images[part] for rank in ranks]), expected)


def test_without_neighbours_a_batch_is_what_it_was(raw: Path, photographs: Path) -> None:
    for data in (raw, photographs):
        settings = config(9, neighbours=0)
        (now,) = take(data, settings, 4, 1)
        stream = loader.batches(SimCLR(seed=3, train=settings.train, views=settings.views), data, 4, 0, 1)
        plain = next(stream)
        assert now.mates is None and torch.equal(now.ids, plain.ids)
        assert len(now.images) == 1 and torch.equal(now.images[0], plain.images[0])
        (views,) = views_for(now, slice(0, 9), crops_for(settings), settings, torch.device("cpu"))
        assert torch.equal(views, two_views(plain.images[0], plain.ids, now.epoch, settings.views, 3))
        stream.close()


def test_a_batch_has_one_frame_of_a_video(raw: Path) -> None:
    settings = config(24, one_per_video=True)
    found = take(raw, settings, 0, 20)
    for epoch in range(2):
        mine = [batch.ids.tolist() for batch in found if batch.epoch == epoch]
        assert all(len({i // 10 for i in ids}) == 24 for ids in mine)
        assert sorted(itertools.chain(*mine)) == list(range(240))
    subset = np.arange(0, 240, 2)
    for batch in take(raw, settings, 0, 5, ids=subset):
        assert len({i // 10 for i in batch.ids.tolist()}) == 24 and batch.mates is not None
        assert set(batch.mates.tolist()) <= set(subset.tolist())


def test_shards_without_videos_are_told(patterns: Path) -> None:
    said = "hold no videos, and time.neighbours pairs frames of one; prepare folders of frames with --videos, or leave out"
    for settings in (config(24), config(24, neighbours=0, one_per_video=True)):
        with pytest.raises(UserError, match=said):
            take(patterns, settings, 0, 1)


def test_settings_that_do_not_go_together_are_refused() -> None:
    base: Config = config(24)
    with pytest.raises(UserError, match=r"want every shard; leave out train\.shard_groups, or both"):
        replace(base, train=Train(batch_size=24, shard_groups=2))
    with pytest.raises(UserError, match=r"time\.neighbours is -1; expected a number of frames"):
        Time(neighbours=-1)
