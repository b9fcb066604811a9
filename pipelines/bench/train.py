"""`simclr bench train`: shards → loader → views → step under Ray Train, against the step alone; beside it, lightly's SimCLR."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipelines.bench.held import Ask, Held, asks, held, steps_of
from pipelines.bench.loop import around, require_ray, timed, under_ray
from pipelines.bench.result import Row, compared, cost, in_turn, power, print_cost
from simclr.config import Config, SimCLR
from simclr.errors import UserError
from simclr.family import method_name, pretraining

if TYPE_CHECKING:
    from torch import Tensor

RESIDENT, TRAIN, LIGHTLY = "step on resident views", "Ray Train, end to end", "lightly, end to end"
_INSTALL = "pip install --no-deps lightly==1.6.0 lightly_utils==0.0.2 lightning-utilities==0.15.3"
_PICTURES = (".jpg", ".jpeg", ".png")


def train(
    name: str,
    config: Config,
    data: Path,
    steps: int,
    trials: int,
    threads: int,
    peer: Literal["none", "lightly"] = "none",
    peer_data: Path | None = None,
    window_s: float = 2.0,
) -> list[Row]:
    """Print and return images/s end to end ÷ the step's on resident views, each in its own process; then the cost.

    Each process compiles once and is timed `trials` times, over windows of as many steps as last `window_s` seconds, at least
    `steps` − 5. Ray Train's process cannot stop between two windows, so it takes them in a row, as reports of the loop. The side that it
    is compared with takes as many windows before and after: `around`. No online classifier is trained: resident views have no labels.
    """
    require_ray("train")
    if peer == "lightly" and not (isinstance(config, SimCLR) and config.loss.name == "nt_xent"):
        raise UserError(f"the recipe's method is {method_name(config)}; `simclr bench train --peer lightly` compares SimCLR with NT-Xent")
    shown = config.views
    if peer == "lightly" and (isinstance(shown.blur_p, tuple) or shown.solarise_p not in (0, (0, 0)) or shown.saturation != 1):
        raise UserError(
            "lightly's SimCLR blurs both views alike, solarises none and has one strength of colour; `simclr bench train --peer lightly` "
            "compares recipes with one views.blur_p, views.solarise_p 0 and views.saturation 1"
        )
    config = replace(config, train=replace(config.train, linear_eval=False))
    n = config.images_per_rank(1)
    asked: dict[str, Callable[..., Any]] = {RESIDENT: partial(_resident, config.to_dict(), threads)}
    if peer == "lightly" and importlib.util.find_spec("lightly") is None:
        print(f"lightly is not installed, so ours is timed alone; `{_INSTALL}` installs lightly")
    elif peer == "lightly":
        asked[LIGHTLY] = partial(_lightly, config.to_dict(), threads, _photographs(peer_data, n))
    with contextlib.ExitStack() as stack:
        sides: dict[str, Held] = {side: stack.enter_context(held(make)) for side, make in asked.items()}
        taken = steps_of(sides[RESIDENT], steps, window_s)
        others = {side: (lambda one=one: n / one.step_s(taken)) for side, one in sides.items()}
        with power() as watts:
            before = in_turn(others, trials, "images/s")
            rates = [n / step_s for step_s in under_ray(timed(config, taken, trials), data, threads)]
            found = {TRAIN: rates} | around(before, in_turn(others, trials, "images/s"))
        found = {side: found[side] for side in (RESIDENT, TRAIN, *asked)}
    rows = compared(found, "images/s", RESIDENT)
    print(
        f"{name}, {config.views.size_px} px, N = {n}, {config.train.precision}, {'compiled' if config.train.compile else 'not compiled'}, "
        f"one worker of {threads} threads, windows of {taken} steps, n = {trials}"
    )
    for row in rows:
        than = "" if row["name"] == RESIDENT else f"   {100 * row['ratio']:.1f} % of it (pairs {row['low']:.3f} … {row['high']:.3f} ×)"
        print(f"{row['name']:<24} {row['median']:10,.1f} images/s{than}")
    if LIGHTLY in found:
        ours = compared({LIGHTLY: found[LIGHTLY], TRAIN: found[TRAIN]}, "images/s", LIGHTLY)[1]
        print(f"simclr ÷ lightly, end to end: {ours['ratio']:.2f} × (pairs {ours['low']:.2f} … {ours['high']:.2f})")
        rows.append({**ours, "name": "simclr ÷ lightly"})
    rows.append(cost(rows[1]["median"], watts[0] if watts else None))
    print_cost(rows[-1], config.views.size_px)
    return rows


def _resident(values: dict[str, Any], threads: int) -> Ask:
    """The step on resident views."""
    import torch

    from pipelines.allocator import keep_freed_memory
    from pipelines.bench.step import our_step, resident, resident_rows
    from simclr.precision import set_backends

    torch.set_num_threads(threads)
    keep_freed_memory()
    config, device = pretraining(values), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    set_backends(config.train.precision, device)
    return asks(partial(our_step(config, device), resident(resident_rows(config, device))), device)


# ── The peer ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _photographs(folder: Path | None, n: int) -> Path:
    if folder is None or not folder.is_dir():
        raise UserError("lightly reads photographs as they are; `--peer-data DIR`, the folder that the shards were prepared from")
    found = sum(path.suffix.lower() in _PICTURES for path in folder.rglob("*"))
    if found < n:
        raise UserError(f"{folder} holds {found} photographs ({', '.join(_PICTURES)}); use --batch-size {found} or less")
    return folder


def _lightly(values: dict[str, Any], threads: int, folder: Path) -> Ask:
    """The step of lightly's SimCLR, data included: its dataset, transform, head and loss as in its own example, our
    ResNet with torch's norms, and torch's loader with a process per thread of ours."""
    import torch
    from lightly.data import LightlyDataset
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from lightly.transforms import SimCLRTransform
    from torch.utils.data import DataLoader

    from pipelines.allocator import keep_freed_memory
    from pipelines.bench.step import in_plain_torch
    from simclr.precision import autocast, set_backends

    torch.set_num_threads(threads)
    keep_freed_memory()
    config, device = pretraining(values), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert isinstance(config, SimCLR)
    set_backends(config.train.precision, device)
    shown, n = config.views, config.images_per_rank(1)
    transform = SimCLRTransform(
        input_size=shown.size_px,
        cj_prob=shown.jitter_p,
        cj_strength=shown.colour_strength,
        min_scale=shown.area[0],
        random_gray_scale=shown.grey_p,
        gaussian_blur=shown.of_view("blur_p", 0),
        hf_prob=shown.flip_p,
        normalize={"mean": list(shown.mean), "std": list(shown.std)},
    )
    batches: Any = DataLoader(
        LightlyDataset(str(folder), transform=transform),
        batch_size=n,
        shuffle=True,
        drop_last=True,
        num_workers=threads,
        persistent_workers=True,
        pin_memory=device.type == "cuda",
    )
    encoder = in_plain_torch(config).encoder
    network = torch.nn.Sequential(encoder, SimCLRProjectionHead(encoder.d_h, encoder.d_h, config.head.d_out, config.head.layers))
    network = network.to(device).to(memory_format=torch.channels_last).train()
    if config.train.compile:
        network.compile()
    criterion = NTXentLoss(config.loss.temperature)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-5, momentum=config.optim.momentum, fused=True)

    def endless() -> Iterator[Any]:
        while True:
            yield from batches

    def one(stream: Iterator[Any]) -> Tensor:
        x0, x1 = (x.to(device, memory_format=torch.channels_last, non_blocking=True) for x in next(stream)[0])
        optimizer.zero_grad(set_to_none=True)
        with autocast(config.train.precision, device):
            z0, z1 = network(x0), network(x1)
        loss: Tensor = criterion(z0.float(), z1.float())
        loss.backward()
        optimizer.step()
        return loss.detach()

    return asks(partial(one, endless()), device)
