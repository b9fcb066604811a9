"""Folders of frames: a folder is a video, and the numbers in its frames' names are their order."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator

from simclr.data.sources.names import Kept, Packed
from simclr.data.sources.reading import some
from simclr.data.sources.source import PART_IMAGES, Part, Together, Tree
from simclr.errors import UserError

_FILMS = frozenset({".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv"})
_DECIMAL = re.compile(r"[0-9]+\.([0-9]+)")
_WANTED = "with --videos a folder is a video: DIR/video/frame.jpg, DIR/class/video/frame.jpg or DIR/split/class/video/frame.jpg"


def video_of(name: str) -> str:
    """The video of a frame: the folder in which it lies."""
    return name.rpartition("/")[0]


def natural(name: str) -> tuple[str | int, ...]:
    """A key that puts names into natural order: runs of digits count by their value, so frame2 comes before frame10."""
    return tuple(int(piece) if at % 2 else piece for at, piece in enumerate(re.split(r"([0-9]+)", name)))


def decimal(name: str) -> tuple[str | int, ...]:
    """A key that puts names that are decimal numbers into their order: 0.25 before 0.5."""
    whole, _, behind = name.rpartition("/")[2].partition(".")
    return int(whole), behind.rstrip("0")


def films_left(ignored: Counter[str]) -> str:
    """What to do about files of whole videos among those that are no pictures; "" where there is none."""
    found = sorted(ending for ending in ignored if ending in _FILMS)
    if not found:
        return ""
    count = sum(ignored[ending] for ending in found)
    return (
        f"{count:,} file{'s' * (count != 1)} ({', '.join(found)}) of whole videos {'are' if count != 1 else 'is'} not read; "
        "`ffmpeg -i a.mp4 a/%06d.jpg` makes a folder of frames"
    )


def by_video(tree: Tree) -> Tree:
    """The tree with its pictures video by video, the frames of each in natural order; notes say what may not be meant so.

    Raises UserError where pictures are no files of their own, lie in no folder or beside folders of frames, where two names of a folder
    state the same place, and where no folder has two frames.
    """
    if not tree.loose:
        raise UserError(f"{tree.spec} is no folder of loose pictures, which --videos reads; unpack it, or leave out --videos")
    folders = {video_of(name) for name in Together(tree.parts)}
    _require_apart(tree.spec, folders)
    kept, parts, waiting = Kept(), list[Part](), list[str]()
    single, unnumbered, mixed, decimals, counted = list[str](), list[str](), list[str](), list[str](), list[str]()
    for video, frames in videos_of(Together(tree.parts)):
        ordered = _ordered(video, frames)
        shapes = {re.sub(r"[0-9]+", "#", _stem(name.rpartition("/")[2])) for name in ordered}
        if len(ordered) == 1:
            single.append(video)
        elif not any("#" in shape for shape in shapes):
            unnumbered.append(ordered[0])
        elif len(shapes) > 1:
            mixed.append(f"{video} ({some(sorted(shapes))})")
        elif _are_decimals(ordered):
            decimals.append(ordered[0])
        elif shapes == {"#.#"} and len({len(name.rpartition("/")[2].split(".")[1]) for name in ordered}) > 1:
            counted.append(ordered[-1])
        waiting += ordered
        whole = len(waiting) // PART_IMAGES * PART_IMAGES
        parts += [Part(tree.spec, Packed(waiting[first : first + PART_IMAGES], kept)) for first in range(0, whole, PART_IMAGES)]
        waiting = waiting[whole:]
    if waiting:
        parts.append(Part(tree.spec, Packed(waiting, kept)))
    if len(single) == len(folders):
        raise UserError(f"every folder of {tree.spec} has a single picture, as {single[0]}, so no frame has a neighbour; {_WANTED}")
    notes = {
        f"{_videos(single)} one frame, which is its own neighbour: {some(single)}": single,
        f"{_videos(unnumbered)} frames without numbers, which come in the order of letters: as {some(unnumbered, 1)}": unnumbered,
        f"{_videos(mixed)} frames with several kinds of names, whose letters count before their numbers: {some(mixed, 1)}": mixed,
        f"{_videos(decimals)} frames named by decimal numbers, which come by their value: as {some(decimals, 1)}": decimals,
        f"{_videos(counted)} frames named by two numbers, which count on behind the dot, as {some(counted, 1)}; pad decimal ones": counted,
        f"without a frame, and left out: {some(tree.bare)}": tree.bare,
        films_left(tree.ignored): films_left(tree.ignored),
    }
    return dataclasses.replace(tree, parts=parts, notes=(*tree.notes, *(note for note, of in notes.items() if of)))


def videos_of(names: Collection[str]) -> Iterator[tuple[str, list[str]]]:
    """(video, its frames) of `names` in which the frames of each video follow each other."""
    for video, frames in itertools.groupby(names, video_of):
        yield video, list(frames)


def table(names: Collection[str], split_of: Callable[[str], str | None]) -> dict[str, dict[str, int]]:
    """Split → number of its `videos`, of those with `one_frame`, and the frames of the `shortest` and the `longest`.

    Raises UserError where a video has frames of two splits: its test frames would be neighbours of training frames."""
    lengths: dict[str, list[int]] = {}
    for video, frames in videos_of(names):
        splits = {split_of(name): name for name in frames}
        if len(splits) > 1:
            (one, first), (other, second) = sorted(splits.items(), key=str)[:2]
            raise UserError(
                f"{video} has frames of two splits ({first}: {one or 'left out'}, {second}: {other or 'left out'}); a video is of one "
                "split, so name all its frames or none, or give --split-from a fraction"
            )
        for split in splits:
            if split is not None:
                lengths.setdefault(split, []).append(len(frames))
    return {split: {"videos": len(of), "one_frame": of.count(1), "shortest": min(of), "longest": max(of)} for split, of in lengths.items()}


def _ordered(video: str, frames: list[str]) -> list[str]:
    key_of = decimal if _are_decimals(frames) else natural
    found = sorted((key_of(_stem(name)), name) for name in frames)
    for (key, name), (following, other) in itertools.pairwise(found):
        if key == following:  # 1.jpg and 01.jpg, or 1.jpg and 1.png
            one, two = name.rpartition("/")[2], other.rpartition("/")[2]
            raise UserError(f"{video} has {one} and {two}, whose names state the same place in the video; keep one of them")
    return [name for _, name in found]


def _are_decimals(frames: list[str]) -> bool:
    """Whether the names are decimal numbers, as a script writes times: 0.25, 0.5, 0.75, 1.0. With as many digits behind each dot their
    order is the natural one. They are none where they count on behind the dot: 1.9, 1.10, or 1.9, 1.11, 1.13. Else a 0 behind the dot says
    that they are, as in 0.05, or that their steps are all equal."""
    stems = [_stem(name.rpartition("/")[2]) for name in frames]
    behind = [match[1] for stem in stems if (match := _DECIMAL.fullmatch(stem))]
    longest = max(map(len, behind), default=0)
    if len(behind) < len(frames) or min(map(len, behind)) == longest or any(len(digits) > 1 and digits.endswith("0") for digits in behind):
        return False
    counts: dict[str, list[float]] = {}
    for stem, digits in zip(stems, behind, strict=True):
        counts.setdefault(stem.partition(".")[0], []).append(int(digits))
    longer = [count for count in counts.values() if len(count) > 2]
    if longer and all(_even(count, 0.0) for count in longer):
        return False
    rounding = 1.5 * 10.0**-longest
    return any(len(digits) > 1 and digits.startswith("0") for digits in behind) or _even([float(stem) for stem in stems], rounding)


def _even(numbers: list[float], rounding: float) -> bool:
    """Whether at least three numbers have equal steps."""
    steps = [b - a for a, b in itertools.pairwise(sorted(numbers))]
    return len(steps) > 1 and max(steps) - min(steps) <= rounding


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _require_apart(spec: str, folders: set[str]) -> None:
    if "" in folders:
        raise UserError(f"{spec} has pictures in no folder; {_WANTED}")
    for folder in sorted(folders):
        above = folder
        while above := above.rpartition("/")[0]:
            if above in folders:
                raise UserError(
                    f"{spec} has pictures both in {above} and in {folder} below it; {_WANTED}, so a folder with frames has no folders of "
                    "pictures; move one of the two away"
                )


def _videos(found: list[str]) -> str:
    return f"{len(found):,} video{'s have' if len(found) != 1 else ' has'}"


def counted(rows: dict[str, dict[str, int]]) -> str:
    """The table of videos, for people: train 80 videos of 12 to 40 frames, test …"""
    each = []
    for split, row in rows.items():
        short, long = row["shortest"], row["longest"]
        frames = f"{short:,} frame{'s' * (short != 1)}" if short == long else f"{short:,} to {long:,} frames"
        each.append(f"{split} {row['videos']:,} of {frames}")
    return ", ".join(each)
