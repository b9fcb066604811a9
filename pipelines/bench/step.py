"""`simclr bench step`: the training step on resident data, against the same network's step in plain torch, and fed from shards."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.allocator import keep_freed_memory
from pipelines.bench.result import WARM_STEPS, Row, compared, cost, in_turn, power, print_cost
from pipelines.bench.timing import Call, graph_breaks, peak_gib, rate, wait, write_profile
from simclr.collectives import data_parallel, world_size
from simclr.config import Config, SimCLR
from simclr.data.loader import Batch, batches, on_device
from simclr.errors import UserError
from simclr.family import CLIP, MAE, method_name
from simclr.methods.choice import pretraining, shapes
from simclr.methods.method import Rows, Start
from simclr.methods.simclr import Network, build_model
from simclr.networks.batchnorm import BatchNorm, share_statistics
from simclr.networks.text import VOCABULARY
from simclr.optim import build_optimizer, lr_peak, warmup_cosine
from simclr.papers import named
from simclr.precision import autocast, set_backends, views_dtype, weights_dtype
from simclr.train import take_step

Step = Callable[[], Tensor]
"""Takes one optimizer step and returns its loss on the device, without waiting for it."""
See = Callable[[slice], Rows]
"""Some of a rank's images → their input rows."""
Side = Literal["resident", "plain", "simclr", "cached", "fed", "views", "loader"]

OURS, PLAIN, FED = "simclr", "plain torch", "simclr, fed from shards"
_BESIDE = "beside"
"""SimCLR's step where the config is another method's; it is printed as simclr, and the sides of ours by the method's name."""
_VIEWS, _LOADER = "views alone", "loader alone"
_PREPARED = 12  # a little more than the batches that the loader may have ready
_WARMUP, _TOTAL = 10_000, 100_000  # steps of the schedule: its low rates keep the repeated batch from being learnt by heart


def step(
    config: Config,
    steps: int,
    trials: int,
    threads: int,
    device: torch.device,
    profile: Path | None,
    data: Path | None = None,
    asked: tuple[Side, ...] = (),
    window_s: float = 0.0,
) -> Iterator[Row]:
    """Print and give, row by row, images/s of the sides `asked` for, or of all possible ones: our step and plain torch's on resident views,
    for another method than SimCLR our step and SimCLR's with the same encoder, batch, precision and optimizer; with `train.micro_batch`
    gradient caching's; with shards in `data` our step fed by loader and views, and these two alone. The fed side shares our network, every
    other compiles its own. Then profile and cost."""
    n = config.images_per_rank(1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    set_backends(config.train.precision, device)  # the same multiplication on both sides
    keep_freed_memory()
    with contextlib.ExitStack() as stack:
        made = _sides(config, device, threads, data, asked, stack)
        yield from _first_steps(made, config, device)
        peaks: dict[str, float] = {}
        sides = {_shown(name, config): partial(_rate, name, one, peaks, steps, n, device, window_s) for name, one in made.items()}
        with power() as watts:
            timed = in_turn(sides, trials, "images/s")
        found = {name: timed[_shown(name, config)] for name in made}
        base = next(iter(made))
        rows = [{**row, "peak_gib": peaks.get(row["name"])} for row in compared(found, "images/s", base, inverted=True)]
        _print_table(rows, config, f"{device.type}, {threads} threads, {_counted(steps, window_s)}, n = {trials}")
        yield from ({**row, "name": _shown(row["name"], config)} for row in rows)
        if profile is not None:
            name = FED if FED in made else base
            waits = write_profile(made[name], profile, device)
            said = "—" if waits is None else f"{waits.total()} times ({', '.join(f'{count} {call}' for call, count in waits.items())})"
            print(f"profile of 5 steps of {_shown(name, config)} in {profile}; the host waits for the device between two reports: {said}")
            yield {
                "name": "host synchronisations",
                "side": _shown(name, config),
                "steps": 5,
                "count": None if waits is None else waits.total(),
            }
    torch.set_num_threads(before)
    dearest = cost(next((row["median"] for row in rows if row["name"] == FED), rows[0]["median"]), watts[0] if watts else None)
    yield dearest
    print_cost(dearest, config.views.size_px)


def _sides(
    config: Config, device: torch.device, threads: int, data: Path | None, asked: tuple[Side, ...], stack: contextlib.ExitStack
) -> dict[str, Call]:
    """Name → one step, for each side asked for. `stack` ends the loader's thread."""
    n = config.images_per_rank(1)
    comparable = isinstance(config, SimCLR) and config.loss.name == "nt_xent"
    beside: tuple[Side, ...] = ("simclr",) if not isinstance(config, SimCLR) else ("plain",) if comparable else ()
    there: tuple[Side, ...] = ("resident", *beside, *(("cached",) if config.pieces(1) > 1 else ()))
    there += ("fed", "views", "loader") if data is not None else ()
    if missing := [side for side in asked if side not in there]:
        needs = {"cached": "--micro-batch", "plain": "SimCLR with NT-Xent", "simclr": "a recipe of another method"}.get(
            missing[0], "--data"
        )
        raise UserError(f"--sides {missing[0]} needs {needs}; give it, or leave that side out")
    wanted = asked or there
    whole = replace(config, train=replace(config.train, micro_batch=None))
    made: dict[str, Call] = {}
    if data is not None:  # before anything compiles: it raises if the shards are wrong
        loaders = Start(data, device, threads=threads).loader_threads
        stream = stack.enter_context(
            contextlib.closing(on_device(batches(whole, data, 0, 0, 1, loaders, crops=shapes(whole).crops), device))
        )
        held = next(stream)
    if {"resident", "fed"} & set(wanted):
        ours = our_step(whole, device)
    if {"resident", "plain", "simclr"} & set(wanted):
        rows = resident_rows(whole, device)
    if "resident" in wanted:
        made[OURS] = partial(ours, resident(rows))
    if "fed" in wanted:
        made[FED] = lambda: ours(of_batch(next(stream), whole, device))
    if "plain" in wanted:
        assert isinstance(whole, SimCLR)
        made[PLAIN] = plain_step(whole, rows)
    if "simclr" in wanted:
        made[_BESIDE] = partial(our_step(simclr_of(whole), device), resident(resident_rows(simclr_of(whole), device)))
    if "cached" in wanted:
        made[_cached(config)] = partial(our_step(config, device), of_noise(config, device))
    if "views" in wanted:
        made[_VIEWS] = lambda: of_batch(held, whole, device)(slice(0, n))
    if "loader" in wanted:
        made[_LOADER] = lambda: next(stream)
    return made


def _first_steps(made: dict[str, Call], config: Config, device: torch.device) -> Iterator[Row]:
    """The first step of each network: its compile time and its graph breaks. The fed side has the same network."""
    for name, one in made.items():
        if not config.train.compile or name in (_VIEWS, _LOADER) or (name == FED and OURS in made):
            continue
        began, breaks = time.perf_counter(), graph_breaks()
        one()
        wait(device)
        row = {
            "name": f"first step, {_shown(name, config)}",
            "seconds": time.perf_counter() - began,
            "graph_breaks": graph_breaks() - breaks,
        }
        print(f"{row['name']}: {row['seconds']:.1f} s, graph breaks: {row['graph_breaks']}")
        yield row


def _rate(name: str, one: Call, peaks: dict[str, float], steps: int, n: int, device: torch.device, window_s: float) -> float:
    peak_gib(device)
    found = rate(one, steps, n, device, window_s, _PREPARED if name == _LOADER else WARM_STEPS)
    if (peak := peak_gib(device)) is not None:
        peaks[name] = max(peak, peaks.get(name, 0.0))
    return found


def simclr_of(config: Config) -> SimCLR:
    """SimCLR with the encoder, views, optimizer and batch of another method's `config`."""
    return SimCLR(**{field.name: getattr(config, field.name) for field in fields(Config)})


def _shown(name: str, config: Config) -> str:
    """A side's name for people: ours is called by its method."""
    return "simclr" if name == _BESIDE else name.replace(OURS, method_name(config), 1)


def _cached(config: Config) -> str:
    return f"simclr, {config.train.micro_batch} at a time"


def _print_table(rows: list[Row], config: Config, how: str) -> None:
    train, base = config.train, rows[0]["name"]
    print(
        f"step of {named(method_name(config)).title} on views of {config.views.size_px} px, {config.encoder.title}, "
        f"N = {train.batch_size}, {train.precision}, "
        f"{'compiled' if train.compile else 'not compiled'}, {how}"
    )
    theirs = "plain torch with fused SGD" if isinstance(config, SimCLR) else "SimCLR too"
    print(f"ours ends with {config.optim.name.upper()}, {theirs}")
    for row in rows:
        pairs, than = f"(pairs {row['low']:.3f} … {row['high']:.3f})", ""
        if row["name"] == FED and base == OURS:
            share = 1 / row["ratio"]
            than = f"   {100 * share:.1f} % of the step on resident views (pairs {1 / row['high']:.3f} … {1 / row['low']:.3f} ×)"
        elif row["name"] == PLAIN and base == OURS:
            than = f"   simclr is {row['ratio']:.3f} × {pairs}"
        elif row["name"] == _BESIDE and base == OURS:
            than = f"   a step of {method_name(config)} takes {1 / row['ratio']:.3f} × (pairs {1 / row['high']:.3f} … {1 / row['low']:.3f})"
        elif row["name"] == _cached(config) and base == OURS:
            than = f"   an image costs {row['ratio']:.3f} × the whole batch's {pairs}, its views made twice"
        memory = "" if row["peak_gib"] is None else f" {row['peak_gib']:6.1f} GiB"
        print(f"{_shown(row['name'], config):<24} {row['median']:10,.1f} images/s{memory}{than}")


def _counted(steps: int, window_s: float) -> str:
    return f"{steps - WARM_STEPS} steps" + (f" or {window_s:g} s" if window_s else "")


# ── The rows of a step ─────────────────────────────────────────────────────────────────────────────────────────────


def resident_rows(config: Config, device: torch.device) -> Rows:
    """The input rows of a step: noise on the device, in the dtype and memory format of the loop's views. Their content does not change the
    time."""
    n, generator = config.images_per_rank(world_size()), torch.Generator(device).manual_seed(0)
    rows: Rows = {}
    for name, crop in zip(("views", "local"), shapes(config).crops, strict=False):
        views = torch.randn(crop.count * n, 3, crop.size_px, crop.size_px, generator=generator, device=device)
        views = views.to(views_dtype(config.train.precision, device)).to(memory_format=torch.channels_last)
        rows[name] = views.unflatten(0, (crop.count, -1))
    if isinstance(config, MAE):
        rows["order"] = torch.rand(1, n, config.patches, generator=generator, device=device).argsort(2)
    if isinstance(config, CLIP):
        rows["tokens"] = torch.randint(VOCABULARY, (1, n, config.context), generator=generator, device=device)
    return rows


def resident(rows: Rows) -> See:
    """Given rows of a rank's images."""
    n = rows["views"].shape[1]
    return lambda some: rows if some == slice(0, n) else {name: x[:, some] for name, x in rows.items()}


def of_batch(batch: Batch, config: Config, device: torch.device) -> See:
    """Rows made of the loader's batch, as in `simclr.train`."""
    inputs: Any = shapes(config).inputs  # the method's own, made for the meta device
    return partial(inputs, batch, device=device)


def of_noise(config: Config, device: torch.device) -> See:
    """Rows made of resident uint8 crops. These take a quarter of the views' memory; with gradient caching only they are held whole."""
    n, generator = config.images_per_rank(world_size()), torch.Generator(device).manual_seed(0)
    shaped = ((n, crop.count, crop.size_px, crop.size_px, 3) for crop in shapes(config).crops)
    crops = tuple(torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator, device=device) for shape in shaped)
    captions = ("a picture",) * n if isinstance(config, CLIP) else ()
    return of_batch(Batch(0, 0, crops, torch.arange(n), torch.full((n,), -1), captions=captions), config, device)


# ── The steps ──────────────────────────────────────────────────────────────────────────────────────────────────────


def our_step(config: Config, device: torch.device) -> Callable[[See], Tensor]:
    """The loop's own step (`simclr.train.take_step`) without labels, in the process group if there is one. It takes the views and
    returns the loss on the device, without waiting for it."""
    n, taken = config.images_per_rank(world_size()), 0
    made = pretraining(config, Start(Path(), device))
    share_statistics((made.network, made.state), config.train.batch_size)
    peak = lr_peak(config.optim.base_lr, config.train.batch_size, config.optim.scaling)
    schedule = partial(warmup_cosine, peak=peak, warmup_steps=_WARMUP, total_steps=_TOTAL)
    groups = tuple(replace(group, schedules={**group.schedules, "lr": schedule}) for group in made.groups)
    optimizer = build_optimizer(groups, config.optim)
    network = data_parallel(made.network, config.train.bucket_mib, config.train.compress_gradients, config.train.compile)
    nobody = Batch(0, 0, (), torch.arange(n), torch.full((n,), -1))

    def one(see: See) -> Tensor:
        nonlocal taken
        seen = replace(made, groups=groups, inputs=lambda batch, some: see(some))
        _, _, loss, _ = take_step(seen, network, optimizer, config, nobody, taken)
        taken += 1
        return loss.detach()

    return one


def plain_step(config: SimCLR, given: Rows) -> Step:
    """The same network and weights in the usual form of the step: `nn.BatchNorm2d`, NT-Xent written out, fused SGD."""
    views = given["views"].flatten(0, 1)
    network: nn.Module = (
        in_plain_torch(config).to(views.device, weights_dtype(config.train.precision)).to(memory_format=torch.channels_last).train()
    )
    optim, temperature, rows = config.optim, config.loss.temperature, len(views)
    trained = [p for p in network.parameters() if p.requires_grad]
    peak = lr_peak(optim.base_lr, config.train.batch_size, optim.scaling)
    optimizer = torch.optim.SGD(trained, lr=peak / _WARMUP, momentum=optim.momentum, weight_decay=optim.weight_decay, fused=True)
    partner = torch.arange(rows, device=views.device).roll(rows // 2)
    if config.train.compile:
        network.compile()

    def one() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with autocast(config.train.precision, views.device):
            z = network(given)["z"].flatten(0, 1)
        z = z.float() if z.dtype == torch.bfloat16 else z
        z = F.normalize(z, dim=1)
        logits = z @ z.T / temperature
        logits = logits.masked_fill(torch.eye(rows, dtype=torch.bool, device=z.device), float("-inf"))
        loss = F.cross_entropy(logits, partner)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return one


def in_plain_torch(config: SimCLR) -> Network:
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
        norm = kind(len(child.running_mean), child.eps, child.momentum)
        norm.load_state_dict(child.state_dict(), strict=False)
        if child.bias is None:  # torch's always has a bias: it stays 0
            norm.bias.requires_grad_(False)
        module.add_module(name, norm)
