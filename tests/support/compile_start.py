"""Time of a fresh process to its first compiled step, without and with the code that an earlier process left in the run:

    python -m tests.support.compile_start [PAIRS]

ResNet-18, 8 views of 64 px, forward and backward on one thread. Each process has an empty disk of torch's, as on another node; C++'s
precompiled headers, which torch keeps elsewhere, exist before. CPU seconds are those of the process and its compilers: on a shared
machine they are steadier than wall-clock seconds. Prints each process, and the ratio of the pairs.

26 November 2026, two cores of a shared machine (load 3.5 at the start), torch 2.15.0, n = 3 pairs: with ÷ without 0.81 (0.74 … 0.92) in
seconds of the CPU, medians 34.8 s and 43.6 s, and 0.81 (0.49 … 0.93) by the clock; the file has 1.85 MiB. The rest is Dynamo and g++,
which Triton's kernels do not need; it was not measured on a GPU.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch._dynamo.utils import counters

from pipelines.train import compile_cache
from simclr.config import Encoder, SimCLR, Views
from simclr.cores import cores
from simclr.loss import nt_xent
from simclr.methods.simclr import build_model


def two_steps() -> Iterator[float]:
    """The losses of two steps."""
    config = SimCLR(encoder=Encoder(depth=18), views=Views(size_px=64))
    network = torch.compile(build_model(config).to(memory_format=torch.channels_last).train())
    views = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
    for _ in range(2):
        loss = nt_xent(network({"views": views.unflatten(0, (2, -1))})["z"].flatten(0, 1), 0.1)
        loss.backward()
        yield loss.item()


def first_step(path: Path) -> dict[str, float]:
    """The time of the first step in this process, which reads or writes `path`."""
    torch.set_num_threads(1)
    began, used = time.perf_counter(), sum(os.times()[:4])
    steps = compile_cache.kept(two_steps(), path, {"torch": torch.__version__}, "ab" * 32, True, print)
    loss = next(steps)
    took = {"seconds": time.perf_counter() - began, "cpu_s": sum(os.times()[:4]) - used}
    missed = counters["inductor"]["fxgraph_cache_miss"] + counters["aot_autograd"]["autograd_cache_miss"]
    return took | {"loss": loss, "missed": missed, "mib": path.stat().st_size / 2**20}


def fresh(disk: Path, path: Path) -> dict[str, float]:
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(disk), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    words = [sys.executable, "-m", "tests.support.compile_start", "--in", str(path)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    if sys.argv[1:2] == ["--in"]:
        print(json.dumps(first_step(Path(sys.argv[2]))))
        return
    ratios: dict[str, list[float]] = {"seconds": [], "cpu_s": []}
    print(f"torch {torch.__version__}, {cores()} cores, load {os.getloadavg()[0]:.1f}")
    for pair in range(int(sys.argv[1]) if len(sys.argv) > 1 else 3):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "compiled", "cpu.bin")
            without, given = (fresh(Path(folder, f"disk-{n}"), path) for n in range(2))
        assert without["missed"] == 3 and given["missed"] == 0 and given["loss"] == without["loss"]
        for name, found in (("without", without), ("with", given)):
            print(f"pair {pair}, {name:<8} {found['seconds']:7.1f} s, {found['cpu_s']:6.1f} s of the CPU, {found['mib']:.2f} MiB")
        for unit, values in ratios.items():
            values.append(given[unit] / without[unit])
    for unit, values in ratios.items():
        print(f"with ÷ without, {unit}: {statistics.median(values):.2f} ({min(values):.2f} … {max(values):.2f}, n = {len(values)})")


if __name__ == "__main__":
    main()
