"""What a cluster has, and what its autoscaler would add for a job that asks."""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

from pipelines.terminal import say

GROWS = "SIMCLR_GROWS"
"""Environment: resources that an autoscaler adds as they are asked for, as "CPU GPU"; where `ray up` has left no file."""


def reachable(joined: bool, file: Path = Path("~/ray_bootstrap_config.yaml")) -> dict[str, float]:
    """Resource → how much of it Ray can have. A cluster that scales to zero has no GPU when a job comes: who counts the nodes of the
    moment refuses what would have started them.

    `file` is what `ray up` leaves on the head, where the drivers of submitted jobs run, for its autoscaler. Without it, and without
    $SIMCLR_GROWS, only the nodes that are there count; so too with a private Ray (`joined` is False).
    """
    import ray

    has = defaultdict(float, ray.cluster_resources())
    if not joined:
        return dict(has)
    for name, amount in _most(file.expanduser()).items():
        has[name] = max(has[name], amount)
    for name in os.environ.get(GROWS, "").split():
        has[name] = math.inf
    return dict(has)


def announce(needs: dict[str, float]) -> None:
    """Say it where nodes are to come before the workers can start: that takes minutes, in which nothing else is to be seen."""
    import ray

    has = ray.cluster_resources()
    if missing := [f"{has.get(name, 0):.0f} of {amount:.0f} {name}s" for name, amount in needs.items() if amount > has.get(name, 0)]:
        say(f"waiting for nodes: the cluster has {' and '.join(missing)}; its autoscaler starts the rest (`ray status` shows them)")


def _most(file: Path) -> dict[str, float]:
    """Resource → of all nodes that the autoscaler may have at once, {} where the file is not there."""
    if not file.is_file():
        return {}
    cluster: dict[str, Any] = json.loads(file.read_text())
    cap, found = cluster.get("max_workers", 0), defaultdict[str, float](float)
    for name, node in cluster.get("available_node_types", {}).items():
        count = 1 if name == cluster.get("head_node_type") else min(node.get("max_workers", cap), cap)
        for resource, amount in node.get("resources", {}).items():
            found[resource] += count * amount
    return found
