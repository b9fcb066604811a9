"""Ranks that hold n and n + 1 images compute what one process does: where W does not divide the batch."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from simclr import checkpoint
from simclr.collectives import all_gather, first_row, from_rank_zero, rank, share_of_mean, world_size
from simclr.config import Config
from simclr.data import loader
from simclr.data.manifest import read_manifest, write_manifest
from simclr.errors import Diverged
from simclr.loss import margin_triplet, nt_logistic, nt_xent, nt_xent_dot
from simclr.shares import share, shares
from simclr.telemetry.guards import Health
from simclr.telemetry.straggler import Stragglers
from simclr.telemetry.timing import Pace
from simclr.train import Start, train
from simclr.views.preprocessing import Preprocessing
from tests.conftest import Within
from tests.support.ranks import Ranks
from tests.support.small import TINY, TUNED, mine

N = 8
State = dict[str, Tensor]


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
    slices = [share(N, me, 3) for me in range(3)]
    expected = torch.cat([x[:, one].flatten(0, 1) for one in slices])
    for one, (every, first, gradient, weight) in zip(slices, ranks(3, gathered, dtype), strict=True):
        assert torch.equal(every, expected) and first == 2 * one.start
        assert torch.equal(gradient[1:], torch.full_like(gradient[1:], 3))
        assert weight == pytest.approx((one.stop - one.start) * 3 / N)


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


# ── The loop ───────────────────────────────────────────────────────────────────────────────────────────────────────

EIGHT = replace(TINY, train=replace(TINY.train, batch_size=N, steps=4, checkpoint_every_steps=2))
TUNES = replace(TUNED, train=replace(TUNED.train, batch_size=N, steps=3))
METHODS: dict[str, Config] = {
    "SimCLR": EIGHT,
    "with a queue": replace(EIGHT, loss=replace(TINY.loss, memory=4 * N)),
    "classifier": TUNES,
    "classifier, classes weigh alike": replace(TUNES, class_weights="balanced"),
}
METRICS = (
    "train/loss",
    "train/linear_loss",
    "train/linear_top1",
    "train/top1",
    "train/contrastive_top1",
    "health/alignment",
    "eval/knn_top1",
)


def trained(name: str, data: str, resumes: str = "", change: dict[str, Any] | None = None) -> list[tuple[dict[str, float], State]]:
    """Metrics and state of every report; from a checkpoint where one is given."""
    config = METHODS[name]
    config = replace(config, train=replace(config.train, **(change or {})))
    start = Start(Path(data), checkpoint=Path(resumes) if resumes else None)
    found = []
    for report in train(config, start):
        kept = {metric: report.metrics[metric] for metric in METRICS if metric in report.metrics}
        state = {key: t.clone() for key, t in report.state.tensors.items()}
        if (queue := state.pop("state.rows", None)) is not None:  # a batch's rows are in the order of ranks, which is of no account
            state["queue"] = torch.stack([rows[rows[:, 0].argsort()] for rows in queue.split(2 * N)])
        found.append((kept, state))
    return found


@pytest.mark.parametrize("name", METHODS)
def test_three_ranks_train_as_one_process_does(ranks: Ranks, within: Within, patterns: Path, name: str) -> None:
    """Eight images a step: 2, 3 and 3. Every metric that is a mean over images, the weights and moments after some steps."""
    expected = trained(name, str(patterns))
    for found in ranks(3, trained, name, str(patterns)):
        for (metrics, state), (others, whole) in zip(found, expected, strict=True):
            assert metrics.keys() == others.keys() and "train/loss" in metrics
            for metric, value in others.items():
                within(metric, abs(metrics[metric] - value), 1e-6 if metric == "health/alignment" else 1e-9)  # that one is float32
            assert state.keys() == whole.keys()
        within("weights, moments, statistics", max(float((state[key] - t).abs().max()) for key, t in whole.items()), 1e-9)


def resumed(data: str, folder: str) -> bool:
    """Whether two steps behind a checkpoint of this very run are those of the run that went on, bit for bit."""
    config = replace(EIGHT, train=replace(EIGHT.train, batch_size=7))
    for report in train(config, Start(Path(data))):
        if report.step == 2 and rank() == 0:
            checkpoint.write(Path(folder), report.state, 1)
    whole = report.state.tensors
    place = from_rank_zero(str(checkpoint.latest(Path(folder), print)))
    *_, again = train(config, Start(Path(data), checkpoint=Path(place)))
    return again.step == report.step == 4 and all(torch.equal(t, whole[key]) for key, t in again.state.tensors.items())


def test_ranks_of_three_and_four_images_resume_to_the_bit(ranks: Ranks, patterns: Path, tmp_path: Path) -> None:
    """Two of them: of three or more, even ones too, DDP adds the gradients of the first step behind a start in another order, since it
    puts its buckets together anew after that step."""
    assert all(ranks(2, resumed, str(patterns), str(tmp_path)))


def test_pieces_of_three_ranks_meet_and_agree(ranks: Ranks, within: Within, patterns: Path) -> None:
    """Two images at a time: a rank of three images has two pieces, like a rank of two, whose pieces are of one image. Every rank's
    statistics and weights stay the same."""
    first, *others = ranks(3, trained, "SimCLR", str(patterns), "", {"micro_batch": 2, "steps": 3})
    for other in others:
        for (metrics, state), (same, whole) in zip(other, first, strict=True):
            assert metrics == same and all(torch.equal(state[key], t) for key, t in whole.items())
    assert all(np.isfinite(metrics["train/loss"]) for metrics, _ in first)


def refused(data: str) -> str:
    with pytest.raises(Diverged) as raised:
        health = Health(nn.Linear(1, 1), torch.device("cpu"), N, Path(data), 1.0, "stop")
        own = shares(N, 3)[rank()]
        z = torch.full((2 * own, 2), float("nan"))
        health.see(1, torch.arange(own) + 3 * rank(), z, torch.tensor(float("nan")))
        health.report(1, {"train/loss": torch.tensor(float("nan"))}, Pace(1, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0))
    return str(raised.value)


def test_all_images_of_a_step_of_three_ranks_are_known_to_be_all(ranks: Ranks, patterns: Path) -> None:
    for said in ranks(3, refused, str(patterns)):
        assert "on rank 0, 1, 2" in said and "(every image of the step: BatchNorm or the weights spread the fault of one image)" in said


def test_a_rank_with_an_image_more_is_no_straggler_for_it() -> None:
    """Of eight images, 2, 3 and 3: times in proportion name nobody, nor does time that is the same for all; half again as long does."""
    for own_s, named in (([2.0, 3.0, 3.0], []), ([1.0, 1.0, 1.0], []), ([2.0, 3.0, 5.6], [2]), ([4.0, 3.0, 3.0], [0])):
        watch = Stragglers(3, N)
        watch.see(own_s, 50)
        assert watch.named() == named, own_s
    watch = Stragglers(4, 11)  # 2, 3, 3 and 3
    assert watch.see([1.0, 1.0, 1.0, 1.6], 50)["speed/slowest_rank"] == 3 and watch.named() == [3]
    watch = Stragglers(4, N)  # two each
    assert watch.see([1.0, 1.0, 1.0, 1.25], 50)["speed/straggle"] == 1.25 and watch.named() == [3]
