"""Every name of Ray 2.60 that Ray may change without a word: here and nowhere else, each with why and the public way that it waits for.

`tests/pipelines/train/test_canary.py` checks each of them against the Ray that is installed. This file imports nothing of ours, and
Ray only where it is asked: who drains a node imports no trainer, and variables are set before Ray is imported.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# ── A process of Ray's ─────────────────────────────────────────────────────────────────────────────────────────────

START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
HEALTH_TIMEOUT = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"
HEALTH_INTERVAL = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"
PREEMPTION_WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
"""Ray reads these where its controller starts. They wait for fields of `ray.train.RunConfig`."""


def set_variables() -> None:
    """Environment that Ray reads once, when it is imported; all wait for arguments of `ray.init` and `ray.train.RunConfig`."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # else a call that comes after the shutdown starts a second Ray, which nobody ends
    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # What a group of workers has to part in order, when one of them is gone or hangs: the others wait for it in a collective and
    # are killed anyway. Ray's default is half a minute of every recovery.
    os.environ.setdefault("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", "2")


def tuned() -> dict[str, Any]:
    """What `ray.init` takes for a private Ray besides its public arguments; it waits for such arguments."""
    # Ray lowers the priority of its workers by 15. With nobody else on the cores that only lets every background process
    # interrupt a step: it cost 7 % of ResNet-18's at N = 32 on two cores (`simclr bench loop`).
    # It would also start a worker process per core in advance, without the environment that Train's workers want.
    return {"_system_config": {"worker_niceness": 0, "prestart_worker_first_driver": False}}


def kill_processes() -> None:
    """End a private Ray from outside. `ray.shutdown()`, the public way, is a segmentation fault now and then under a thread that waits
    in Ray; it waits for one that is safe there."""
    node = sys.modules["ray"]._private.worker._global_node
    if node is not None and node.is_head():
        node.kill_all_processes(check_alive=False, allow_graceful=False)


# ── Nodes ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def draining() -> set[str]:
    """Ids of the nodes that are about to be taken back. It waits for `ray.nodes()` to say so."""
    import ray

    return set(ray._private.state.state.get_draining_nodes())


def free() -> dict[str, dict[str, float]]:
    """Node id → what is free on it. `ray.available_resources()` gives only the sum over nodes; this waits for it by node."""
    import ray

    found: dict[str, dict[str, float]] = ray._private.state.available_resources_per_node()
    return found


def drain(gcs: str, node_id: str, why: str, deadline_ms: int, timeout_s: float) -> tuple[bool, str]:
    """Tell the head at `gcs` that a cloud takes the node back: (whether it accepts, else why not). It waits for a function of Ray's;
    the command `ray drain-node` is hidden, and takes 3 s of imports each time."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION  # type: ignore[attr-defined]

    told: tuple[bool, str] = GcsClient(address=gcs).drain_node(node_id, DRAIN_NODE_REASON_PREEMPTION, why, deadline_ms, timeout=timeout_s)
    return told


# ── Ray Train's controller ─────────────────────────────────────────────────────────────────────────────────────────


def trainer_class(scaling: Callable[[Any], Any], failures: Callable[[Any], Any], lean: bool, controllers: list[Any] | None) -> Any:
    """TorchTrainer with policies of ours, made from its scaling and its failure config. It puts its controller's handle into
    `controllers`, to be aborted; None = its controller runs in this process. `lean` = without two actors of Ray's.

    It waits for a trainer that takes policies, that gives its controller's handle or can be stopped from another thread, and for a
    switch of those actors.
    """
    import ray
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.constants import get_env_vars_to_propagate
    from ray.train.v2._internal.execution.controller import TrainController

    class Trainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            callbacks: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]
            # Each is an actor more: for Ray Data, and for a controller lost with its node.
            unused = {"DatasetsCallback", "PlacementGroupCleanerCallback"} if lean else set()
            return [c for c in callbacks if type(c).__name__ not in unused]

        def _initialize_and_run_controller(self, **settings: Any) -> Any:
            settings["scaling_policy"] = scaling(self.scaling_config)
            settings["failure_policy"] = failures(self.run_config.failure_config)
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


def failure_policy(config: Any, again: Callable[[Any, Any], bool | None]) -> Any:
    """Ray's own policy where `again(failure, counter)` is None, else that answer; `counter.failures` is how many failures of workers
    count against `max_failures` so far. It waits for a public failure policy; there is none in 2.60."""
    from ray.train.v2._internal.execution.failure_handling import FailureDecision
    from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy

    class Policy(DefaultFailurePolicy):
        @property
        def failures(self) -> int:
            return int(self._worker_group_failures)

        @failures.setter
        def failures(self, count: int) -> None:
            self._worker_group_failures = count

        def make_decision(self, training_failed_error: Any) -> Any:
            answer = again(training_failed_error, self)
            if answer is None:
                return super().make_decision(training_failed_error)
            return FailureDecision.RETRY if answer else FailureDecision.RAISE

    return Policy(config)


def never_started(failure: BaseException) -> bool:
    """Whether there was no room for the workers. Ray's ControllerError is public, what it carries is not."""
    from ray.train import ControllerError
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    return isinstance(failure, ControllerError) and isinstance(failure.controller_failure, WorkerGroupStartupTimeoutError)


def fixed_scaling(config: Any, lean: bool) -> Any:
    """Ray's own policy for a fixed number of workers; `lean` = without a request to an autoscaler, which takes an actor, that is a
    process of 3 s of imports. It waits for a switch of that."""
    from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy

    class Alone(FixedScalingPolicy):
        def after_controller_start(self, train_run_context: Any) -> None: ...

        def _maybe_send_resource_request(self) -> None: ...

    return Alone(config) if lean else FixedScalingPolicy(config)


def elastic_scaling() -> Any:
    """Base of a policy that answers what Ray asks while nodes come and go; it waits for a public scaling policy. Ray's own ends a group
    where it stands to make it larger: this one never does, and tells `may_grow`."""
    from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ResizeDecision

    class Elastic(ElasticScalingPolicy):
        def possible(self, room: Callable[[set[str]], int]) -> int:
            """How many workers may run, where there is `room(ids of nodes)` as Ray counts."""
            raise NotImplementedError

        def idle(self) -> None:
            """No group runs, and Ray is about to plan one."""

        def planned(self, starts: bool) -> None:
            """Ray has planned a group, or has seen no room for one."""

        def runs(self, workers: int) -> None:
            """A group runs."""

        def may_grow(self, workers: int, running: Group) -> None:
            """There is room for so many, other than those that run."""

        def _count_possible_workers(self, reserved_resources: Any) -> int:
            count = super()._count_possible_workers
            return self.possible(lambda nodes: int(count({node: has for node, has in reserved_resources.items() if node in nodes})))

        def make_decision_for_non_running_worker_group(self) -> Any:
            self.idle()
            decision = super().make_decision_for_non_running_worker_group()
            self.planned(not isinstance(decision, NoopDecision))
            return decision

        def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
            self.runs(worker_group_state.num_workers)
            decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
            if isinstance(decision, ResizeDecision):
                workers = [Worker(worker) for worker in worker_group_state.workers]
                self.may_grow(decision.num_workers, Group(worker_group_state.start_time, workers))
            return NoopDecision()

    return Elastic


# ── The workers, as the controller sees them ───────────────────────────────────────────────────────────────────────


class Worker:
    """One worker. It waits for a public handle: `ray.train.UserCallback` hears of reports and failures, and can ask nobody."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker

    def __str__(self) -> str:
        about = self._worker.metadata
        return f"pid {about.pid} on {about.hostname} ({about.node_ip})"

    def ask(self, question: Callable[..., Any], *arguments: Any) -> Any:
        """Call `question` in its process, beside the training; a reference to the answer."""
        return self._worker.execute_async(question, *arguments)


@dataclass(frozen=True)
class Group:
    """The workers that run."""

    started: float
    """By the controller's clock; another for each group."""
    workers: list[Worker]
    """By rank."""


class Health:
    """What the controller has just heard of its workers."""

    def __init__(self, status: Any) -> None:
        self._status = status

    def failed(self) -> bool:
        """Whether one has failed."""
        return bool(self._status.errors)

    def fail(self, rank: int, error: Exception) -> None:
        """Have the controller take this worker for failed."""
        self._status.worker_statuses[rank].error = error

    def notice(self) -> Any:
        """The `ray.train.PreemptionInfo` of nodes that are about to be taken back, or None. `ray.train.get_preemption_info()`, which is
        public, is a collective of all ranks: 8.5 ms each time, and nobody comes back from it while one hangs or is gone."""
        return self._status.get_preemption_info()


def group_callback() -> Any:
    """Base of a callback that looks after the workers; `ray.train.RunConfig(callbacks=…)` takes it. Ray calls those last, behind the
    public ones. It waits for these hooks in `ray.train.UserCallback`, and for one that may call a worker failed."""
    from ray.train.v2._internal.execution.callback import WorkerGroupCallback

    class Callback(WorkerGroupCallback):
        def started(self, count: int) -> None:
            """So many workers' processes run."""

        def trains(self, workers: list[Worker]) -> None:
            """They have begun to train."""

        def ends(self) -> None:
            """They are about to be ended."""

        def heard(self, health: Health) -> None:
            """Ray has asked for their health."""

        def after_worker_group_start(self, worker_group: Any) -> None:
            self.started(len(worker_group.get_workers()))

        def after_worker_group_training_start(self, worker_group: Any) -> None:
            self.trains([Worker(worker) for worker in worker_group.get_workers()])

        def before_worker_group_shutdown(self, worker_group: Any) -> None:
            self.ends()

        def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
            self.heard(Health(worker_group_status))

    return Callback
