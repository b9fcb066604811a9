"""Ray calls `load` before it starts a process group `tpu_dist`, which is gloo under another name here."""

from datetime import timedelta
from typing import Any

import torch.distributed as dist


def load() -> None:
    dist.Backend.register_backend("tpu_dist", _gloo, devices=["cpu", "tpu"])


def _gloo(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    return dist.ProcessGroupGloo(store, rank, size, timeout)
