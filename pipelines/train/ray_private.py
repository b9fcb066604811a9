"""All private names of Ray 2.60 that we use, here and in `ray_start`: each with the reason, and the public way that it waits for.

`tests/pipelines/train/test_canary.py` checks each of them against the installed Ray. This file imports nothing of ours, and Ray only
inside its functions: draining a node needs no trainer, and variables must be set before Ray is imported.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# ── A process of Ray's ─────────────────────────────────────────────────────────────────────────────────────────────

START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
HEALTH_TIMEOUT = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"
HEALTH_INTERVAL = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"
PREEMPTION_WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
"""Ray reads these variables when its controller starts. They wait for fields of `ray.train.RunConfig`."""


def set_variables() -> None:
    """Environment variables that Ray reads once, on import. They wait for arguments of `ray.init` and `ray.train.RunConfig`."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # else a call after the shutdown starts a second Ray, which would never end
    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Seconds for an orderly shutdown of a group with a lost or hung worker. The others wait for it in a collective, and are killed
    # anyway. Ray's default adds half a minute to every recovery.
    os.environ.setdefault("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", "2")


def tuned(folder: Path) -> dict[str, Any]:
    """Private arguments of `ray.init` for a private Ray with its sockets and logs in `folder`; they wait for public ones."""
    # Ray lowers the priority of its workers by 15. On cores that no other job uses, this only lets every background process interrupt
    # a step: it cost 7 % of ResNet-18's step at N = 32 on two cores (`simclr bench loop`).
    # Ray would also start a worker process per core in advance, without the environment that Train's workers need.
    config = {"worker_niceness": 0, "prestart_worker_first_driver": False, "enable_metrics_collection": False}
    return {"_temp_dir": str(folder), "_system_config": config}


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """While a private Ray starts: it listens on the loopback alone, and is without what nobody asked for, which would listen too.
    Without them `ray.init` took 1.3, 2.3 and 1.3 s, with them 2.5, 3.4 and 3.6 s, on two cores. It waits for arguments of `ray.init`."""
    from ray._private import node, ray_constants, utils

    def left_out(*arguments: Any, **more: Any) -> None: ...

    changed: list[tuple[Any, str, Any]] = [
        # Else Ray replaces 127.0.0.1 by the machine's own address, and its processes then listen on all.
        (ray_constants, "ENABLE_RAY_CLUSTER", False),
        # An autoscaler and a dashboard, whose metrics answer without a token, and what sends logs to a dashboard.
        *((node.Node, f"start_{what}", left_out) for what in ("monitor", "log_monitor", "api_server")),
        # As where Ray's dashboard is not installed: the agent then serves neither metrics nor jobs, and only reports that it lives.
        (utils, "get_dashboard_dependency_error", lambda: ImportError("a private Ray has no dashboard")),
        (utils, "set_sigterm_handler", left_out),  # a command has its own, which ends it in order
    ]
    before = [(where, name, getattr(where, name)) for where, name, _ in changed]
    try:
        for where, name, value in changed:
            setattr(where, name, value)
        yield
    finally:
        for where, name, value in before:
            setattr(where, name, value)


def refuses_token(error: BaseException) -> bool:
    """Whether `ray.init` ended in `error` because the cluster did not take this process's token, or it has none. Ray tries for 20 s and
    raises ConnectionError, whose cause has the reason as text. It waits for a `ray.init` that raises AuthenticationError."""
    from ray.exceptions import AuthenticationError

    return isinstance(error, AuthenticationError) or AuthenticationError.__name__ in str(error.__cause__)


def read_token_again() -> None:
    """Let Ray read the variables of its token now. It keeps those of its import, and the token of the Ray before. It waits for a `ray.init`
    that reads them."""
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def kill_processes() -> None:
    """End a private Ray from outside. The public way, `ray.shutdown()`, now and then is a segmentation fault while a thread waits in Ray;
    this waits for a shutdown that is safe then."""
    node = sys.modules["ray"]._private.worker._global_node
    if node is not None and node.is_head():
        node.kill_all_processes(check_alive=False, allow_graceful=False)


# ── A submitted job ────────────────────────────────────────────────────────────────────────────────────────────────


def packed(folder: Path) -> list[tuple[str, int]]:
    """(name in `folder`, bytes) of each file that `ray job submit --working-dir` would send, by its own walk through .gitignore and
    .rayignore. It waits for a dry run of that command."""
    import logging

    from ray._private.runtime_env import packaging

    found: list[Path] = []
    packaging._dir_travel(folder.absolute(), [], found.append, include_gitignore=True, logger=logging.Logger("quiet", logging.WARNING))
    return [(str(path.relative_to(folder.absolute())), path.stat().st_size) for path in found if path.is_file()]


def largest_package() -> int:
    """The bytes that the job API takes. It waits for a public constant."""
    from ray._private import ray_constants

    return int(ray_constants.DASHBOARD_CLIENT_MAX_SIZE)


def submission_id() -> str:
    """The id by which `ray job` knows this process's job, "" for another process. It waits for `ray.get_runtime_context()` to tell it."""
    given = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    return str((given.get("metadata") or {}).get("job_submission_id", ""))


# ── Nodes ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def draining() -> set[str]:
    """Ids of the nodes with a preemption notice. It waits for `ray.nodes()` to tell them."""
    import ray

    return set(ray._private.state.state.get_draining_nodes())


def free() -> dict[str, dict[str, float]]:
    """Node id → its free resources. `ray.available_resources()` gives only the sum over nodes; this waits for a version by node."""
    import ray

    found: dict[str, dict[str, float]] = ray._private.state.available_resources_per_node()
    return found


def drain(gcs: str, node_id: str, why: str, deadline_ms: int, timeout_s: float) -> tuple[bool, str]:
    """Tell the head at `gcs` that the cloud preempts the node. Returns (whether the head accepts, else why not). It waits for a public
    function; the command `ray drain-node` is hidden, and takes 3 s of imports each time."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION  # type: ignore[attr-defined]

    told: tuple[bool, str] = GcsClient(address=gcs).drain_node(node_id, DRAIN_NODE_REASON_PREEMPTION, why, deadline_ms, timeout=timeout_s)
    return told


# ── Ray Train's controller ─────────────────────────────────────────────────────────────────────────────────────────


def trainer_class(scaling: Callable[[Any], Any], failures: Callable[[Any], Any], lean: bool, controllers: list[Any] | None) -> Any:
    """TorchTrainer with our policies, which `scaling` and `failures` make from its configs. It puts its controller's handle into
    `controllers`, so that the job can be aborted; None = the controller runs in this process. `lean` = without two of Ray's actors.

    It waits for a trainer that takes policies, that gives its controller's handle or can be stopped from another thread, and for a
    switch for those actors.
    """
    import ray
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.constants import get_env_vars_to_propagate
    from ray.train.v2._internal.execution.controller import TrainController

    class Trainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            callbacks: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]
            # Each starts an actor: one for Ray Data, one for a controller that is lost with its node.
            unused = {"DatasetsCallback", "PlacementGroupCleanerCallback"} if lean else set()
            return [c for c in callbacks if type(c).__name__ not in unused]

        def _initialize_and_run_controller(self, **settings: Any) -> Any:
            settings["scaling_policy"] = scaling(self.scaling_config)
            settings["failure_policy"] = failures(self.run_config.failure_config)
            if controllers is None:
                controller = TrainController(**settings)
                try:
                    asyncio.run(controller.run())
                finally:  # Tune ends a trial by a SystemExit inside a report
                    group = controller.get_worker_group()
                    if group is not None:
                        group.shutdown()
                return controller.get_result()
            # As in the parent class, which does not give the handle away; Ctrl-C needs it.
            here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
            env = {"RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0", **get_env_vars_to_propagate()}
            # Freeing the workers' cores after the controller is killed needs this address if two Rays run on a machine.
            env["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
            actor: Any = ray.remote(num_cpus=0, label_selector=here, runtime_env={"env_vars": env})(TrainController)
            controllers.append(actor.remote(**settings))
            ray.get(controllers[0].run.remote())
            return ray.get(controllers[0].get_result.remote())

    return Trainer


def failure_policy(config: Any, again: Callable[[Any, Any], bool | None]) -> Any:
    """A policy that retries as `again(failure, counter)` answers, and as Ray's own policy if that is None. `counter.failures` is the number
    of worker failures that count against `max_failures` so far. It waits for a public failure policy; 2.60 has none."""
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


def inner(error: BaseException) -> BaseException:
    """What was wrong with a worker, without the error of Ray's poll around it."""
    found: BaseException = getattr(error, "health_check_failure", error)
    return found


def fixed_scaling(config: Any, lean: bool) -> Any:
    """Ray's own policy for a fixed number of workers. `lean` = without the actor that asks an autoscaler: it is a process with 3 s of
    imports. It waits for a switch for that."""
    from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy

    class Alone(FixedScalingPolicy):
        def after_controller_start(self, train_run_context: Any) -> None: ...

        def _maybe_send_resource_request(self) -> None: ...

    return Alone(config) if lean else FixedScalingPolicy(config)


def elastic_scaling() -> Any:
    """Base of a policy for nodes that come and go; it waits for a public scaling policy. Ray's own policy ends a group in mid-step to make
    it larger. This one never does: it calls `may_grow`."""
    from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ResizeDecision

    class Elastic(ElasticScalingPolicy):
        def possible(self, room: Callable[[set[str]], int]) -> int:
            """How many workers may run; `room(ids of nodes)` is Ray's own count."""
            raise NotImplementedError

        def idle(self) -> None:
            """Called when no group runs and Ray is about to plan one."""

        def planned(self, starts: bool) -> None:
            """Called when Ray has planned a group (`starts`), or has found no room for one."""

        def runs(self, workers: int) -> None:
            """Called while a group of `workers` runs."""

        def may_grow(self, workers: int, running: Group) -> None:
            """Called when there is room for another number of `workers` than run now."""

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
    """One worker. It waits for a public handle: `ray.train.UserCallback` gets reports and failures, but cannot ask a worker."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker

    def __str__(self) -> str:
        about = self._worker.metadata
        return f"pid {about.pid} on {about.hostname} ({about.node_ip})"

    def end(self) -> None:
        """Kill its process; Ray then sees a worker that has died."""
        import ray

        ray.kill(self._worker.actor)

    @property
    def node(self) -> str:
        return str(self._worker.metadata.node_id)

    def beside(self, question: Callable[[], Any]) -> Any:
        """Call `question` in another process on its node, since its own may be gone; returns a reference to the answer."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        there: Any = NodeAffinitySchedulingStrategy(self.node, soft=False)
        return ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(question).remote()

    def ask(self, question: Callable[..., Any], *arguments: Any) -> Any:
        """Call `question` in its process, beside the training; returns a reference to the answer."""
        return self._worker.execute_async(question, *arguments)


@dataclass(frozen=True)
class Group:
    """The workers that run."""

    started: float
    """By the controller's clock; another for each group."""
    workers: list[Worker]
    """By rank."""


class Health:
    """The workers' health, as the controller has just polled it."""

    def __init__(self, status: Any) -> None:
        self._status = status

    def failed(self) -> bool:
        """Whether one has failed."""
        return bool(self._status.errors)

    def fail(self, rank: int, error: Exception) -> None:
        """Mark this worker as failed."""
        self._status.worker_statuses[rank].error = error

    def notice(self) -> Any:
        """The `ray.train.PreemptionInfo` of nodes with a preemption notice, or None. The public `ray.train.get_preemption_info()` is a
        collective of all ranks: it takes 8.5 ms each time, and does not return while a rank hangs or is gone."""
        return self._status.get_preemption_info()


def group_callback() -> Any:
    """Base of a callback that watches the workers; `ray.train.RunConfig(callbacks=…)` takes it. Ray calls it after the public callbacks.
    It waits for these hooks in `ray.train.UserCallback`, and for a hook that may mark a worker as failed."""
    from ray.train.v2._internal.execution.callback import WorkerGroupCallback

    class Callback(WorkerGroupCallback):
        def starts(self) -> contextlib.AbstractContextManager[None]:
            """A group starts inside it, for whose processes Ray waits without a limit; another thread may look at them meanwhile."""
            return contextlib.nullcontext()

        def born(self, workers: list[Worker]) -> None:
            """Called in a start when each process has answered once."""

        def started(self, count: int) -> None:
            """Called when the processes of `count` workers run."""

        def trains(self, workers: list[Worker]) -> None:
            """Called when they have begun to train."""

        def ends(self) -> None:
            """Called before they are ended."""

        def heard(self, health: Health) -> None:
            """Called when Ray has polled their health."""

        def on_worker_group_start(self) -> Any:
            return self.starts()

        def before_init_train_context(self, workers: list[Any]) -> dict[str, list[Any]]:
            self.born([Worker(worker) for worker in workers])
            return {}

        def after_worker_group_start(self, worker_group: Any) -> None:
            self.started(len(worker_group.get_workers()))

        def after_worker_group_training_start(self, worker_group: Any) -> None:
            self.trains([Worker(worker) for worker in worker_group.get_workers()])

        def before_worker_group_shutdown(self, worker_group: Any) -> None:
            self.ends()

        def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
            self.heard(Health(worker_group_status))

    return Callback
