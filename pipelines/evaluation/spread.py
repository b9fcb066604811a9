"""Features of the quick table's encoders by parts: consecutive images of a split, embedded by whoever takes them."""

from __future__ import annotations

import contextlib
import secrets
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.parts.run import CARRIED, THREADS, Plain, Where, Work, run
from pipelines.runs import sync
from simclr.config import Config
from simclr.data.manifest import Manifest, read_manifest
from simclr.data.s3.place import Place
from simclr.errors import UserError

if TYPE_CHECKING:
    import torch

    from simclr.encoder.directory import PublishedEncoder
    from simclr.evaluation.features import Features

BATCH = 256
_IMAGES, _MOST = 2048, 512  # of a part; parts of a split


def encoders_of(
    published: PublishedEncoder, config: Config, manifest: Manifest, baselines: bool, device: torch.device
) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Name → encoder of each row of the table, on `device`, weakest first."""
    from simclr.evaluation.features import pixels
    from simclr.networks.encoders import encoder_of

    found: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
    if baselines:
        if manifest.classes:
            found["raw pixels"] = _small if manifest.kind == "jpeg" else pixels
        found["untrained encoder"] = encoder_of(config).eval().to(device)
    return found | {"trained encoder": published.encoder.to(device)}


def _small(x: torch.Tensor) -> torch.Tensor:
    """Photographs as rows of 32 × 32 pixels: rows of 150,528 numbers would need a larger machine than training."""
    import torch.nn.functional as F

    return F.interpolate(x, (32, 32), mode="area").flatten(1)


def features(
    directory: Path,
    home: str,
    data: str,
    manifest: Manifest,
    counts: Mapping[str, int],
    asked: Plain,
    where: Where,
    progress: Callable[[int], None],
) -> dict[str, list[Features]]:
    """Split → features under each encoder, of `counts` images of each split, in sample order, on the host.

    The published encoder lies in `directory`, which every process gets; parts leave their features below `home`, the run's own address or
    folder, for as long as this takes. `data` is the address of the shards of `manifest`, which each node fetches for itself. `asked`:
    limit, baselines, device.
    Raises UserError where this machine does not see what the others write.
    """
    parts = [
        {"split": split, "part": part, "of": of}
        for split, count in counts.items()
        for of in [min(max(count // _IMAGES, 1), _MOST)]
        for part in range(of)
    ]
    with _below(home) as place:
        settings = {**asked, "data": data, "shards": manifest.shards_sha256, "out": str(place.at or place.path)}
        for _, told in run(make, settings, parts, where, asked["device"], carry=directory):
            progress(told["images"])
        there = place.names()
        if missing := [part for part in parts if _name(part) not in there]:
            raise UserError(
                f"{len(missing):,} parts were written where this machine does not see them ({_name(missing[0])} is not in {place}); "
                "evaluate a run at s3://bucket/prefix, or on a disk that all nodes see"
            )
        return {split: _joined(place, [part for part in parts if part["split"] == split], count) for split, count in counts.items()}


@contextlib.contextmanager
def _below(home: str) -> Iterator[Place]:
    """A place of this evaluation's own, which goes at its end."""
    name = f".evaluating-{secrets.token_hex(4)}"
    place = Place(f"{home}/{name}") if Place(home).at is not None else Place(Path(home).absolute() / name)
    try:
        yield place
    finally:
        for file in place.names():
            place.remove(file)
        if place.at is None and place.path.is_dir():
            place.path.rmdir()


def _name(part: Plain) -> str:
    return f"{part['split']}-{part['part']:05d}.safetensors"


def _joined(place: Place, parts: list[Plain], count: int) -> list[Features]:
    import torch
    from safetensors.torch import load_file

    from simclr.evaluation.features import Features
    from simclr.evaluation.rows import matrix

    kept: list[torch.Tensor] = []
    y, ids = torch.empty(count, dtype=torch.int64), torch.empty(count, dtype=torch.int64)
    done = 0
    with tempfile.TemporaryDirectory(prefix="simclr-features-") as scratch:
        for part in parts:
            file = place.get(_name(part), Path(scratch))
            found = load_file(file)
            h = [found[f"h{number}"] for number in range(len(found) - 2)]
            kept = kept or [matrix(count, one.shape[1]) for one in h]
            at = slice(done, done + len(found["y"]))
            y[at], ids[at] = found["y"], found["ids"]
            for whole, rows in zip(kept, h, strict=True):
                whole[at] = rows
            done = at.stop
            place.remove(_name(part))
            if place.at is not None:
                file.unlink()
    assert done == count, f"{done} images of {count}"
    return [Features(h, y, ids) for h in kept]


# ── In another process ─────────────────────────────────────────────────────────────────────────────────────────────


def make(settings: Plain) -> Work:
    """A function that embeds a part. settings: data, out, limit, baselines, device."""
    from safetensors.torch import save_file

    import simclr
    from pipelines.evaluation.inputs import device_of
    from simclr.data.loader import in_order
    from simclr.encoder.directory import config_of, read_text
    from simclr.evaluation.features import embed_each

    data = sync.shards(settings["data"])
    manifest, device = read_manifest(data), device_of(settings["device"])
    if manifest.shards_sha256 != settings["shards"]:
        raise UserError(
            f"{sync.shown(settings['data'])} on {socket.gethostname()} are other shards than the driver's; use s3:// or one disk"
        )
    directory = Path(settings[CARRIED])
    published = simclr.load_encoder(directory)
    encoders = encoders_of(published, config_of(read_text(directory)), manifest, settings["baselines"], device)
    place, seen, limit = Place(settings["out"]), published.preprocessing, settings["limit"]

    def work(part: Plain) -> Plain:
        split, number, of = part["split"], part["part"], part["of"]
        total = min(limit or manifest.examples(split), manifest.examples(split))
        count = total * (number + 1) // of - total * number // of
        batches = in_order(data, split, seen, BATCH, limit, settings[THREADS], number, of)
        each = embed_each(list(encoders.values()), batches, count, seen, device)
        tensors: dict[str, Any] = {f"h{i}": found.h for i, found in enumerate(each)}
        with tempfile.TemporaryDirectory(prefix="simclr-features-") as scratch:
            file = Path(scratch) / _name(part)
            save_file(tensors | {"y": each[0].y, "ids": each[0].ids}, file)
            place.put(_name(part), file)
        return {"images": count}

    return work
