"""`simclr bench embed`: images/s of `simclr embed`, in one process and with two, against one picture after the other."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import simclr
from pipelines.bench.prepare import photographs
from pipelines.bench.result import Row, compared, in_turn
from pipelines.parts import embedding
from pipelines.parts.plan import plan
from pipelines.parts.run import Where, run
from pipelines.terminal import show
from simclr.data.depth import Rule
from simclr.data.encode import decoded
from simclr.data.feature_parts import About
from simclr.data.options import Options
from simclr.data.sources.reading import Reading
from simclr.encoder.directory import write_encoder
from simclr.methods.simclr import build_model
from simclr.recipes import recipe

_BATCH = 64
BEFORE, HERE, WORKERS = "one after the other", "one process", "two workers"


def embed(name: str, data: Path | None, images: int, trials: int) -> list[Row]:
    """Print and return images/s of each side: pictures decoded one after the other and then embedded, as the command did before it worked
    by parts; the command's own process, which decodes ahead in a thread for each core; two workers of one core each.

    The encoder is that of the recipe `name`, untrained, on the CPU. Start-up does not count: the time runs from the end of the first part
    to that of the last.
    """
    with tempfile.TemporaryDirectory(prefix="simclr-bench-") as temporary:
        folder = Path(temporary)
        different = photographs(data, folder, images)
        config = recipe(name)
        encoder = build_model(config).encoder
        write_encoder(encoder.state_dict(), config, folder / "encoder", {})
        sides: dict[str, Callable[[], float]] = {
            BEFORE: lambda: _before(folder),
            HERE: lambda: _now(folder, encoder.d_h, Where()),
            WORKERS: lambda: _now(folder, encoder.d_h, Where(workers=2)),
        }
        rows = compared(in_turn(sides, trials, "images/s"), "images/s", BEFORE)
    of = f"{images:,} photographs ({different} different ones) through the encoder of {name}"
    for row in rows:
        show(f"{row['name']:<20} {row['median']:8,.1f} images/s  {row['ratio']:.2f} × ({row['low']:.2f} to {row['high']:.2f})  {of}")
    return rows


@torch.inference_mode()
def _before(folder: Path) -> float:
    encoder = simclr.load_encoder(folder / "encoder")
    paths = sorted((folder / "many").iterdir())
    began, counted = 0.0, 0
    for first in range(0, len(paths), _BATCH):
        some = paths[first : first + _BATCH]
        encoder(torch.cat([encoder.prepared(decoded(path, Rule())[None]) for path in some])).float().numpy()
        if began:
            counted += len(some)
        began = began or time.perf_counter()
    return counted / max(time.perf_counter() - began, 1e-9)


def _now(folder: Path, d: int, where: Where) -> float:
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    (out / embedding.PLAN).touch()
    planned = plan([str(folder / "many")], Reading(), Options())
    preprocessing = dataclasses.asdict(simclr.load_encoder(folder / "encoder").preprocessing)
    about = About(encoder="", preprocessing=preprocessing, source="", d=d)
    settings = {
        "sources": planned.sources,
        "reading": dataclasses.asdict(Reading()),
        "options": {},
        "ranges": planned.ranges,
        "out": str(out),
        "about": {name: getattr(about, name) for name in about.__slots__},
        "device": "cpu",
        "plan": "",
        "precision": "float32",
        "batch_size": _BATCH,
    }
    began, counted = 0.0, 0
    for _, told in run(embedding.make, settings, planned.parts, where, carry=folder / "encoder"):
        if began:
            counted += told["images"]
        began = began or time.perf_counter()
    return counted / max(time.perf_counter() - began, 1e-9)
