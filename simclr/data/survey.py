"""What a sample of a source decides for all of it: raw or JPEG, the range of pixels of more than 8 bits, how many make a shard."""

from __future__ import annotations

import itertools
import json
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from simclr import fields, files
from simclr.data.depth import Rule, decided
from simclr.data.encode import Looked, encode, look
from simclr.data.options import Options
from simclr.data.sources.source import Item, Source, bundles
from simclr.errors import UserError

SAMPLE = 256
"""Images, evenly spaced over the source where it can be read so."""
_RAW_SIDE_PX = 64
_AHEAD, _AHEAD_BYTES = 16, 128 << 20  # images of the sample in memory
_EVERY, _MOST_BYTES = 2, 256 << 20  # of the sample, those whose size is measured: they are held in memory


class Unusable(UserError):
    """The source cannot be trained on; a resumed prepare would fail in the same way."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What holds for every image of a source."""

    kind: Literal["raw", "jpeg"]
    bytes_each: int
    """The least that an image takes."""
    ranges: dict[str, tuple[float, float]]
    """Kind of pixels → black and white (`depth.Rule`)."""
    times: str
    """`Source.times` at that time."""
    size_px: tuple[int, ...]
    """Height and width that all images have; () where they may differ."""
    mean_bytes: float
    """Of an image, as stored: how many make about a shard."""
    images_unnamed: int
    """Images of the first part of the source whose names are known only when it is read, or so many as make a shard."""

    def save(self, path: Path, key: str) -> None:
        """`key` identifies the source, but for its times, and the options."""
        files.write_text(path, json.dumps(asdict(self) | {"key": key}))


def saved(path: Path, key: str) -> Choice | None:
    """The choice in the file, if it was made for the same key."""
    try:
        text = files.read_json(path, "it is made again")
        return fields.build(Choice, text, path, "it is made again") if text.pop("key", "") == key else None
    except (OSError, UserError):
        return None


def survey(source: Source, options: Options, pool: ThreadPoolExecutor) -> Choice:
    """Raises UserError if none of the sample can be read, or if raw was asked for and they have several sizes."""
    rule = options.rule({})
    tried, first = 0, ""
    seen: list[tuple[str, Looked]] = []  # without the files, which may be in memory
    some = _Some()  # an archive is unpacked once for the sample
    for item, looked in _looked(some.of(_sample(source)), options.max_side_px, rule, pool):
        tried += 1
        first = first or (f"; the first: {item.name}: {looked.skipped}" if looked.skipped else "")
        if not looked.skipped:
            seen.append((item.name, looked))
    if not seen:
        raise UserError(f"{source.spec} has no image that can be read ({tried} tried{first}); expected JPEG, PNG or other pictures")
    height, width = seen[0][1].height, seen[0][1].width
    other = next(((name, looked) for name, looked in seen if (looked.height, looked.width) != (height, width)), None)
    if options.kind == "raw" and other:
        raise UserError(sizes_differ(other[0], (other[1].height, other[1].width), (height, width)))
    small = other is None and max(height, width) <= _RAW_SIDE_PX
    raw = options.kind == "raw" or (options.kind == "auto" and small)
    ranges = {} if options.value_range else decided([looked.values for _, looked in seen if looked.values])
    size = (height, width) if raw else ()
    choice = Choice(
        "raw" if raw else "jpeg", 3 * height * width if raw else 1 << 8, ranges, source.times, size, mean_bytes=0.0, images_unnamed=0
    )
    return _measured(source, some.items, options, choice, pool)


def chosen_again(source: Source, options: Options, choice: Choice, pool: ThreadPoolExecutor) -> Choice:
    """The `choice`, whose kind or ranges an image has contradicted, with all that follows from it: the same as a sample with that image
    would have given."""
    if choice.kind == "jpeg":
        choice = replace(choice, bytes_each=1 << 8, size_px=())
    some = _Some()
    deque(some.of(_sample(source)), maxlen=0)
    return _measured(source, some.items, options, choice, pool)


class _Some:
    """Images of a sample that are kept while it passes."""

    def __init__(self) -> None:
        self.items: list[Item] = []

    def of(self, sample: Iterator[Item]) -> Iterator[Item]:
        """The `sample`."""
        size = 0
        for place, item in enumerate(sample):
            if place % _EVERY == 0 and size < _MOST_BYTES:
                self.items.append(item)
                size += len(item.data) if isinstance(item.data, bytes) else getattr(item.data, "nbytes", 0)
            yield item


def _measured(source: Source, some: Sequence[Item], options: Options, choice: Choice, pool: ThreadPoolExecutor) -> Choice:
    """The `choice` with the mean size of `some` images as they will be stored, and the number of images of the first part without names."""
    rule, sizes = options.rule(choice.ranges), [choice.bytes_each] if choice.kind == "raw" else []
    if not sizes:
        encoded = pool.map(lambda item: encode(item, choice.kind, options.max_side_px, options.jpeg_quality, rule), some)
        sizes = [len(one.stored) for one in encoded if not one.skipped]
    mean = sum(sizes) / len(sizes) if sizes else float(choice.bytes_each)
    unnamed = [part for part in source.parts if not part.names]
    each = int((options.shard_mib << 20) / mean) + 1
    images = sum(1 for _ in itertools.islice(source.read(unnamed[0]), each)) if len(unnamed) > 1 else 0
    return replace(choice, mean_bytes=mean, images_unnamed=images)


def sizes_differ(name: str, size: tuple[int, int], before: tuple[int, int]) -> str:
    """The sentence for raw images of two sizes (height, width)."""
    return f"{name} has {size[1]} × {size[0]} px, the images before it {before[1]} × {before[0]}; raw shards hold one size: use --kind jpeg"


def _sample(source: Source) -> Iterator[Item]:
    """Images from all over the source; where an archive does not know its names beforehand, those at its beginning too."""
    count = 0
    for item in source.sample(SAMPLE):
        count += 1
        yield item
    if count < SAMPLE and not all(part.names for part in source.parts):
        yield from itertools.islice(source.items(), SAMPLE)


def _looked(items: Iterator[Item], max_side_px: int, rule: Rule, pool: ThreadPoolExecutor) -> Iterator[tuple[Item, Looked]]:
    for some in bundles(items, _AHEAD, _AHEAD_BYTES):
        yield from zip(some, pool.map(lambda item: look(item, max_side_px, rule), some), strict=True)
