"""Published encoders whose config.json, or a file of weights, somebody has damaged or made up."""

from __future__ import annotations

import functools
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tests.attack import mutate
from tests.attack.mutate import damaged, damaged_json

_NAMED = (
    {"encoder": {"width": 100}},
    {"encoder": {"width": 10**9}},
    {"encoder": {"depth": 200, "width": 16, "sk_ratio": 1.0}},
    {"head": {"layers": 10**9}},
    {"head": {"d_out": 2**40}},
    {"views": {"size_px": 10**7}, "preprocessing": None},
    {"preprocessing": {"size_px": 10**7}},
    {"preprocessing": {"size_px": -5}},
    {"preprocessing": {"centre_crop": 1e-9}},
    {"preprocessing": {"std": [0, 0, 0]}},
    {"classifier": {"tap": 10**9}},
    {"classifier": {"tap": -1}},
    {"classifier": {"classes": []}},
)


@functools.cache
def _sound() -> Path:
    """A published encoder with head and classifier."""
    from simclr.config import Encoder, Head, SimCLR, Views
    from simclr.encoder.directory import write_encoder
    from simclr.methods.simclr import build_model
    from simclr.networks.heads import Classifier

    config = SimCLR(encoder=Encoder(depth=8, cifar_stem=True), head=Head(layers=2, d_out=16), views=Views(size_px=16))
    model = build_model(config)
    parts = {"head": dict(model.head.state_dict()), "classifier": dict(Classifier(model.encoder, model.head, 1, 3).classifier.state_dict())}
    directory = mutate.folder() / "encoder"
    write_encoder(dict(model.encoder.state_dict()), config, directory, {"recipe": "none"}, **parts, tap=1, classes=["a", "b", "c"])
    return directory


def cases(seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """(name, content of one of the directory's files), the file's name in front of the case's."""
    draw, sound = random.Random(seed), _sound()
    text = (sound / "config.json").read_text()
    for number in range(count):
        if number < len(_NAMED):
            stated = json.loads(text)
            for key, values in _NAMED[number].items():
                stated[key] = {**stated[key], **values} if values is not None else None
                if values is None:
                    del stated[key]
            yield f"config.json:{json.dumps(_NAMED[number])}", json.dumps(stated).encode()
        elif number % 4:
            yield f"config.json:{number}", damaged_json(text, draw)
        else:
            name = draw.choice(("encoder.safetensors", "head.safetensors", "classifier.safetensors"))
            yield f"{name}:{number}", damaged((sound / name).read_bytes(), draw)


def place(folder: Path, name: str, content: bytes) -> Path:
    """The directory with one file replaced."""
    directory = folder / "encoder"
    shutil.copytree(_sound(), directory)
    (directory / name.partition(":")[0]).write_bytes(content)
    return directory


def use(path: Path) -> None:
    """What embed, finetune, distill, export, publish and --start read. All of them: a first refusal would hide the others."""
    from pipelines.tracking.card import write_card
    from pipelines.tracking.record import Record
    from simclr.encoder.directory import read_classifier, read_head
    from simclr.errors import UserError

    troubles = []
    for read in (
        _embed,
        read_head,
        read_classifier,
        _start,
        lambda path: write_card(path, "name", Record(scores={"knn_top1": 0.5}), "other"),
    ):
        try:
            read(path)
        except UserError as error:
            troubles.append(error)
    if troubles:
        raise troubles[0]


def _embed(path: Path) -> None:
    import simclr

    encoder = simclr.load_encoder(path)
    for sides in ((16, 16), (37, 52)):
        encoder.embed(np.zeros((1, *sides, 3), np.uint8))


def _start(path: Path) -> None:
    from simclr.encoder import weights

    found = weights.of_directory(path)
    weights.require_fit(found.shape, found, path)
    assert found.sha256
