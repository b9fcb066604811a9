"""Videos of the built-in patterns: each shows one pattern whose angle, position and tint change a little from frame to frame."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from simclr import keyed
from simclr.data.sources.patterns import CLASSES, DRAWS, Field, options_of, painted
from simclr.data.sources.reading import Split, Understood
from simclr.data.sources.source import Item, Part, Source
from simclr.errors import UserError

_USUAL = {"train": 400, "test": 100, "frames": 10, "size": 32, "seed": 0, "coloured": 0}
_BLOCK = 512
_LARGEST_PX = 512  # a frame's noise has as many draws as a key of `keyed` has
_TURN = 1 / 80 * np.array([3.0, 8.0], np.float32)  # least and most degrees a frame, where a draw of 1 is 80°
_DRIFT, _TINT = 0.03, 0.05  # most change of the draws of position and of colour, a frame


def render(
    videos: NDArray[np.int64], frames: NDArray[np.int64], seed: int, size_px: int = 32, coloured: bool = False
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (n, size, size, 3) and labels (n,) of frame `frames[i]` of video `videos[i]`: class video % 10, all else keyed by (seed,
    video), and the noise by (seed, video, frame).

    What `patterns.painted` draws for an image is drawn for a video; then the angle turns by 3° to 8° a frame, one way or the other, and
    position and tint drift, thrown back at the ends of their ranges. Scale, polarity, contrast, brightness and strength of the noise stay.
    """
    if not 1 <= size_px <= _LARGEST_PX:
        raise UserError(f"patterns of {size_px} px were asked for; expected 1 to {_LARGEST_PX} px")
    labels = videos % len(CLASSES)
    u = keyed.uniform(seed, "patterns", 0, videos, 1, 2 * DRAWS).astype(np.float32)
    drawn, rates, t = u[:, :DRAWS].copy(), 2 * u[:, DRAWS:] - 1, frames[:, None].astype(np.float32)
    turn = np.sign(rates[:, :1]) * (_TURN[0] + (_TURN[1] - _TURN[0]) * np.abs(rates[:, :1]))
    drawn[:, :1] += t * turn
    drawn[:, 2:4] = _thrown_back(drawn[:, 2:4] + t * _DRIFT * rates[:, 2:4])
    drawn[:, 8:11] = _thrown_back(drawn[:, 8:11] + t * _TINT * rates[:, 8:11])
    images = np.empty((len(videos), size_px, size_px, 3), np.uint8)
    for video in np.unique(videos):  # each frame's noise has the video as its epoch
        mine = videos == video
        noise = keyed.uniform(seed, "patterns", int(video) + 1, frames[mine], 2, size_px**2).astype(np.float32)
        images[mine] = painted(drawn[mine], noise, labels[mine], size_px, coloured)
    return images, labels


def _thrown_back(x: Field) -> Field:
    """x in [0, 1], as a ball between two walls."""
    thrown: Field = 1 - np.abs(1 - np.mod(x, 2))
    return thrown


def rotating_source(options: str) -> Source:
    """Videos called train/000012, with frames train/000012/0003. Raises UserError for an unknown option."""
    values = options_of("rotating-patterns", options, _USUAL)
    counts, frames = {"train": values["train"], "test": values["test"]}, values["frames"]
    if values["train"] < 2 or frames < 2:
        raise UserError(f"rotating-patterns has {values['train']} videos of {frames} frames; use at least train=2 and frames=2")
    first = {"train": 0, "test": counts["train"]}
    names = [
        f"{split}/{video:06d}/{frame:04d}"
        for split, count in counts.items()
        for video in range(first[split], first[split] + count)
        for frame in range(frames)
    ]
    end = counts["train"] * frames
    runs = [range(begin, min(begin + _BLOCK, last)) for low, last in ((0, end), (end, len(names))) for begin in range(low, last, _BLOCK)]
    parts = [Part(names[run.start].partition("/")[0], tuple(names[run.start : run.stop])) for run in runs]

    def read(part: Part) -> Iterator[Item]:
        places = np.array([[int(number) for number in name.split("/")[1:]] for name in part.names], np.int64)
        images, labels = render(places[:, 0], places[:, 1], values["seed"], values["size"], bool(values["coloured"]))
        for name, image, label in zip(part.names, images, labels, strict=True):
            yield Item(part.name, CLASSES[label], name, image)

    def classes(split: str) -> Counter[str | None]:
        found = Counter[str | None]()
        for video in range(first[split], first[split] + counts[split]):
            found[CLASSES[video % len(CLASSES)]] += frames
        return found

    rendered = {split: count for split, count in counts.items() if count}
    understood = Understood(
        splits={split: Split(classes(split), ()) for split in rendered},
        how_split="rendered as such, by video",
        how_labelled="rendered as such",
        notes=(),
        counted=True,
    ).to_dict()
    understood["videos"] = {
        split: {"videos": count, "one_frame": 0, "shortest": frames, "longest": frames} for split, count in rendered.items()
    }
    stated = ",".join(f"{key}={value}" for key, value in values.items())
    return Source(spec=f"rotating-patterns:{stated}", parts=parts, read=read, total=len(names), videos=True, understood=understood)
