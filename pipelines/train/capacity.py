"""The resources that a cluster has, and those that its autoscaler would add for a job."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

from pipelines.terminal import say
from pipelines.train import rendezvous
from simclr import files

GROWS = "SIMCLR_GROWS"
"""Environment variable for clusters without the file of `ray up`: the resources that an autoscaler adds on demand, as "CPU GPU"."""


LEFT = Path("~/ray_bootstrap_config.yaml")
"""The file that `ray up` leaves for its autoscaler on the head. The drivers of submitted jobs run there."""


def reachable(joined: bool) -> dict[str, float]:
    """Resource → how much of it Ray can have. A cluster that scales to zero has no GPU when a job comes, so counting only the nodes that
    run now would refuse the very job that starts them.

    Raises UserError if nodes cannot reach one another.

    Without `LEFT` and $SIMCLR_GROWS, and in a private Ray (`joined` is False), only the nodes that run now count.
    """
    import ray

    has = defaultdict(float, ray.cluster_resources())
    if not joined:
        return dict(has)
    rendezvous.require_reachable(ray.nodes())
    for name, amount in grown().items():
        has[name] = max(has[name], amount)
    return dict(has)


def grown() -> dict[str, float]:
    """Resource → its sum over all nodes that the autoscaler may run at once, infinite for those in $SIMCLR_GROWS; {} without one."""
    return _most() | dict.fromkeys(os.environ.get(GROWS, "").split(), math.inf)


def slots(joined: bool, cpus: int, gpu: bool) -> float:
    """How many workers of `cpus` cores (and a GPU each, if `gpu`) fit on the nodes that Ray can have; `reachable` says which these are.
    A worker runs on one node. Infinite if $SIMCLR_GROWS names all that a worker needs: the number of nodes is then unknown."""
    import ray

    each = {"CPU": float(cpus)} | ({"GPU": 1.0} if gpu else {})
    now = sum(fit(each, node["Resources"]) for node in ray.nodes() if node["Alive"])
    if not joined:
        return now
    grows = set(os.environ.get(GROWS, "").split())
    return math.inf if grows >= each.keys() else max(now, sum(count * fit(each, node) for node, count in _types()))


def fit(each: dict[str, float], node: dict[str, float]) -> int:
    """How many workers that take `each` fit on a node that has `node`."""
    return min(math.floor(node.get(name, 0) / amount) for name, amount in each.items() if amount > 0)


def announce(needs: dict[str, float]) -> None:
    """Say so if nodes have to start before the workers can: that takes minutes, and nothing else shows meanwhile."""
    import ray

    has = ray.cluster_resources()
    if missing := [f"{has.get(name, 0):.0f} of {amount:.0f} {name}s" for name, amount in needs.items() if amount > has.get(name, 0)]:
        say(f"waiting for nodes: the cluster has {' and '.join(missing)}; its autoscaler starts the rest (`ray status` shows them)")


def _most() -> dict[str, float]:
    """Resource → its sum over all nodes that the autoscaler may run at once."""
    found = defaultdict[str, float](float)
    for node, count in _types():
        for resource, amount in node.items():
            found[resource] += count * amount
    return found


def _types() -> list[tuple[dict[str, float], int]]:
    """(resources of a node, most nodes at once) of each node type in `LEFT`; [] without that file."""
    file = LEFT.expanduser()
    if not file.is_file():
        return []
    cluster: dict[str, Any] = files.read_json(file, "start the cluster again with `ray up`")
    cap, head = cluster.get("max_workers", 0), cluster.get("head_node_type")
    types = cluster.get("available_node_types", {}).items()
    return [(node.get("resources", {}), 1 if name == head else min(node.get("max_workers", cap), cap)) for name, node in types]
