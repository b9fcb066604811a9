"""Checkpoints that somebody has damaged and given the right checksum."""

from __future__ import annotations

import functools
import hashlib
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.attack import mutate
from tests.attack.mutate import damaged, damaged_json

_STEP = "step-000000002"


@functools.cache
def _model() -> Any:
    from simclr.config import Encoder, Head, SimCLR, Views
    from simclr.methods.simclr import build_model

    return build_model(SimCLR(encoder=Encoder(depth=8, cifar_stem=True), head=Head(d_out=16), views=Views(size_px=16)))


@functools.cache
def _sound() -> Path:
    """A checkpoint after two steps of SGD with momentum."""
    import torch

    from simclr import checkpoint

    model = _model()
    optimizer = _optimizer(model)
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    state = checkpoint.capture(2, {"seed": 0}, model, optimizer)
    reports = [{"step": 1, "train/loss": 2.0}, {"step": 2, "train/loss": 1.5}]
    return checkpoint.write(mutate.folder(), checkpoint.State(2, state.config, state.tensors, reports), keep=1)


def _optimizer(model: Any) -> Any:
    import torch

    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01, momentum=0.9)


def cases(seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """(name, content of one of the checkpoint's files), the file's name in front of the case's."""
    draw, sound = random.Random(seed), _sound()
    text, tensors = (sound / "checkpoint.json").read_text(), (sound / "state.safetensors").read_bytes()
    size = int.from_bytes(tensors[:8], "little")
    header = tensors[8 : 8 + size].decode()
    for number in range(count):
        match number % 4:
            case 0:
                yield f"checkpoint.json:{number}", damaged_json(text, draw)
            case 1:
                yield f"state.safetensors:bytes {number}", damaged(tensors, draw)
            case 2:  # a header that still is one, over other tensors
                changed = damaged_json(header, draw)
                yield f"state.safetensors:header {number}", len(changed).to_bytes(8, "little") + changed + tensors[8 + size :]
            case _:
                whole = json.loads(header)
                stated = json.loads(whole["__metadata__"]["reports"])
                whole["__metadata__"]["reports"] = damaged_json(json.dumps(stated), draw).decode(errors="replace")
                changed = json.dumps(whole).encode()
                yield f"state.safetensors:reports {number}", len(changed).to_bytes(8, "little") + changed + tensors[8 + size :]


def place(folder: Path, name: str, content: bytes) -> Path:
    """A folder of checkpoints with this one, its checksum that of its tensors."""
    directory = folder / "checkpoints" / _STEP
    shutil.copytree(_sound(), directory)
    file = name.partition(":")[0]
    (directory / file).write_bytes(content)
    if file == "state.safetensors":
        text = json.loads((directory / "checkpoint.json").read_text())
        text["sha256"] = hashlib.sha256(content).hexdigest()
        (directory / "checkpoint.json").write_text(json.dumps(text))
    return directory.parent


def use(path: Path) -> None:
    """What resuming, publishing and --start do. A damaged checkpoint is said and passed over."""
    from simclr import checkpoint
    from simclr.config import SimCLR
    from simclr.encoder import weights

    newest = checkpoint.latest(path, lambda text: None)
    if newest is None:
        return
    checkpoint.score_of(newest)
    state, model = checkpoint.read(newest), _model()
    checkpoint.restore(state, model, _optimizer(model))
    [row["step"] for row in state.reports]
    weights.of_checkpoint(newest, SimCLR(), ())
