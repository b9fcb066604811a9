"""The cores of this machine, used one by one instead of all for each product."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


class Cores:
    """This machine's cores, each with a part of the work; torch itself uses a single thread meanwhile.

    The product of a block of rows, or the convolution of a small batch, is too small to be shared among cores: they would meet after each,
    and spin where another process has one of them. So each core takes rows of its own. With a GPU it is the caller's thread alone.
    """

    def __init__(self, device: torch.device) -> None:
        self.count = torch.get_num_threads() if device.type == "cpu" else 1
        self.pool = ThreadPoolExecutor(self.count, "core") if self.count > 1 else None

    def __enter__(self) -> Cores:
        if self.pool is not None:
            torch.set_num_threads(1)
            started = threading.Barrier(self.count)

            def alone(_: int) -> None:
                torch.get_num_threads()  # torch gives a new thread its number at the first question; a later one would undo the next line
                torch.set_num_threads(1)
                started.wait()

            list(self.pool.map(alone, range(self.count)))
        return self

    def map(self, work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """work(item) of each, in their order."""
        if self.pool is None or len(items) == 1:
            return [work(item) for item in items]
        return list(self.pool.map(work, items))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.pool is not None:
            self.pool.shutdown()
            torch.set_num_threads(self.count)
