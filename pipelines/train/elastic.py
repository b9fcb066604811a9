"""With how many workers a training runs, as nodes come and go."""

from __future__ import annotations

import socket
import time
from typing import Any

from pipelines.train import capacity, hang
from pipelines.train.messages import Said, Tell

_SAY_EVERY_S, _LOOK_EVERY_S = 60.0, 0.5


def listens(host: str, port: int) -> bool:
    """Whether somebody does at this address."""
    try:
        socket.create_connection((host.strip("[]"), port), timeout=1.0).close()
    except OSError:
        return False
    return True


def scaling_policy(config: Any, counts: list[int], private: bool, tell: Tell) -> Any:
    from ray.train.v2._internal.execution.scaling_policy import (
        ElasticScalingPolicy,
        FixedScalingPolicy,
        NoopDecision,
        ResizeDecision,
    )

    class Alone(FixedScalingPolicy):
        """Without a request to an autoscaler, which takes an actor, that is a process of 3 s of imports."""

        def after_controller_start(self, train_run_context: Any) -> None: ...

        def _maybe_send_resource_request(self) -> None: ...

    class Elastic(ElasticScalingPolicy):
        """As many workers as there is room for and as the batch divides over. Ray's own ends a group where it stands to make it
        larger; this one asks it to leave with a checkpoint, and the next group, which has the room, is the larger."""

        asked, say_at = 0.0, 0.0
        running, tried = 0, False
        """Workers that run now, and whether a group was to start and has not come to run."""

        def _count_possible_workers(self, reserved_resources: Any) -> int:
            alive = _alive()
            room = super()._count_possible_workers({node: has for node, has in reserved_resources.items() if node in alive})
            # Ray counts what nodes have, and not what other jobs hold of it: a group that is to grow into that never starts. Right
            # after a group's end what it held is not seen to be free yet, so the first try does not ask.
            if self.running or self.tried:
                room = min(room, self.running + _free(self.scaling_config._resources_per_worker_not_none, alive))
            return max((count for count in counts if count <= room), default=0)

        def make_decision_for_non_running_worker_group(self) -> Any:
            self.running = 0
            decision = super().make_decision_for_non_running_worker_group()
            now = time.monotonic()
            if not isinstance(decision, NoopDecision):
                self.say_at, self.tried = 0.0, True
                return decision
            time.sleep(_LOOK_EVERY_S)  # Ray asks again at once, and again
            if self.say_at == 0:  # the first answers come before Ray has counted
                self.say_at = now + _SAY_EVERY_S / 6
            elif now > self.say_at:
                self.say_at = now + _SAY_EVERY_S
                tell(Said(f"waiting for nodes: there is no room for {counts[0]} workers"))
            return decision

        def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
            self.running, self.tried = worker_group_state.num_workers, False
            decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
            # A smaller one follows from who fails or leaves.
            if (
                isinstance(decision, ResizeDecision)
                and decision.num_workers > worker_group_state.num_workers
                and self.asked != worker_group_state.start_time
            ):
                self.asked = worker_group_state.start_time
                reason = f"there is room for {decision.num_workers} workers"
                worker_group_state.workers[0].execute_async(hang.ask_to_leave, reason)
            return NoopDecision()

    if config.elasticity_enabled:
        return Elastic(config)
    return Alone(config) if private else FixedScalingPolicy(config)


def _alive() -> set[str]:
    """Ids of the nodes that workers may be placed on now.

    What Ray has noted may be seconds old, and a group that is planned with a node that just died, or is about to be taken back,
    waits for it until its start times out. So the nodes are asked.
    """
    import ray

    draining = ray._private.state.state.get_draining_nodes()
    nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in draining]
    return {node["NodeID"] for node in nodes if listens(node["NodeManagerAddress"], node["NodeManagerPort"])}


def _free(each: dict[str, float], nodes: set[str]) -> int:
    """How many workers that take `each` there is free room for on `nodes`."""
    import ray

    found = ray._private.state.available_resources_per_node()
    return sum(capacity.fit(each, has) for node, has in found.items() if node in nodes)
