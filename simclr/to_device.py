"""Copies from the host to a device, without waiting for it."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(x: Tensor | NDArray[Any], device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """A copy of the host's `x` on `device`, as `dtype` if given. Neither the host nor the kernels before the copy wait for it.

    A copy to CUDA starts from page-locked memory. From other memory the driver may wait until its stream is empty, and then the GPU runs
    out of kernels. torch reuses page-locked blocks, so locking costs one small copy on the host.
    """
    host = torch.as_tensor(x, dtype=dtype)
    if torch.device(device).type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)
