"""`simclr bench embed`: images/s of `simclr embed` against one picture after the other: with threads that decode, with processes that do,
on CPUs also with two workers; and how long the device waits for pictures."""

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
from pipelines.parts.plan import Plan, plan
from pipelines.parts.run import Where, run
from pipelines.terminal import show
from simclr.data.depth import Rule
from simclr.data.encode import decoded
from simclr.data.feature_parts import About
from simclr.data.options import Options
from simclr.data.sources.open import open_source
from simclr.data.sources.portions import portions
from simclr.data.sources.reading import Reading
from simclr.encoder.directory import write_encoder
from simclr.errors import UserError
from simclr.networks.encoders import encoder_of
from simclr.precision import autocast, set_backends
from simclr.recipes import recipe

_BATCH = 64
_PART = 512  # of 131,072 pictures; of fewer a job has smaller parts, and the device waits at the end of each
BEFORE, THREADS, PROCESSES, WORKERS = "one after the other", "threads", "processes", "two workers"


def embed(name: str, data: Path | None, images: int, trials: int, threads: int, device: torch.device, precision: str) -> list[Row]:
    """Print and return images/s of each side: pictures decoded one after the other and then embedded, as the command did before it worked
    by parts; the command's own process, which decodes ahead in `threads` threads, or in `threads` - 1 processes; on a CPU two workers of
    one core each.

    The encoder is that of the recipe `name`, untrained. Start-up does not count: the time runs from the end of the first part, a third of
    the pictures or _PART, to that of the last. A row's `waited` is the share of that time in which the device waited for pictures, in
    [0, 1], of each trial; the other sides have none. Raises UserError for fewer than three pictures.
    """
    if images < 3:
        raise UserError(f"--images is {images}; expected at least 3, since the first part of them warms up and does not count")
    with tempfile.TemporaryDirectory(prefix="simclr-bench-") as temporary:
        folder = Path(temporary)
        different = photographs(data, folder, images)
        config = recipe(name)
        encoder = encoder_of(config)
        write_encoder(encoder.state_dict(), config, folder / "encoder", {})
        waited: dict[str, list[float]] = {THREADS: [], PROCESSES: []}
        here = Where(cpus_per_worker=threads)
        part = min(_PART, images // 3)
        how = (folder, part, encoder.d_h, device, precision)
        sides: dict[str, Callable[[], float]] = {
            BEFORE: lambda: _before(folder, part, device, precision),
            THREADS: lambda: _now(*how, here, THREADS, waited[THREADS]),
            PROCESSES: lambda: _now(*how, here, PROCESSES, waited[PROCESSES]),
        }
        if device.type == "cpu":
            sides[WORKERS] = lambda: _now(*how, Where(workers=2), THREADS, [])
        rows = compared(in_turn(sides, trials, "images/s"), "images/s", BEFORE)
    of = f"{images:,} photographs ({different} different ones) through the encoder of {name} on the {device.type}, {threads} threads"
    for row in rows:
        if row["name"] in waited:
            row["waited"] = waited[row["name"]]
        share = f"  {100 * statistics.median(row['waited']):.0f} % waiting" if "waited" in row else ""
        show(f"{row['name']:<20} {row['median']:8,.1f} images/s  {row['ratio']:.2f} × ({row['low']:.2f} to {row['high']:.2f}){share}  {of}")
    return rows


@torch.inference_mode()
def _before(folder: Path, part: int, device: torch.device, precision: str) -> float:
    set_backends(precision, device)
    encoder = simclr.load_encoder(folder / "encoder").to(device).to(memory_format=torch.channels_last)
    paths = sorted((folder / "many").iterdir())
    began = 0.0
    for some in (paths[:part], paths[part:]):  # the first ones warm up
        began = time.perf_counter()
        for first in range(0, len(some), _BATCH):
            x = torch.cat([encoder.prepared(decoded(path, Rule()).pixels[None]) for path in some[first : first + _BATCH]])
            with autocast(precision, device):
                encoder(x.to(device).to(memory_format=torch.channels_last)).float().cpu().numpy()
    return (len(paths) - part) / max(time.perf_counter() - began, 1e-9)


def _planned(folder: Path, part: int) -> Plan:
    planned = plan([str(folder / "many")], Reading(), Options())
    divided = portions(open_source(str(folder / "many"), Reading()), part)
    parts = [{"number": p.number, "first": p.first, "source": 0, "portion": p.to_dict()} for p in divided]
    return dataclasses.replace(planned, parts=parts)


def _now(folder: Path, part: int, d: int, device: torch.device, precision: str, where: Where, decoders: str, waited: list[float]) -> float:
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    (out / embedding.PLAN).touch()
    planned = _planned(folder, part)
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
        embedding.DECODERS: decoders,
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
