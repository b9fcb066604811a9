"""The door to Ray Train: connecting, resources, the trainer, and the reports' way back to the driver."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines import capacity, tpu
from pipelines.terminal import say
from simclr import disk
from simclr.data.place import Unreachable

# Before Ray is imported: what it reads from the environment once.
os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "300")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # else a call that comes after the shutdown starts a second Ray, which nobody ends
os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

_END: dict[str, Any] = {"end": True}
_STOP_S = 2.0
_jobs: list[threading.Thread] = []  # that may be inside Ray's core worker


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """Where the workers run."""

    workers: int = 2
    """Ray Train workers, one process each; with GPUs, one GPU each."""
    cpus_per_worker: int = 1
    """CPU cores of each worker: torch threads on a CPU, loader threads beside a GPU."""
    device: str = "auto"
    """auto (GPUs when the cluster has one for each worker), cpu, cuda, or tpu, which has never run on one."""
    topology: str | None = None
    """Chips of the TPU slice in each direction, as 4x4; one worker drives each."""
    accelerator_type: str | None = None
    """The TPU's kind, as TPU-V5LITEPOD."""
    address: str | None = None
    """Ray cluster to join: 'auto' on a cluster's node; nothing = a private Ray on this machine."""
    max_failures: int = 3
    """How often lost or failed workers are started again, from the last checkpoint."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"--workers is {self.workers}; expected at least 1")
        if self.cpus_per_worker < 1:
            raise ValueError(f"--cpus-per-worker is {self.cpus_per_worker}; expected at least 1")
        if self.device not in ("auto", "cpu", "cuda", "tpu"):
            raise ValueError(f"--device is {self.device!r}; expected auto, cpu, cuda or tpu")
        if self.device == "tpu":
            tpu.check(self.workers, self.topology, self.accelerator_type)
        elif self.topology or self.accelerator_type:
            raise ValueError("--topology and --accelerator-type are a TPU slice's; say --device tpu, or leave them out")


def joins_a_cluster(address: str | None) -> bool:
    """Whether Ray is joined, at `address` or at $RAY_ADDRESS, and not started on this machine for this command alone."""
    return bool(address or os.environ.get("RAY_ADDRESS"))


def connect(resources: Resources) -> bool:
    """Join the cluster, or start a private Ray that has as many cores as the workers ask for. False where that was done before."""
    import ray

    if ray.is_initialized():
        return False
    # Its imports take as long as Ray takes to start its processes.
    threading.Thread(target=importlib.import_module, args=("ray.train.torch",), daemon=True).start()
    on_sigterm = signal.getsignal(signal.SIGTERM)
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "ignore_reinit_error": True}
    if joins_a_cluster(resources.address):
        try:
            ray.init(address=resources.address or os.environ["RAY_ADDRESS"], **quiet)
        except ConnectionError as error:
            where = resources.address or os.environ["RAY_ADDRESS"]
            raise ValueError(f"no Ray cluster answers at {where!r} ({error}); start one with `ray up`, or leave out --address") from None
    else:
        cores = max(os.cpu_count() or 1, resources.workers * resources.cpus_per_worker)
        # Ray lowers the priority of its workers by 15. With nobody else on the cores that only lets every background process
        # interrupt a step: it cost 7 % of ResNet-18's at N = 32 on two cores (`simclr bench loop`).
        # It would also start a worker process per core in advance, without the environment that Train's workers want.
        tuned = {"worker_niceness": 0, "prestart_worker_first_driver": False}
        ray.init(num_cpus=cores, include_dashboard=False, _system_config=tuned, **quiet)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # which ray.init has replaced
    return True


def disconnect() -> None:
    """Leave the cluster; a private Ray ends, also one that was still starting."""
    if "ray" not in sys.modules:
        return
    if any(job.is_alive() for job in _jobs):
        # A shutdown under a thread that waits in Ray is a segmentation fault now and then. A cluster ends what a driver that
        # went away had started; a private Ray's processes are ended from outside.
        node = sys.modules["ray"]._private.worker._global_node
        if node is not None and node.is_head():
            node.kill_all_processes(check_alive=False, allow_graceful=False)
    else:
        sys.modules["ray"].shutdown()


@dataclass
class Running:
    """A training job under way: iterate `reports()`, then it is over."""

    thread: threading.Thread
    inbox: Any
    outcome: list[BaseException | None]
    controllers: list[Any]
    """The handle of Ray's controller actor, once there is one."""

    def stop(self) -> None:
        """End the job where it is, workers and all. Takes at most 2 s."""
        import ray

        if self.controllers and self.thread.is_alive():
            ray.kill(self.controllers[0])  # its workers are its own and end with it
        self.thread.join(_STOP_S)

    def reports(self) -> Iterator[dict[str, Any]]:
        """Metrics of rank 0, one dict per report, as they arrive.

        Raises ValueError where a worker failed in a way that the user can mend and that trying again cannot, and what Ray
        raises where workers failed too often.
        """
        for message in iter(self._take, _END):
            if "failed_rank" in message:
                say(f"rank {message['failed_rank']} failed: {message['error']}")
            elif message:
                yield message
        self.thread.join()
        error = self.outcome[0]
        if error is not None:
            if sentence := _mistake(error):
                raise ValueError(sentence) from None
            raise error

    def _take(self) -> dict[str, Any]:
        """The next message; {} where there was none for a while."""
        ended = not self.thread.is_alive()  # asked before looking, so that nothing put before the end is missed
        try:
            return take(self.inbox, 2.0) or (_END if ended else {})
        except EOFError:  # somebody killed the queue's process: the training's end is still to be waited for
            time.sleep(_STOP_S)
            return _END if ended else {}


def require(resources: Resources) -> bool:
    """Whether the workers get GPUs. Raises ValueError where the cluster, once connected, cannot have what they ask for."""
    if resources.topology and resources.accelerator_type:
        tpu.require(resources.topology, resources.accelerator_type)
    total = capacity.reachable(joins_a_cluster(resources.address))
    gpus = total.get("GPU", 0) >= resources.workers and resources.device in ("auto", "cuda")
    if resources.device == "cuda" and not gpus:
        raise ValueError(f"--device cuda with {resources.workers} workers needs as many GPUs; the cluster has {total.get('GPU', 0):.0f}")
    cores = resources.workers * resources.cpus_per_worker
    if cores > total.get("CPU", 0):
        raise ValueError(
            f"{resources.workers} workers with {resources.cpus_per_worker} CPUs each need {cores} CPUs; "
            f"the cluster has {total.get('CPU', 0):.0f}: use fewer --workers or --cpus-per-worker"
        )
    capacity.announce({"CPU": cores, "GPU": resources.workers if gpus else 0})
    return gpus


def launch(worker: Callable[[dict[str, Any]], None], job: dict[str, Any], resources: Resources, storage: Path) -> Running:
    """Start `worker(job)` on every worker under Ray Train and return at once.

    The trainer runs in a thread of its own, so that the caller's thread stays free for reports and Ctrl-C.
    """
    messages = inbox()
    controllers: list[Any] = []
    private = not joins_a_cluster(resources.address)
    trainer = _trainer(worker, {**job, "inbox": messages}, resources, storage, [_forwarder(messages)], private, controllers)
    outcome: list[BaseException | None] = []

    def fit() -> None:
        try:
            trainer.fit()
            outcome.append(None)
        except BaseException as error:  # handed to the thread that iterates the reports
            outcome.append(error)
        with contextlib.suppress(Exception):  # Ray was shut down: then nobody reads it
            messages.put(_END)

    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    thread.start()
    _jobs[:] = [job for job in _jobs if job.is_alive()] + [thread]
    return Running(thread, messages, outcome, controllers)


def inbox() -> Any:
    """A queue for reports, where the driver is: on another node it would be lost with that node, and the reports with it."""
    import ray
    from ray.util.queue import Queue

    return Queue(actor_options={"num_cpus": 0, "label_selector": {"ray.io/node-id": ray.get_runtime_context().get_node_id()}})


def take(inbox: Any, within_s: float) -> dict[str, Any]:
    """The next message of an `inbox()`; {} where none comes in time. Raises EOFError where its process is gone."""
    from ray.exceptions import RayActorError
    from ray.util.queue import Empty

    try:
        message: dict[str, Any] = inbox.get(timeout=within_s)
        return message
    except (Empty, queue.Empty):
        return {}
    except RayActorError:
        raise EOFError("the queue's process is gone") from None


def fit(
    worker: Callable[[dict[str, Any]], None], job: dict[str, Any], resources: Resources, storage: Path, callbacks: list[Any], private: bool
) -> None:
    """`launch` for a process that Ray Tune started: it returns when `worker(job)` is over on every worker.

    Train's controller runs in this process, which waits anyway, and not in one of its own that would import everything again;
    so `callbacks` are called here. `job` has the inbox. Raises what Ray raises where workers failed too often.
    """
    _trainer(worker, job, resources, storage, callbacks, private, None).fit()


def _trainer(
    worker: Callable[[dict[str, Any]], None],
    job: dict[str, Any],
    resources: Resources,
    storage: Path,
    callbacks: list[Any],
    private: bool,
    controllers: list[Any] | None,
) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig

    gpus = require(resources)
    accelerator = {"GPU": 1} if gpus else {}
    torch_config, scaling = TorchConfig(backend="nccl" if gpus else "gloo", timeout_s=1800), {}
    if resources.topology and resources.accelerator_type:
        accelerator = {"TPU": 1}
        torch_config, scaling = tpu.torch_config(resources.topology, 1800), tpu.scaling(resources.topology, resources.accelerator_type)
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0" if private else "1"
    return _trainer_class(private, controllers)(
        worker,
        train_loop_config={**job, "cpus_per_worker": resources.cpus_per_worker},
        torch_config=torch_config,
        scaling_config=ScalingConfig(
            num_workers=resources.workers,
            use_gpu=gpus,
            resources_per_worker={"CPU": resources.cpus_per_worker} | accelerator,
            **scaling,
        ),
        run_config=RunConfig(
            name=f"train-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
            storage_path=str(storage.absolute()),
            failure_config=FailureConfig(max_failures=resources.max_failures),
            callbacks=callbacks,
        ),
    )


def _trainer_class(private: bool, controllers: list[Any] | None) -> Any:
    """TorchTrainer that gives up at once where trying again cannot help, that starts nothing which a run has no use for, and
    that puts its controller's handle into `controllers`; None = its controller runs in this process."""
    import asyncio

    import ray
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.constants import get_env_vars_to_propagate
    from ray.train.v2._internal.execution.controller import TrainController
    from ray.train.v2._internal.execution.failure_handling import FailureDecision
    from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
    from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy

    class GiveUpOnMistakes(DefaultFailurePolicy):
        def make_decision(self, training_failed_error: Any) -> Any:
            return FailureDecision.RAISE if _mistake(training_failed_error) else super().make_decision(training_failed_error)

    class AloneScaling(FixedScalingPolicy):
        """Without a request to an autoscaler, which takes an actor, that is a process of 3 s of imports."""

        def after_controller_start(self, train_run_context: Any) -> None: ...

        def _maybe_send_resource_request(self) -> None: ...

    class Trainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            callbacks: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]
            # On this machine alone: each is an actor more, for Ray Data and for a controller lost with its node.
            unused = {"DatasetsCallback", "PlacementGroupCleanerCallback"} if private else set()
            return [c for c in callbacks if type(c).__name__ not in unused]

        def _initialize_and_run_controller(self, **settings: Any) -> Any:
            if private:
                settings["scaling_policy"] = AloneScaling(self.scaling_config)  # type: ignore[arg-type]
            settings["failure_policy"] = GiveUpOnMistakes(self.run_config.failure_config)  # type: ignore[arg-type]
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
            actor: Any = ray.remote(num_cpus=0, label_selector=here, runtime_env={"env_vars": env})(TrainController)
            controllers.append(actor.remote(**settings))
            ray.get(controllers[0].run.remote())
            return ray.get(controllers[0].get_result.remote())

    return Trainer


def causes(failure: BaseException) -> list[BaseException]:
    """What the workers raised, by rank, where Ray Train gave up for that; else the failure itself."""
    errors = getattr(failure, "worker_failures", {})
    return [getattr(errors[rank], "_base_exc", errors[rank]) for rank in sorted(errors)] or [failure]


def _mistake(failure: BaseException) -> str:
    """The sentence of a worker's failure that would come again in every new try (a diverging loss, a damaged shard, a full
    disk, too little memory on the device), or ""."""
    for error in causes(failure) if hasattr(failure, "worker_failures") else []:
        if type(error).__name__ == "OutOfMemoryError" and type(error).__module__.startswith("torch"):
            first = str(error).splitlines()[0][:200]
            return f"a worker's device is out of memory ({first}); use --train.micro-batch, a smaller batch or more workers"
        if isinstance(error, ValueError | FloatingPointError) and not isinstance(error, Unreachable):
            return str(error)
        if sentence := disk.trouble(error):
            return sentence
    return ""


def _forwarder(inbox: Any) -> Any:
    """A callback for Ray's controller process that tells the driver's queue of failed workers."""
    from ray.train import UserCallback

    class Forward(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            rank, error = sorted(worker_exceptions.items())[0]
            inbox.put({"failed_rank": rank, "error": str(error).strip().splitlines()[-1][:500]})

    return Forward()
