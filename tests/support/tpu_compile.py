"""Compile a training step for a TPU v5e, ahead of time, on a machine without one:  python -m tests.support.tpu_compile [gradient]

libtpu has XLA's compiler for TPUs, which compiles for a described chip without having one. torchax gives it our torch code. Needs `pip
install jax libtpu torchax` beside the environment; prints the compiler's figures for the program's memory.
"""

from __future__ import annotations

import os
import sys
import time

import torch
import torch._ops
import torch.distributed.tensor

from simclr.loss import nt_xent
from simclr.methods.simclr import build_model
from simclr.recipes import patterns_tiny

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}


class _Gone:
    """An operator that torchax 0.0.13 registers and torch 2.15 no longer has."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, name: str) -> _Gone:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Gone(f"{self.name}.{name}")


def _import_torchax() -> object:
    kinds = (torch._ops._OpNamespace, torch._ops.OpOverloadPacket)
    real = [kind.__getattr__ for kind in kinds]

    def lenient(old):  # type: ignore[no-untyped-def]
        def look(self, name):  # type: ignore[no-untyped-def]
            try:
                return old(self, name)
            except AttributeError:
                if name.startswith("_"):
                    raise
                return _Gone(name)

        return look

    for kind, old in zip(kinds, real, strict=True):
        kind.__getattr__ = lenient(old)  # type: ignore[method-assign]
    try:
        import torchax

        torchax.default_env().load_ops()
    finally:
        for kind, old in zip(kinds, real, strict=True):
            kind.__getattr__ = old  # type: ignore[method-assign]
    return torchax


class Step(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = patterns_tiny()
        self.model = build_model(self.config).train()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nt_xent(self.model({"views": x.unflatten(0, (2, -1))})["z"].flatten(0, 1), self.config.loss.temperature)


def main(gradient: bool) -> None:
    import numpy as np

    torchax = _import_torchax()
    import jax
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    chips = topologies.get_topology_desc(topology_name="v5e:2x2", platform="tpu").devices
    everywhere = NamedSharding(Mesh(np.array(chips[:1]), ("chip",)), PartitionSpec())
    weights, step = torchax.extract_jax(Step())  # type: ignore[attr-defined]

    def loss(weights, x):  # type: ignore[no-untyped-def]
        return step(weights, (x,))

    shapes = {name: jax.ShapeDtypeStruct(w.shape, w.dtype) for name, w in weights.items()}
    x = jax.ShapeDtypeStruct((16, 3, 32, 32), np.float32)
    # On two busy cores the loss took 2 minutes; the gradient was not done after 12, when we stopped waiting.
    for what, function in {"gradient": jax.grad(loss)}.items() if gradient else {"loss": loss}.items():
        began = time.monotonic()
        lowered = jax.jit(function, in_shardings=(everywhere, everywhere), out_shardings=everywhere).lower(shapes, x)
        compiled = lowered.compile()
        memory = compiled.memory_analysis()
        needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        took = time.monotonic() - began
        print(f"{what}: compiled for {chips[0].device_kind} in {took:.0f} s, {needed / 2**20:.1f} MiB of the chip", flush=True)


if __name__ == "__main__":
    main("gradient" in sys.argv[1:])
