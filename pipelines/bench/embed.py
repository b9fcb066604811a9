"""`simclr bench embed`: images/s of `simclr embed` against one picture after the other; on CPUs also with two processes, on a GPU also how
long it waits for pictures."""

from __future__ import annotations

import dataclasses
import shutil
import statistics
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
from simclr.precision import autocast, set_backends
from simclr.recipes import recipe

_BATCH = 64
BEFORE, HERE, WORKERS = "one after the other", "one process", "two workers"


def embed(name: str, data: Path | None, images: int, trials: int, threads: int, device: torch.device, precision: str) -> list[Row]:
    """Print and return images/s of each side: pictures decoded one after the other and then embedded, as the command did before it worked
    by parts; the command's own process, which decodes ahead in `threads` threads; on a CPU two workers of one core each.

    The encoder is that of the recipe `name`, untrained. Start-up does not count: the time runs from the end of the first part to that of
    the last. A row's `waited` is the share of that time in which the device waited for pictures, in [0, 1], of each trial; the other sides
    have none.
    """
    with tempfile.TemporaryDirectory(prefix="simclr-bench-") as temporary:
        folder = Path(temporary)
        different = photographs(data, folder, images)
        config = recipe(name)
        encoder = build_model(config).encoder
        write_encoder(encoder.state_dict(), config, folder / "encoder", {})
        waited: list[float] = []
        here = Where(cpus_per_worker=threads)
        sides: dict[str, Callable[[], float]] = {
            BEFORE: lambda: _before(folder, device, precision),
            HERE: lambda: _now(folder, encoder.d_h, here, device, precision, waited),
        }
        if device.type == "cpu":
            sides[WORKERS] = lambda: _now(folder, encoder.d_h, Where(workers=2), device, precision, [])
        rows = compared(in_turn(sides, trials, "images/s"), "images/s", BEFORE)
    of = f"{images:,} photographs ({different} different ones) through the encoder of {name} on the {device.type}, {threads} threads"
    for row in rows:
        if row["name"] == HERE:
            row["waited"] = waited
        share = f"  {100 * statistics.median(row['waited']):.0f} % waiting" if "waited" in row else ""
        show(f"{row['name']:<20} {row['median']:8,.1f} images/s  {row['ratio']:.2f} × ({row['low']:.2f} to {row['high']:.2f}){share}  {of}")
    return rows


@torch.inference_mode()
def _before(folder: Path, device: torch.device, precision: str) -> float:
    set_backends(precision, device)
    encoder = simclr.load_encoder(folder / "encoder").to(device).to(memory_format=torch.channels_last)
    paths = sorted((folder / "many").iterdir())
    began, counted = 0.0, 0
    for first in range(0, len(paths), _BATCH):
        some = paths[first : first + _BATCH]
        x = torch.cat([encoder.prepared(decoded(path, Rule()).pixels[None]) for path in some])
        with autocast(precision, device):
            encoder(x.to(device).to(memory_format=torch.channels_last)).float().cpu().numpy()
        if began:
            counted += len(some)
        began = began or time.perf_counter()
    return counted / max(time.perf_counter() - began, 1e-9)


def _now(folder: Path, d: int, where: Where, device: torch.device, precision: str, waited: list[float]) -> float:
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
        "device": device.type,
        "plan": "",
        "precision": precision,
        "batch_size": _BATCH,
    }
    began, counted, idle_s = 0.0, 0, 0.0
    for _, told in run(embedding.make, settings, planned.parts, where, carry=folder / "encoder"):
        if began:
            counted += told["images"]
            idle_s += told["waited_s"]
        began = began or time.perf_counter()
    seconds = max(time.perf_counter() - began, 1e-9)
    waited.append(idle_s / seconds)
    return counted / seconds
