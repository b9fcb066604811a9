"""`simclr bench scale`: the step on one and on two ranks, its share of communication, and what `scale_model` expects of more ranks."""

from __future__ import annotations

import math
import multiprocessing
import multiprocessing.queues
import os
import queue
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from pipelines.bench.result import WARM_STEPS, Row, in_turn
from pipelines.bench.scale_model import LEFT_OUT, WAYS, Cluster, Link, Work, expected
from pipelines.terminal import say
from simclr.config import Config, SimCLR
from simclr.errors import UserError
from simclr.family import pretraining

EXPECTED_RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
_REPEATS = 7  # of each collective alone; the first two are not counted
_PATIENCE_S = 600
_LARGE = 1 << 23  # numbers: 32 MiB, whose time is bandwidth
_CHAIN = 50  # all-reduces of one number, whose time is latency

Found = dict[str, float]
"""Seconds (…_s) and bytes (…_bytes) of one trial, the slowest rank's."""


# ── The measurement ────────────────────────────────────────────────────────────────────────────────────────────────


def scale(
    config: Config,
    steps: int,
    trials: int,
    threads: int,
    device: str,
    bandwidth_gb_s: float | None = None,
    latency_us: float | None = None,
    node_bandwidth_gb_s: float | None = None,
    node_latency_us: float | None = None,
    ranks_per_node: int = 8,
) -> list[Row]:
    """Print and return the step on 1 and 2 ranks, its communication, and the expectation for 8 to 1,024 ranks.

    `train.batch_size` of `config` is each rank's. Collectives are timed alone, with the sizes of the step and on the same
    ranks: in the step some overlap with computing, and some wait for a slower rank.
    """
    given = {"--bandwidth-gb-s": bandwidth_gb_s, "--latency-us": latency_us, "--ranks-per-node": ranks_per_node}
    given |= {"--node-bandwidth-gb-s": node_bandwidth_gb_s, "--node-latency-us": node_latency_us}
    for name, value in given.items():
        if value is not None and not value > 0:
            raise UserError(f"{name} is {value}; expected more than 0")
    n, worlds = config.train.batch_size, [1, 2]
    if device == "cuda":
        import torch

        worlds = worlds[: torch.cuda.device_count()]
    if len(worlds) == 1 and (bandwidth_gb_s is None or latency_us is None):
        raise UserError("one GPU has no link to measure; give --bandwidth-gb-s and --latency-us, or --device cpu")
    trial: dict[int, list[Found]] = {world: [] for world in worlds}

    def run(world: int) -> float:
        trial[world].append(_trial(config, world, steps, threads, device))
        return 1e3 * trial[world][-1]["step_s"]

    in_turn({f"W = {world}": (lambda world=world: run(world)) for world in worlds}, trials, "ms a step")  # type: ignore[misc]
    found = {world: {key: statistics.median(one[key] for one in all_) for key in all_[0]} for world, all_ in trial.items()}
    backend = "gloo" if device == "cpu" else "nccl"
    print(
        f"step of {config.encoder.title}, {config.views.size_px} px, {n} images per rank, {config.train.precision}, {backend}, "
        f"{threads} threads per rank, {steps - WARM_STEPS} steps, n = {trials}; collectives timed alone, of the same sizes"
    )
    rows = [{"name": f"W = {world}", **values} for world, values in found.items()]
    one = found[1]
    print(f"{'':<22} {'step':>10} {'images/s':>9} {'gradients':>18} {'gather of z':>18} {'BatchNorm sums':>18} {'efficiency':>11}")
    for world, values in found.items():
        efficiency = statistics.median(a["step_s"] / b["step_s"] for a, b in zip(trial[1], trial[world], strict=True))
        _print_row(f"W = {world}, measured", values, world * n, efficiency)
        rows[world - 1]["efficiency"] = efficiency
    work = Work(
        step_s=one["step_s"],
        gradient_bytes=one["gradient_bytes"],
        buckets=int(one["buckets"]),
        z_bytes=one["z_bytes"],
        norm_bytes=one["norm_bytes"],
        layers=int(one["layers"]),
        norm_ranks=config.encoder.norm_ranks,
    )
    here: Link | None = None
    if 2 in found:
        here = Link(found[2]["bandwidth_gb_s"], found[2]["latency_us"])
        # Two ranks on one machine share its memory and its power. A step that runs beside another, with nothing exchanged, shows the
        # cost of sharing, which is no communication.
        beside = replace(work, step_s=found[2]["beside_s"])
        none = dict.fromkeys(("gradients_s", "gather_s", "norm_s"), 0.0)
        _print_row("2 × W = 1, at once", {"step_s": beside.step_s, **none}, 2 * n, one["step_s"] / beside.step_s)
        model = expected(beside, Cluster(2, 2, here, here), "flat ring")
        values = {name: getattr(model, name) for name in ("step_s", "gradients_s", "gather_s", "norm_s")}
        _print_row("W = 2, by the model", values, 2 * n, one["step_s"] / model.step_s)
        print(
            f"the model takes {here.bandwidth_gb_s:.2f} GB/s between the two (all-reduce of 32 MiB) and {here.latency_us:,.0f} µs a "
            f"message (mean of {_CHAIN} all-reduces of 4 bytes)"
        )
        rows.append({"name": "W = 2, by the model", **values, **asdict(here), "efficiency": one["step_s"] / model.step_s})
    between = _link(bandwidth_gb_s, latency_us, here)
    inside = _link(node_bandwidth_gb_s, node_latency_us, here or between)
    return rows + _expect(work, ranks_per_node, inside, between, config.train.compress_gradients)


def _link(bandwidth_gb_s: float | None, latency_us: float | None, other: Link | None) -> Link:
    """The link that is given, with what is not given from the `other`."""
    if bandwidth_gb_s is not None and latency_us is not None:
        return Link(bandwidth_gb_s, latency_us)
    assert other is not None
    return Link(bandwidth_gb_s or other.bandwidth_gb_s, latency_us or other.latency_us)


def _expect(work: Work, per_node: int, inside: Link, between: Link, compressed: bool) -> list[Row]:
    """Print and return what the model expects of more ranks, by each way."""
    over = "all ranks" if work.norm_ranks is None else f"{work.norm_ranks} ranks in a row"
    norms = f"{work.layers} BatchNorms of {work.norm_bytes / 2**10:,.0f} KiB in all over {over}" if work.layers else "no BatchNorm shared"
    print(
        f"expected at {between.bandwidth_gb_s:,.2f} GB/s and {between.latency_us:,.1f} µs between nodes of {per_node} ranks, "
        f"{inside.bandwidth_gb_s:,.2f} GB/s and {inside.latency_us:,.1f} µs within, with {work.gradient_bytes / 2**20:,.1f} MiB of "
        f"gradients in {work.buckets} buckets{' of bfloat16' if compressed else ''}, {work.z_bytes / 2**20:,.2f} MiB of z per rank, {norms}"
    )
    rows = []
    for way in WAYS:
        print(
            f"{way:<13} {'W':>5} {'step':>11} {'gradients':>11} {'gather of z':>11} {'BatchNorm':>11} "
            f"{'efficiency, nothing overlaps':>29} {'gradients behind the backward pass':>35}"
        )
        for ranks in EXPECTED_RANKS:
            found = expected(work, Cluster(ranks, per_node, inside, between), way)
            times = " ".join(f"{1e3 * s:>8,.1f} ms" for s in (found.step_s, found.gradients_s, found.gather_s, found.norm_s))
            shares = f"{100 * found.efficiency:>27.1f} % {100 * found.overlapped_efficiency:>33.1f} %"
            print(f"{'':<13} {ranks:>5,} {times} {shares}")
            rows.append({"name": f"expected, {way}", "ranks": ranks, **asdict(found)})
    print(LEFT_OUT)
    return rows


def _print_row(label: str, values: Found, images: int, efficiency: float) -> None:
    step = values["step_s"]
    parts = [f"{1e3 * values[name]:,.1f} ms {100 * values[name] / step:5.1f} %" for name in ("gradients_s", "gather_s", "norm_s")]
    columns = " ".join(f"{part:>18}" for part in parts)
    print(f"{label:<22} {1e3 * step:>7,.1f} ms {images / step:>9,.1f} {columns} {100 * efficiency:>9.1f} %")


def _trial(config: Config, world: int, steps: int, threads: int, device: str) -> Found:
    """One trial in `world` fresh processes; each figure is the slowest rank's."""
    config = config.of_batch(config.train.batch_size * world)
    context = multiprocessing.get_context("spawn")
    answers: multiprocessing.queues.Queue[Found] = context.Queue()
    with tempfile.TemporaryDirectory(prefix="simclr-bench-") as folder:
        arguments = (f"file://{Path(folder).absolute()}/store", config.to_dict(), steps, threads, device, answers)
        processes = [context.Process(target=_rank, args=(rank, world, *arguments), daemon=True) for rank in range(world)]
        for process in processes:
            process.start()
        try:
            found = [_answer(answers, processes) for _ in processes]
        finally:
            for process in processes:
                process.join(10)
                process.kill()
    slowest = {key: max(one[key] for one in found) for key in found[0]}
    if world > 1:
        slowest["bandwidth_gb_s"] = min(one["bandwidth_gb_s"] for one in found)
    say(f"W = {world}: {1e3 * slowest['step_s']:,.1f} ms a step")
    return slowest


def _answer(answers: Any, processes: list[Any]) -> Found:
    """The next rank's answer. Raises RuntimeError if a rank ended without one."""
    for _ in range(_PATIENCE_S):
        try:
            found: Found = answers.get(timeout=1)
            return found
        except queue.Empty:
            if codes := [p.exitcode for p in processes if p.exitcode]:
                raise RuntimeError(f"a rank ended with code {codes[0]}; its traceback is above") from None
    raise RuntimeError(f"no rank answered within {_PATIENCE_S} s")


def _rank(rank: int, world: int, store: str, config: dict[str, Any], steps: int, threads: int, device: str, answers: Any) -> None:
    import torch
    import torch.distributed as dist

    from pipelines.allocator import keep_freed_memory
    from pipelines.bench.step import our_step, resident, resident_rows
    from pipelines.bench.timing import rate

    torch.set_num_threads(threads)
    keep_freed_memory()
    place = torch.device(device, rank) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        torch.cuda.set_device(place)
    group: dict[str, Any] = {"backend": "gloo" if device == "cpu" else "nccl", "rank": rank, "world_size": world}
    group["timeout"] = timedelta(seconds=_PATIENCE_S)
    plan = pretraining(config)
    n = plan.images_per_rank(world)

    def step_s(config: Config) -> float:
        return n / rate(partial(our_step(config, place), resident(resident_rows(config, place))), steps, n, place)

    found: Found = {}
    if world > 1:
        dist.init_process_group(init_method=f"{store}-begin", **group)
        dist.barrier()  # they begin together, and then exchange nothing
        dist.destroy_process_group()
        alone = replace(plan, train=replace(plan.train, batch_size=n))
        found["beside_s"] = step_s(alone)
        dist.init_process_group(init_method=store, **group)
    found["step_s"] = step_s(plan)
    answers.put(found | _communication(plan, n, world, place))
    answers.close()
    answers.join_thread()
    if world > 1:
        dist.barrier()
    os._exit(0)  # gloo's threads now and then abort a process at a normal exit


def _communication(config: Config, n: int, world: int, place: Any) -> Found:
    """Bytes of a step's collectives and, with more than one rank, seconds of the same collectives alone."""
    import torch
    import torch.distributed as dist

    from simclr.collectives import all_gather, all_reduce_sum
    from simclr.methods.choice import shapes
    from simclr.networks.batchnorm import BatchNorm

    network = shapes(config).network
    kind = torch.bfloat16 if config.train.compress_gradients else torch.float32
    gradients = torch.zeros(sum(p.numel() for p in network.parameters()), device=place, dtype=kind)
    bucket = max(int(config.train.bucket_mib * 2**20) // 4, 1)  # DDP fills its buckets with float32, even if they are compressed
    norms = [torch.zeros(2 * len(m.running_mean), device=place) for m in network.modules() if isinstance(m, BatchNorm) and m.ranks != 1]
    d_out = config.head.d_out if isinstance(config, SimCLR) else getattr(config, "d_out", 0)
    z = torch.zeros(2 * n, d_out, device=place, requires_grad=True)
    found = {"gradient_bytes": float(gradients.nbytes), "buckets": float(math.ceil(gradients.numel() / bucket))}
    found |= {"z_bytes": 4.0 * z.numel(), "layers": float(len(norms))}
    found["norm_bytes"] = 4.0 * sum(sums.numel() for sums in norms)
    if world == 1:
        return found | {"gradients_s": 0.0, "gather_s": 0.0, "norm_s": 0.0}

    def buckets() -> None:
        works = [dist.all_reduce(part, async_op=True) for part in gradients.split(bucket)]
        for work in works:
            work.wait()

    def gather() -> None:
        torch.autograd.grad(all_gather(z).sum(), z)

    def sums() -> None:
        for _ in range(2):  # forward and backward
            for one in norms:
                all_reduce_sum(one)

    def chain() -> None:
        for _ in range(_CHAIN):
            all_reduce_sum(number)

    number, large = torch.zeros(1, device=place), torch.zeros(_LARGE, device=place)
    found |= {"gradients_s": _alone_s(buckets, place), "gather_s": _alone_s(gather, place), "norm_s": _alone_s(sums, place)}
    # A chain, as in BatchNorm: of some hundred messages a few take ten times as long, and in a chain they count.
    found["latency_us"] = 1e6 * _alone_s(chain, place) / (_CHAIN * 2 * (world - 1))
    # 2 (W − 1) messages after one another, and 2 (W − 1) / W of the bytes through each rank's link: the model's own terms.
    found["bandwidth_gb_s"] = 2 * (world - 1) / world * 4 * _LARGE / _alone_s(lambda: all_reduce_sum(large), place) / 1e9
    return found


def _alone_s(call: Callable[[], object], place: Any) -> float:
    """Median seconds of `call`, which every rank begins at once."""
    import torch
    import torch.distributed as dist

    times = []
    for _ in range(_REPEATS):
        dist.barrier()
        began = time.perf_counter()
        call()
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])
