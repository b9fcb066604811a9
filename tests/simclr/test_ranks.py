"""W ranks compute what one process does: loss and gradient, BatchNorm, twenty steps, features."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from simclr import checkpoint
from simclr.collectives import all_gather, data_parallel, from_rank_zero, rank, world_size
from simclr.config import Config
from simclr.data import loader
from simclr.errors import Diverged
from simclr.evaluation import features
from simclr.loss import margin_triplet, nt_logistic, nt_xent
from simclr.methods.simclr import build_model
from simclr.networks.batchnorm import BatchNorm
from simclr.train import Start, train
from simclr.views.draw import crop_boxes, draw_colours
from simclr.views.preprocessing import Preprocessing
from simclr.views.two_views import two_views
from tests.conftest import Within
from tests.support.paths import GOLDEN
from tests.support.ranks import Ranks
from tests.support.small import TINY, mine

# ── Loss ───────────────────────────────────────────────────────────────────────────────────────────────────────────


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "τ = 0.05": lambda z: nt_xent(z, 0.05),
    "τ = 0.5": lambda z: nt_xent(z, 0.5),
    "τ = 1": lambda z: nt_xent(z, 1.0),
    "logistic": lambda z: nt_logistic(z, 0.3),
    "logistic, semi-hard": lambda z: nt_logistic(z, 0.3, semi_hard=True),
    "triplet": lambda z: margin_triplet(z, 0.4),
    "triplet, semi-hard": lambda z: margin_triplet(z, 0.4, semi_hard=True),
}


def loss_and_gradients(name: str) -> tuple[float, list[Tensor]]:
    """Loss, averaged over ranks, and the parameters' gradients after DDP, of a small network on 12 images' two views."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(24, 7, dtype=torch.float64, generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        network: nn.Module = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 5)).double()
    if world_size() > 1:
        network = DistributedDataParallel(network)
    loss = LOSSES[name](network(mine(x, views=2)))
    loss.backward()
    mean = all_gather(loss.detach().view(1)).mean().item()
    return mean, [p.grad for p in network.parameters() if p.grad is not None]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_are_those_of_one_process(ranks: Ranks, within: Within, world: int, name: str) -> None:
    """The classic mistakes: negatives of one rank only change the loss, a gather without gradient gives 1/W of the cross terms."""
    expected, gradients = loss_and_gradients(name)
    for loss, found in ranks(world, loss_and_gradients, name):
        within(f"loss, W = {world}", abs(loss - expected), 1e-9)
        assert len(found) == len(gradients) == 4 and max(g.abs().max() for g in gradients) > 1e-3
        within(f"gradient, W = {world}", max(float((a - b).abs().max()) for a, b in zip(found, gradients, strict=True)), 1e-9)


def replica(z: np.ndarray, temperature: float) -> tuple[float, Tensor]:
    """This rank's loss and the gradient of the mean over ranks with respect to its rows."""
    own = torch.tensor(z[rank()], requires_grad=True)
    loss = nt_xent(own, temperature)
    (grad,) = torch.autograd.grad(loss, own)  # of the sum over ranks: DDP divides by their number
    return loss.item(), grad / world_size()


def test_four_replicas_have_the_official_losses_and_gradients(ranks: Ranks, within: Within) -> None:
    data = np.load(GOLDEN / "nt_xent_replicas.npz")
    found = ranks(4, replica, data["z"], float(data["temperature"]))
    within("losses", float(np.abs(2 * np.array([loss for loss, _ in found]) - data["replica_loss"]).max()), 1e-10)
    within("mean loss", abs(2 * np.mean([loss for loss, _ in found]) - float(data["loss"])), 1e-10)
    within("gradient", float(np.abs(2 * np.stack([grad.numpy() for _, grad in found]) - data["grad"]).max()), 1e-10)


# ── BatchNorm ──────────────────────────────────────────────────────────────────────────────────────────────────────


def normalised(shape: tuple[int, ...], offset: float, over: int | None, device: str = "cpu") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(shape, dtype=torch.float64, generator=generator) + offset
    target = torch.randn(shape, dtype=torch.float64, generator=generator)
    norm = BatchNorm(shape[1], ranks=over).to(device, torch.float64)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, shape[1]))
        assert norm.bias is not None
        norm.bias.copy_(torch.linspace(-1, 1, shape[1]))
    own = mine(x).to(device).requires_grad_()
    y = norm(own)
    (y * mine(target).to(device)).sum().backward()
    assert own.grad is not None and norm.weight.grad is not None and norm.bias.grad is not None
    parameters = all_gather(torch.stack([norm.weight.grad, norm.bias.grad])[None].cpu()).sum(0)
    return {
        "y": all_gather(y.detach().cpu()),
        "dx": all_gather(own.grad.cpu()),
        "parameters": parameters,
        "mean": norm.running_mean.cpu(),
        "var": norm.running_var.cpu(),
    }


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(("shape", "offset"), [((8, 3), 0.0), ((8, 3, 5, 4), 0.0), ((8, 3, 5, 4), 1000.0)])
def test_batchnorm_is_that_of_the_whole_batch(ranks: Ranks, within: Within, world: int, shape: tuple[int, ...], offset: float) -> None:
    """Output, all gradients and the running statistics; also where the mean is far larger than the standard deviation."""
    expected = normalised(shape, offset, None)
    reference = nn.functional.batch_norm  # the definition, so that one process is right too
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) + offset
    y = reference(x, None, None, torch.linspace(0.5, 2, 3).double(), torch.linspace(-1, 1, 3).double(), True, 0.1, 1e-5)
    torch.testing.assert_close(expected["y"], y, rtol=0, atol=1e-9)
    for found in ranks(world, normalised, shape, offset, None):
        for name, value in expected.items():
            # Where the mean is a thousand standard deviations, 16 digits leave this precision.
            scale, bound = float(value.abs().max().clamp_min(1)), 1e-8 if offset else 1e-10
            within(f"{name}{', mean 1000' if offset else ''}", float((found[name] - value).abs().max()) / scale, bound)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("world", [1, 2])
def test_batchnorm_on_cuda_is_that_of_the_whole_batch(ranks: Ranks, within: Within, world: int) -> None:
    expected = normalised((8, 3, 5, 4), 0.0, None)
    for found in ranks(world, normalised, (8, 3, 5, 4), 0.0, None, "cuda"):
        for name, value in expected.items():
            within(name, float((found[name] - value).abs().max()), 1e-10)


def test_per_worker_batchnorm_differs_on_purpose(ranks: Ranks) -> None:
    together, apart = (ranks(2, normalised, (8, 3), 0.0, over)[0]["y"] for over in (None, 1))
    assert (together - apart).abs().max() > 0.1


# ── The loop ───────────────────────────────────────────────────────────────────────────────────────────────────────


def trained(config: Config, data: str) -> tuple[list[float], dict[str, Tensor], float]:
    """Losses of every step, the final weights and the final kNN score."""
    losses, state, knn = [], {}, -1.0
    for report in train(config, Start(Path(data))):
        losses.append(report.metrics["train/loss"])
        knn = report.metrics.get("eval/knn_top1", knn)
        if report.due:
            state = {name: t.clone() for name, t in report.state.tensors.items()}
    return losses, state, knn


def test_twenty_steps_are_the_same_on_one_two_and_four_ranks(ranks: Ranks, within: Within, patterns: Path) -> None:
    """And the same as in tests/golden/curve.json: a change of the numbers must be intended. The views are float32, and their last bits
    depend on the CPU: the AMD that wrote the curve repeats it to 1e-9, an Intel with AVX-512 is 7e-8 off."""
    losses, state, knn = trained(TINY, str(patterns))
    assert len(losses) == 20 and losses[-1] < losses[0]
    golden = json.loads((GOLDEN / "curve.json").read_text())
    within("loss, frozen curve", float(np.abs(np.subtract(losses, golden["train/loss"])).max()), 1e-6)
    for world in (2, 4):
        for found, weights, score in ranks(world, trained, TINY, str(patterns)):
            within(f"loss, W = {world}", float(np.abs(np.subtract(found, losses)).max()), 1e-9)
            assert weights.keys() == state.keys()
            within(f"weights, W = {world}", max(float((weights[name] - t).abs().max()) for name, t in state.items()), 1e-7)
            assert score == knn


def resumed(config: Config, data: str, folder: str, until: int) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and last state of a run from the newest checkpoint in `folder` to step `until`, where it writes one."""
    losses, state = [], {}
    found = from_rank_zero(str(checkpoint.latest(Path(folder), print) or "") if Path(folder).exists() else "")
    for report in train(config, Start(Path(data), checkpoint=Path(found) if found else None)):
        losses.append(report.metrics["train/loss"])
        if report.step == until:
            state = {name: t.clone() for name, t in report.state.tensors.items()}
            if rank() == 0:
                checkpoint.write(Path(folder), report.state, 1)
            break
    return losses, state


def test_a_run_goes_on_with_another_number_of_workers(ranks: Ranks, within: Within, patterns: Path, tmp_path: Path) -> None:
    """Three steps on 2 workers, four on 4, three on 1: as ten on one. Step 7 lies in mid-epoch."""
    config = dataclasses.replace(TINY, train=dataclasses.replace(TINY.train, checkpoint_every_steps=1, steps=10))
    losses, state = resumed(config, str(patterns), str(tmp_path / "whole"), 10)
    parts: list[float] = []
    for world, until in ((2, 3), (4, 7)):
        parts += ranks(world, resumed, config, str(patterns), str(tmp_path / "parts"), until)[0][0]
    rest, weights = resumed(config, str(patterns), str(tmp_path / "parts"), 10)
    assert len(parts) == 7 and len(rest) == 3
    within("loss", float(np.abs(np.subtract(parts + rest, losses)).max()), 1e-9)
    assert weights.keys() == state.keys() and any(name.startswith("optimizer.") for name in state)
    within("weights, momentum, statistics", max(float((weights[name] - t).abs().max()) for name, t in state.items()), 1e-9)


def seen(config: Config, data: str, steps: int, threads: int) -> dict[tuple[int, int], list[Any]]:
    """(epoch, sample id) → crop boxes, colours and the pixels of both views, of this rank's share of the first `steps` batches."""
    stream = loader.batches(config, Path(data), 0, rank(), world_size(), threads)
    found: dict[tuple[int, int], list[Any]] = {}
    for _ in range(steps):
        batch = next(stream)
        ids = batch.ids.numpy().copy()
        sizes = np.broadcast_to(np.array([72, 96] if batch.images[0].ndim == 5 else [32, 32]), (len(ids), 2))
        boxes = crop_boxes(config.views, config.seed, batch.epoch, ids, sizes)
        colours = dataclasses.astuple(draw_colours(config.views, config.seed, batch.epoch, ids))
        views = two_views(batch.images[0], batch.ids, batch.epoch, config.views, config.seed, torch.device("cpu")).clone()
        n = len(ids)
        for i, sample in enumerate(ids.tolist()):
            parameters = [row[k] for row in colours for k in (i, n + i)]
            found[batch.epoch, sample] = [boxes[i], *parameters, views[i].numpy(), views[n + i].numpy()]
    stream.close()
    return found


@pytest.mark.parametrize("kind", ["raw", pytest.param("photographs", marks=pytest.mark.long)])
def test_256_samples_are_seen_alike_by_any_number_of_workers_and_threads(
    ranks: Ranks, patterns: Path, photographs: Path, kind: str
) -> None:
    """View parameters and pixels, exactly: 1, 2 and 4 workers, 1 and 3 threads, batches of 64 and of 32."""
    data = str(patterns if kind == "raw" else photographs)
    views = TINY.views if kind == "raw" else dataclasses.replace(TINY.views, size_px=40, blur_p=(1.0, 0.1), solarise_p=(0.0, 0.5))
    settings = {n: dataclasses.replace(TINY, views=views, train=dataclasses.replace(TINY.train, batch_size=n)) for n in (16, 32)}
    whole = seen(settings[32], data, 8, 1)  # into the second epoch
    assert len(whole) == 256
    others = [seen(settings[32], data, 8, 3), seen(settings[16], data, 16, 1)]
    for world in (2, 4):
        parts = ranks(world, seen, settings[32], data, 8, 1)
        assert [len(part) for part in parts] == [256 // world] * world
        others.append({key: row for part in parts for key, row in part.items()})
    for other in others:
        shared = whole.keys() & other.keys()  # smaller batches leave less of an epoch out
        assert len(shared) >= 240
        for key in shared:
            assert all(np.array_equal(a, b) for a, b in zip(whole[key], other[key], strict=True)), key


def embedded(data: str, limit: int | None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    kernel = torch.randn(3 * 32 * 32, 4, generator=generator)
    found = features.embed_split(_Flat(kernel), Path(data), "test", Preprocessing.of(TINY.views), limit, batch_size=7)
    return [found.h, found.y, found.ids]


class _Flat(nn.Module):
    def __init__(self, kernel: Tensor) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).double() @ self.kernel.double()  # in float32 a row's last bits depend on how many are beside it


@pytest.mark.parametrize("limit", [None, 3, 59])
def test_features_arrive_whole_and_in_order_on_every_rank(ranks: Ranks, patterns: Path, limit: int | None) -> None:
    expected = embedded(str(patterns), limit)
    assert len(expected[0]) == (limit or 60)
    for found in ranks(4, embedded, str(patterns), limit):
        torch.testing.assert_close(found[0], expected[0])
        assert torch.equal(found[1], expected[1]) and torch.equal(found[2], expected[2])


def diverging(data: str) -> str:
    """The error if rank 1 alone has a loss that is not finite."""
    from simclr.methods import simclr as module

    good, calls = module.nt_xent, []

    def spoilt(z: Tensor, temperature: float, memory: Tensor | None, images: int | None = None) -> Tensor:
        calls.append(1)
        return good(z, temperature, memory, images) * (float("nan") if len(calls) == 3 else 1)

    if rank() == 1:
        module.nt_xent = spoilt
    config = dataclasses.replace(TINY, train=dataclasses.replace(TINY.train, batch_size=8, steps=8, report_every_steps=7))
    try:
        return lost(config, data)
    finally:
        module.nt_xent = good


def lost(config: Config, data: str) -> str:
    """The error of a run that is not finite."""
    with pytest.raises(Diverged) as raised:
        list(train(config, Start(Path(data))))
    return str(raised.value)


def test_a_loss_that_is_not_finite_names_rank_and_step_on_every_rank(ranks: Ranks, patterns: Path) -> None:
    """The first step that was bad, though the next report is due at step 7, when every rank's weights are NaN."""
    for text in ranks(2, diverging, str(patterns)):
        assert text.startswith("the loss is not finite at step 3 on rank 1, though all projections are finite; train with a lower")


def blackened(data: str) -> str:
    """The error if one image of rank 0's second batch is not finite, and BatchNorm sees only each rank's own rows."""
    from simclr.methods import method as module

    good, calls = module.views_for, []

    def spoilt(*arguments: Any) -> list[Tensor]:
        calls.append(1)
        found = good(*arguments)
        if rank() == 0 and len(calls) == 2:
            found[0][0, 0, 0, 0] = float("inf")
        return found

    module.views_for = spoilt
    config = dataclasses.replace(TINY, train=dataclasses.replace(TINY.train, batch_size=8, steps=5, report_every_steps=5))
    config = dataclasses.replace(config, encoder=dataclasses.replace(TINY.encoder, batchnorm="per_worker"))
    try:
        return lost(config, data)
    finally:
        module.views_for = good


def test_input_that_is_not_finite_names_the_rank_it_came_from(ranks: Ranks, patterns: Path) -> None:
    """At that step every rank's loss is NaN, because all ranks share negatives; only rank 0's projections are NaN."""
    for text in ranks(2, blackened, str(patterns)):
        four = r"(\d+ \(sample \d+ of train-00000.beton\)(, )?){4}"
        assert re.match(rf"the loss is not finite at step 2 on rank 0, of images {four}; train with a lower", text)


# ── torch.compile ──────────────────────────────────────────────────────────────────────────────────────────────────


def compiled() -> dict[str, float]:
    """Differences of the compiled model's outputs and gradients from the eager ones; a graph break raises."""
    x = mine(torch.randn(8, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(6)))
    found: list[list[Tensor]] = []
    for compiling in (False, True):
        model = build_model(TINY, 10).double()
        torch._dynamo.reset()
        network: Any = torch.compile(model, backend="aot_eager", fullgraph=True) if compiling else model
        z, logits = (rows.flatten(0, 1) for rows in network({"views": x.unflatten(0, (2, -1))}).values())
        (nt_xent(z, 0.5) + logits.square().sum()).backward()
        found.append([z, logits, model.encoder.groups[0][0].body[1].running_var, *(p.grad for p in model.parameters())])
    names = ["z", "logits", "running variance", *("gradient",) * len(found[0][3:])]
    return {name: max(float((a - b).abs().max()) for n, a, b in zip(names, *found, strict=True) if n == name) for name in set(names)}


def exchanged(bucket_mib: float | None, compress: bool) -> list[Tensor]:
    """Gradients of a step of the whole model on this rank's share of eight random views; its own alone without buckets."""
    x = mine(torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(6)), views=2)
    model = build_model(TINY)
    network = data_parallel(model, bucket_mib, compress) if bucket_mib else model  # by name: without it ranks exchange nothing
    nt_xent(network({"views": x.unflatten(0, (2, -1))})["z"].flatten(0, 1), 0.5).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_buckets_change_nothing_and_compressed_gradients_are_those_to_bfloat16(ranks: Ranks, within: Within) -> None:
    (whole, _), (cut, _), (small, other) = (ranks(2, exchanged, *how) for how in ((25.0, False), (0.01, False), (25.0, True)))
    for a, b, c, d, *own in zip(whole, cut, small, other, *ranks(2, exchanged, None, False), strict=True):
        scale = float(a.abs().max()) + 1e-12
        within("gradient in buckets of 10 KiB", float((a - b).abs().max()) / scale, 1e-6)
        # Rounded on each rank, halved and added in bfloat16: each of the three roundings errs by 2^-8 of its number at most. The
        # ranks' numbers may cancel in the sum, so the bound is of their sizes; plus float32's own rounding.
        allowed = 2**-8 * ((own[0].abs() + own[1].abs()) / 2 + c.abs()) + 1e-6 * scale
        within("gradient sent as bfloat16, over the bound of its roundings", float(((a - c).abs() / allowed).max()), 1.01)
        assert torch.equal(c, d)
    assert any(not torch.equal(a, c) for a, c in zip(whole, small, strict=True))


@pytest.mark.parametrize("world", [1, 2])
def test_the_model_compiles_without_a_graph_break(ranks: Ranks, within: Within, world: int) -> None:
    """`fullgraph` raises at a break: neither BatchNorm nor its all-reduce makes one."""
    for found in ranks(world, compiled):
        for name, deviation in found.items():
            within(name, deviation, 1e-10)
