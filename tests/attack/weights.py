"""Files of weights for --start, in torch's formats and in safetensors, damaged or made up."""

from __future__ import annotations

import functools
import io
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.attack.mutate import damaged, damaged_json


@functools.cache
def _sound() -> dict[str, bytes]:
    """File name → content: a network as torch saves it now, as it did before, and as safetensors."""
    import torch
    from safetensors.torch import save

    from simclr.networks.resnet import resnet

    tensors = {name: t.contiguous() for name, t in resnet(8, 1, cifar_stem=True).state_dict().items()}
    found = {"weights.safetensors": save(tensors)}
    for name, new in (("weights.pth", True), ("legacy.pth", False)):
        file = io.BytesIO()
        torch.save({"state_dict": tensors, "epoch": 3}, file, _use_new_zipfile_serialization=new)
        found[name] = file.getvalue()
    return found


def _made_up() -> Iterator[tuple[str, Any]]:
    """Values that torch reads and no network has."""
    import torch

    warnings.filterwarnings("ignore", message="Sparse invariant checks")
    nested: Any = {}
    for _ in range(300):
        nested = {"a": nested}
    yield "nested", nested
    yield "expanded", {"conv1.weight": torch.zeros(1).expand(1 << 18, 1 << 18), "bn1.weight": torch.zeros(1)}
    yield "expanded ours", {"stem.0.weight": torch.zeros(1).expand(1 << 18, 1 << 10, 3, 3), "stem.1.weight": torch.zeros(1)}
    yield "strided", {"stem.0.weight": torch.zeros(4).as_strided((1 << 20, 1 << 12), (0, 0))}
    yield "sparse", {"stem.0.weight": torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.int64), torch.ones(1), (1 << 30, 1 << 30))}
    yield "meta", {"stem.0.weight": torch.empty(1 << 30, 1 << 20, device="meta")}
    yield "wide", {"stem.0.weight": torch.zeros(16 * 10**5, 3, 3, 3)}
    yield "no tensor", {"stem.0.weight": "text", "stem": None}
    yield "list", [torch.zeros(2)]
    yield "numbers", {1: {2: torch.zeros(2)}, "stem.0.weight": torch.zeros(16, 3, 3, 3)}


def cases(seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """(name, content of a file), the file's name in front of the case's."""
    import torch

    draw, sound = random.Random(seed), _sound()
    for name, value in _made_up():
        file = io.BytesIO()
        torch.save(value, file)
        yield f"made.pth:{name}", file.getvalue()
    data = sound["weights.safetensors"]
    size = int.from_bytes(data[:8], "little")
    for number in range(count - 10):
        if number % 4 == 3:
            changed = damaged_json(data[8 : 8 + size].decode(), draw)
            yield f"weights.safetensors:header {number}", len(changed).to_bytes(8, "little") + changed + data[8 + size :]
        else:
            name = list(sound)[number % 4]
            yield f"{name}:{number}", damaged(sound[name], draw)


def place(folder: Path, name: str, content: bytes) -> Path:
    """The file."""
    path = folder / name.partition(":")[0]
    path.write_bytes(content)
    return path


def use(path: Path) -> None:
    """What --start does before it trains."""
    from simclr.config import Encoder
    from simclr.encoder import weights

    found = weights.of_file(path)
    weights.require_fit(Encoder(depth=8, cifar_stem=True), found, path)
    assert found.sha256
