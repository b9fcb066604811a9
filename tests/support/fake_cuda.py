"""A fake CUDA device: tensors without values whose device is CUDA, and stand-ins for its streams and events.

torch's FakeTensorMode computes shapes, dtypes and devices of every operator, and refuses operators that mix devices. So the branches that
only CUDA takes run, up to the kernels, while tensors on the host have values. Values on the device, kernels and the order of streams can
be tested on a GPU alone.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # not public; torch.compile sees a program through it
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
_READS = ("aten._local_scalar_dense", "aten.is_nonzero", "aten.equal")  # operators whose result is a number on the host
_SHAPES = ("aten.nonzero", "aten.masked_select", "aten._unique2")  # operators whose result's shape depends on values on the device


class Event:
    """Records no time, and is reached as soon as it is recorded."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.recorded = False

    def record(self, stream: Any = None) -> None:
        self.recorded = True

    def query(self) -> bool:
        return self.recorded

    def synchronize(self) -> None:
        assert self.recorded, "waits for an event that was not recorded"

    def elapsed_time(self, later: Event) -> float:
        assert self.recorded and later.recorded
        return 1.0


class Stream:
    def __init__(self, device: Any = None) -> None:
        self.waited: list[Event] = []
        self.synchronized = False

    def wait_event(self, event: Event) -> None:
        assert event.recorded, "waits for an event that was not recorded"
        self.waited.append(event)

    def synchronize(self) -> None:
        self.synchronized = True


def _without_values(x: Any) -> Any:
    """A fake tensor like x. (FakeTensorMode could make one, but keeps a reference to x, with which a module's parameters cannot be
    moved.)"""
    if not isinstance(x, Tensor) or isinstance(x, FakeTensor):
        return x
    return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=x.device)


class Watched(TorchDispatchMode):
    """Records in `waits` what the host would wait for: reads, shapes that depend on values, blocking copies.

    A read gives 0 (or True). A copy to the device blocks unless it is asked not to and its source is page-locked.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.copies = 0
        self.beside = False
        self.locked: set[int] = set()
        self.kept: list[Tensor] = []

    def pin(self, x: Tensor) -> Tensor:
        assert x.device.type == "cpu", "only the host's memory is page-locked"
        pinned = x.clone() if type(x) is Tensor else x
        self.locked.add(id(pinned))
        self.kept.append(pinned)  # an id is reused after its tensor is freed
        return pinned

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, str(func)
        device = torch.device(kwargs.get("device") or "cpu")
        if device.type == "cpu" and not any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs))):
            with _disable_current_modes():
                return func(*args, **kwargs)
        if name.startswith(_READS):
            if args[0].device.type == "cuda":
                self.waits.append(name)
            return True if args[0].dtype == torch.bool else 0.0 if args[0].dtype.is_floating_point else 0
        if name.startswith(_SHAPES):
            self.waits.append(name)
        if name.startswith("aten._fused_sgd_"):  # in place, one kernel; FakeTensorMode knows no such operator
            return None
        if name.startswith("aten._to_copy"):
            self._copied(args[0], torch.device(kwargs.get("device") or args[0].device), bool(kwargs.get("non_blocking")))
        elif name.startswith("aten.copy_"):
            self._copied(args[1], args[0].device, bool(args[2] if len(args) > 2 else kwargs.get("non_blocking")))
        args, kwargs = tree_map(_without_values, (args, kwargs))
        return func(*args, **kwargs)

    def _copied(self, source: Tensor, to: torch.device, non_blocking: bool) -> None:
        if source.device.type == to.type:
            return
        self.copies += 1
        if to.type != "cuda":
            self.waits.append("a copy to the host")
        elif not non_blocking:
            self.waits.append("a blocking copy to the device")
        elif not self.beside and id(source) not in self.locked:
            self.waits.append("a copy from memory that is not page-locked")


# ── Parts of torch in C++ that refuse to run without a driver ──────────────────────────────────────────────────────


def _moved(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` without its ways to keep a parameter's identity, which fail for fake tensors."""
    for child in module.children():
        _moved(child, fn)
    with torch.no_grad():
        for name, p in module._parameters.items():
            module._parameters[name] = None if p is None else nn.Parameter(fn(p), p.requires_grad)
        for name, b in module._buffers.items():
            module._buffers[name] = None if b is None else fn(b)
    return module


def _gradients(root: Tensor) -> dict[Any, Tensor]:
    """{leaf's node: gradient} of a scalar: every node of the graph called once, behind those that lead to it."""
    order: list[Any] = []
    seen: set[Any] = set()
    stack: list[tuple[Any, bool]] = [(root.grad_fn, False)]
    while stack:
        node, left = stack.pop()
        if left:
            order.append(node)
        elif node is not None and node not in seen:
            seen.add(node)
            stack += [(node, True), *((following, False) for following, _ in node.next_functions)]
    arrived: dict[Any, dict[int, Tensor]] = {root.grad_fn: {root.output_nr: torch.ones_like(root)}}
    found = {}
    with torch.no_grad():
        for node in reversed(order):
            given = arrived.pop(node, {})
            if type(node).__name__ == "AccumulateGrad":
                found[node] = given[0]
                continue
            call = node.apply if isinstance(node, torch.autograd.function.BackwardCFunction) else node
            results = call(*(given.get(i) for i in range(len(node._input_metadata))))
            for (following, place), g in zip(node.next_functions, results if isinstance(results, tuple) else (results,), strict=False):
                if following is not None and g is not None:
                    slot, asked = arrived.setdefault(following, {}), following._input_metadata[place]
                    g = g.sum_to_size(tuple(asked.shape)).to(asked.dtype)  # the gradient of a broadcast input
                    slot[place] = slot[place] + g if place in slot else g
    return found


def _backward(root: Tensor) -> None:
    for node, gradient in _gradients(root).items():
        node.variable.grad = gradient if node.variable.grad is None else node.variable.grad + gradient


def _grad(root: Tensor, inputs: Tensor | list[Tensor], allow_unused: bool = False) -> tuple[Tensor | None, ...]:
    found = _gradients(root)
    wanted = [inputs] if isinstance(inputs, Tensor) else inputs
    gradients = tuple(next((g for node, g in found.items() if node.variable is x), None) for x in wanted)
    assert allow_unused or all(g is not None for g in gradients)
    return gradients


@contextlib.contextmanager
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    """Inside, `CUDA` is a device whose tensors have no values."""
    watched = Watched()
    current = Stream()

    @contextlib.contextmanager
    def stream(other: Stream) -> Iterator[None]:
        watched.beside = True  # copies on their own stream wait for no kernel; the loader's memory is page-locked
        try:
            yield
        finally:
            watched.beside = False

    for name, stand_in in {
        "Event": Event,
        "Stream": Stream,
        "stream": stream,
        "current_stream": lambda device=None: current,
        "max_memory_allocated": lambda device=None: 3 << 30,
        "get_device_properties": lambda device=None: SimpleNamespace(major=9, minor=0, multi_processor_count=132),
        "synchronize": lambda device=None: watched.waits.append("synchronize"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: watched.pin(x))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, stream: None)
    monkeypatch.setattr(torch.Tensor, "backward", _backward)
    monkeypatch.setattr(torch.autograd, "grad", _grad)
    monkeypatch.setattr(nn.Module, "_apply", _moved)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "CUDA is not available|User provided device_type of 'cuda'")  # autocast, which is off then
        with FakeTensorMode(allow_non_fake_inputs=True), watched:
            yield watched


def stand_in_kernels(monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """Put recorders in the place of the Triton kernels; returns the list of their launches: name, grid, arguments, settings."""
    import sys

    launched: list[SimpleNamespace] = []

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: Any) -> Any:
            return lambda *arguments, **settings: launched.append(
                SimpleNamespace(name=self.name, grid=grid, arguments=arguments, settings=settings)
            )

    kernels = {
        "nt_xent_triton": ("sums_kernel", "losses_kernel", "weighted_kernel", "gradient_kernel"),
        "views_triton": ("means_kernel", "colours_kernel", "blur_kernel"),
    }
    for file, names in kernels.items():
        module: Any = SimpleNamespace(**{name: Kernel(name) for name in names})
        monkeypatch.setitem(sys.modules, f"simclr.kernels.{file}", module)
    return launched
