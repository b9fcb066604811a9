"""Ray Train's controller as we run it: which failures it tries again, with how many workers, who hangs, who leaves a node in time."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from typing import Any

from pipelines.train import capacity, hang
from simclr import files
from simclr.data.s3.uri import Unreachable
from simclr.telemetry import progress

_ASK_MOST_S = 30.0  # between two questions where a worker is
_SAY_EVERY_S, _LOOK_EVERY_S = 60.0, 0.5
Tell = Callable[[dict[str, Any]], None]
"""Sends a message to the driver."""


def listens(host: str, port: int) -> bool:
    """Whether somebody does at this address."""
    try:
        socket.create_connection((host.strip("[]"), port), timeout=1.0).close()
    except OSError:
        return False
    return True


def causes(failure: BaseException) -> list[BaseException]:
    """What the workers raised, by rank, where Ray Train gave up for that; else the failure itself."""
    errors = getattr(failure, "worker_failures", {})
    return [getattr(errors[rank], "_base_exc", errors[rank]) for rank in sorted(errors)] or [failure]


def mistake(failure: BaseException) -> str:
    """The sentence of a worker's failure that would come again in every new try (a diverging loss, a damaged shard, a full
    disk, too little memory on the device), or ""."""
    for error in causes(failure) if hasattr(failure, "worker_failures") else []:
        if type(error).__name__ == "OutOfMemoryError" and type(error).__module__.startswith("torch"):
            first = str(error).splitlines()[0][:200]
            return f"a worker's device is out of memory ({first}); use --train.micro-batch, a smaller batch or more workers"
        if isinstance(error, ValueError | FloatingPointError) and not isinstance(error, Unreachable):
            return str(error)
        if sentence := files.trouble(error):
            return sentence
    return ""


def given_up(failure: BaseException) -> str:
    """The sentence of a failure that came too often, where it is nobody's bug: what could not be reached, a process that was lost or
    hung. "" for others, whose traceback says more."""
    import ray

    for error in causes(failure) if hasattr(failure, "worker_failures") else []:
        if isinstance(error, Unreachable):
            return str(error)
        if isinstance(error, hang.Hung | ray.exceptions.RayActorError):
            last = str(error).strip().splitlines()[0]
            return (
                f"workers failed more often in a row than --max-failures allows, the last time so: {last}; "
                "run the same command again, to go on from the last checkpoint"
            )
    return ""


def trainer_class(private: bool, counts: list[int], hang_timeout_s: float, tell: Tell, controllers: list[Any] | None) -> Any:
    """TorchTrainer that gives up at once where trying again cannot help, that starts nothing which a run has no use for, and
    that puts its controller's handle into `controllers`; None = its controller runs in this process.

    `counts` are the numbers of workers that it may run with, ascending.
    """
    import ray
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.constants import get_env_vars_to_propagate
    from ray.train.v2._internal.execution.controller import TrainController

    class Trainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            callbacks: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]
            # On this machine alone: each is an actor more, for Ray Data and for a controller lost with its node.
            unused = {"DatasetsCallback", "PlacementGroupCleanerCallback"} if private else set()
            # Ours first: the others then see whom it calls failed.
            return [_overseer(hang_timeout_s, tell), *(c for c in callbacks if type(c).__name__ not in unused)]

        def _initialize_and_run_controller(self, **settings: Any) -> Any:
            settings["scaling_policy"] = _scaling(self.scaling_config, counts, private, tell)
            settings["failure_policy"] = _failing(self.run_config.failure_config, counts[-1], tell)
            if controllers is None:
                controller = TrainController(**settings)
                try:
                    asyncio.run(controller.run())
                finally:  # Tune ends a trial by SystemExit out of a report
                    group = controller.get_worker_group()
                    if group is not None:
                        group.shutdown()
                return controller.get_result()
            # As the parent does, which keeps the handle to itself; Ctrl-C needs it.
            here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
            env = {"RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0", **get_env_vars_to_propagate()}
            # Else who frees the workers' cores when the controller is killed finds no Ray where there are two on a machine.
            env["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
            actor: Any = ray.remote(num_cpus=0, label_selector=here, runtime_env={"env_vars": env})(TrainController)
            controllers.append(actor.remote(**settings))
            ray.get(controllers[0].run.remote())
            return ray.get(controllers[0].get_result.remote())

    return Trainer


def _failing(config: Any, workers: int, tell: Tell) -> Any:
    import ray
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
    from ray.train.v2._internal.execution.failure_handling import FailureDecision
    from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
    from ray.train.v2.api.exceptions import ControllerError

    class Policy(DefaultFailurePolicy):
        """Gives up on mistakes, does not count who left when asked to, and counts failures in a row: over weeks every node fails once,
        and only a training that gets no further is worth no other try."""

        def make_decision(self, training_failed_error: Any) -> Any:
            error = training_failed_error
            if any(isinstance(cause, hang.Leave) for cause in causes(error)):
                return FailureDecision.RETRY
            if mistake(error):
                return FailureDecision.RAISE
            if hang.group.saved:
                hang.group.saved = self._worker_group_failures = 0
            if isinstance(error, ControllerError) and isinstance(error.controller_failure, ray.exceptions.RayError):
                # A worker was lost while its group was still meeting: to Ray a mistake of the controller's, and the end.
                self._worker_group_failures += 1
                tell({"say": f"workers failed to start: {str(error.controller_failure).strip().splitlines()[-1][:500]}"})
                again = self.failure_config.max_failures < 0 or self._worker_group_failures <= self.failure_config.max_failures
                return FailureDecision.RETRY if again else FailureDecision.RAISE
            if isinstance(error, ControllerError) and isinstance(error.controller_failure, WorkerGroupStartupTimeoutError):
                tell({"say": f"waiting for nodes: the cluster has no room for {workers} workers now (`ray status` shows why)"})
            return super().make_decision(error)

    return Policy(config)


def _scaling(config: Any, counts: list[int], private: bool, tell: Tell) -> Any:
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
                tell({"say": f"waiting for nodes: there is no room for {counts[0]} workers"})
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


def _overseer(hang_timeout_s: float, tell: Tell) -> Any:
    """A callback of the controller, that looks after the workers whenever Ray asks for their health."""
    import ray
    from ray.train.v2._internal.execution.callback import WorkerGroupCallback

    class Overseer(WorkerGroupCallback):
        workers: list[Any]
        vigil: hang.Vigil | None = None
        size = 0

        def after_worker_group_start(self, worker_group: Any) -> None:
            count = len(worker_group.get_workers())
            if self.size:
                tell({"say": f"starting again with {count} workers" + (f", {self.size} before" if count != self.size else "")})
            self.size = count

        def after_worker_group_training_start(self, worker_group: Any) -> None:
            self.workers = worker_group.get_workers()
            about = [worker.metadata for worker in self.workers]
            names = [f"pid {m.pid} on {m.hostname} ({m.node_ip})" for m in about]
            self.vigil = hang.Vigil(names, hang_timeout_s, time.monotonic())
            self.pending: dict[Any, int] = {}
            self.next = 0.0
            self.warned = False
            hang.group.saved = 0

        def before_worker_group_shutdown(self, worker_group: Any) -> None:
            self.vigil = None

        def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
            if self.vigil is None or worker_group_status.errors:
                return
            self._ask(self.vigil)
            for rank, sentence in self.vigil.hung(time.monotonic()).items():
                worker_group_status.worker_statuses[rank].error = hang.Hung(sentence)
            notice = worker_group_status.get_preemption_info()
            if notice is not None and not self.warned:
                self.warned = True
                left = f" in {notice.deadline_ms / 1000 - time.time():.0f} s" if notice.deadline_ms else ""
                reason = f"rank {', '.join(map(str, notice.preempted_ranks))} loses its node{left}"
                self.workers[0].execute_async(hang.ask_to_leave, reason)

        def _ask(self, vigil: hang.Vigil) -> None:
            """Hear who has answered meanwhile, and ask again those who have, when it is time."""
            done, _ = ray.wait(list(self.pending), num_returns=len(self.pending), timeout=0) if self.pending else ([], [])
            for answer in done:
                rank = self.pending.pop(answer)
                try:
                    reading = ray.get(answer)
                except ray.exceptions.RayError:  # a worker that is gone: Ray's health check names it
                    continue
                vigil.hear(rank, reading, time.monotonic())
                hang.group.saved = max(hang.group.saved, reading.saved)
            if (now := time.monotonic()) >= self.next:
                self.next = now + min(vigil.timeout_s / 10, _ASK_MOST_S)
                waited_for = set(self.pending.values())
                for rank, worker in enumerate(self.workers):
                    if rank not in waited_for:
                        self.pending[worker.execute_async(progress.read)] = rank

    return Overseer()
