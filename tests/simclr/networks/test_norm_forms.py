"""BatchNorm's forms for GPUs compute what it computes: values, gradients and statistics, alone and in networks, on one rank and several."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simclr.collectives import all_gather
from simclr.networks.batchnorm import BatchNorm
from simclr.networks.heads import ProjectionHead
from simclr.networks.norm_forms import Form, KernelNorm, SumsNorm, give_form
from simclr.networks.resnet import resnet
from tests.conftest import Within
from tests.support.ranks import Ranks
from tests.support.small import mine

FORMS: list[Form] = ["sums", "kernels"]


def norm_of(form: Form, channels: int, relu: bool, beta: bool = True, over: int | None = None) -> BatchNorm:
    """In float64, with weights, shifts and running statistics that tell channels apart."""
    norm = BatchNorm(channels, beta=beta, ranks=over)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-0.5, 2, channels))
        if norm.bias is not None:
            norm.bias.copy_(torch.linspace(-1, 1, channels))
        norm.running_mean.copy_(torch.linspace(-0.3, 0.6, channels))
    return (SumsNorm(norm) if form == "sums" else KernelNorm(norm, relu=relu)).double()


def data(shape: tuple[int, ...], offset: float = 0.0) -> list[Tensor]:
    random = torch.Generator().manual_seed(3)
    x, residual, target = (torch.randn(shape, dtype=torch.float64, generator=random) for _ in range(3))
    return [x + offset, residual, target]


def through(form: Form, shape: tuple[int, ...], offset: float, end: bool, relu: bool, over: int | None = None) -> dict[str, Tensor]:
    """This rank's share of a batch through a norm; the whole batch's results."""
    norm = norm_of(form, shape[1], relu, over=over)
    x, residual, target = (mine(t) for t in data(shape, offset))
    x.requires_grad_(), residual.requires_grad_()
    if isinstance(norm, KernelNorm) and end:
        y, again = norm.end(x, residual, None)
        (0.25 * y * target + 0.75 * again * target).sum().backward()
    else:
        y = F.relu(norm(x)) if relu and form == "sums" else norm(x)
        (y * target).sum().backward()
    assert norm.bias is not None and norm.weight.grad is not None and norm.bias.grad is not None
    found = {
        "y": all_gather(y.detach()),
        "dx": all_gather(x.grad),
        "parameters": all_gather(torch.stack([norm.weight.grad, norm.bias.grad])[None]).sum(0),
        "mean": norm.running_mean,
        "var": norm.running_var,
    }
    return found | ({"residual's gradient": all_gather(residual.grad)} if end else {})


def expected(shape: tuple[int, ...], offset: float, end: bool, relu: bool) -> dict[str, Tensor]:
    """The same by torch's own BatchNorm on the whole batch."""
    norm = norm_of("sums", shape[1], False)
    x, residual, target = data(shape, offset)
    x.requires_grad_(), residual.requires_grad_()
    y = F.batch_norm(x, None, None, norm.weight, norm.bias, True, 0.1, norm.eps)
    y = y + residual if end else y
    y = F.relu(y) if end or relu else y
    (y * target).sum().backward()
    assert norm.bias is not None and norm.weight.grad is not None and norm.bias.grad is not None
    others = [0, *range(2, x.ndim)]
    found = {
        "y": y.detach(),
        "dx": x.grad,
        "parameters": torch.stack([norm.weight.grad, norm.bias.grad]),
        "mean": norm.running_mean.lerp(x.detach().mean(others), 0.1),
        "var": norm.running_var.lerp(x.detach().var(others, correction=0), 0.1),
    }
    return found | ({"residual's gradient": residual.grad} if end else {})  # type: ignore[dict-item]


CASES: list[tuple[Form, tuple[int, ...], float, bool, bool]] = [
    ("sums", (8, 3), 0.0, False, False),
    ("sums", (8, 3, 5, 4), 0.0, False, True),
    ("sums", (8, 3, 5, 4), 1000.0, False, False),
    ("kernels", (8, 3), 0.0, False, True),
    ("kernels", (8, 3, 5, 4), 0.0, False, False),
    ("kernels", (8, 3, 5, 4), 0.0, True, False),
    ("kernels", (8, 3, 5, 4), 1000.0, False, True),
    ("kernels", (8, 3, 5, 4), 1000.0, True, False),
]


def every_case() -> list[dict[str, Tensor]]:
    return [through(*case) for case in CASES]


@pytest.mark.parametrize("world", [1, 2])
def test_a_form_is_batchnorm_of_the_whole_batch(ranks: Ranks, within: Within, world: int) -> None:
    wanted = [expected(*case[1:]) for case in CASES]
    for found in ranks(world, every_case) if world > 1 else [every_case()]:
        for (form, _, offset, _, _), ours, theirs in zip(CASES, found, wanted, strict=True):
            assert ours.keys() == theirs.keys()
            for name, value in theirs.items():
                # Where the mean is a thousand standard deviations, and the shift is not yet near it, 16 digits leave this precision.
                scale, bound = float(value.abs().max().clamp_min(1)), 1e-8 if offset else 1e-12
                within(f"{form}, {name}{', mean 1000' if offset else ''}", float((ours[name] - value).abs().max()) / scale, bound)


def test_per_worker_differs_on_purpose(ranks: Ranks) -> None:
    together, apart = (ranks(2, through, "kernels", (8, 3), 0.0, False, False, alone)[0]["y"] for alone in (None, 1))
    assert (together - apart).abs().max() > 0.1


@pytest.mark.parametrize(("form", "end"), [("sums", False), ("kernels", False), ("kernels", True)])
def test_bfloat16_is_rounded_once(within: Within, form: Form, end: bool) -> None:
    """Statistics and both terms of the gradient are float32, and results differ from float64 by half a unit in the last of 8 bits."""
    x, residual, target = (t.bfloat16() for t in data((64, 8, 7, 7), 3.0))
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        norm = norm_of(form, 8, True).to(torch.float32 if dtype == torch.bfloat16 else dtype)
        own, added = x.to(dtype).clone().requires_grad_(), residual.to(dtype).clone().requires_grad_()
        y = norm.end(own, added, None)[0] if isinstance(norm, KernelNorm) and end else norm(own)
        y.backward(target.to(dtype))
        assert norm.bias is not None
        found.append([y.detach(), own.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var])
    for name, ours, exact in zip(("y", "dx", "weight's", "bias's", "mean", "variance"), *found, strict=True):
        off = (ours.double() - exact).abs() / exact.abs().clamp_min(exact.abs().max() / 8)
        within(f"{form}, {name}", float(off.max()), 2**-8 if ours.dtype == torch.bfloat16 else 1e-4)


# ── Networks ───────────────────────────────────────────────────────────────────────────────────────────────────────


def varied(network: nn.Module) -> nn.Module:
    """`network` in float64; its norms' weights, of which some begin at 0, and running statistics drawn."""
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, BatchNorm):
                module.weight.copy_(torch.randn(module.weight.shape, generator=random) * 0.3 + 0.8)
                module.running_mean.copy_(torch.randn(module.weight.shape, generator=random) * 0.1)
                if module.bias is not None:
                    module.bias.copy_(torch.randn(module.weight.shape, generator=random) * 0.3)
    return network.double()


NETWORKS: dict[str, Any] = {
    "ResNet-50": lambda: resnet(50),
    "selective kernels": lambda: resnet(50, sk_ratio=0.0625),
    "squeeze-and-excitation": lambda: resnet(8, se_ratio=0.25, cifar_stem=True),
}


@pytest.mark.parametrize(("name", "form"), [("squeeze-and-excitation", "sums"), *((name, "kernels") for name in NETWORKS)])
def test_a_network_of_another_form_computes_the_same(within: Within, name: str, form: Form) -> None:
    random = torch.Generator().manual_seed(6)
    encoder = NETWORKS[name]()
    plain = varied(nn.Sequential(encoder, ProjectionHead(encoder.d_h)))
    other = copy.deepcopy(plain)
    give_form(other, form)
    assert list(other.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in other.named_parameters()] == [n for n, _ in plain.named_parameters()]
    kinds = [type(m) for m in other.modules() if isinstance(m, BatchNorm)]
    assert set(kinds) == {SumsNorm if form == "sums" else KernelNorm}
    assert len(kinds) == sum(isinstance(m, BatchNorm) for m in plain.modules())
    x = torch.randn(6, 3, 32, 32, dtype=torch.float64, generator=random).to(memory_format=torch.channels_last)
    found = []
    for network in (plain, other):
        z = network(x)[-1]
        z.backward(torch.linspace(-1, 1, z.numel(), dtype=z.dtype).view(z.shape))
        gradients = [p.grad for p in network.parameters()]
        found.append([z.detach(), *gradients, *network.buffers(), network.eval()(x)[-1].detach()])
    for ours, theirs in zip(*reversed(found), strict=True):
        within(name, float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-3)), 1e-8)


@pytest.mark.parametrize("form", FORMS)
def test_parameters_and_statistics_are_the_same_tensors(form: Form) -> None:
    network = resnet(8, cifar_stem=True)
    before = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    give_form(network, form)
    after = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    assert before.keys() == after.keys() and all(after[name] is t for name, t in before.items())
    assert sum(isinstance(m, nn.ReLU) for m in network.modules()) == (0 if form == "kernels" else 4)


def compiled(form: Form) -> list[float]:
    """A block of `form`, compiled in one graph: differences of its end, gradients and statistics from it uncompiled, on this rank's
    rows."""
    x = mine(torch.randn(8, 16, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(6)))
    network = varied(resnet(8, cifar_stem=True).groups[1])
    give_form(network, form)
    found = []
    for compiling in (False, True):
        own = copy.deepcopy(network)
        torch._dynamo.reset()
        run: Any = torch.compile(own, backend="aot_eager", fullgraph=True) if compiling else own
        y, again = end if isinstance(end := run(x), tuple) else (end, end)
        (y * again.sin()).sum().backward()
        found.append([y.detach(), *(p.grad for p in own.parameters()), *own.buffers()])
    return [float((a - b).abs().max()) for a, b in zip(*found, strict=True)]


@pytest.mark.parametrize(("form", "world"), [("sums", 1), ("kernels", 2)])
def test_a_form_compiles_without_a_graph_break(ranks: Ranks, within: Within, world: int, form: Form) -> None:
    for found in ranks(world, compiled, form) if world > 1 else [compiled(form)]:
        within(form, max(found), 1e-10)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("form", FORMS)
def test_on_the_device_a_form_is_as_far_from_float64_as_batchnorm_is(within: Within, form: Form) -> None:
    """ResNet-50's stem and first blocks, channels last, compiled as in a run: in float32 without TF32, and under bfloat16. A value whose
    sign or rank in a window is decided by rounding sends its gradient elsewhere, so in bfloat16 gradients are a fifth off for any form. In
    float32 the order of the sums decides: on a CPU 4.4 times BatchNorm's deviation was seen for compiled sums, 0.7 for kernels."""
    encoder = resnet(50)
    encoder.groups = encoder.groups[:1]
    plain = varied(encoder)
    random = torch.Generator().manual_seed(6)
    x, upstream = (torch.randn(16, *shape, generator=random, dtype=torch.float64) for shape in ((3, 64, 64), (256,)))

    def deviations(network: nn.Module, device: str, dtype: torch.dtype, few_bits: bool, compiling: bool) -> list[Tensor]:
        torch._dynamo.reset()
        network = network.to(device, dtype).to(memory_format=torch.channels_last)
        own = x.to(device, dtype, memory_format=torch.channels_last).requires_grad_()
        run: Any = torch.compile(network, fullgraph=True) if compiling else network
        with torch.autocast(device, torch.bfloat16, enabled=few_bits):
            y = run(own)
        y.backward(upstream.to(device, y.dtype))
        assert own.grad is not None
        return [y.detach().double().cpu(), own.grad.double().cpu()]

    exact = deviations(copy.deepcopy(plain), "cpu", torch.float64, False, False)
    torch.backends.cudnn.allow_tf32 = False
    for few_bits in (False, True):
        other = copy.deepcopy(plain)
        give_form(other, form)
        ours = deviations(other, "cuda", torch.float32, few_bits, True)
        theirs = deviations(copy.deepcopy(plain), "cuda", torch.float32, few_bits, False)
        for name, a, b, c in zip(("value", "gradient"), ours, theirs, exact, strict=True):
            off = (a - c).square().mean().sqrt() / (b - c).square().mean().sqrt()
            within(f"{form}, {'bfloat16' if few_bits else 'float32'}, {name}, over BatchNorm's own deviation", float(off), 8.0)
