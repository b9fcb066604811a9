"""The model of `simclr bench scale`: seconds of a step's communication on more ranks than there are here, by bytes and messages. Pure.

Ranks stand in nodes, with one link within a node (NVLink) and another between nodes (the network, of which each rank has its own part).
There are two ways for the same collectives, and a cluster is expected between them: a flat one, where all bytes pass the slower link, and
a hierarchical one, where a node's ranks first add up and only a part of the bytes leaves the node.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

_BACKWARD = 2 / 3  # of a step: a convolution's backward pass is two products, its forward pass one
LEFT_OUT = (
    "the model leaves out: waiting for the slowest rank, a network card that a node's ranks share, gradients and BatchNorm's sums at once "
    "on one link, the start of kernels, and the loss's longer rows"
)


@dataclass(frozen=True, slots=True)
class Link:
    """What one rank sends over it (10⁹ bytes/s), and the latency of a message."""

    bandwidth_gb_s: float
    latency_us: float

    def bytes_s(self, count: float) -> float:
        return count / (self.bandwidth_gb_s * 1e9)

    def messages_s(self, count: float) -> float:
        """Of so many, one after another."""
        return count * self.latency_us * 1e-6


@dataclass(frozen=True, slots=True)
class Cluster:
    """W `ranks`, `per_node` of them in each node."""

    ranks: int
    per_node: int
    inside: Link
    between: Link

    @property
    def nodes(self) -> int:
        return -(-self.ranks // self.per_node)

    @property
    def together(self) -> int:
        """Ranks of a node."""
        return min(self.ranks, self.per_node)

    @property
    def slower(self) -> Link:
        """The link that holds up a ring over all ranks."""
        if self.nodes == 1 or self.together == 1:
            return self.inside if self.nodes == 1 else self.between
        return min(self.inside, self.between, key=lambda link: link.bandwidth_gb_s)

    def hops_s(self) -> float:
        """Once along a ring: W − 1 messages one after another, of which one in each node but the last leaves it."""
        return self.inside.messages_s(self.ranks - self.nodes) + self.between.messages_s(self.nodes - 1)


# ── Collectives, flat ──────────────────────────────────────────────────────────────────────────────────────────────


def ring_all_reduce_s(size_bytes: float, on: Cluster) -> float:
    """Twice along the ring, first to add, then to tell: 2 (W − 1) / W of the bytes pass each rank (Patarasuk and Yuan, 2009,
    doi:10.1016/j.jpdc.2008.09.002)."""
    return 2 * (on.slower.bytes_s((on.ranks - 1) / on.ranks * size_bytes) + on.hops_s())


def ring_all_gather_s(size_bytes: float, on: Cluster) -> float:
    """Once along the ring, of `size_bytes` once they are gathered. A reduce-scatter of them takes the same."""
    return on.slower.bytes_s((on.ranks - 1) / on.ranks * size_bytes) + on.hops_s()


def tree_all_reduce_s(size_bytes: float, on: Cluster) -> float:
    """2 ⌈log₂ W⌉ messages up and down a tree that knows no nodes, and 2 (W − 1) / W of the bytes: for a few KiB latency dominates, and a
    ring of 1,024 ranks would wait 2,046 times."""
    link = on.between if on.nodes > 1 else on.inside
    return link.messages_s(2 * _depth(on.ranks)) + on.slower.bytes_s(2 * (on.ranks - 1) / on.ranks * size_bytes)


# ── The same in two levels ─────────────────────────────────────────────────────────────────────────────────────────


def two_level_all_reduce_s(size_bytes: float, on: Cluster) -> float:
    """A node's g ranks add up and keep b / g each; the ranks of one place in each of the M nodes add up theirs; a node's ranks tell each
    other: 2 (g − 1) / g · b within, 2 (M − 1) / M · b / g between, 2 (g − 1) and 2 (M − 1) messages."""
    return 2 * two_level_all_gather_s(size_bytes, on)


def two_level_all_gather_s(size_bytes: float, on: Cluster) -> float:
    """Among the ranks of one place in each node, then within the nodes: half of the all-reduce. A reduce-scatter takes the same."""
    g, m = on.together, on.nodes
    within = on.inside.bytes_s((g - 1) / g * size_bytes) + on.inside.messages_s(g - 1)
    return within + on.between.bytes_s((m - 1) / m * size_bytes / g) + on.between.messages_s(m - 1)


def two_level_tree_s(size_bytes: float, on: Cluster) -> float:
    """A chain of a node's ranks, and a tree of nodes, up and down: 2 (g − 1) and 2 ⌈log₂ M⌉ messages, as NCCL itself expects of its trees
    (its src/graph/tuning.cc)."""
    g, m = on.together, on.nodes
    messages = on.inside.messages_s(2 * (g - 1)) + on.between.messages_s(2 * _depth(m))
    return messages + on.inside.bytes_s(2 * (g - 1) / g * size_bytes) + on.between.bytes_s(2 * (m - 1) / m * size_bytes)


def _depth(count: int) -> int:
    return math.ceil(math.log2(count))


Collective = Callable[[float, Cluster], float]
WAYS: dict[str, tuple[Collective, Collective, Collective]] = {
    "flat ring": (ring_all_reduce_s, ring_all_gather_s, tree_all_reduce_s),
    "hierarchical": (two_level_all_reduce_s, two_level_all_gather_s, two_level_tree_s),
}
"""Name → all-reduce of much, all-gather, all-reduce of little."""


# ── The step ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Work:
    """One rank's step, and what it exchanges."""

    step_s: float
    """Without ranks to exchange with."""
    gradient_bytes: float
    buckets: int
    """In which gradients travel, each an all-reduce of its own."""
    z_bytes: float
    """The rank's own unit rows."""
    norm_bytes: float
    """Sums of all BatchNorms, in one direction."""
    layers: int
    """BatchNorms whose statistics several ranks share."""
    norm_ranks: int | None = None
    """How many ranks in a row share them; None = all."""


@dataclass(frozen=True, slots=True)
class Expected:
    """Seconds of one step of W ranks, and the efficiency: one rank's step over it."""

    gradients_s: float
    gather_s: float
    norm_s: float
    step_s: float
    """One rank's step plus all communication, without overlap."""
    efficiency: float
    overlapped_efficiency: float
    """With gradients sent during the backward pass, as DDP does. Only their time beyond it costs, and the last bucket, which is complete
    when the backward pass ends; the gather and BatchNorm's sums, for which computing waits, cost all of theirs."""


def expected(work: Work, on: Cluster, way: str) -> Expected:
    """The time of a step of `on`'s ranks, each with as many images as the single rank of `work`, by one of `WAYS`.

    gradients   an all-reduce for each bucket, with its messages
    gather      an all-gather of W · z_bytes, and the reduce-scatter of their gradient
    norm        in each layer a small all-reduce forward and one backward; in groups forward an all-gather, and both among a group's ranks
    """
    all_reduce, all_gather, small = WAYS[way]
    bucket = all_reduce(work.gradient_bytes / work.buckets, on)
    gradients, gather, norm = work.buckets * bucket, 2 * all_gather(on.ranks * work.z_bytes, on), 0.0
    if work.layers:
        each, together = work.norm_bytes / work.layers, min(work.norm_ranks or on.ranks, on.ranks)
        group = replace(on, ranks=together)
        forward = small(each, on) if together == on.ranks else all_gather(together * each, group)
        norm = work.layers * (forward + small(each, group))
    whole = work.step_s + gradients + gather + norm
    hidden = work.step_s + max(bucket, gradients - _BACKWARD * work.step_s) + gather + norm
    return Expected(gradients, gather, norm, whole, work.step_s / whole, work.step_s / hidden)
