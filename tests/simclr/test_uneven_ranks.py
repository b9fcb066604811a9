"""Ranks that hold n and n + 1 images compute what one process does: where W does not divide the batch."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from simclr.collectives import all_gather, first_row, share_of_mean, world_size
from simclr.config import Config
from simclr.data import loader
from simclr.data.manifest import read_manifest, write_manifest
from simclr.loss import margin_triplet, nt_logistic, nt_xent, nt_xent_dot
from simclr.shares import share
from simclr.views.preprocessing import Preprocessing
from tests.conftest import Within
from tests.support.ranks import Ranks
from tests.support.small import TINY, mine

N = 8


def test_shares_are_the_whole_in_order_and_differ_by_one_at_most() -> None:
    """And where W divides N they are the slices of before: rank r has the images from r N / W on."""
    for total in (1, 2, 8, 23, 24, 1024, 4096):
        for world in range(1, min(total, 130) + 1):
            slices = [share(total, rank, world) for rank in range(world)]
            assert [i for one in slices for i in range(total)[one]] == list(range(total))
            sizes = [one.stop - one.start for one in slices]
            assert min(sizes) == total // world and max(sizes) == sizes[-1] == -(-total // world)
            if total % world == 0:
                assert slices == [slice(rank * (total // world), (rank + 1) * (total // world)) for rank in range(world)]


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "nt_xent": lambda z: nt_xent(z, 0.2, images=N),
    "with a queue": lambda z: nt_xent(z, 0.2, nn.functional.normalize(torch.arange(10.0).double().cos().view(2, 5), dim=1), N),
    "dot": lambda z: nt_xent_dot(z, 1.0, N),
    "logistic": lambda z: nt_logistic(z, 0.3, images=N),
    "logistic, semi-hard": lambda z: nt_logistic(z, 0.3, True, N),
    "triplet": lambda z: margin_triplet(z, 0.4, images=N),
    "triplet, semi-hard": lambda z: margin_triplet(z, 0.4, True, N),
}


def loss_and_gradients(streams: bool) -> dict[str, tuple[float, list[Tensor]]]:
    """Of each loss the mean over ranks, and the parameters' gradients after DDP, of a small network on two views of N images."""
    import simclr.loss as module

    before, module.STREAMED_FROM = module.STREAMED_FROM, 0 if streams else module.STREAMED_FROM
    x = torch.randn(2 * N, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = {}
    try:
        for name, loss_of in LOSSES.items():
            with torch.random.fork_rng():
                torch.manual_seed(2)
                network: nn.Module = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 5)).double()
            if world_size() > 1:
                network = DistributedDataParallel(network)
            loss = loss_of(network(mine(x, views=2)))
            loss.backward()
            mean = all_gather(loss.detach().view(1)).mean().item()
            found[name] = mean, [p.grad for p in network.parameters() if p.grad is not None]
    finally:
        module.STREAMED_FROM = before
    return found


@pytest.mark.parametrize(("world", "streams"), [(3, False), (3, True), (5, False)])
def test_loss_and_gradient_of_eight_images_are_those_of_one_process(ranks: Ranks, within: Within, world: int, streams: bool) -> None:
    expected = loss_and_gradients(False)
    for found in ranks(world, loss_and_gradients, streams):
        for name, (loss, gradients) in expected.items():
            within(f"{name}, W = {world}", abs(found[name][0] - loss), 1e-12)
            assert len(gradients) == 4 and max(float(g.abs().max()) for g in gradients) > 1e-3
            off = max(float((a - b).abs().max()) for a, b in zip(found[name][1], gradients, strict=True))
            within(f"gradient of {name}, W = {world}", off, 1e-12)


def gathered(dtype: torch.dtype) -> tuple[Tensor, int, Tensor, float]:
    x = mine(torch.arange(4.0 * N).view(2 * N, 2).to(dtype), views=2).requires_grad_()
    every = all_gather(x, N)
    (every.detach() * every).sum().backward()
    assert x.grad is not None
    own = len(x) // 2
    return every.detach(), first_row(x, N), x.grad / x.detach().clamp_min(1), float(share_of_mean(torch.ones(()), own, N))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_gather_of_uneven_rows_is_in_the_order_of_ranks_and_its_gradient_the_sum(ranks: Ranks, dtype: torch.dtype) -> None:
    """Exactly: rows are moved and never added to others' (their gradients are, W alike ones here)."""
    x = torch.arange(4.0 * N).view(2, N, 2).to(dtype)
    shares = [share(N, rank, 3) for rank in range(3)]
    expected = torch.cat([x[:, one].flatten(0, 1) for one in shares])
    for rank, (every, first, gradient, weight) in enumerate(ranks(3, gathered, dtype)):
        assert torch.equal(every, expected) and first == 2 * shares[rank].start
        assert torch.equal(gradient[1:], torch.full_like(gradient[1:], 3))
        assert weight == pytest.approx((shares[rank].stop - shares[rank].start) * 3 / N)


# ── The loader ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def five_shards(patterns: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five times the patterns' 240 training images, in a shard each."""
    out = tmp_path_factory.mktemp("five")
    manifest = read_manifest(patterns)
    (one,) = manifest.splits["train"]
    links = tuple(replace(one, name=f"train-{number:05}.beton") for number in range(5))
    for link in (*links, *manifest.splits["test"]):
        os.link(patterns / (one.name if link in links else link.name), out / link.name)
    write_manifest(out, replace(manifest, splits={**manifest.splits, "train": links}))
    return out


def grouped(groups: int) -> Config:
    return replace(TINY, train=replace(TINY.train, batch_size=N, shard_groups=groups))


def drawn(groups: int, data: Path, rank: int, world: int, steps: int) -> list[list[int]]:
    """Ids of this rank's images of some steps, from a folder with no training shards but those of its groups."""
    with tempfile.TemporaryDirectory() as node:
        whole, held = read_manifest(data), grouped(groups).groups_of(rank, world)
        for name in {"manifest.json", *(shard.name for group in held for shard in whole.part(groups, group))}:
            os.link(data / name, Path(node) / name)
        with closing(loader.batches(grouped(groups), Path(node), 0, rank, world)) as stream:
            return [batch.ids.tolist() for batch in itertools.islice(stream, steps)]


@pytest.mark.parametrize("groups", [1, 2])
def test_a_step_has_the_same_images_on_three_ranks_of_two_groups(five_shards: Path, groups: int) -> None:
    """Rank 1 of 3 reads both groups; two ranks, which divide batch and groups, have the slices of before."""
    assert [list(grouped(2).groups_of(rank, 3)) for rank in range(3)] == [[0], [0, 1], [1]]
    of = {world: [drawn(groups, five_shards, rank, world, 5) for rank in range(world)] for world in (2, 3, 5)}
    steps = {world: [list(itertools.chain.from_iterable(step)) for step in zip(*every, strict=True)] for world, every in of.items()}
    assert steps[2] == steps[3] == steps[5] and all(len(set(step)) == N for step in steps[2])
    assert [len(rank[0]) for rank in of[3]] == [2, 3, 3]
    group_of = [[i // 240 % groups for i in step] for step in steps[3]]
    assert all(found == sorted(found) and found.count(0) == N // groups for found in group_of)


@pytest.mark.parametrize("limit", [None, 100])
def test_three_ranks_of_two_groups_evaluate_what_two_do(five_shards: Path, limit: int | None) -> None:
    """In the same order, each image once, and no rank more than its part."""
    seen = Preprocessing.of(TINY.views)

    def every(world: int) -> list[list[int]]:
        streams = [loader.in_order(five_shards, "train", seen, 64, limit, 1, rank, world, 2) for rank in range(world)]
        return [[i for batch in stream for i in batch.ids.tolist()] for stream in streams]

    two, three = every(2), every(3)
    whole = list(itertools.chain.from_iterable(three))
    assert whole == list(itertools.chain.from_iterable(two)) and len(set(whole)) == len(whole) == (limit or 5 * 240)
    if limit:
        assert max(map(len, three)) - min(map(len, three)) <= 2
