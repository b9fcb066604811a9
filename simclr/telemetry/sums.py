"""Sums of a loss's values from one report to the next, on the device: nothing waits for them before the report."""

from __future__ import annotations

import torch
from torch import Tensor

_OF = " of"


class Sums:
    """Sums by name: of means (), and of hits with their possible number (2,)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.names: list[str] = []
        self.total: Tensor | None = None

    def add(self, found: dict[str, Tensor]) -> None:
        """Add the values of one step. Every step gives the same names."""
        if self.total is None:
            self.names = [part for name, x in found.items() for part in ((name, name + _OF) if x.ndim else (name,))]
            self.total = torch.zeros(len(self.names), device=self.device, dtype=torch.float64)
        self.total += torch.cat([x.detach().reshape(-1) for x in found.values()])

    def means(self, steps: int) -> dict[str, Tensor]:
        """This rank's means over `steps` steps; `shares` reads them after they are averaged over ranks."""
        assert self.total is not None
        return dict(zip(self.names, self.total / steps, strict=True))

    def clear(self) -> None:
        if self.total is not None:
            self.total.zero_()


def shares(means: dict[str, float]) -> dict[str, float]:
    """`means` with hits divided by their possible number; a name whose number is 0 is left out."""
    found = {name: value for name, value in means.items() if not name.endswith(_OF) and name + _OF not in means}
    for name, of in ((name.removesuffix(_OF), value) for name, value in means.items() if name.endswith(_OF)):
        if of:
            found[name] = means[name] / of
    return found
