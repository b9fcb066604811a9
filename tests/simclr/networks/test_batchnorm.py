"""BatchNorm over several ranks: its rounding, groups of ranks, and ranks that hold different numbers of images."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from simclr.collectives import rank, world_size
from simclr.networks.batchnorm import BatchNorm, Over, _GlobalBatchNorm, share_statistics
from tests.conftest import Within
from tests.support.ranks import Ranks
from tests.support.small import mine


@pytest.mark.parametrize("offset", [0.0, 10.0])
def test_batchnorm_of_bfloat16_rounds_its_results_alone(within: Within, offset: float) -> None:
    """The form for several ranks, here on one: statistics and both terms of the gradient are float32, and bfloat16 results differ from
    float64 by half a unit in the last of their 8 bits."""
    random = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(64, 8, 7, 7, generator=random) + offset).bfloat16(), torch.randn(64, 8, 7, 7, generator=random).bfloat16()
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        others = torch.float32 if dtype == torch.bfloat16 else dtype
        own, weight, bias = x.to(dtype).clone().requires_grad_(), torch.linspace(0.5, 2, 8, dtype=others), torch.zeros(8, dtype=others)
        y, mean, var = _GlobalBatchNorm.apply(
            own, weight.requires_grad_(), bias.requires_grad_(), torch.zeros(8, dtype=others), 1e-5, Over(1)
        )
        y.backward(upstream.to(dtype))
        found.append((y, mean, var, own.grad, weight.grad, bias.grad))
    names = ("y", "mean", "variance", "gradient", "weight's gradient", "bias's gradient")
    for name, ours, exact in zip(names, *found, strict=True):
        ours, exact, bound = ours.detach(), exact.detach(), 2**-8 if ours.dtype == torch.bfloat16 else 1e-4
        off = (ours.double() - exact).abs() / exact.abs().clamp_min(exact.abs().max() / 8)
        within(f"{name}, mean {offset:.0f}", float(off.max()), bound)


@pytest.mark.parametrize("ranks", [None, 1])
def test_running_statistics_move_by_a_tenth_towards_mean_and_biased_variance(within: Within, ranks: int | None) -> None:
    """Of 1, 2, 3 and 6 the mean is 3, and the mean square of what is left 3.5; torch's own variance would be 14 / 3."""
    norm = BatchNorm(1, ranks=ranks).double()
    norm(torch.tensor([[1.0], [2.0], [3.0], [6.0]], dtype=torch.float64))
    within("mean", abs(norm.running_mean.item() - 0.1 * 3), 1e-12)
    within("variance", abs(norm.running_var.item() - (0.9 + 0.1 * 3.5)), 1e-12)


# ── Groups of ranks, and ranks that hold different numbers of images ───────────────────────────────────────────────

Sides = dict[str, Tensor]
SHAPES: list[tuple[int, ...]] = [(3,), (3, 5, 4)]  # of an image


def rows_of(rank: int, world: int, batch: int) -> slice:
    return slice(rank * batch // world, (rank + 1) * batch // world)


def shared(shape: tuple[int, ...], over: int | None) -> Sides:
    """This rank's rows through a norm with weights that tell channels apart: output, gradients and statistics."""
    random = torch.Generator().manual_seed(3)
    x, target = (torch.randn(shape, dtype=torch.float64, generator=random) + 7 for _ in range(2))
    norm = BatchNorm(shape[1], ranks=over).double()
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-0.5, 2, shape[1]))
        norm.bias.copy_(torch.linspace(-1, 1, shape[1]))
        norm.running_mean.copy_(torch.linspace(6, 8, shape[1]))
    share_statistics([norm], shape[0])
    rows = rows_of(rank(), world_size(), shape[0])
    own = x[rows].clone().requires_grad_()
    y = norm(own)
    (y * target[rows]).sum().backward()
    parameters = torch.stack([norm.weight.grad, norm.bias.grad])
    assert own.grad is not None
    return {"y": y.detach(), "dx": own.grad, "parameters": parameters, "mean": norm.running_mean, "var": norm.running_var}


def every_share(over: int | None, batch: int) -> list[Sides]:
    return [shared((batch, *shape), over) for shape in SHAPES]


def by_definition(shape: tuple[int, ...], rows: slice) -> Sides:
    """The same in one process, by torch's own functions."""
    random = torch.Generator().manual_seed(3)
    x, target = ((torch.randn(shape, dtype=torch.float64, generator=random) + 7)[rows] for _ in range(2))
    own, others = x.clone().requires_grad_(), [0, *range(2, x.ndim)]
    weight, bias = (torch.linspace(low, high, shape[1]).double().requires_grad_() for low, high in ((-0.5, 2), (-1, 1)))
    y = nn.functional.batch_norm(own, None, None, weight, bias, True, 0.1, 1e-5)
    (y * target).sum().backward()
    assert own.grad is not None and weight.grad is not None and bias.grad is not None
    return {
        "y": y.detach(),
        "dx": own.grad,
        "parameters": torch.stack([weight.grad, bias.grad]),
        "mean": torch.linspace(6, 8, shape[1]).double().lerp(x.mean(others), 0.1),
        "var": torch.ones(shape[1]).double().lerp(x.var(others, correction=0), 0.1),
    }


@pytest.mark.parametrize(
    ("world", "over", "batch"),
    [
        pytest.param(3, None, 8, id="8 images on 3 ranks: 2, 3 and 3"),
        pytest.param(4, 2, 8, id="groups of 2"),
        pytest.param(4, 2, 7, id="groups of 2, uneven: 1 and 2, 2 and 2 images"),
        pytest.param(4, 4, 8, id="a group of all"),
        pytest.param(4, 9, 7, id="a group larger than all, uneven"),
    ],
)
def test_ranks_that_share_statistics_are_one_process_with_their_images(
    ranks: Ranks, within: Within, world: int, over: int | None, batch: int
) -> None:
    """Each group of ranks against one process with the group's images: output, gradients and running statistics."""
    every = ranks(world, every_share, over, batch)
    size = min(over or world, world)
    for case, shape in enumerate(SHAPES):
        for first in range(0, world, size):
            sides = [found[case] for found in every[first : first + size]]
            rows = slice(rows_of(first, world, batch).start, rows_of(first + size - 1, world, batch).stop)
            whole = {name: torch.cat([side[name] for side in sides]) for name in ("y", "dx")}
            whole["parameters"] = torch.stack([side["parameters"] for side in sides]).sum(0)
            for side, (name, value) in itertools.product(sides, by_definition((batch, *shape), rows).items()):
                found = whole[name] if name in whole else side[name]
                within(name, float((found - value).abs().max()), 1e-9)


def own_groups() -> tuple[bool, bool, list[float], list[int], str]:
    """What is said of the groups of all four ranks, and of two."""
    layers = nn.Sequential(BatchNorm(3), BatchNorm(3), BatchNorm(3, ranks=2), BatchNorm(3, ranks=1))
    with pytest.raises(RuntimeError) as raised:
        layers(torch.zeros(2, 3))
    share_statistics([layers], 8)
    of_all, again, of_two, alone = (norm.shared.group for norm in layers)  # type: ignore[union-attr]
    patience = [
        g._get_backend(torch.device("cpu")).options._timeout.total_seconds() for g in (torch.distributed.group.WORLD, of_all, of_two)
    ]
    apart = of_all is not torch.distributed.group.WORLD and alone is None
    return apart, of_all is again, patience, torch.distributed.get_process_group_ranks(of_two), str(raised.value)


def test_sums_have_process_groups_of_their_own_with_the_timeout_of_all(ranks: Ranks) -> None:
    """DDP's gradients travel in the group of all ranks. Without a timeout gloo's groups have 30 minutes, and the pool's has one."""
    for me, (apart, once, patience, members, text) in enumerate(ranks(4, own_groups)):
        assert apart and once and patience == [60.0] * 3
        assert members == [me // 2 * 2, me // 2 * 2 + 1]
        assert text == "BatchNorm over 2 of 4 ranks has no group of them: call share_statistics first"


def from_another_running_mean() -> bool:
    """Whether a group's outputs and statistics of 7 images are the same to the bit, whatever the running mean was."""
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(5))[rows_of(rank(), world_size(), 7)]
    found = []
    for mean in (0.0, 3.0):
        norm = BatchNorm(3, ranks=2)
        share_statistics([norm], 7)
        norm.running_mean.fill_(mean)
        y = norm(x)
        found.append((y, norm.running_var))
    return all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_group_does_not_read_the_running_mean(ranks: Ranks) -> None:
    """A checkpoint has the first group's, which another group would resume with."""
    assert all(ranks(4, from_another_running_mean))


def compiled_groups() -> float:
    """How far the compiled layers' output and gradients are from the eager ones', of 7 images on 4 ranks."""
    x = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))[rows_of(rank(), world_size(), 7)]
    layers, found = nn.Sequential(BatchNorm(3), BatchNorm(3, ranks=2), BatchNorm(3, ranks=1)).double(), []
    share_statistics([layers], 7)
    for compiling in (False, True):
        layers.zero_grad()
        for norm in layers:
            norm.running_mean.zero_()
        network: Any = torch.compile(layers, backend="aot_eager", fullgraph=True) if compiling else layers
        own = x.clone().requires_grad_()
        y = network(own)
        y.square().sum().backward()
        assert own.grad is not None
        found.append(torch.cat([y.detach(), own.grad]))
    return float((found[0] - found[1]).abs().max())


def test_groups_compile_without_a_graph_break(ranks: Ranks, within: Within) -> None:
    """`fullgraph` raises at a break: a group of the layer's own makes none, on whichever rank."""
    within("output and gradient", max(ranks(4, compiled_groups)), 1e-10)


class _Backwards(TorchDispatchMode):
    """Notes which saved statistics each call of BatchNorm's native backward is given."""

    def __init__(self) -> None:
        super().__init__()
        self.saved: list[tuple[Tensor | None, Tensor | None]] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: tuple[Any, ...] = (), named: dict[str, Any] | None = None) -> Any:
        if function is torch.ops.aten.native_batch_norm_backward.default:
            self.saved.append(arguments[5:7])
        return function(*arguments, **(named or {}))


def saved_statistics() -> list[float]:
    """Of a backward pass over all ranks: how far what CUDA's kernel would read is from the batch's mean and 1 / σ."""
    x = torch.randn(8, 3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    norm = BatchNorm(3).to(torch.float64)
    with _Backwards() as seen:
        norm(mine(x).requires_grad_()).sum().backward()
    ((mean, invstd),) = seen.saved
    assert mean is not None and invstd is not None, "CUDA's kernel fails without them"
    var, expected = torch.var_mean(x, (0, 2, 3), correction=0)
    return [float((mean - expected).abs().max()), float((invstd - (var + norm.eps).rsqrt()).abs().max())]


def test_the_backward_pass_has_what_cudas_kernel_reads(ranks: Ranks, within: Within) -> None:
    """A CPU reads running statistics there; on two ranks of an H100 every eager step ended with an internal assertion of torch."""
    for found in ranks(2, saved_statistics):
        within("mean", found[0], 1e-12)
        within("1 / σ", found[1], 1e-12)
