"""v2's queue: its negatives, its moving average and its ring, on any number of ranks and in a resumed run."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from simclr import checkpoint
from simclr.config import Config, Loss
from simclr.errors import UserError
from simclr.loss import nt_xent
from simclr.methods.queue import Queue
from simclr.train import Start, train
from tests.conftest import Within
from tests.support.ranks import Ranks
from tests.support.small import TINY, run

REMEMBERING = dataclasses.replace(TINY, loss=Loss(temperature=0.2, memory=96, memory_decay=0.9))  # two batches


def by_hand(z: Tensor, memory: Tensor, temperature: float) -> Tensor:
    """Eq. 1 as a double loop, with the queue's rows in every denominator."""
    u = z / z.norm(dim=1, keepdim=True)
    losses = []
    for i in range(len(u)):
        partner = (i + len(u) // 2) % len(u)
        others = [torch.exp(u[i] @ u[k] / temperature) for k in range(len(u)) if k != i]
        stored = [torch.exp(u[i] @ m / temperature) for m in memory]
        losses.append(-torch.log(torch.exp(u[i] @ u[partner] / temperature) / torch.stack(others + stored).sum()))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("streamed", [False, True])
def test_loss_with_a_queue_is_the_double_loops(within: Within, monkeypatch: pytest.MonkeyPatch, streamed: bool) -> None:
    if streamed:
        monkeypatch.setattr("simclr.loss.STREAMED_FROM", 0)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(8, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    memory = torch.nn.functional.normalize(torch.randn(6, 5, dtype=torch.float64, generator=generator), dim=1)
    ours, hand = nt_xent(z, 0.3, memory), by_hand(z, memory, 0.3)
    within("loss", abs(ours.item() - hand.item()), 1e-12)
    gradients = [torch.autograd.grad(loss, z)[0] for loss in (ours, hand)]
    within("gradient", float((gradients[0] - gradients[1]).abs().max()), 1e-12)
    assert nt_xent(z, 0.3, memory[:0]) == nt_xent(z, 0.3)
    # With equal embeddings everywhere each of 2N − 1 + m candidates is as likely as another.
    same = torch.ones(8, 5, dtype=torch.float64)
    within("constant", abs(float(nt_xent(same, 0.3, same[:6] / math.sqrt(5))) - math.log(7 + 6)), 1e-12)


def test_the_average_and_the_ring() -> None:
    """Weights after three steps, by hand; the third batch takes the first one's place."""
    encoder, head = torch.nn.Linear(3, 3), torch.nn.Linear(3, 2)
    queue = Queue(encoder, head, torch.zeros(8, 2))
    weight = head.weight.detach().clone()
    assert queue.negatives(0, 4).shape == (0, 2)
    expected = [torch.nn.functional.normalize(torch.randn(4, 2), dim=1) for _ in range(3)]
    for step, rows in enumerate(expected):
        with torch.no_grad():
            head.weight += 1
        queue.follow(encoder, head, 0.75)
        weight = 0.75 * weight + 0.25 * head.weight.detach()
        assert torch.allclose(queue.head.weight, weight, atol=1e-6)  # type: ignore[arg-type]
        queue.enqueue(rows, step)
        assert queue.negatives(step + 1, 4).shape == (min(4 * (step + 1), 8), 2)
    assert torch.equal(queue.rows, torch.cat([expected[2], expected[1]]))
    assert not queue.head.weight.requires_grad and head.weight.requires_grad  # type: ignore[union-attr]


def steps(config: Config, data: Path) -> tuple[list[float], dict[str, Tensor]]:
    """Losses, and the state at the end."""
    losses, tensors = [], {}
    for report in train(config, Start(data)):
        losses.append(report.metrics["train/loss"])
        if report.due:
            tensors = {name: t.clone() for name, t in report.state.tensors.items()}
    return losses, tensors


def test_two_ranks_have_the_queue_of_one(patterns: Path, ranks: Ranks, within: Within) -> None:
    config = dataclasses.replace(REMEMBERING, train=dataclasses.replace(TINY.train, steps=4))
    losses, tensors = steps(config, patterns)
    without, _ = steps(dataclasses.replace(TINY, train=config.train), patterns)
    assert losses[0] == without[0] and all(a > b for a, b in zip(losses[1:], without[1:], strict=True))  # more candidates
    for found, theirs in ranks(2, steps, config, patterns):
        within("loss", max(abs(a - b) for a, b in zip(losses, found, strict=True)), 1e-9)
        # The rows of a rank are adjacent: [view 0, view 1] of rank 0, then of rank 1.
        ring = theirs.pop("state.rows").view(2, 2, 2, 12, 16).transpose(1, 2).reshape(96, 16)
        within("ring", float((ring - tensors["state.rows"]).abs().max()), 1e-9)
        within("weights", max(float((theirs[name] - tensors[name]).abs().max()) for name in theirs), 1e-9)


def test_stopped_and_resumed_is_bitwise_the_uninterrupted_run(patterns: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(TINY.train, precision="float32", steps=4, checkpoint_every_steps=1)
    config = dataclasses.replace(REMEMBERING, train=settings)
    run(config, patterns, tmp_path / "whole")
    run(config, patterns, tmp_path / "parts", until=2)
    assert sorted(run(config, patterns, tmp_path / "parts")) == [3, 4]
    a, b = (checkpoint.read(tmp_path / part / "step-000000004").tensors for part in ("whole", "parts"))
    assert a.keys() == b.keys() and "state.rows" in a and all(torch.equal(a[key], b[key]) for key in a)


def test_a_size_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match=r"loss\.memory 100 holds no whole batches; use a multiple of 48"):
        dataclasses.replace(TINY, loss=Loss(memory=100))
    with pytest.raises(UserError, match=r"loss\.memory needs a whole batch at once"):
        dataclasses.replace(REMEMBERING, train=dataclasses.replace(TINY.train, micro_batch=4))
    with pytest.raises(UserError, match=r"loss\.memory is for nt_xent"):
        Loss(name="nt_logistic", memory=48)
