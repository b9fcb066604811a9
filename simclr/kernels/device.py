"""The GPUs that take the Triton kernels."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True, slots=True)
class Gpu:
    """What the sizes of tiles depend on."""

    capability: int
    """Compute capability, 90 for an H100."""
    multiprocessors: int


def gpu(device: torch.device) -> Gpu:
    found = torch.cuda.get_device_properties(device)
    return Gpu(10 * found.major + found.minor, found.multi_processor_count)


def takes_triton(device: torch.device) -> bool:
    """Whether tensors on `device` go through the kernels: on an NVIDIA GPU from the A100's generation on, for whose registers and memory
    they are made, if Triton is installed. Other devices take the plain functions."""
    return device.type == "cuda" and torch.version.hip is None and _installed() and gpu(device).capability >= 80


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None
