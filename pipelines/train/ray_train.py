"""The door to Ray Train: connecting, resources, the trainer, and the reports' way back to the driver."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from pipelines import environ
from pipelines.terminal import say
from pipelines.train import capacity, elastic, hang, memory, messages, own_ray, ray_private, ray_start, retry, tpu, waiting
from pipelines.train.overseer import overseer
from pipelines.train.resources import Resources
from simclr.cores import cores
from simclr.errors import UserError

ray_private.set_variables()
_START_S = os.environ.get(ray_private.START_TIMEOUT, "300")

_STOP_S = 2.0
_HEAD_S = 30.0  # to wait for a cluster's head, which may come back; after 60 s Ray ends the process without a message
_RESIZE_S = 60.0  # between two checks for room for more workers
_imports: list[threading.Thread] = []  # of Ray's modules, under way
_jobs: list[threading.Thread] = []  # threads that may be inside Ray's core worker
_lost: list[str] = []  # lost heads: at the end of the process Ray tries to reach them for a minute, or crashes


def address_of(asked: str | None) -> str:
    """The cluster to join: the one `asked` for or $RAY_ADDRESS; "local" = a private Ray."""
    return asked or os.environ.get("RAY_ADDRESS") or "local"


def connect(resources: Resources, trials: int = 1, imports: str = "ray.train.torch") -> bool:
    """Join the cluster, or start a private Ray with as many cores as the workers ask for. False if Ray was connected before.

    `trials` is how many trainings with these resources may run at a time; `imports` is the part of Ray that is imported meanwhile. If it
    fails, nothing of a private Ray stays in this process.
    """
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        if own_ray.begun() and sys.modules["ray"].get_runtime_context().get_temp_dir() != str(own_ray.folder()):
            own_ray.end()  # somebody has ended that Ray, and connected this process to another
        return False
    if not re.fullmatch(r"\d+(\.\d*)?", _START_S):
        raise UserError(f"${ray_private.START_TIMEOUT} is {_START_S!r}; expected a number of seconds")
    while _imports:
        _imports.pop().join()  # of a start that was interrupted
    address = address_of(resources.address)
    own_ray.close_token_file()
    own_ray.require_files(trials * (resources.workers + 1) if address == "local" else 0)  # each training has a controller
    own_ray.end()  # a cluster must not see the token and the interface of a private Ray
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        _init(address, max(cores(), resources.workers * resources.cpus_per_worker), imports)
    except BaseException as error:
        ending = threading.Thread(target=disconnect, daemon=True)
        ending.start()
        if isinstance(error, Exception):
            ending.join()
            while _imports:
                _imports.pop().join()
        ending.join(_STOP_S / 2)  # after Ctrl-C the command has to be over soon; another start waits for the imports
        raise
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)  # ray.init has replaced it
    _imports.pop().join()  # two threads in Ray's circular imports see half a module now and then
    return True


def _init(address: str, cores: int, imports: str) -> None:
    """Import Ray and start it. "local" is a private Ray."""
    folder = own_ray.begin() if address == "local" else None
    import ray

    ray_private.read_token_again()
    # These imports take as long as Ray takes to start its processes, so both run at once.
    importing = threading.Thread(target=importlib.import_module, args=(imports,), daemon=True)
    importing.start()
    _imports.append(importing)
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "ignore_reinit_error": True}
    if folder is not None:
        with ray_private.alone():
            # "local", else it would join any other Ray that runs on this machine.
            ray.init(address=address, num_cpus=cores, include_dashboard=False, **ray_private.tuned(folder), **quiet)
        return
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, ray.exceptions.AuthenticationError) as error:
        if ray_private.refuses_token(error):
            raise UserError(f"the Ray cluster at {address!r} refuses {_token()}, or {environ.without(address)}") from None
        raise UserError(
            f"no Ray cluster answers at {address!r} ({error}); start one with `ray up`, or {environ.without(address)}"
        ) from None


def _token() -> str:
    """What this process showed to a cluster that refuses it, and what to do."""
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return "this process, which shows no token; `export RAY_AUTH_MODE=token`, with the cluster's in ~/.ray/auth_token"
    held = next((f"${name}" for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH") if os.environ.get(name)), "~/.ray/auth_token")
    return f"the token of this process, from {held}; put the cluster's own there"


def lost() -> bool:
    """Whether the cluster's head is gone; this process should then end without calling Ray."""
    return bool(_lost)


def disconnect() -> None:
    """Leave the cluster, or end the private Ray, even if it is still starting."""
    if "ray" in sys.modules:
        if any(job.is_alive() for job in _jobs):
            # A shutdown while a thread waits in Ray is a segmentation fault now and then. A cluster ends the processes of a driver that
            # went away; a private Ray's processes are ended from outside.
            ray_private.kill_processes()
        else:
            sys.modules["ray"].shutdown()
    own_ray.end()


@dataclass
class Running:
    """A training job that runs; it is over when `reports()` ends."""

    thread: threading.Thread
    inbox: Any
    outcome: list[BaseException | None]
    controllers: list[Any]
    """The handle of Ray's controller actor, once there is one."""
    ended: threading.Event
    head: _Head
    less_memory: str
    """Advice for the case that a device has too little memory."""
    data: str
    """Address of the shards."""
    checks: list[Callable[[], None]] = field(default_factory=list)
    """Called every few seconds while it runs; what one raises ends the job."""

    def stop(self) -> None:
        """End the job and its workers at once. Takes at most 3 s."""
        import ray

        self.ended.set()
        if not (self.controllers and self.thread.is_alive() and self.head.answers()):
            return  # without a head its processes end by themselves, and Ray would wait for the head for a minute
        self.controllers[0].abort.remote()  # frees the workers' cores for the next job of this process
        self.thread.join(_STOP_S)
        if self.thread.is_alive():
            ray.kill(self.controllers[0])  # its workers are its own and end with it
            self.thread.join(_STOP_S / 2)

    def reports(self) -> Iterator[messages.Reported | messages.Saved]:
        """The reports of rank 0 and the checkpoints that it has written, as they arrive.

        Raises UserError for a worker's failure that the user can mend and a retry cannot, and if the cluster's head is gone. If workers
        failed too often, Ray's own error.
        """
        while not isinstance(message := self._take(), messages.TrainingOver):
            match message:
                case messages.WorkerFailed(rank=rank, error=text):
                    say(f"rank {rank} failed: {text}")
                case messages.Said(text):
                    say(text)
                case messages.Reported() | messages.Saved():
                    yield message
        self.thread.join()
        error = self.outcome[0]
        if error is not None:
            if sentence := retry.non_retryable(error, self.less_memory) or retry.given_up(error, self.data):
                raise UserError(sentence) from None
            raise error

    def _take(self) -> messages.Message | None:
        """The next message; None if none came for a while."""
        ended = not self.thread.is_alive()  # asked before taking, so that no message put before the end is missed
        if not ended:
            self.head.require()
            for check in self.checks:
                check()
        try:
            found: messages.Message | None = messages.take(self.inbox, 2.0)
            return found or (messages.TrainingOver() if ended else None)
        except EOFError:  # the queue's process was killed: wait for the end of the training all the same
            time.sleep(_STOP_S)
            return messages.TrainingOver() if ended else None


class _Head:
    """The head of the Ray cluster. Without it Ray schedules nothing, and ends every process after a minute."""

    def __init__(self, address: str, private: bool) -> None:
        self.address, self.patience_s = address, 0.0 if private else _HEAD_S
        self.asked = self.answered = time.monotonic()

    def answers(self) -> bool:
        host, _, port = self.address.rpartition(":")
        return elastic.listens(host, int(port))

    def require(self) -> None:
        """Raise UserError if it has not answered for too long. Asks at most once a second."""
        if (now := time.monotonic()) - self.asked < 1:
            return
        self.asked = now
        if self.answers():
            self.answered = time.monotonic()
        elif (away := time.monotonic() - self.answered) >= self.patience_s:
            _lost.append(self.address)
            again = "run the same command again, to go on from the last checkpoint"
            if not self.patience_s:
                raise UserError(f"Ray's head process on this machine is gone; {again}")
            raise UserError(f"the head of the Ray cluster at {self.address} has not answered for {away:.0f} s; once it does, {again}")


def require(resources: Resources, private: bool | None = None) -> bool:
    """Whether the workers get GPUs. Raises UserError if the connected Ray cannot give what they ask for. The process that has connected
    knows whether that Ray is `private`; a trial's process is told."""
    if resources.topology and resources.accelerator_type:
        tpu.require(resources.topology, resources.accelerator_type)
    joined = not (own_ray.begun() if private is None else private)
    workers, each = resources.min_workers or resources.workers, resources.cpus_per_worker
    has = capacity.reachable(joined).get("GPU", 0)
    gpus = has >= workers and resources.device in ("auto", "cuda")
    unused = environ.unused_gpus() if not has and not joined and resources.device in ("auto", "cuda") else ""
    if resources.device == "cuda" and not gpus:
        raise UserError(f"--device cuda with {workers} workers needs as many GPUs; {unused or f'the cluster has {has:.0f}'}")
    if resources.device == "auto" and unused:
        say(f"training on CPUs: {unused}")
    if resources.device == "auto" and has and not gpus:
        if joined:  # else, while a node is missing, days on GPUs would become months on CPUs
            raise UserError(f"{workers} workers need as many GPUs, and the cluster has {has:.0f}; use fewer --workers, or --device cpu")
        say(f"training on CPUs: {workers} workers need as many GPUs, this machine has {has:.0f}; use --workers {has:.0f} for it")
    if (room := capacity.slots(joined, each, gpus)) < workers:
        raise UserError(
            f"{workers} workers with {each} CPUs{' and a GPU' if gpus else ''} each do not fit: a worker is on one node, "
            f"and the cluster's have room for {room:.0f}; use fewer --workers or --cpus-per-worker"
        )
    capacity.announce({"CPU": workers * each, "GPU": workers if gpus else 0})
    return gpus


def launch(worker: Callable[[messages.Task], None], task: messages.Task, resources: Resources, storage: Path) -> Running:
    """Start `worker(task)` on every worker under Ray Train and return at once.

    The trainer has its own thread, so that the caller's thread stays free for reports and Ctrl-C.
    """
    inbox = messages.make()
    controllers: list[Any] = []
    private = own_ray.begun()
    forward, tell = [_forwarder(inbox)], inbox.put
    trainer = _trainer(worker, replace(task, inbox=inbox), resources, storage, forward, private, tell, controllers)
    outcome: list[BaseException | None] = []
    ended = threading.Event()

    def fit() -> None:
        try:
            with waiting.turn(trainer, task, private, tell, ended) as ours:
                if ours:
                    trainer.fit()
            outcome.append(None)
        except BaseException as error:  # raised again in the thread that iterates the reports
            outcome.append(error)
        with contextlib.suppress(Exception):  # Ray was shut down, and no one reads the queue
            inbox.put(messages.TrainingOver())

    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    thread.start()
    _jobs[:] = [job for job in _jobs if job.is_alive()] + [thread]
    import ray

    head, advice = _Head(ray.get_runtime_context().gcs_address, private), retry.less_memory(task.stage, task.config, resources.workers)
    return Running(thread, inbox, outcome, controllers, ended, head, advice, task.data)


def fit(
    worker: Callable[[messages.Task], None], task: messages.Task, resources: Resources, storage: Path, callbacks: list[Any], private: bool
) -> None:
    """`launch` for a process that Ray Tune started: it returns when `worker(task)` is over on every worker.

    Train's controller runs in this process, which waits anyway; its own process would import everything again. So `callbacks` are called
    here. `task` has the queue. Raises Ray's error if workers failed too often.
    """
    trainer = _trainer(worker, task, resources, storage, callbacks, private, lambda message: None, None)
    with waiting.turn(trainer, task, private, task.inbox.actor.put.remote):
        trainer.fit()


def _trainer(
    worker: Callable[[messages.Task], None],
    task: messages.Task,
    resources: Resources,
    storage: Path,
    callbacks: list[Any],
    private: bool,
    tell: messages.Tell,
    controllers: list[Any] | None,
) -> Any:
    import ray.train

    train: Any = ray.train  # Any: a type checker finds older classes of the same names there

    gpus = require(resources, private)
    accelerator = {"GPU": 1} if gpus else {}
    torch_config, scaling = ray_start.torch_config("nccl" if gpus else "gloo", 1800, private), {}
    if resources.topology and resources.accelerator_type:
        accelerator = {"TPU": 1}
        torch_config, scaling = tpu.torch_config(resources.topology, 1800), tpu.scaling(resources.topology, resources.accelerator_type)
    os.environ[ray_private.PREEMPTION_WATCHER] = "0" if private else "1"
    # The overseer finds a silent worker earlier in every phase, and names it.
    os.environ[ray_private.HEALTH_TIMEOUT] = str(10 * hang.patience_s("start", resources.hang_timeout_s))
    counts = resources.counts(task.config)
    is_elastic = resources.min_workers is not None
    # An elastic group that was planned with a node that is gone must time out soon, to be planned again.
    os.environ[ray_private.START_TIMEOUT] = "30" if is_elastic else _START_S
    scaling_policy = partial(elastic.scaling_policy, counts=counts, private=private, tell=tell)
    failure_policy = partial(retry.failure_policy, workers=counts[-1], tell=tell)
    return ray_private.trainer_class(scaling_policy, failure_policy, private, controllers)(
        partial(worker, replace(task, cpus_per_worker=resources.cpus_per_worker)),
        torch_config=torch_config,
        scaling_config=train.ScalingConfig(
            num_workers=(counts[0], counts[-1]) if is_elastic else resources.workers,
            use_gpu=gpus,
            resources_per_worker={"CPU": resources.cpus_per_worker} | accelerator,
            elastic_resize_monitor_interval_s=_RESIZE_S,
            **scaling,
        ),
        run_config=train.RunConfig(
            name=f"train-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
            storage_path=str(storage.absolute()),
            # Nodes with a preemption notice do not count.
            failure_config=train.FailureConfig(max_failures=resources.max_failures, max_preemption_failures=-1),
            callbacks=[*callbacks, overseer(resources.hang_timeout_s, tell)],
        ),
    )


def _forwarder(inbox: Any) -> Any:
    """A callback for Ray's controller process that reports failed workers to the driver's queue."""
    from ray.train import UserCallback

    class Forward(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            for rank, error in sorted(worker_exceptions.items()):
                if isinstance(error, hang.Leave):
                    inbox.put(messages.Said(f"rank {rank} left with a checkpoint: {error}"))
                    return
            short = {rank: sentence for rank, error in worker_exceptions.items() if (sentence := memory.used_up(error))}
            last = {rank: str(error).strip().splitlines()[-1][:500] for rank, error in worker_exceptions.items()}
            rank, why = min((short or last).items())  # who lost a connection says less than who was ended for its memory
            inbox.put(messages.WorkerFailed(rank=rank, error=why))

    return Forward()
