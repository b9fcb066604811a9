"""What the benches share: sides in turn, their rows, the cost of a rate, and the result as a file."""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import statistics
import subprocess
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipelines.runs.environment import environment
from pipelines.terminal import say
from simclr import files

SCHEMA = 1
WARM_STEPS = 5  # the first steps allocate and compile
IMAGENET_IMAGES, IMAGENET_EPOCHS = 1_281_167, 100
_POWER_EVERY_MS = 200

Row = dict[str, Any]
"""One line of a result: its name, and numbers with their unit in the key."""


def in_turn(sides: Mapping[str, Callable[[], float]], trials: int, unit: str) -> dict[str, list[float]]:
    """`trials` values of each side. Every second round runs backwards (ABBA), so that other load of the machine falls on all sides."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for trial in range(trials):
        for name in list(sides)[:: 1 if trial % 2 == 0 else -1]:
            found[name].append(sides[name]())
        say(f"trial {trial + 1} of {trials}: " + ", ".join(f"{name} {values[-1]:,.1f}" for name, values in found.items()) + f" {unit}")
    return found


def compared(found: dict[str, list[float]], unit: str, base: str, *, inverted: bool = False) -> list[Row]:
    """A row per side: its median, and the median, lowest and highest over pairs of trials of value ÷ `base`'s value, or,
    `inverted`, of `base`'s ÷ value."""
    rows = []
    for name, values in found.items():
        pairs = sorted(b / v if inverted else v / b for v, b in zip(values, found[base], strict=True))
        low, high = pairs[0], pairs[-1]
        ratio = statistics.median(pairs)
        rows.append({"name": name, "unit": unit, "median": statistics.median(values), "ratio": ratio, "low": low, "high": high})
    return rows


# ── The cost of a rate ─────────────────────────────────────────────────────────────────────────────────────────────


def cost(images_per_s: float, watts: float | None) -> Row:
    """Seconds of an epoch of ImageNet-1k (1,281,167 images), hours of 100 epochs, and kWh of those at `watts`; None without watts."""
    epoch_s = IMAGENET_IMAGES / images_per_s
    hours = IMAGENET_EPOCHS * epoch_s / 3600
    kwh = None if watts is None else watts * hours / 1000
    return {"name": "cost", "images_per_s": images_per_s, "epoch_s": epoch_s, "hours": hours, "watts": watts, "kwh": kwh}


def print_cost(row: Row, size_px: int) -> None:
    energy = "—" if row["kwh"] is None else f"{row['kwh']:,.1f} kWh at {row['watts']:,.0f} W, the GPU alone"
    print(
        f"at {row['images_per_s']:,.1f} images/s, {size_px} px, one worker: {row['epoch_s']:,.0f} s for an epoch of "
        f"{IMAGENET_IMAGES:,} images, {row['hours']:,.1f} h for {IMAGENET_EPOCHS}, energy {energy}"
    )


@contextlib.contextmanager
def power() -> Iterator[list[float]]:
    """A list that gets, at the end of the block, the mean watts of the busiest GPU at work, as nvidia-smi reports them; it stays empty if
    nvidia-smi reports none."""
    watts: list[float] = []
    asked = None
    if tool := shutil.which("nvidia-smi"):
        query = [tool, "--query-gpu=index,power.draw", "--format=csv,noheader,nounits", f"--loop-ms={_POWER_EVERY_MS}"]
        asked = subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        yield watts
    finally:
        if asked is not None:
            asked.terminate()
            watts.extend(busiest(asked.communicate()[0]))


def busiest(samples: str) -> list[float]:
    """Lines "index, watts" → [the highest of the GPUs' means while at work], [] where no line has a number.

    At work means above half of a GPU's highest sample, so that a worker's start does not count. A GPU that reports no power says
    "[N/A]", and the last line may be cut off.
    """
    by_gpu: dict[str, list[float]] = {}
    for line in samples.splitlines():
        index, _, text = line.partition(", ")
        with contextlib.suppress(ValueError):
            watts = float(text)
            by_gpu.setdefault(index, []).append(watts)
    means = [statistics.fmean([v for v in values if v >= max(values) / 2]) for values in by_gpu.values()]
    return [max(means)] if means else []


# ── The result ─────────────────────────────────────────────────────────────────────────────────────────────────────


@functools.cache
def machine() -> dict[str, str]:
    """`pipelines.runs.environment.environment()`, with the GPUs that nvidia-smi lists."""
    found = environment()
    if tool := shutil.which("nvidia-smi"):
        query = [tool, "--query-gpu=name", "--format=csv,noheader"]
        if names := subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")[:-1]:
            found["gpus"] = f"{len(names)} × {names[0]}"
    return found


def write_json(path: Path, what: str, setting: dict[str, Any], trials: int, rows: list[Row], complete: bool = True) -> None:
    """The result as a file: what, machine, versions, date (UTC), setting (the command's options), n, rows. It is
    written after each row; `complete` is false until the last one."""
    text = {"schema": SCHEMA, "what": what, **machine(), "date": datetime.now(UTC).isoformat(timespec="seconds")}
    text |= {"setting": setting, "n": trials, "complete": complete, "rows": rows}
    files.write_text(path, json.dumps(text, indent=1, ensure_ascii=False) + "\n")
