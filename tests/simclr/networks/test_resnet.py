"""Encoders and heads against features of the official code (tests/golden/resnet: TensorFlow 2.21, weights made from names)."""

from __future__ import annotations

import copy
import json
import re
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simclr.networks.batchnorm import BatchNorm
from simclr.networks.heads import ProjectionHead
from simclr.networks.pooling import SameMaxPool
from simclr.networks.resnet import ResNet, resnet
from tests.conftest import Within
from tests.support.resnets import CASES, RESNET, deviation


def made(name: str, shape: list[int], seed: int = 7) -> np.ndarray:
    """The weights' formula of tests/golden's README."""
    r = np.random.RandomState(zlib.crc32(name.encode()) % 2**31 ^ seed)
    kind = name.rsplit("/", 1)[1]
    if kind == "gamma":
        return 1 + 0.1 * r.randn(*shape)
    if kind == "moving_variance":
        return 1 + 0.2 * r.rand(*shape)
    if kind in ("beta", "bias", "moving_mean"):
        return 0.1 * r.randn(*shape)
    return r.randn(*shape) * np.sqrt(2 / np.prod(shape[:-1]))


def load(module: nn.Module, variables: list[dict[str, object]]) -> dict[str, Tensor]:
    """Fill `module`; returns variable name → our tensor.

    The official code numbers its layers as it creates them, a block's shortcut first, and so do we: the i-th
    convolution (dense layer, BatchNorm) here is the i-th by number there.
    """
    layers: dict[str, dict[str, list[int]]] = {"map": {}, "norm": {}}
    for variable in variables:
        layer, _ = str(variable["name"]).rsplit("/", 1)
        layers["norm" if "batch_norm" in layer else "map"].setdefault(layer, [])
    number = re.compile(r"_(\d+)$")

    def created(layer: str) -> int:
        found = number.search(layer)
        return int(found[1]) if found else 0

    maps = [m for m in module.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    norms = [m for m in module.modules() if isinstance(m, BatchNorm)]
    ours: dict[str, Tensor] = {}
    for layer, m in zip(sorted(layers["map"], key=created), maps, strict=True):
        ours[f"{layer}/kernel"] = m.weight
        if m.bias is not None:
            ours[f"{layer}/bias"] = m.bias
    for layer, norm in zip(sorted(layers["norm"], key=created), norms, strict=True):
        ours |= {f"{layer}/gamma": norm.weight, f"{layer}/moving_mean": norm.running_mean, f"{layer}/moving_variance": norm.running_var}
        if norm.bias is not None:
            ours[f"{layer}/beta"] = norm.bias
    assert set(ours) == {str(v["name"]) for v in variables}
    for variable in variables:
        name, shape = str(variable["name"]), list(variable["shape"])  # type: ignore[call-overload]
        value = torch.tensor(made(name, shape))
        value = value.permute(3, 2, 0, 1) if value.ndim == 4 else value.T if value.ndim == 2 else value
        assert value.shape == ours[name].shape, (name, value.shape, ours[name].shape)
        ours[name].data.copy_(value)
    return ours


def build(tag: str) -> tuple[ResNet, ProjectionHead, dict[str, Tensor], Tensor]:
    variables = json.loads((RESNET / f"{tag}_variables.json").read_text())
    encoder = resnet(**CASES[tag]).double()  # type: ignore[arg-type]
    head = ProjectionHead(encoder.d_h, layers=3).double()
    names = load(encoder, [v for v in variables if v["name"].startswith("resnet/")])
    names |= load(head, [v for v in variables if v["name"].startswith("projection_head/")])
    side = 32 if "cifar" in tag else 64
    x = torch.tensor(np.random.RandomState(18).rand(4, side, side, 3)).permute(0, 3, 1, 2)
    return encoder, head, names, x


@pytest.mark.parametrize("tag", CASES)
def test_features_and_projections_equal_the_official_ones(within: Within, tag: str) -> None:
    encoder, head, names, x = build(tag)
    golden = np.load(RESNET / f"{tag}.npz")
    encoder.eval(), head.eval()
    for stage, features in enumerate(encoder.stages(x)):
        assert list(golden[f"stage{stage}_shape"]) == [features.shape[i] for i in (0, 2, 3, 1)]
        within("stages, running statistics", deviation(features.mean((2, 3)), golden[f"stage{stage}_mean"]), 1e-4)
    h = encoder(x)
    within("features, running statistics", deviation(h, golden["features"]), 1e-4)
    for tap, output in enumerate(head(h)):
        within("taps, running statistics", deviation(output, golden[f"head3_tap{tap}"]), 1e-4)
    within("z, running statistics", deviation(head(h)[-1], golden["head3_z"]), 1e-4)
    # Statistics over 4 images amplify rounding, most of all where a selective kernel's attention normalises 4 single pixels.
    # So the official float32 numbers may be as far from ours in float64 as our own float32 is, twice.
    encoder.train(), head.train()
    single = copy.deepcopy(encoder).float()(x.float())
    single_z = copy.deepcopy(head).float()(single)[-1]
    h = encoder(x)
    z = head(h)[-1]
    bound = max(1e-4, 2 * deviation(single.double(), h.detach().numpy()))
    bound_z = max(1e-4, 2 * deviation(single_z.double(), z.detach().numpy()))
    within(f"features, batch statistics, {tag}", deviation(h, golden["features_batch_statistics"]), bound)
    within(f"z, batch statistics, {tag}", deviation(z, golden["head3_z_batch_statistics"]), bound_z)
    updated = [key for key in golden.files if key.startswith("updated|")]
    assert updated
    for key in updated:
        part, most = ("head", bound_z) if "projection_head" in key else ("encoder", 1e-4)
        within(f"updated statistics, {part}, {tag}", deviation(names[key.removeprefix("updated|")], golden[key]), most)


def test_two_layer_head(within: Within) -> None:
    tag = "resnet18_cifar"
    encoder, _, _, x = build(tag)
    golden = np.load(RESNET / f"{tag}.npz")
    head = ProjectionHead(512, layers=2).double()
    variables = [v for v in json.loads((RESNET / f"{tag}_variables.json").read_text()) if "/nl_0/" in v["name"]]
    # The 2-layer head shares the names of the 3-layer head's first layer; its last layer is nl_1 of width 128.
    stem = "projection_head/nl_1/"
    norm = "batch_norm_relu_22/batch_normalization_22/"
    last = [(norm + kind, [128]) for kind in ("gamma", "moving_mean", "moving_variance")] + [("dense_1/kernel", [512, 128])]
    variables += [{"name": stem + name, "shape": shape, "trainable": True} for name, shape in last]
    load(head, variables)
    encoder.eval(), head.eval()
    within("z", deviation(head(encoder(x))[-1], golden["head2_z"]), 1e-4)


PUBLISHED_M = {
    (50, 1, False): 24,
    (50, 1, True): 35,
    (50, 2, False): 94,
    (50, 2, True): 140,
    (101, 1, False): 43,
    (101, 1, True): 65,
    (101, 2, False): 170,
    (101, 2, True): 257,
    (152, 1, False): 58,
    (152, 1, True): 89,
    (152, 2, False): 233,
    (152, 2, True): 354,
    (152, 3, True): 795,
}
"""(depth, width, selective kernels) → millions of parameters, arXiv:2006.10029, Table 1 (also in the official README)."""


def test_parameter_counts_as_published() -> None:
    """Of all 13 sizes of SimCLR v2, without classifier, to the printed million. The published counts are of all variables, the
    moving statistics of BatchNorm included: ResNet-152 (2x) has 232.25 M weights, 232.56 M with them, and is printed as 233 M."""
    with torch.device("meta"):  # names and shapes, without memory and without drawing weights
        for (depth, width, sk), published in PUBLISHED_M.items():
            model = resnet(depth, width, 0.0625 if sk else 0.0)
            weights, statistics = (sum(t.numel() for t in part) / 1e6 for part in (model.parameters(), model.buffers()))
            name = f"ResNet-{depth} ({width}x{', SK' if sk else ''})"
            print(f"{name:<20} {weights:8.3f} M weights, {weights + statistics:8.3f} M with statistics, published {published:4d} M")
            assert round(weights + statistics) == published and abs(weights - published) < 1, name


def test_small_networks_and_an_unknown_depth() -> None:
    assert resnet(8, width=2, cifar_stem=True)(torch.zeros(2, 3, 32, 32)).shape == (2, 128)
    with pytest.raises(ValueError, match="no ResNet of depth 51; choose one of 8, 14, 18"):
        resnet(51)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_stems_pooling_is_the_padded_one_to_the_bit(dtype: torch.dtype, layout: torch.memory_format) -> None:
    """TensorFlow's 'SAME': on even sizes a row and a column of −inf behind, on odd ones around. Rounded values are often equal within a
    window: the first of them gets the gradient."""
    for size, pads in (((8, 6), (0, 1, 0, 1)), ((2, 2), (0, 1, 0, 1)), ((112, 112), (0, 1, 0, 1)), ((7, 9), (1, 1, 1, 1))):
        random = torch.Generator().manual_seed(0)
        for x in (torch.randn(2, 5, *size, generator=random), torch.randn(2, 5, *size, generator=random).round().relu()):
            found = []
            for pool in (SameMaxPool(), lambda x, pads=pads: F.max_pool2d(F.pad(x, pads, value=float("-inf")), 3, 2)):
                own = x.to(dtype, memory_format=layout).requires_grad_()
                y = pool(own)
                y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype))
                found.append((y.detach(), own.grad))
            assert all(torch.equal(ours, padded) and ours.stride() == padded.stride() for ours, padded in zip(*found, strict=True)), size
