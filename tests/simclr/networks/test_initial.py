"""Initial weights: fixed numbers on any machine, for any threads, chunks, version of torch and rest of the network."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import statistics
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import ndtr, ndtri
from torch import nn

from simclr import keyed
from simclr.config import Encoder, Head, Loss, SimCLR
from simclr.encoder.directory import read_classifier, write_encoder
from simclr.methods.choice import shapes
from simclr.methods.classifier import build_classifier
from simclr.methods.method import Start
from simclr.methods.queue import Queue
from simclr.methods.simclr import build_model, simclr
from simclr.networks import initial
from simclr.networks.heads import MLP, Classifier, ProjectionHead
from simclr.networks.resnet import resnet
from simclr.recipes import RECIPES
from tests.conftest import Within
from tests.support.small import TINY

SMALL = SimCLR(encoder=Encoder(depth=8, cifar_stem=True, se_ratio=0.25), head=Head(layers=3, d_out=16), loss=TINY.loss, views=TINY.views)
REMEMBERING = dataclasses.replace(SMALL, loss=Loss(temperature=0.2, memory=8192))


def digest(module: nn.Module) -> str:
    """sha256 of names and float32 values of a module's state."""
    found = hashlib.sha256()
    for name, t in module.state_dict().items():
        found.update(name.encode() + t.numpy().astype("<f4").tobytes())
    return found.hexdigest()


def equal(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(t, theirs[name]) for name, t in ours.items())


# ── Numbers ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_quantile_is_the_normal_distributions(within: Within) -> None:
    """Against Cephes, another approximation, from one end of 32 bits to the other; odd in q, and 0 at 0."""
    q = np.concatenate([0.5 - 2.0 ** -np.arange(1, 33, 1 / 16), [0.425], np.linspace(0, 0.499, 20_001)])
    q = (np.floor(q[q > 1e-9] * 2**32) + 0.5) * 2.0**-32  # so that 1/2 − q is exact, as it is for words
    assert 0.5 - q.max() == 2.0**-33
    z = initial.normal_quantile(q)
    within("quantile, relative", float((np.abs(z + ndtri(0.5 - q)) / z).max()), 4e-15)
    assert np.array_equal(initial.normal_quantile(-q), -z) and initial.normal_quantile(np.zeros(1)) == 0
    x = np.concatenate([0.5 - q, np.linspace(0.05, 3, 999)])
    logs = np.array([math.log(v) for v in x])
    within("logarithm", float((np.abs(initial._log(x) - logs) / np.abs(logs).clip(1)).max()), 1e-15)
    within("within two deviations", abs(initial._INSIDE_TWO - (1 - 2 * ndtr(-2))), 1e-15)
    density = math.exp(-2) / math.sqrt(2 * math.pi)
    within("their deviation", abs(initial._STD_INSIDE_TWO - math.sqrt(1 - 4 * density / initial._INSIDE_TWO)), 1e-15)


def by_hand(seed: int, name: str, element: int) -> float:
    """The uniform number of an element by Philox4x32-10 in plain integers."""
    c, k = [element // 4, element // 4 >> 32, zlib.crc32(name.encode()), 3 << 24], [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [b >> 32 ^ c[1] ^ k[0], b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return (c[element % 4] + 0.5) / 2**32


@pytest.mark.parametrize("seed", [0, 7, 2**40 + 1])
def test_weights_are_those_computed_by_hand(within: Within, seed: int) -> None:
    model, normal = build_model(dataclasses.replace(SMALL, seed=seed), 10), statistics.NormalDist()
    named = dict(model.named_parameters())
    below, share = normal.cdf(-2), normal.cdf(2) - normal.cdf(-2)
    for name in ("encoder.stem.0.weight", "encoder.groups.1.0.body.3.weight", "encoder.groups.0.0.gate.reduce.weight"):
        weight = named[name].detach()
        std = math.sqrt(1 / weight[0].numel()) / 0.87962566103423978
        for i in (0, 1, 5, weight.numel() - 1):
            within("convolution", abs(float(weight.flatten()[i]) / std - normal.inv_cdf(below + share * by_hand(seed, name, i))), 1e-6)
    for name in ("head.layers.0.0.weight", "head.layers.2.0.weight", "classifier.weight"):
        flat = named[name].detach().flatten()
        for i in (0, 6, flat.numel() - 1):
            within("linear", abs(float(flat[i]) / 0.01 - normal.inv_cdf(by_hand(seed, name, i))), 1e-6)
    assert not any(p.any() for name, p in named.items() if name.endswith("bias"))


DIGESTS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "ResNet-8, 2-layer head": (
        lambda: build_model(TINY),
        "da9327bdb071568880e08f78dbde3dae6d26055d291425be25d803923887ebe0",
    ),
    "ResNet-8 with gates, 3-layer head, classifier, seed 7": (
        lambda: build_model(dataclasses.replace(SMALL, seed=7), 10),
        "92a759019a32c2858a4d91d60205e9e2d0cb029d5b43fe9810f5daad23c4c449",
    ),
    "the same from scratch, tap 1": (
        lambda: build_classifier(dataclasses.replace(SMALL, seed=7), 10, 1),
        "dfb7a4e0f5ef643a6b1d358267ea1936c58423f9cc7f6ea50553ac1e14df121a",
    ),
    "ResNet-50 with selective kernels": (
        lambda: resnet(50, sk_ratio=0.0625),
        "d59084380889d3063e98dd72ac98f1fcbd8f938a5df13733a15e528a2b14dfb1",
    ),
}
"""CHANGELOG.md must mention a change of these numbers: every seed then starts from other weights."""


@pytest.mark.parametrize("name", DIGESTS)
def test_weights_are_the_same_numbers_on_any_processor_and_version(name: str) -> None:
    build, golden = DIGESTS[name]
    assert digest(build()) == golden


def test_neither_threads_nor_chunks_nor_layout_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, threads = build_model(SMALL, 10), torch.get_num_threads()
    monkeypatch.setattr(initial, "_CHUNK", 1020)
    torch.set_num_threads(3)
    try:
        assert equal(build_model(SMALL, 10), whole)
    finally:
        torch.set_num_threads(threads)
    with torch.device("meta"):
        turned = resnet(8, cifar_stem=True, se_ratio=0.25)
    turned = turned.to_empty(device="cpu").to(torch.float64).to(memory_format=torch.channels_last)  # another type and another layout
    initial.draw(turned, 0, "encoder")
    ours = dict(whole.encoder.named_parameters())
    maps = [name for name, p in turned.named_parameters() if p.ndim == 4]
    assert len(maps) == 16 and all(torch.equal(turned.get_parameter(name), ours[name].double()) for name in maps)
    ends = initial.deviates(5, "x", 3, 6, False)
    assert np.array_equal(ends, initial.deviates(5, "x", 0, 9, False)[3:6])


def test_a_heads_weights_and_biases_are_uniform_by_fan_in_and_keyed_by_its_name() -> None:
    """The words of `keyed`, from −1 to 1, times 1 / √fan-in: torch's own distribution."""
    head = MLP(9, 16, 4, layers=3, bias=(True, False), last_norm=True, seed=5, name="projector")
    first = head.get_submodule("layers.0.0")
    for name, parameter in first.named_parameters():
        count = parameter.numel()
        words = keyed.bits(5, "weights", zlib.crc32(f"projector.layers.0.0.{name}".encode()), np.arange(-(-count // 4)), 0, 4).reshape(-1)
        expected = ((words[:count] + 0.5) / 2**31 - 1) / math.sqrt(9)
        assert float((parameter.detach().flatten() - torch.from_numpy(expected)).abs().max()) < 1e-7
    assert [linear.bias is not None for linear in head.modules() if isinstance(linear, nn.Linear)] == [True, True, False]
    assert not equal(head, MLP(9, 16, 4, layers=3, bias=(True, False), last_norm=True, seed=5, name="predictor"))
    assert [name for name, _ in head.layers[-1].named_parameters()] == ["0.weight"]  # the last norm has neither scale nor shift


def test_their_distribution(within: Within) -> None:
    """Mean, standard deviation, both ends and Kolmogorov's distance; parameters, seeds and neighbours are uncorrelated."""
    cut, free = (initial.deviates(0, "encoder.a.weight", 0, 200_001, cut) for cut in (True, False))
    for what, z, std, most in (("cut", cut, initial._STD_INSIDE_TWO, 2.0), ("free", free, 1.0, 6.4)):
        within(f"{what}: mean", abs(z.mean()) / std, 4 / math.sqrt(len(z)))
        within(f"{what}: deviation", abs(z.std() / std - 1), 4 / math.sqrt(2 * len(z)))
        assert 0.65 * most < abs(z).max() <= most
        u = np.sort((ndtr(z) - ndtr(-most)) / (ndtr(most) - ndtr(-most)))
        within(f"{what}: Kolmogorov's distance", float(abs(u - (np.arange(len(u)) + 0.5) / len(u)).max()), 1.63 / math.sqrt(len(u)))
    others = [initial.deviates(*at, 0, 200_001, False) for at in ((0, "encoder.b.weight"), (1, "encoder.a.weight"))]
    for what, other in zip(("parameters", "seeds", "neighbours"), (*others, np.roll(free, 1)), strict=True):
        within(f"correlation of {what}", abs(float(np.corrcoef(free, other)[0, 1])), 4 / math.sqrt(len(free)))


def test_no_two_parameters_of_a_recipe_share_their_words() -> None:
    for recipe in RECIPES.values():
        names = [name for name, _ in shapes(recipe(), 10).network.named_parameters()]
        assert len({zlib.crc32(name.encode()) for name in names}) == len(names) > 20


# ── Networks that begin with them ──────────────────────────────────────────────────────────────────────────────────


def test_an_encoder_does_not_depend_on_what_is_beside_it() -> None:
    whole = build_model(dataclasses.replace(REMEMBERING, seed=3), 10)
    alone = build_model(dataclasses.replace(SMALL, seed=3, head=Head(layers=2, d_out=8)))
    assert equal(whole.encoder, alone.encoder) and equal(whole.encoder, resnet(8, cifar_stem=True, se_ratio=0.25, seed=3))
    assert equal(whole.head, ProjectionHead(64, 3, 16, seed=3)) and not equal(whole.head, ProjectionHead(64, 3, 16))
    queue = simclr(dataclasses.replace(REMEMBERING, seed=3), Start(Path())).state
    assert isinstance(queue, Queue) and equal(queue.encoder, whole.encoder) and equal(queue.head, whole.head)
    scratch = build_classifier(dataclasses.replace(SMALL, seed=3), 10, 2)
    assert equal(scratch.encoder, whole.encoder) and equal(scratch.head, nn.Sequential(*whole.head.layers[:2]))
    assert not scratch.classifier.weight.any()
    linear = Classifier(whole.encoder, whole.head, 0, 10, seed=3).classifier
    assert whole.classifier is not None and equal(linear, whole.classifier)
    with pytest.raises(ValueError, match="seed of the initial weights is -1; expected a whole number from 0 to 2"):
        resnet(8, cifar_stem=True, seed=-1)


@pytest.fixture
def foul() -> Iterator[None]:
    """Uninitialised tensors hold NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def finite(module: nn.Module) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in (*module.parameters(), *module.buffers()))


def published(at: Path) -> Path:
    """A directory with encoder, head and classifier."""
    model = build_model(SMALL)
    linear = Classifier(model.encoder, model.head, 1, 4).classifier
    parts = {"head": model.head.state_dict(), "classifier": linear.state_dict()}
    write_encoder(model.encoder.state_dict(), SMALL, at, {"recipe": "none"}, **parts, tap=1, classes=["a", "b", "c", "d"])
    return at


def test_no_tensor_stays_uninitialised_and_torchs_generator_is_not_used(foul: None, tmp_path: Path) -> None:
    assert not finite(build_model(SMALL, drawn=False)) and not finite(build_classifier(SMALL, 10, 1, drawn=False))
    before = torch.random.get_rng_state()
    made: list[nn.Module] = [resnet(8, cifar_stem=True, se_ratio=0.25), ProjectionHead(64, 3), build_model(SMALL, 10)]
    made.append(simclr(REMEMBERING, Start(Path())).state)
    made += [build_classifier(SMALL, 10, 1), Classifier(resnet(8, cifar_stem=True), None, 0, 10)]
    made.append(read_classifier(published(tmp_path / "encoder"))[0])
    assert all(finite(module) for module in made)
    shapes(SMALL, 10)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_loading_weights_draws_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = published(tmp_path / "encoder")

    def refuse(*asked: object) -> None:
        raise AssertionError(f"weights are drawn: {asked}")

    monkeypatch.setattr(initial, "deviates", refuse)
    with pytest.raises(AssertionError, match=r"weights are drawn: \(0, 'encoder.stem.0.weight'"):
        build_model(SMALL)
    shapes(SMALL, 10)
    assert read_classifier(directory)[1] == ["a", "b", "c", "d"]
