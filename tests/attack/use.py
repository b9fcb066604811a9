"""What commands do with a directory of shards: the reading side of verify, evaluate, report and pretrain, in this process."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from pathlib import Path

import numpy as np

from pipelines.html.data import data_table
from simclr import sense
from simclr.config import SimCLR, Train, Views
from simclr.data import loader, shards
from simclr.data.manifest import digest_of, read_manifest, read_names
from simclr.data.sources.open import open_source
from simclr.data.sources.patterns import render
from simclr.data.sources.reading import essence
from simclr.data.verify import verify
from simclr.views.preprocessing import Preprocessing
from tests.attack import mutate

KINDS = ("raw", "jpeg")


@functools.cache
def base(kind: str) -> Path:
    """Sound shards of the `kind`, 60 training images in two shards and 12 test images with three classes, made once a process."""
    from PIL import Image

    folder, size = mutate.folder(), 32 if kind == "raw" else 96
    images, _ = render(np.arange(72), 0, size, kind == "jpeg")
    for i, image in enumerate(images):
        of = folder / "images" / ("train" if i < 60 else "test") / f"class{i % 3}"
        of.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image if kind == "raw" else image[: 72 + i % 9]).save(of / f"{i:02}.{'png' if kind == 'raw' else 'jpg'}")
    shards.prepare(open_source(str(folder / "images")), folder / "shards", shards.Options(), 1, lambda done: None)
    return folder / "shards"


def with_digests(manifest: bytes, directory: Path) -> bytes:
    """`manifest` with the bytes and sha256 that the shards in `directory` have, as whoever altered them would write it."""
    text = json.loads(manifest)
    for shard in itertools.chain(*text["splits"].values()):
        content = (directory / shard["name"]).read_bytes()
        shard["bytes"], shard["sha256"] = len(content), hashlib.sha256(content).hexdigest()
    return json.dumps(text, indent=1).encode() + b"\n"


def use(directory: Path) -> None:
    """Read all that is in `directory`, as commands do. Raises UserError where something in it is refused."""
    manifest = read_manifest(directory, look=False)
    list(verify(directory))
    manifest = read_manifest(directory)
    digest_of((directory / "manifest.json").read_bytes())
    essence(manifest.understood), data_table(manifest.understood), manifest.to_json()
    config = SimCLR(train=Train(batch_size=4, steps=6), views=Views(size_px=16))
    sense.notes(config, manifest, manifest.examples("train"), (1,))
    for split in manifest.splits:
        read_names(directory, split, manifest.examples(split))
        loader.labels(directory, split)
        for _ in loader.in_order(directory, split, Preprocessing.of(config.views), 16):
            pass
    steps = min(config.steps_per_epoch(manifest.examples("train")) + 2, 64)
    stream = loader.batches(config, directory, 0, 0, 1)
    for _ in itertools.islice(stream, steps):
        pass
    stream.close()
