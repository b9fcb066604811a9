"""From the host to a device without waiting for it."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(x: Tensor | NDArray[Any], device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """`x`, which lies on the host, on `device`, as `dtype` if given: a copy that neither the host nor the kernels before it wait for.

    To CUDA it goes from page-locked memory. From any other the driver may wait until its stream is empty, and the step's queue of
    kernels runs dry. torch keeps page-locked blocks for their next use, so locking costs one small copy on the host.
    """
    host = torch.as_tensor(x, dtype=dtype)
    if torch.device(device).type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)
