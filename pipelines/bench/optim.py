"""`simclr bench optim`: LARS over ResNet-50's parameters, against torch's SGD and AdamW."""

from __future__ import annotations

import statistics
import time
from functools import partial

import torch

from pipelines.allocator import keep_freed_memory
from pipelines.bench.result import WARM_STEPS, Row, compared, in_turn
from simclr.config import Optim
from simclr.networks.resnet import resnet
from simclr.optim import LARS, parameter_groups


def optim(steps: int, trials: int, threads: int, device: torch.device) -> list[Row]:
    """Print and return LARS's time over SGD's and AdamW's, each with momentum and weight decay: the median over pairs of trials."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    optimizers: dict[str, torch.optim.Optimizer] = {}
    for name in ("SGD, foreach", "SGD, fused", "AdamW, fused", "LARS"):
        network = resnet(50).to(device)
        for p in network.parameters():
            p.grad = torch.randn_like(p)
        groups = [
            {"params": list(g.params), **g.settings} for g in parameter_groups(network, Optim(weight_decay=1e-4), lambda step: 1e-3, 1)
        ]
        if name == "LARS":
            optimizers[name] = LARS(groups, lr=1e-3)
        elif name == "AdamW, fused":
            optimizers[name] = torch.optim.AdamW([g | {"adapt": None} for g in groups], lr=1e-3, fused=True)
        else:
            way = {"foreach": True} if "foreach" in name else {"fused": True}
            optimizers[name] = torch.optim.SGD([g | {"adapt": None} for g in groups], lr=1e-3, momentum=0.9, **way)
    sides = {name: partial(_step_ms, one, steps) for name, one in optimizers.items()}
    rows = compared(in_turn(sides, trials, "ms"), "ms", "LARS", inverted=True)
    print(
        f"step over the {sum(p.numel() for p in network.parameters()) / 1e6:.1f} M parameters of ResNet-50 on {device.type}, "
        f"{threads} threads, median of {steps - WARM_STEPS} steps, n = {trials}"
    )
    for row in rows:
        than = "" if row["name"] == "LARS" else f"   LARS takes {row['ratio']:.2f} × (pairs {row['low']:.2f} … {row['high']:.2f})"
        print(f"{row['name']:<13} {row['median']:8.2f} ms{than}")
    return rows


def _step_ms(optimizer: torch.optim.Optimizer, steps: int) -> float:
    """Median milliseconds of a step; on a GPU the queue is emptied before and after each."""

    def wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    found = []
    for _ in range(steps):
        wait()
        began = time.perf_counter()
        optimizer.step()
        wait()
        found.append(time.perf_counter() - began)
    return 1e3 * statistics.median(found[WARM_STEPS:])
