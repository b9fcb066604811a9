"""Runs with pairs from time: any number of ranks computes what one does, a resumed run goes on bit by bit, and what is said before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines.html.pictures import gallery
from simclr import sense
from simclr.config import Encoder, Head, Optim, SimCLR, Time, time_of
from simclr.data import loader, shards
from simclr.data.manifest import Manifest, read_manifest
from simclr.data.sources.open import open_source
from simclr.errors import UserError
from simclr.recipes import recipe
from simclr.stages import Distill, FineTune
from simclr.train import Start, train
from simclr.views.draw import Crop
from simclr.views.two_views import raw_views
from tests.conftest import Within
from tests.support.ranks import Ranks
from tests.support.small import TINY, resumed

TIMED = replace(TINY, time=Time(neighbours=2, one_per_video=True), train=replace(TINY.train, batch_size=16, steps=4))


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 + 6 videos of six rendered frames."""
    out = tmp_path_factory.mktemp("videos") / "out"
    shards.prepare(open_source("rotating-patterns:train=20,test=6,frames=6"), out, shards.Options(), 2, lambda count: None)
    return out


def steps(config: SimCLR, data: Path) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    reports = list(train(config, Start(data)))
    return [report.metrics for report in reports], {name: x.clone() for name, x in reports[-1].state.tensors.items()}


def test_any_number_of_ranks_computes_what_one_does(videos: Path, ranks: Ranks, within: Within) -> None:
    expected, state = steps(TIMED, videos)
    for theirs, found in ranks(3, steps, TIMED, videos):  # 5, 5 and 6 images
        for mine, other in zip(expected, theirs, strict=True):
            within("loss", abs(mine["train/loss"] - other["train/loss"]), 1e-9)
        for name, x in state.items():
            if x.is_floating_point():
                within("state", float((found[name] - x).abs().max()), 1e-8)


def test_in_pieces_a_step_is_that_of_the_whole_batch(videos: Path, within: Within) -> None:
    """Of a network without BatchNorm, whose statistics would be those of a piece."""
    plain = replace(TIMED, encoder=Encoder(vit="micro", patch_px=16), head=Head(layers=0), optim=Optim(name="sgd", base_lr=0.1))
    (whole, state), (cut, found) = (
        steps(replace(plain, train=replace(plain.train, micro_batch=images, steps=2)), videos) for images in (None, 5)
    )
    within("loss", max(abs(a["train/loss"] - b["train/loss"]) for a, b in zip(whole, cut, strict=True)), 1e-9)
    within("state", max(float((found[name] - x).abs().max()) for name, x in state.items() if x.is_floating_point()), 1e-9)


def test_stopped_and_resumed_is_bitwise_the_uninterrupted_run(videos: Path, tmp_path: Path) -> None:
    resumed(replace(TIMED, train=replace(TIMED.train, steps=12)), videos, tmp_path, until=5)


def test_pairs_from_time_train_on_other_images_than_plain_ones(videos: Path) -> None:
    losses = [
        steps(replace(TIMED, time=time, train=replace(TIMED.train, steps=1)), videos)[0][0]["train/loss"]
        for time in (Time(), Time(neighbours=2), Time(neighbours=5), Time(one_per_video=True))
    ]
    assert len(set(losses)) == 4
    assert losses[0] == steps(replace(TINY, train=replace(TIMED.train, steps=1)), videos)[0][0]["train/loss"]


def test_the_gallery_shows_both_frames(videos: Path) -> None:
    rows = gallery(TIMED, videos, 8)
    stream = loader.batches(TIMED, videos, 0, 0, 1, crops=(Crop(views=TIMED.views, neighbours=2),))
    batch = next(stream)
    for view in range(2):
        expected = raw_views(batch.images[view][:8], batch.ids[:8], 0, TIMED.views, TIMED.seed).unflatten(0, (2, 8))[view]
        assert np.array_equal(rows[:, 1 + view], (expected * 255).round().byte().permute(0, 2, 3, 1).numpy())
    assert batch.mates is not None and not torch.equal(batch.images[0], batch.images[1])
    stream.close()


# ── Said and refused ───────────────────────────────────────────────────────────────────────────────────────────────


def of_videos(manifest: Manifest, firsts: tuple[int, ...]) -> Manifest:
    return replace(manifest, videos={"train": firsts})


def about(config: SimCLR, manifest: Manifest) -> list[str]:
    return [note for note in sense.notes(config, manifest, manifest.examples("train")) if "video" in note]


def test_what_frames_of_a_video_do_in_a_batch_is_said_before_training(videos: Path) -> None:
    manifest = read_manifest(videos)  # 20 videos of 6
    assert about(TIMED, manifest) == [] == about(replace(TIMED, time=Time()), manifest)
    (note,) = about(replace(TIMED, time=Time(neighbours=2)), manifest)
    assert note == (
        "a frame has 0.63 frames of its own video among the 15 other images of its batch, in the mean, as false negatives; "  # 5 · 15 / 119
        "--time.one-per-video keeps them apart"
    )
    (note,) = about(TIMED.of_batch(40), manifest)  # 3 batches an epoch
    assert note == (
        "a batch of 40 has up to 2 frames of a video, and no order of all frames has fewer: the longest video has 6 frames, an epoch "
        "3 batches; --train.batch-size 20 leaves one"
    )
    assert about(TIMED.of_batch(20), manifest) == []
    assert about(TIMED, of_videos(manifest, (0, 1, 2, *range(7, 120, 5)))) == ["2 of 26 videos have one frame, which is paired with itself"]


def test_shards_without_videos_are_refused_before_any_worker_starts(patterns: Path) -> None:
    with pytest.raises(UserError, match="want frames of videos, and the shards hold none; prepare folders of frames with --videos"):
        sense.notes(TIMED, read_manifest(patterns), 240)
    with pytest.raises(UserError, match=r"hold no videos, and time\.neighbours pairs frames"):
        next(train(TIMED, Start(patterns)))


def test_only_pretraining_has_pairs_and_the_recipe_is_whole() -> None:
    for stage in (FineTune, Distill):
        with pytest.raises(UserError, match="are for pretraining, where images come in pairs; leave them out"):
            stage(time=Time(neighbours=1))
    assert time_of(recipe("patterns_byol")) == Time() == time_of(recipe("patterns_tiny"))
    assert time_of(recipe("patterns_time")) == Time(neighbours=3, one_per_video=True)
    before = {name: value for name, value in TINY.to_dict().items() if name != "time"}  # as a run of before states it
    assert SimCLR.from_dict(before) == TINY
