"""Stragglers: a rank's own time is its step without its waits, and a rank that is slow for long is named."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from simclr import collectives
from simclr import train as loop
from simclr.collectives import rank
from simclr.methods import method
from simclr.methods import simclr as module
from simclr.telemetry import straggler
from simclr.telemetry.guards import Health
from simclr.telemetry.straggler import Stragglers
from simclr.telemetry.timing import Clock, Pace
from simclr.train import Report, Start, train
from tests.support.ranks import Ranks
from tests.support.small import TINY

_NAP_S = 0.2


class _Nap:
    """Sleeps 0.2 s, or as long as the step before took without its nap: on a loaded machine every rank is slow, and a straggler slower."""

    def __init__(self) -> None:
        self.ended = math.nan

    def __call__(self) -> None:
        rest_s = time.monotonic() - self.ended
        time.sleep(_NAP_S if math.isnan(rest_s) else max(_NAP_S, rest_s))
        self.ended = time.monotonic()


def napping(data: str, slow: int, where: str, clock: Any = Clock) -> list[Report]:
    """Reports of 15 steps of two images a rank, in which rank `slow` sleeps: before its first layer, or in its backward pass. Ten steps in
    a row, not fifty, make a straggler."""
    good = method.views_for, module.nt_xent, loop.Clock, straggler.STEPS
    nap = _Nap()

    def views(*arguments: Any) -> list[Tensor]:
        if where == "views":
            nap()
        return good[0](*arguments)

    def loss(z: Tensor, *arguments: Any) -> Tensor:
        if where == "backward":
            z.register_hook(lambda gradient: nap())
        return good[1](z, *arguments)

    if rank() == slow:
        method.views_for, module.nt_xent = views, loss
    loop.Clock, straggler.STEPS = clock, 10
    settings = dataclasses.replace(TINY.train, batch_size=4, steps=15, report_every_steps=5, checkpoint_every_steps=None)
    config = dataclasses.replace(TINY, train=settings, watch=dataclasses.replace(TINY.watch, every_epochs=0))
    try:
        return list(train(config, Start(Path(data))))
    finally:
        method.views_for, module.nt_xent, loop.Clock, straggler.STEPS = good


@pytest.mark.parametrize(("where", "compiled"), [("views", False), ("backward", False), ("views", True)])
def test_a_rank_that_sleeps_in_its_step_is_named(ranks: Ranks, patterns: Path, where: str, compiled: bool) -> None:
    """After that many steps and not before, with the time that it slept, though the steps of both ranks are equally long. A compiled
    network hides its collectives, but the time outside of it is still seen."""
    both = ranks(2, napping, str(patterns), 1, where, functools.partial(_compiled, compiled))
    assert [r.step for r in both[0]] == [1, 5, 10, 15]
    assert [r.ranks for r in both[0]] == [r.ranks for r in both[1]]
    for report in both[0][2:]:  # the first steps may be long on both ranks
        fast, slow = report.ranks["speed/own_s"]
        assert slow - fast > _NAP_S / 2 and min(report.ranks["speed/step_p50_s"]) > _NAP_S
        assert report.metrics["speed/slowest_rank"] == 1
        assert report.metrics["speed/straggle"] == pytest.approx(slow / ((fast + slow) / 2))
        if not compiled:  # rank 0 waits, rank 1 does not
            waits = report.ranks["speed/communication_pct"]
            assert waits[0] > waits[1]
    for rows in both:
        assert [r.stragglers for r in rows][:2] == [(), ()] and rows[-1].stragglers == (1,)
    assert both[0][-1].metrics["speed/straggler_steps"] >= 10


def _compiled(compiled: bool, step: int, device: torch.device, _: bool) -> Clock:
    return Clock(step, device, compiled)


def test_no_rank_is_named_if_none_sleeps(ranks: Ranks, patterns: Path) -> None:
    reports = ranks(2, napping, str(patterns), -1, "views")[0]
    assert [report.step for report in reports] == [1, 5, 10, 15]
    for report in reports:
        assert report.stragglers == () and 0 < report.metrics["speed/communication_pct"] < 100


def test_a_rank_is_named_after_fifty_slow_steps_in_a_row() -> None:
    watch = Stragglers(5)
    usual = [1.0, 1.1, 0.9, 1.0, 1.05]
    slow = [1.0, 1.1, 0.9, 1.3, 1.05]  # the median is 1.05
    assert watch.see(slow, 40) == {"speed/slowest_rank": 3, "speed/straggle": 1.3 / 1.05, "speed/straggler_steps": 40}
    assert watch.named() == []
    assert watch.see(slow, 10)["speed/straggler_steps"] == 50 and watch.named() == [3]
    assert watch.see(usual, 10)["speed/straggler_steps"] == 0 and watch.named() == []  # it recovered
    watch.see(slow, 49)
    assert watch.named() == []
    two = [2.0, 1.0, 1.0, 1.0, 2.0]
    watch.see(two, 50)
    assert watch.named() == [0, 4]  # two at once
    assert Stragglers(1).see([1.0], 50) == {} and Stragglers(2).see([0.0, 0.0], 50) == {}  # a device without timestamps of its own


def test_of_two_ranks_one_must_be_half_again_as_slow() -> None:
    for slow, named in ((1.49, []), (1.51, [1])):
        watch = Stragglers(2)
        watch.see([1.0, slow], 50)
        assert watch.named() == named


def seen(paces: list[Pace], data: str) -> tuple[dict[str, float], dict[str, tuple[float, ...]]]:
    health = Health(torch.nn.Linear(1, 1), torch.device("cpu"), 2, Path(data), 0.0, "stop")
    return health.report(10, {"train/loss": torch.tensor(1.0 + rank())}, paces[rank()])


def test_a_report_has_every_ranks_pace_in_one_collective(ranks: Ranks, patterns: Path) -> None:
    """For a compiled network only the sum of own time and waits is known: no rank's own time is more than the least of these sums."""
    paces = [Pace(10, 3.0, 4.0, 5.0, 1.0, 2.0, 10.0, 40.0), Pace(10, 3.1, 4.1, 5.1, 1.5, 1.5, 50.0, 20.0)]
    first, second = ranks(2, seen, paces, str(patterns))
    assert first == second
    metrics, each = first
    assert each == {
        "speed/step_p50_s": (3.0, 3.1),
        "speed/step_p95_s": (4.0, 4.1),
        "speed/step_max_s": (5.0, 5.1),
        "speed/own_s": (2.5, 3.0),
        "speed/data_wait_pct": (10.0, 50.0),
        "speed/communication_pct": (40.0, 20.0),
    }
    assert metrics == {
        "train/loss": 1.5,
        "speed/step_p50_s": 3.1,
        "speed/communication_pct": 30.0,
        "speed/slowest_rank": 1,
        "speed/straggle": 3.0 / 2.75,
        "speed/straggler_steps": 0,
    }


def test_a_clock_counts_the_steps_since_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty steps of 1 s, two of them 2 and 4 s longer, each with half a second for data; the time before a restart is in no step."""
    hour = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: hour[0])

    def stream() -> Iterator[None]:
        while True:
            hour[0] += 0.5
            yield

    clock, data = Clock(0, torch.device("cpu")), stream()
    for step in range(20):
        clock.next(data)
        hour[0] += {4: 4.5, 9: 2.5}.get(step, 0.5)
        clock.step_over()
    pace = clock.pace()
    assert (pace.steps, pace.p50_s, pace.p95_s, pace.max_s) == (20, 1.0, 3.0, 5.0)
    assert (pace.outside_s, pace.inside_s, pace.communication_pct) == (1.0, 0.0, 0.0)
    assert pace.data_wait_pct == 100 * 10 / 26 and clock.speed(20, 13)["speed/images_per_s"] == 10
    hour[0] += 1000
    assert collectives._waits is None  # nothing is recorded after a report
    clock.restart(20)
    hour[0] += 7
    clock.step_over()
    assert clock.pace().max_s == 7
    assert clock.speed(21, 14)["speed/images_per_s"] == 2
