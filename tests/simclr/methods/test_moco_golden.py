"""MoCo against numbers of the authors' code (golden/README.md): loss, queue, moving average, shuffle, three steps on two ranks, symmetric
loss and kNN."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simclr.collectives import all_gather, data_parallel, rank, world_size
from simclr.config import Encoder, Optim, Train
from simclr.evaluation.knn import nearest
from simclr.family import MoCo
from simclr.loss import info_nce_queue
from simclr.methods.average import average_of, move
from simclr.methods.method import Method, Start
from simclr.methods.moco import Shuffle, moco
from simclr.methods.queue import Queue
from simclr.networks.batchnorm import BatchNorm
from simclr.optim import build_optimizer
from simclr.train import take_step
from tests.conftest import Within
from tests.support.paths import GOLDEN
from tests.support.ranks import Ranks


def golden(name: str) -> dict[str, Tensor]:
    """The numbers of a file, float32 ones as float64."""
    with np.load(GOLDEN / "family" / f"{name}.npz") as file:
        found = {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}
    return {key: t.double() if t.dtype == torch.float32 else t for key, t in found.items()}


def off(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).detach().abs().max())


# ── Loss, queue, average ───────────────────────────────────────────────────────────────────────────────────────────


def losses_and_queue() -> dict[str, float]:
    """The largest deviations from the golden numbers of this many ranks."""
    numbers, world, me = golden("moco"), world_size(), rank()
    found = dict.fromkeys(("loss", "gradient", "logits", "queue"), 0.0)
    queue = Queue(nn.Identity(), nn.Identity(), numbers[f"w{world}_queue"].T.contiguous())
    first = int(numbers[f"w{world}_ptr"]) // 8  # the step that writes there
    for step in range(3):
        q, k = (numbers[f"w{world}_{name}"][step, me] for name in "qk")
        k = F.normalize(k, dim=1)
        for t in ("0.07", "0.2"):
            raw = q.clone().requires_grad_()
            loss = info_nce_queue(raw, k, queue.rows, float(t), 8)
            loss.backward()
            assert raw.grad is not None and not k.requires_grad
            u = F.normalize(q, dim=1)
            logits = torch.cat([(u * k).sum(1, keepdim=True), u @ queue.rows.T], 1) / float(t)
            for name, ours in (("loss", loss), ("gradient", raw.grad), ("logits", logits)):
                theirs = numbers[f"w{world}_T{t}_{'grad_q' if name == 'gradient' else name}_{step}"][me]
                found[name] = max(found[name], off(ours, theirs))
        queue.enqueue(all_gather(k, 8), first + step)
        found["queue"] = max(found["queue"], off(queue.rows, numbers[f"w{world}_queue_after_{step}"].T))
        assert (first + step + 1) * 8 % 32 == int(numbers[f"w{world}_ptr_after_{step}"])
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_loss_gradient_and_queue_of_three_steps(ranks: Ranks, within: Within, world: int) -> None:
    for found in ranks(world, losses_and_queue):
        for name, deviation in found.items():
            within(f"{name}, W = {world}", deviation, 1e-12)


@pytest.mark.parametrize("keep", [0.999, 0.99])
def test_the_average_moves_as_the_authors(within: Within, keep: float) -> None:
    numbers = golden("moco")
    names = ("w", "b", "g", "bn.weight", "bn.bias")

    def parameters(what: str) -> nn.ParameterList:
        return nn.ParameterList([nn.Parameter(numbers[f"m{keep}|{name}|{what}"]) for name in names])

    average = average_of(parameters("key_init"))
    for step in range(3):
        move(average, parameters(f"query_{step}"), keep)
        for name, p in zip(names, average, strict=True):
            within("average", off(p, numbers[f"m{keep}|{name}|key_{step}"]), 1e-14)


class Seen(nn.Module):
    """Passes rows on, and keeps them."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return x


def shuffled() -> tuple[Tensor, Tensor]:
    numbers, seen = golden("moco"), Seen()
    with patch("simclr.keyed.permutation", lambda *given: numbers["shuffle_perm"].numpy()):
        shuffle = Shuffle(0, 8, torch.device("cpu"))
        shuffle.draw(0)
    back = shuffle(numbers["shuffle_x"][rank()], seen)
    return seen.seen, back


def test_a_shuffle_sends_images_where_the_authors_send_them_and_brings_keys_back(ranks: Ranks) -> None:
    numbers = golden("moco")
    for me, (seen, back) in enumerate(ranks(2, shuffled)):
        assert torch.equal(seen, numbers["shuffle_seen"][me]) and torch.equal(back, numbers["shuffle_x"][me])


# ── Three steps on two ranks ───────────────────────────────────────────────────────────────────────────────────────


class Vectors(nn.Module):
    """(n, 6) → h (n, 8), with BatchNorm over this rank's rows."""

    d_h = 8

    def __init__(self, config: Any = None) -> None:
        super().__init__()
        self.l1, self.bn = nn.Linear(6, 8), BatchNorm(8, ranks=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.l1(x)).relu()


def of_vectors(**settings: Any) -> tuple[MoCo, Method]:
    """MoCo in float64 on an encoder of rows of numbers, in place of images."""
    train = Train(batch_size=settings.pop("batch_size", 8), steps=3, precision="float64")
    optim = Optim(name="sgd", base_lr=0.5, warmup_epochs=0, weight_decay=0.01)
    config = MoCo(encoder=Encoder(batchnorm="per_worker"), optim=optim, train=train, **settings)
    with patch("simclr.methods.moco.encoder_of", Vectors):
        return config, moco(config, Start(Path()))


def ours(name: str) -> str:
    """The name of one of the authors' parameters here."""
    return name.replace("fc.", "head.") if name.startswith("fc.") else f"encoder.{name}"


def trained() -> tuple[dict[str, float], dict[str, Tensor]]:
    """Deviations of three steps, and this rank's running statistics after each."""
    numbers, me = golden("moco_train"), rank()
    config, made = of_vectors(queue=16, d_out=5, temperature=float(numbers["T"]), ema=float(numbers["m"]), shuffle=True)
    rate = float(numbers["lr"])
    method = replace(made, groups=tuple(replace(group, schedules={"lr": lambda step: rate}) for group in made.groups))
    names = [key.removeprefix("init|") for key in numbers if key.startswith("init|")]
    for module in (method.network, method.state):
        module.load_state_dict({ours(name): numbers[f"init|{name}"] for name in names}, strict=False)
    method.state.get_buffer("rows").copy_(numbers["queue"].T)
    network = data_parallel(method.network, 25.0, False)
    optimizer = build_optimizer(method.groups, config.optim)
    found, statistics = dict.fromkeys(("loss", "logits", "queue", "query", "key", "gradient"), 0.0), {}

    def see(what: str, a: Tensor, b: Tensor) -> None:
        found[what] = max(found[what], off(a, b))

    for step in range(3):
        rows = method.state.get_buffer("rows").clone()
        views = torch.stack([numbers["im_q"][step, me], numbers["im_k"][step, me]])
        method = replace(method, inputs=lambda batch, some, views=views: {"views": views})  # type: ignore[misc]
        batch: Any = SimpleNamespace(ids=torch.arange(4))
        with patch("simclr.keyed.permutation", lambda seed, step, size, stream: numbers["perm"][step].numpy()):
            outputs, targets, loss, _ = take_step(method, network, optimizer, config, batch, step)
        u, k = F.normalize(outputs["z"][0], dim=1), targets["keys"][0]
        see("loss", loss, numbers[f"loss_{step}"][me])
        see("logits", torch.cat([(u * k).sum(1, keepdim=True), u @ rows.T], 1) / config.temperature, numbers[f"logits_{step}"][me])
        see("queue", method.state.get_buffer("rows"), numbers[f"queue_{step}"].T)
        for name in names:
            p = method.network.get_parameter(ours(name))
            see("query", p, numbers[f"q_{step}|{name}"])
            see("key", method.state.get_parameter(ours(name)), numbers[f"k_{step}|{name}"])
            if step == 0:
                assert p.grad is not None
                see("gradient", p.grad, numbers[f"grad_0|{name}"])
        for part, module in (("q", method.network), ("k", method.state)):
            for name in ("running_mean", "running_var"):
                statistics[f"{part}_{step}|{name}"] = module.get_buffer(f"encoder.bn.{name}").clone()
    return found, statistics


def test_three_steps_on_two_ranks_are_the_authors(ranks: Ranks, within: Within) -> None:
    """Running variances are biased here and unbiased there, of four rows; and there each step begins with rank 0's running statistics on
    every rank, while here each keeps its own, which training does not read."""
    numbers = golden("moco_train")
    for me, (found, statistics) in enumerate(ranks(2, trained)):
        for name, deviation in found.items():
            within(name, deviation, 1e-12)
        for part in "qk":
            for name, begin, factor in (("running_mean", 0.0, 1.0), ("running_var", 1.0, 3 / 4)):
                theirs = expected = torch.full((8,), begin, dtype=torch.float64)
                for step in range(3):
                    there = numbers[f"{part}_{step}|bn.{name}"]
                    batch = (there[me] - 0.9 * theirs) / 0.1
                    theirs, expected = there[0], 0.9 * expected + 0.1 * factor * batch
                    within("running statistics", off(statistics[f"{part}_{step}|{name}"], expected), 1e-12)


# ── The notebook ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("symmetric", "kind"), [(True, "sym"), (False, "asym")])
def test_the_symmetric_loss_is_a_sum_over_one_queue(within: Within, symmetric: bool, kind: str) -> None:
    """Each direction counts once; then the keys of view 1 enter, and those of view 2 behind them."""
    numbers = golden("moco_cifar")
    _, method = of_vectors(batch_size=4, queue=16, d_out=6, temperature=0.1, symmetric=symmetric)
    method.state.get_buffer("rows").copy_(numbers["sym_queue"].T)
    both = torch.stack([numbers["sym_1"], numbers["sym_2"]])
    raw, keys = both[: 2 if symmetric else 1].clone().requires_grad_(), F.normalize(both if symmetric else both[1:], dim=-1)
    loss, _ = method.loss({"z": raw}, {"keys": keys}, 0)
    loss.backward()
    assert raw.grad is not None
    within("loss", off(loss, numbers[f"{kind}_loss"]), 1e-12)
    for view, gradient in enumerate(raw.grad, 1):
        within("gradient", off(gradient, numbers[f"{kind}_grad_{view}"]), 1e-12)
    method.after({}, {"keys": keys}, 1 if symmetric else 2)  # the step that writes at row 8
    within("queue", off(method.state.get_buffer("rows"), numbers[f"{kind}_queue_after"].T), 1e-12)


@pytest.mark.parametrize(("k", "t"), [(20, 0.1), (10, 0.07)])
def test_knn_orders_classes_as_the_notebook(k: int, t: float) -> None:
    """Those with votes: the others come last in no defined order."""
    numbers = golden("moco_cifar")
    votes = nearest(numbers["knn_bank"].float(), numbers["knn_labels"], numbers["knn_features"].float(), k, t).votes
    voted = (votes > 0).sum(1)
    assert voted.min() > 1
    for ours_, theirs, some in zip(votes.argsort(1, descending=True), numbers[f"knn_order_k{k}_t{t}"], voted, strict=True):
        assert torch.equal(ours_[:some], theirs[:some])
