"""Folders of frames: what is a video, in which order its frames come, whole videos in a split, and what a user is told."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.commands.prepare import told
from simclr.data import shards
from simclr.data.manifest import Manifest, read_manifest, read_names
from simclr.data.sources.open import open_source
from simclr.data.sources.reading import Reading
from simclr.data.sources.rotating import render
from simclr.data.sources.source import Source
from simclr.data.sources.videos import natural
from simclr.errors import UserError

Plain = dict[str, Any]


def made(root: Path, names: Sequence[str], size: tuple[int, int] = (24, 20)) -> Path:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            (root / name).mkdir()
            continue
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (*size, 3), np.uint8)).save(root / name)
    return root


def opened(root: Path, **reading: Any) -> Source:
    return open_source(str(root), Reading(videos=True, **reading))


def names(source: Source, split: str = "train") -> list[str]:
    return [item.name for item in source.items() if item.split == split]


def notes(source: Source) -> str:
    return "\n".join(source.understood["notes"])  # type: ignore[arg-type]


def prepared(source: Source, out: Path, said: list[str] | None = None, **more: Any) -> Manifest:
    says = (said if said is not None else []).append
    return shards.prepare(source, out, shards.Options(shard_mib=1), 2, lambda count: None, says=says, **more)


# ── Order ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_numbers_in_names_count_by_value() -> None:
    assert sorted(["f10", "g1", "f2b1", "a", "f010b", "f2"], key=natural) == ["a", "f2", "f2b1", "f10", "f010b", "g1"]


def test_frames_of_a_video_follow_each_other_in_natural_order(tmp_path: Path) -> None:
    root = made(tmp_path / "in", [f"{video}/frame{i}.png" for video in ("b10", "b9", "a") for i in (10, 9, 100, 1)])
    source = opened(root)
    assert names(source) == [f"{video}/frame{i}.png" for video in ("a", "b10", "b9") for i in (1, 9, 10, 100)]
    assert source.understood["videos"] == {"train": {"videos": 3, "one_frame": 0, "shortest": 4, "longest": 4}}
    assert "  videos   train 3 of 4 frames\n" in told(source) and "none: no folder tells training pictures apart" in told(source)
    manifest = prepared(source, tmp_path / "out")
    assert manifest.videos == {"train": (0, 4, 8)} and not manifest.classes
    assert read_names(tmp_path / "out", "train", 12) == names(source)


def test_decimal_numbers_in_names_count_by_their_value(tmp_path: Path) -> None:
    """Times, as a script writes them; names that count on behind the dot, and those with several dots, are no decimals."""
    videos = {
        "times": ["0.04", "0.25", "0.4", "0.5", "1.0", "10.5"],
        "scenes": ["1.1", "1.2", "1.9", "1.10", "1.11", "2.1"],
        "dates": ["1.2.9", "1.2.10", "1.10.1"],
        "even": ["0.05", "0.40", "0.50"],
        "quarters": ["0.25", "0.5", "0.75", "1.0"],
        "strides": ["1.1", "1.3", "1.5", "1.7", "1.9", "1.11", "1.13", "2.1", "2.3"],
        "thirds": ["1.333", "1.667", "2.0", "2.333"],
        "window": ["3.8", "3.9", "3.11"],
    }
    root = made(tmp_path / "in", [f"{video}/{stem}.png" for video, stems in videos.items() for stem in reversed(stems)], (8, 8))
    source = opened(root)
    assert names(source) == [f"{video}/{stem}.png" for video in sorted(videos) for stem in videos[video]]
    assert "3 videos have frames named by decimal numbers, which come by their value: as quarters/0.25.png" in notes(source)
    assert (
        "3 videos have frames named by two numbers, which count on behind the dot, as scenes/2.1.png and 2 more; pad decimal ones"
        in notes(source)
    )
    made(root, ["even/0.5.png"], (8, 8))  # with a 0 at an end they count on behind the dot
    with pytest.raises(UserError, match=r"even has 0.05.png and 0.5.png, whose names state the same place"):
        opened(root)


def test_many_frames_keep_their_order_over_parts(tmp_path: Path) -> None:
    root = made(tmp_path / "in", [f"{video}/{i}.png" for video in ("a", "b") for i in range(700)], (8, 8))
    source = opened(root)
    assert [len(part.names) for part in source.parts] == [1024, 376]
    assert names(source) == [f"{video}/{i}.png" for video in ("a", "b") for i in range(700)]


# ── Splits and classes ─────────────────────────────────────────────────────────────────────────────────────────────


def test_the_folder_above_the_videos_is_the_class_and_a_video_called_test_is_no_split(tmp_path: Path) -> None:
    videos = ("cat/v1", "cat/test", "dog/v1", "dog/train")
    source = opened(made(tmp_path, [f"{video}/{i}.png" for video in videos for i in range(3)]))
    assert {item.name.rpartition("/")[0]: (item.split, item.label) for item in source.items()} == {
        video: ("train", video.partition("/")[0]) for video in videos
    }
    plain = open_source(str(tmp_path))
    assert not plain.videos and "videos" not in plain.understood


def test_splits_by_folders_hold_whole_videos(tmp_path: Path) -> None:
    root = made(
        tmp_path / "in", [f"{split}/{c}/v{v}/{i}.png" for split in ("train", "val") for c in "xy" for v in (1, 2) for i in (1, 2, 3)]
    )
    manifest = prepared(opened(root), tmp_path / "out")
    assert manifest.videos == {"train": (0, 3, 6, 9), "test": (0, 3, 6, 9)} and manifest.classes == ("x", "y")


def test_a_fraction_is_of_videos(tmp_path: Path) -> None:
    root = made(tmp_path / "in", [f"{c}/v{v}/{i}.png" for c in "xy" for v in range(20) for i in range(3)], (8, 8))
    source = opened(root, split_from="0.25")
    test, train = ({name.rpartition("/")[0] for name in names(source, split)} for split in ("test", "train"))
    assert not test & train and len(test | train) == 40 and 4 <= len(test) <= 17
    assert "0.25 of the training videos are held out" in told(source)
    assert f"videos   train {len(train)} of 3 frames, test {len(test)} of 3 frames" in told(source)
    manifest = prepared(source, tmp_path / "out")
    assert {split: len(firsts) for split, firsts in manifest.videos.items()} == {"train": len(train), "test": len(test)}
    made(root, ["x/v21/1.png", "x/v21/2.png"], (8, 8))  # a new video moves no old one
    assert {name.rpartition("/")[0] for name in names(opened(root, split_from="0.25"), "test")} - {"x/v21"} == test


def test_a_file_of_splits_that_divides_a_video_is_refused(tmp_path: Path) -> None:
    root = made(tmp_path / "in", [f"v{v}/{v}_{i}.png" for v in range(3) for i in range(3)])
    (tmp_path / "splits.csv").write_text("name,split\nv1/1_0.png,test\nv1/1_1.png,test\n")
    with pytest.raises(UserError, match=r"v1 has frames of two splits \(v1/1_\d.png: test, v1/1_2.png: train\); a video is of one split"):
        opened(root, split_from=str(tmp_path / "splits.csv"))
    (tmp_path / "splits.csv").write_text("name,split\n" + "".join(f"v1/1_{i}.png,test\n" for i in range(3)))
    assert names(opened(root, split_from=str(tmp_path / "splits.csv")), "test") == [f"v1/1_{i}.png" for i in range(3)]


# ── What a user is told ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("frames", "said"),
    [
        (["1.png", "v/1.png", "v/2.png"], r"has pictures in no folder; with --videos a folder is a video: DIR/video/frame.jpg"),
        (["a/1.png", "a/v/1.png", "a/v/2.png"], r"has pictures both in a and in a/v below it; with --videos"),
        (["a/1.png", "b/1.png"], r"every folder of .* has a single picture, as a, so no frame has a neighbour; with --videos"),
        (["a/1.png", "a/01.png", "a/2.png"], r"a has 01.png and 1.png, whose names state the same place in the video; keep one of them"),
        (["a/7.png", "a/7.jpg", "a/2.png"], r"a has 7.jpg and 7.png, whose names state the same place"),
    ],
)
def test_what_is_no_folder_of_videos_is_refused(frames: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        opened(made(tmp_path, frames))


def test_what_may_not_be_meant_so_is_said(tmp_path: Path) -> None:
    root = made(tmp_path, ["a/1.png", "b/1.png", "b/2.png", "c/x.png", "c/y.png", "d/l_1.png", "d/r_1.png", "d/l_2.png", "e/"])
    (root / "f.mp4").write_bytes(b"a film")
    source = opened(root)
    assert notes(source).splitlines() == [
        "1 video has one frame, which is its own neighbour: a",
        "1 video has frames without numbers, which come in the order of letters: as c/x.png",
        "1 video has frames with several kinds of names, whose letters count before their numbers: d (l_#, r_#)",
        "without a frame, and left out: e",
        "1 file (.mp4) of whole videos is not read; `ffmpeg -i a.mp4 a/%06d.jpg` makes a folder of frames",
    ]
    assert source.understood["videos"] == {"train": {"videos": 4, "one_frame": 1, "shortest": 1, "longest": 3}}
    assert names(source)[-3:] == ["d/l_1.png", "d/l_2.png", "d/r_1.png"]


def test_films_alone_and_archives_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"a film")
    with pytest.raises(UserError, match=r"no images in .*1 file \(.mp4\) of whole videos is not read; `ffmpeg"):
        opened(tmp_path)
    with pytest.raises(UserError, match="splits and classes of its own; leave out --labels, --split-from, --videos and --captions"):
        open_source("rotating-patterns", Reading(videos=True))


def test_an_archive_is_refused(tmp_path: Path) -> None:
    import tarfile

    root = made(tmp_path / "in", ["v/1.png", "v/2.png"])
    with tarfile.open(tmp_path / "v.tar", "w") as tar:
        tar.add(root / "v", "v")
    with pytest.raises(UserError, match=r"v.tar is no folder of loose pictures, which --videos reads; unpack it, or leave out --videos"):
        opened(tmp_path / "v.tar")


def test_frames_of_several_sizes_are_said(tmp_path: Path) -> None:
    root = made(made(tmp_path / "in", [f"{v}/{i}.png" for v in "ab" for i in range(3)]), ["a/3.png", "a/4.png"], (24, 40))
    said: list[str] = []
    manifest = prepared(opened(root), tmp_path / "out", said)
    assert manifest.kind == "jpeg" and manifest.videos == {"train": (0, 5)}
    assert (
        "1 video has frames of several sizes, as a of 20 × 24 and 40 × 24 px; each is cropped by its own size, but is this one video?"
        in said
    )


# ── Shards ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def in_plain_values(
    make: Callable[[Plain], Callable[[Plain], Plain]], settings: Plain, parts: Sequence[Plain]
) -> Iterator[tuple[Plain, Plain]]:
    """Parts as other processes make them, which get text; the last part is made first."""
    each = make(json.loads(json.dumps(settings)) | {"threads": 1})
    for part in reversed(parts):
        yield part, json.loads(json.dumps(each(json.loads(json.dumps(part)))))


def test_a_video_that_goes_on_in_the_next_part_is_one_and_frames_that_cannot_be_read_close_up(tmp_path: Path) -> None:
    root = made(tmp_path / "in", [f"v{v}/{i}.jpg" for v in range(3) for i in range(40)], (200, 200))
    for broken in ("v0/0.jpg", "v1/17.jpg"):
        (root / broken).write_bytes(b"no picture")
    made(root, ["w/1.jpg"])
    (root / "w" / "1.jpg").write_bytes(b"no picture")  # a video that has none left
    source, options = opened(root), shards.Options(shard_mib=1, max_skipped_pct=5)
    whole = shards.prepare(source, tmp_path / "one", options, 2, lambda count: None)
    assert len(whole.shards) > 1 and whole.skipped == 3 and whole.videos == {"train": (0, 39, 78)}
    elsewhere = shards.Elsewhere(run=in_plain_values, reading=Reading(videos=True))
    parts = shards.prepare(opened(root), tmp_path / "many", options, 2, lambda count: None, elsewhere=elsewhere)
    assert replace(parts, source="") == replace(whole, source="")
    assert read_manifest(tmp_path / "many") == parts


def test_rotating_patterns_are_videos_by_other_processes_too(tmp_path: Path) -> None:
    spec = "rotating-patterns:train=30,test=5,frames=60"  # parts end within videos
    whole = prepared(open_source(spec), tmp_path / "one")
    assert whole.videos == {"train": tuple(range(0, 1800, 60)), "test": tuple(range(0, 300, 60))} and len(whole.splits["train"]) > 1
    elsewhere = shards.Elsewhere(run=in_plain_values, reading=Reading())
    assert prepared(open_source(spec), tmp_path / "many", elsewhere=elsewhere) == whole


def test_a_table_of_videos_that_cannot_be_is_refused_and_none_is_as_before(tmp_path: Path, patterns: Path) -> None:
    plain = read_manifest(patterns)
    assert "videos" not in json.loads(plain.to_json()) and plain.videos == {}
    text = replace(plain, videos={"train": (0, 100), "test": (0,)}).to_json()
    assert Manifest.from_json(text).videos == {"train": (0, 100), "test": (0,)} and Manifest.from_json(text).to_json() == text
    for wrong in ([1, 5], [0, 0], [0, 240], [0, -1], [0, 9, 7], []):
        with pytest.raises(UserError, match=r"is damaged: videos of train begin at .*, which are no ascending ids from 0 in that split"):
            Manifest.from_json(json.dumps(json.loads(text) | {"videos": {"train": wrong}}))
    for wrong in (7, {"train": [0.5]}, {"train": 0}, {"val": [0]}):
        with pytest.raises(UserError, match="is damaged: videos"):
            Manifest.from_json(json.dumps(json.loads(text) | {"videos": wrong}))


def test_shards_made_without_videos_are_not_taken_for_those_with(tmp_path: Path) -> None:
    root = made(tmp_path / "in", [f"v{v}/{i}.png" for v in range(2) for i in range(3)])
    prepared(opened(root, labels="none"), tmp_path / "with")
    prepared(open_source(str(root), Reading(labels="none")), tmp_path / "without")
    with pytest.raises(UserError, match="holds shards that were made without --videos; use another --out"):
        shards.held(opened(root, labels="none"), tmp_path / "without", shards.Options(shard_mib=1))
    with pytest.raises(UserError, match="holds shards that were made with --videos; use another --out"):
        shards.held(open_source(str(root), Reading(labels="none")), tmp_path / "with", shards.Options(shard_mib=1))
    assert shards.held(opened(root, labels="none"), tmp_path / "with", shards.Options(shard_mib=1)) is not None


# ── Rotating patterns ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_rotating_pattern_changes_slowly_and_is_a_function_of_video_and_frame() -> None:
    videos, frames = np.repeat(np.arange(40), 12), np.tile(np.arange(12), 40)
    images, labels = render(videos, frames, 0)
    assert (labels == videos % 10).all()
    some = np.array([100, 3, 477])
    again, _ = render(videos[some], frames[some], 0)
    assert np.array_equal(again, images[some]) and not np.array_equal(render(videos[some], frames[some], 1)[0], again)
    x = images.reshape(40, 12, -1).astype(float) / 255
    step = np.abs(x[:, 1:] - x[:, :-1]).mean()
    far = np.abs(x[:, 6:] - x[:, :6]).mean()
    other = np.abs(x[:30] - x[10:]).mean()  # of the same class
    assert 0 < step < 0.8 * far and far < other
    assert len(np.unique(images.reshape(480, -1), axis=0)) == 480


def test_options_of_rotating_patterns_are_checked() -> None:
    source = open_source("rotating-patterns:train=3,test=0,frames=4")
    assert source.total == 12 and source.spec == "rotating-patterns:train=3,test=0,frames=4,size=32,seed=0,coloured=0"
    assert list(source.understood["videos"]) == ["train"]  # type: ignore[call-overload]
    for spec, said in (
        ("frames=1", "has 400 videos of 1 frames; use at least train=2 and frames=2"),
        ("video=3", "rotating-patterns has no option 'video=3'; expected train=NUMBER"),
        ("size=4", "rotating-patterns of 4 px show nothing"),
    ):
        with pytest.raises(UserError, match=said):
            open_source(f"rotating-patterns:{spec}")
