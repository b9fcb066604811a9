"""Pictures that a user looks for, embedded as the rows of a table of features were."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

import simclr
from pipelines.evaluation.originals import thumbnail
from pipelines.parts import plan
from pipelines.runs import sync
from pipelines.terminal import say
from simclr.data.feature_parts import About
from simclr.data.options import Options
from simclr.data.sources.portions import Portion
from simclr.data.sources.reading import Reading
from simclr.data.sources.source import Item
from simclr.encoder.directory import weights_digest
from simclr.errors import UserError
from simclr.evaluation.decoding import Threads
from simclr.evaluation.embedding import Clock, embedded

_BATCH = 64
Query = tuple[str, NDArray[np.float32], NDArray[np.uint8] | None]


def embed(directory: Path, asked: Path, words: list[str], about: About, device: torch.device, pictures: int) -> list[Query]:
    """(name, feature, small picture) of every picture that `words` name; only the first `pictures` have one. The encoder in `directory`
    is what the user `asked` for. Raises UserError if it is not the one that made the features, and where no picture can be read."""
    if (digest := weights_digest(directory)) != about.encoder:
        raise UserError(
            f"{sync.shown(asked)} (sha256 {digest[:12]}…) is not the encoder that made the features (sha256 {about.encoder[:12]}…): "
            "cosines of two encoders mean nothing; give that one, or embed the images again with this one"
        )
    encoder = simclr.load_encoder(directory).to(device).to(memory_format=torch.channels_last)
    planned = plan.plan(words, Reading(), Options())
    rule, found, left = about.rule(planned.ranges), [], []
    small: list[NDArray[np.uint8] | None] = []
    with tempfile.TemporaryDirectory(prefix="simclr-query-") as scratch:

        def items() -> Iterator[Item]:
            for part in planned.parts:
                read = plan.reader(planned.sources[part["source"]], Reading(), Path(scratch))
                for item in read(Portion.from_dict(part["portion"])):
                    small.append(thumbnail(item.data, rule) if len(small) < pictures else None)
                    yield item

        at, decoders = 0, Threads(1, _BATCH, encoder.preprocessing, rule)
        for seen, h in embedded(encoder, items(), decoders, device, _BATCH, "float32", Clock()):
            rows = iter(h)
            for picture in seen:
                if picture.reason:
                    left.append(f"{picture.item.name} ({picture.reason})")
                else:
                    found.append((picture.item.name, next(rows), small[at]))
                at += 1
    if not found:
        raise UserError(f"none of the pictures can be read; the first: {left[0]}" if left else f"no pictures in {', '.join(words)}")
    if left:
        what = "file is no image that can be read and was" if len(left) == 1 else "files are no images that can be read and were"
        say(f"{len(left):,} {what} left out; the first: {left[0]}")
    return found
