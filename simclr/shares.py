"""Who of several ranks gets what of a whole that they need not divide. In whole numbers, so that all ranks and the driver agree."""

from __future__ import annotations


def share(total: int, rank: int, world: int) -> slice:
    """Which of `total` consecutive things (images of a batch, in its order) `rank` of `world` gets: all ranks' shares, one behind the
    other, are all of them, and their sizes differ by one at most."""
    return slice(rank * total // world, (rank + 1) * total // world)


def shares(total: int, world: int) -> list[int]:
    """How many of `total` things each of `world` ranks gets."""
    ends = [share(total, rank, world).stop for rank in range(world)]
    return [end - first for first, end in zip([0, *ends], ends, strict=False)]


def groups_of(groups: int, rank: int, world: int) -> range:
    """The groups, each an equal part of a whole, that the share of `rank` of `world` lies in, however many things the whole has."""
    return range(rank * groups // world, -(-(rank + 1) * groups // world))
