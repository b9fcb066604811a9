"""`simclr bench step`: the training step on resident data, against the same network's step in plain torch."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.allocator import keep_freed_memory
from pipelines.bench_result import WARM_STEPS, Row, compared, cost, in_turn, power, print_cost
from simclr.batchnorm import BatchNorm
from simclr.collectives import data_parallel, world_size
from simclr.config import Config
from simclr.loss import nt_xent
from simclr.microbatch import cached_gradient
from simclr.model import SimCLR, build_model
from simclr.optim import build_optimizer, lr_peak, warmup_cosine

Step = Callable[[], Tensor]
"""Takes one optimizer step and returns its loss, on the device: nobody waits for it."""

OURS, PLAIN = "simclr", "plain torch"
_WARMUP, _TOTAL = 10_000, 100_000  # of the schedule: a batch that comes again and again is not learnt by heart at such rates
_PROFILED = 5  # steps
_SYNCHRONISE = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cuStreamSynchronize", "cuCtxSynchronize")
_SPAN = "steps between two reports"


def step(config: Config, steps: int, trials: int, threads: int, device: torch.device, profile: Path | None) -> list[Row]:
    """Print and return images/s of our step, plain torch's and, with `train.micro_batch`, gradient caching's; then the cost."""
    if config.loss.name != "nt_xent":
        raise ValueError(f"the recipe's loss is {config.loss.name}; `simclr bench step` compares NT-Xent")
    n = config.images_per_rank(1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    keep_freed_memory()
    whole = replace(config, train=replace(config.train, micro_batch=None))
    views = resident_views(whole, device)
    made: dict[str, Step] = {OURS: our_step(whole, views), PLAIN: plain_step(whole, views)}
    if config.train.micro_batch not in (None, n):
        made[cached := f"simclr, {config.train.micro_batch} at a time"] = our_step(config, views)
    sides = {name: partial(rate, one, steps, n, device) for name, one in made.items()}
    with power() as watts:
        found = in_turn(sides, trials, "images/s")
    rows = compared(found, "images/s", OURS, inverted=True)
    train = config.train
    print(
        f"step on resident views of {config.views.size_px} px, ResNet-{config.encoder.depth}, N = {n}, {train.precision}, "
        f"{'compiled' if train.compile else 'not compiled'}, {device.type}, {threads} threads, {steps - WARM_STEPS} steps, n = {trials}"
    )
    print(f"ours ends with {config.optim.name.upper()}, plain torch with fused SGD")
    for row in rows:
        than = "" if row["name"] == OURS else f"   simclr is {row['ratio']:.3f} × (pairs {row['low']:.3f} … {row['high']:.3f})"
        if len(made) > 2 and row["name"] == cached:
            than = f"   an image costs {row['ratio']:.3f} × the whole batch's (pairs {row['low']:.3f} … {row['high']:.3f})"
        print(f"{row['name']:<24} {row['median']:10,.1f} images/s{than}")
    if train.compile:
        for name, network in ((OURS, build_model(whole)), (PLAIN, in_plain_torch(whole))):
            breaks = graph_breaks(network.to(device), views, whole)
            print(f"graph breaks of {name}: {breaks}")
            rows.append({"name": f"graph breaks, {name}", "graph_breaks": breaks})
    if profile is not None:
        waits = write_profile(made[OURS], profile, device)
        print(f"profile of {_PROFILED} steps in {profile}; the host waits for the device between two reports: {_times(waits)}")
        rows.append({"name": "host synchronisations", "steps": _PROFILED, "count": waits})
    torch.set_num_threads(before)
    rows.append(cost(rows[0]["median"], watts[0] if watts else None))
    print_cost(rows[-1], config.views.size_px)
    return rows


def resident_views(config: Config, device: torch.device) -> Tensor:
    """(2n, 3, size, size) noise on the device, channels last, as the loop's views are: what they show changes no time."""
    size, n = config.views.size_px, config.images_per_rank(world_size())
    views = torch.randn(2 * n, 3, size, size, generator=torch.Generator().manual_seed(0))
    return views.to(device, _dtype(config)).to(memory_format=torch.channels_last)


def our_step(config: Config, views: Tensor) -> Step:
    """A step of `simclr.pretrain` without labels, by the functions that it calls, in the process group if there is one."""
    n = config.images_per_rank(world_size())
    model = build_model(config).to(views.device, _dtype(config)).to(memory_format=torch.channels_last).train()
    optimizer = build_optimizer(model, config.optim)
    network = data_parallel(model, config.train.bucket_mib, config.train.compress_gradients, config.train.compile)
    peak, taken = lr_peak(config.optim.base_lr, config.train.batch_size, config.optim.scaling), 0

    def contrast(z: Tensor) -> Tensor:
        return nt_xent(z, config.loss.temperature)

    def embed(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        some = views if rows == slice(0, n) else torch.cat([views[rows], views[n + rows.start : n + rows.stop]])
        with autocast(config, views.device):
            found: tuple[Tensor, Tensor, Tensor] = network(some)
        return found

    def no_classifier(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        return logits.new_zeros(()), logits.new_zeros(2)

    def one() -> Tensor:
        nonlocal taken
        optimizer.zero_grad(set_to_none=True)
        if config.train.micro_batch in (None, n):
            loss = contrast(embed(slice(0, n))[1])
            loss.backward()
        else:
            _, loss, _, _ = cached_gradient(network, embed, n, config.train.micro_batch, contrast, no_classifier)
        for group in optimizer.param_groups:
            group["lr"] = warmup_cosine(taken, peak, _WARMUP, _TOTAL)
        optimizer.step()
        taken += 1
        return loss.detach()

    return one


def plain_step(config: Config, views: Tensor) -> Step:
    """The same network and weights as anybody would write the step: `nn.BatchNorm2d`, NT-Xent written out, fused SGD."""
    network: nn.Module = in_plain_torch(config).to(views.device, _dtype(config)).to(memory_format=torch.channels_last).train()
    optim, temperature, rows = config.optim, config.loss.temperature, len(views)
    trained = [p for p in network.parameters() if p.requires_grad]
    peak = lr_peak(optim.base_lr, config.train.batch_size, optim.scaling)
    optimizer = torch.optim.SGD(trained, lr=peak / _WARMUP, momentum=optim.momentum, weight_decay=optim.weight_decay, fused=True)
    partner = torch.arange(rows, device=views.device).roll(rows // 2)
    if config.train.compile:
        network.compile()

    def one() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with autocast(config, views.device):
            _, z, _ = network(views)
        z = z.float() if z.dtype == torch.bfloat16 else z
        z = F.normalize(z, dim=1)
        logits = z @ z.T / temperature
        logits = logits.masked_fill(torch.eye(rows, dtype=torch.bool, device=z.device), float("-inf"))
        loss = F.cross_entropy(logits, partner)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return one


def in_plain_torch(config: Config) -> SimCLR:
    """The network and weights of `config` with torch's own BatchNorm."""
    model = build_model(config)
    _with_torch_norms(model.encoder, nn.BatchNorm2d)
    _with_torch_norms(model.head, nn.BatchNorm1d)
    return model


def _with_torch_norms(module: nn.Module, kind: type[nn.BatchNorm1d | nn.BatchNorm2d]) -> None:
    """Put torch's BatchNorm in the place of ours, with the same weights."""
    for name, child in list(module.named_children()):
        if not isinstance(child, BatchNorm):
            _with_torch_norms(child, kind)
            continue
        norm = kind(child.weight.numel(), child.eps, child.momentum)
        norm.load_state_dict(child.state_dict(), strict=False)
        if child.bias is None:  # torch's cannot be without: it stays 0
            norm.bias.requires_grad_(False)
        module.add_module(name, norm)


def _dtype(config: Config) -> torch.dtype:
    return torch.float64 if config.train.precision == "float64" else torch.float32


def autocast(config: Config, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bfloat16")


# ── Looking at steps ───────────────────────────────────────────────────────────────────────────────────────────────


def rate(one: Step, steps: int, images: int, device: torch.device) -> float:
    """Images per second of the steps behind the first 5. As in the loop, the host waits at the end only."""
    for _ in range(WARM_STEPS):
        one()
    _wait(device)
    began = time.perf_counter()
    for _ in range(steps - WARM_STEPS):
        one()
    _wait(device)
    return (steps - WARM_STEPS) * images / (time.perf_counter() - began)


def window_s(one: Step, steps: int, device: torch.device) -> float:
    """Median seconds of a step over windows of 5 steps, the first left out: as the loop reports and `bench loop` counts."""
    found = []
    for _ in range(steps // WARM_STEPS):
        began = time.perf_counter()
        for _ in range(WARM_STEPS):
            one()
        _wait(device)
        found.append((time.perf_counter() - began) / WARM_STEPS)
    return statistics.median(found[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def graph_breaks(network: nn.Module, views: Tensor, config: Config) -> int:
    """Where torch.compile falls back to Python in a forward pass: 0 = the network is one graph."""
    import torch._dynamo

    network = network.to(views.dtype).to(memory_format=torch.channels_last).train()
    with autocast(config, views.device):
        return int(torch._dynamo.explain(network)(views).graph_break_count)


def write_profile(one: Step, path: Path, device: torch.device) -> int | None:
    """Write the operators that take longest, over a few steps, to `path`; return `host_waits`, None without a GPU."""
    from torch.profiler import ProfilerActivity, profile, record_function

    gpu = device.type == "cuda"
    one()
    _wait(device)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as seen:
        with record_function(_SPAN):
            for _ in range(_PROFILED):
                one()
        _wait(device)
    table = seen.key_averages().table(sort_by=f"self_{'cuda' if gpu else 'cpu'}_time_total", row_limit=25, max_name_column_width=70)
    path.write_text(table + "\n")
    if not gpu:
        return None
    return host_waits([(e.name, e.time_range.start, e.time_range.end) for e in seen.events() or ()])


def host_waits(events: list[tuple[str, float, float]]) -> int:
    """How often the host waited for the device inside the span of steps, of (name, start, end). The profiler itself, and
    whoever times the steps, waits once more at their end: outside."""
    spans = [(start, end) for name, start, end in events if name == _SPAN]
    return sum(name in _SYNCHRONISE and any(a <= start and end <= b for a, b in spans) for name, start, end in events)


def _times(count: int | None) -> str:
    return "—" if count is None else f"{count} times"
