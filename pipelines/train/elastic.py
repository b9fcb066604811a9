"""The number of workers of an elastic training, as nodes come and go."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Any

from pipelines.train import capacity, hang, ray_private, waiting
from pipelines.train.messages import Said, Tell

_SAY_EVERY_S, _LOOK_EVERY_S = 60.0, 0.5


def listens(host: str, port: int) -> bool:
    """Whether a process listens at this address."""
    try:
        socket.create_connection((host.strip("[]"), port), timeout=1.0).close()
    except OSError:
        return False
    return True


def scaling_policy(config: Any, counts: list[int], private: bool, tell: Tell) -> Any:
    class Elastic(ray_private.elastic_scaling()):  # type: ignore[misc]
        """As many workers as fit. When there is room for more, the running group is asked to leave with
        a checkpoint, and the next group is larger."""

        asked, say_at = 0.0, 0.0
        running, tried = 0, False
        """Number of workers that run now, and whether a planned group has not started to run yet."""

        def possible(self, room: Callable[[set[str]], int]) -> int:
            alive = _alive()
            most = room(alive)
            # Ray also counts resources that other jobs hold, and a group that should grow into these never starts: so free resources
            # are a bound. Right after a group's end its own do not show as free yet, so the first try has no such bound.
            if self.running or self.tried:
                most = min(most, self.running + _free(self.scaling_config.resources_per_worker, alive))
            if self.running and most > self.running and not private and waiting.somebody():
                most = self.running  # that room is for the job that waits
            return max((count for count in counts if count <= most), default=0)

        def idle(self) -> None:
            self.running = 0

        def planned(self, starts: bool) -> None:
            now = time.monotonic()
            if starts:
                self.say_at, self.tried = 0.0, True
                return
            time.sleep(_LOOK_EVERY_S)  # else Ray asks again at once, in a loop
            if self.say_at == 0:  # Ray's first answers come before it has counted the nodes
                self.say_at = now + _SAY_EVERY_S / 6
            elif now > self.say_at:
                self.say_at = now + _SAY_EVERY_S
                tell(Said(f"waiting for nodes: there is no room for {counts[0]} workers"))

        def runs(self, workers: int) -> None:
            self.running, self.tried = workers, False

        def may_grow(self, workers: int, running: ray_private.Group) -> None:
            # A group shrinks by itself when workers fail or leave.
            if workers > len(running.workers) and self.asked != running.started:
                self.asked = running.started
                running.workers[0].ask(hang.ask_to_leave, f"there is room for {workers} workers")

    return Elastic(config) if config.elasticity_enabled else ray_private.fixed_scaling(config, lean=private)


def _alive() -> set[str]:
    """Ids of the nodes that workers may be placed on now.

    Ray's own list may be seconds old. A group that is planned with a node that just died, or has a preemption notice, waits until its
    start times out. So each node is asked.
    """
    import ray

    draining = ray_private.draining()
    nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in draining]
    return {node["NodeID"] for node in nodes if listens(node["NodeManagerAddress"], node["NodeManagerPort"])}


def _free(each: dict[str, float], nodes: set[str]) -> int:
    """How many workers that take `each` fit into the free resources of `nodes`."""
    return sum(capacity.fit(each, has) for node, has in ray_private.free().items() if node in nodes)
