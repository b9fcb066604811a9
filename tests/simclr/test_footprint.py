"""The memory of a step from its shapes, against the memory of the same step with numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from simclr import footprint as memory
from simclr.config import Config
from simclr.footprint import Footprint, fitting, footprint
from simclr.gradient_cache import Rows
from simclr.methods.method import Start
from simclr.methods.simclr import simclr
from simclr.optim import build_optimizer
from simclr.train import take_step
from tests.support.small import TINY

SMALL = replace(TINY, train=replace(TINY.train, batch_size=16, precision="float32"))


def used(found: Footprint) -> int:
    return found.weights + found.momentum + found.views + found.step


def counted(config: Config) -> int:
    """Bytes at most, counted while two steps run with numbers."""
    with memory._Live() as live:
        method = simclr(config, Start(Path()))
        live.are([*method.network.parameters(), *method.network.buffers()], "weights")
        optimizer = build_optimizer(method.groups, config.optim)

        def inputs(batch: Any, some: slice) -> Rows:
            n, px = some.stop - some.start, config.views.size_px
            return {"views": torch.rand(2 * n, 3, px, px).to(memory_format=torch.channels_last).unflatten(0, (2, -1))}

        method = replace(method, inputs=inputs)
        for step in range(2):
            live.restart()
            last = take_step(method, method.network, optimizer, config, SimpleNamespace(ids=range(16)), step)  # type: ignore[arg-type]
        del last
    return sum(live.peak.values())


@pytest.mark.parametrize(("precision", "pieces"), [("float32", None), ("float32", 8), ("bfloat16", None)])
def test_shapes_alone_give_the_bytes_of_a_step(precision: Any, pieces: int | None) -> None:
    config = replace(SMALL, train=replace(SMALL.train, precision=precision, micro_batch=pieces))
    assert used(footprint(config)) == pytest.approx(counted(config), rel=0.03)


def test_parts_are_what_a_person_would_add_up() -> None:
    found = footprint(SMALL)
    network = simclr(SMALL, Start(Path(), torch.device("meta"))).network
    trained = sum(p.numel() for p in network.parameters())
    kept = sum(b.numel() for b in network.buffers())
    assert (found.weights, found.momentum) == (4 * (trained + kept), 4 * trained)
    assert found.views == 16 * 2 * 3 * 32 * 32 * 4 and found.loader == 5 * 16 * 2 * 3 * 32 * 32
    assert found.total == used(found) + found.ranks + found.loader + found.base + found.kept


def test_adamw_keeps_two_moments_of_each_weight() -> None:
    adamw = footprint(replace(SMALL, optim=replace(SMALL.optim, name="adamw", clip_norm=1.0)))
    momentum = footprint(SMALL).momentum
    assert 2 * momentum <= adamw.momentum < 2.01 * momentum, "and a count of steps for each parameter"


def test_workers_share_a_batch_and_have_its_rows_in_common() -> None:
    two = footprint(replace(SMALL, train=replace(SMALL.train, batch_size=32)), workers=2)
    alone = footprint(SMALL)
    assert used(two) == used(alone)
    assert two.ranks > alone.ranks == 0


def test_pieces_save_memory_and_the_largest_that_fits_is_proposed() -> None:
    config = replace(SMALL, train=replace(SMALL.train, batch_size=32))
    pieces = footprint(replace(config, train=replace(config.train, micro_batch=8))).total
    assert pieces < footprint(config).total
    assert fitting(config, 1, pieces) == 8  # 16 would take more
    queue = replace(config, loss=replace(config.loss, memory=64))
    assert fitting(queue, 1, 1 << 40) is None  # it wants the whole batch


@pytest.mark.cluster
def test_the_estimate_is_within_a_fifth_of_a_process(patterns: Path) -> None:
    from pipelines.bench.footprint import measured
    from simclr.recipes import recipe

    base = recipe("patterns_tiny")
    (row,) = measured(replace(base, train=replace(base.train, batch_size=120)), patterns, 1, torch.device("cpu"))
    assert 0.8 < row["ratio"] < 1.2
