"""Pieces of a batch give the whole batch's gradient; ranks exchange it once; running statistics move once."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from simclr.collectives import all_gather, rank, world_size
from simclr.errors import UserError
from simclr.gradient_cache import cached_gradient
from simclr.loss import nt_xent
from simclr.methods.method import Rows, labels_of
from simclr.methods.online import classify
from simclr.methods.simclr import build_model
from simclr.networks.batchnorm import BatchNorm
from simclr.shares import shares
from simclr.train import Start, train
from tests.conftest import Within
from tests.support.ranks import Ranks
from tests.support.small import TINY, mine

N = 12


def gradients(piece: int, fixed_statistics: bool) -> dict[str, Any]:
    """Loss, gradients and running statistics on this rank's share of 12 images, whole (piece 0) or in pieces."""
    generator = torch.Generator().manual_seed(7)
    views = mine(torch.rand(2 * N, 3, 16, 16, dtype=torch.float64, generator=generator), views=2)
    labels = mine(torch.arange(N) % 4)
    model = build_model(TINY, 4).double()
    for norm in (m for m in model.modules() if isinstance(m, BatchNorm)):
        with torch.no_grad():
            norm.running_mean.uniform_(-0.1, 0.1, generator=generator)
            norm.weight.uniform_(0.5, 1.5, generator=generator)
        norm.train(not fixed_statistics)
    network: torch.nn.Module = DistributedDataParallel(model, broadcast_buffers=False) if world_size() > 1 else model
    n = shares(N, world_size())[rank()]

    def inputs(rows: slice) -> Rows:
        return {"views": views.unflatten(0, (2, -1))[:, rows], "labels": labels[None, rows]}

    def objective(outputs: Rows, targets: Rows) -> tuple[Tensor, Rows]:
        contrasted = nt_xent(outputs["z"].flatten(0, 1), 0.3, images=N)
        classified, hits = classify(outputs["logits"].flatten(0, 1), targets["labels"][0], N)
        return contrasted + classified, {"contrasted": contrasted, "classified": classified, "hits": hits}

    if piece:
        outputs, _, _, sums = cached_gradient(network, nn.Module(), inputs, network, labels_of, objective, n, -(-n // piece))
    else:
        whole = inputs(slice(0, n))
        outputs = network(whole)
        loss, sums = objective(outputs, labels_of(whole))
        loss.backward()
    both = torch.stack([sums["contrasted"].detach(), sums["classified"].detach()])
    total = all_gather(torch.cat([both, sums["hits"].double() * world_size() / (2 * N)])[None]).mean(0)
    norms = {name: m.running_mean.clone() for name, m in model.named_modules() if isinstance(m, BatchNorm)}
    grads = {name: p.grad for name, p in model.named_parameters()}
    return {"losses": total, "z": outputs["z"].detach(), "statistics": norms, "gradients": grads}


def worst(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[name] - t).abs().max()) for name, t in b.items())


@pytest.mark.parametrize("piece", [1, 2, 3, 6])
def test_with_fixed_statistics_the_gradient_is_the_whole_batchs(ranks: Ranks, within: Within, piece: int) -> None:
    whole = gradients(0, True)
    assert max(float(g.abs().max()) for g in whole["gradients"].values()) > 1e-3
    for world in (1, 2, *((5,) if piece == 2 else ())):
        if world == 2 and N // world % piece:
            continue
        for found in ranks(world, gradients, piece, True) if world > 1 else [gradients(piece, True)]:
            within(f"gradient, W = {world}", worst(found["gradients"], whole["gradients"]), 1e-9)
            within(f"losses, W = {world}", float((found["losses"] - whole["losses"]).abs().max()), 1e-9)


def test_statistics_are_those_of_a_piece_and_move_once(within: Within) -> None:
    """Against the definition: pieces through BatchNorm by themselves, in one graph; the running mean by their average."""
    found = gradients(4, False)
    generator = torch.Generator().manual_seed(7)
    views = torch.rand(2 * N, 3, 16, 16, dtype=torch.float64, generator=generator)
    model = build_model(TINY, 4).double()
    norms = {name: m for name, m in model.named_modules() if isinstance(m, BatchNorm)}
    for norm in norms.values():
        with torch.no_grad():
            norm.running_mean.uniform_(-0.1, 0.1, generator=generator)
            norm.weight.uniform_(0.5, 1.5, generator=generator)
    before = {name: m.running_mean.clone() for name, m in norms.items()}
    moved: dict[str, list[Tensor]] = {name: [] for name in norms}
    parts = []
    for at in range(0, N, 4):
        found_rows = model({"views": views.unflatten(0, (2, -1))[:, at : at + 4]})
        parts.append((*found_rows["z"], found_rows["logits"].flatten(0, 1)))
        for name, norm in norms.items():
            moved[name].append((norm.running_mean - 0.9 * before[name]) / 0.1)
            norm.running_mean.copy_(before[name])
    z = torch.cat([part[view] for view in range(2) for part in parts])
    classified = sum(classify(part[2], (torch.arange(N) % 4)[at : at + 4])[0] for at, part in zip(range(0, N, 4), parts, strict=True)) / 3
    (nt_xent(z, 0.3) + classified).backward()
    within("gradient", worst(found["gradients"], {name: p.grad for name, p in model.named_parameters() if p.grad is not None}), 1e-9)
    expected = {name: 0.9 * before[name] + 0.1 * torch.stack(means).mean(0) for name, means in moved.items()}
    within("running mean", worst(found["statistics"], expected), 1e-12)


def losses(data: str, micro_batch: int | None) -> list[float]:
    config = dataclasses.replace(TINY, train=dataclasses.replace(TINY.train, steps=3, micro_batch=micro_batch))
    return [report.metrics["train/loss"] for report in train(config, Start(Path(data)))]


def test_the_loop_trains_in_pieces(ranks: Ranks, patterns: Path) -> None:
    whole, pieces = losses(str(patterns), None), losses(str(patterns), 6)
    assert np.isfinite(pieces).all() and pieces != whole  # BatchNorm over 6 images is another network than over 24
    assert losses(str(patterns), 24) == whole
    one, other = ranks(2, losses, str(patterns), 3)
    assert one == other and np.isfinite(one).all()


def test_every_worker_has_as_many_pieces_none_of_them_empty_or_larger_than_asked() -> None:
    """Their collectives meet: a worker with one image more has no piece more. One that is asked for single images embeds two at once."""
    for batch in (8, 23, 24):
        for micro in (1, 2, 3, 5, 24, 40):
            config = dataclasses.replace(TINY, train=dataclasses.replace(TINY.train, batch_size=batch, micro_batch=micro))
            for world in range(1, batch + 1):
                pieces = config.pieces(world)
                sizes = [size for own in shares(batch, world) for size in shares(own, pieces)]
                assert min(sizes) >= 1 and max(sizes) <= max(micro, 1 if batch % world == 0 else 2)
                if batch % world == 0 and batch // world % micro == 0:
                    assert sizes == [micro] * (batch // micro)


def test_no_images_at_a_time_are_a_user_error() -> None:
    with pytest.raises(UserError, match=r"train.micro_batch is 0; expected at least 1"):
        dataclasses.replace(TINY.train, micro_batch=0)


def test_in_bfloat16_pieces_train_too(patterns: Path) -> None:
    config = dataclasses.replace(TINY, train=dataclasses.replace(TINY.train, steps=3, micro_batch=6, precision="bfloat16"))
    found = [report.metrics["train/loss"] for report in train(config, Start(patterns))]
    whole = dataclasses.replace(config, train=dataclasses.replace(config.train, micro_batch=None))
    first = next(iter(train(whole, Start(patterns)))).metrics["train/loss"]
    assert len(found) == 3 and np.isfinite(found).all() and np.isfinite(first)
