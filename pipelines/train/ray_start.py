"""The private names of Ray 2.60 about the start of a group of workers, as in `ray_private`: where its ranks meet, and what its processes
do before they answer."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

from pipelines.train import rendezvous
from simclr.telemetry import progress

_meetings: list[_Meeting] = []  # in a worker's process: where its group meets


def torch_config(backend: str, timeout_s: int, private: bool) -> Any:
    """TorchConfig whose workers do not meet while their group starts: Ray's controller would wait for them without a limit, and could ask
    none of them. Each is told where to meet, and does so in its training thread, by `meet`. It waits for a backend of this kind.

    Workers of a `private` Ray are all on this machine, and meet in a file of Ray's folder: torch's own store listens on every address,
    and obeys whoever connects. That waits for an `init_method` that is a file's address.
    """
    import ray
    from ray.train._internal.utils import get_address_and_port
    from ray.train.torch import TorchConfig

    class Backend(TorchConfig(backend=backend).backend_cls):  # type: ignore[misc]
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            if private:
                place = f"file://{ray.get_runtime_context().get_temp_dir()}/torch-{uuid.uuid4().hex}"
            else:
                host, port = worker_group.execute_single(0, get_address_and_port)
                place = f"tcp://{f'[{host}]' if ':' in host else host}:{port}"
            worker_group.execute(_told, _Meeting(backend, place, timeout_s))

    class Config(TorchConfig):
        @property
        def backend_cls(self) -> Any:
            return Backend

    return Config(backend=backend, timeout_s=timeout_s)


@dataclass(frozen=True, slots=True)
class _Meeting:
    """Where the ranks of a group meet."""

    backend: str
    address: str
    timeout_s: int
    """Of each of their collectives."""


def _told(meeting: _Meeting) -> None:
    _meetings[:] = [meeting]


def meet() -> None:
    """Wait in a worker until all ranks of its group are here, where its start did not do that: the phase "rendezvous", before "fetch"."""
    import ray
    import ray.train
    from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group

    progress.enter("rendezvous")
    for meeting in _meetings:
        if meeting.address.startswith("tcp:"):
            rendezvous.choose_interface(ray.util.get_node_ip_address())
        _set_torch_distributed_env_vars()  # for torch and NCCL
        rank, world = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
        _setup_torch_process_group(meeting.backend, rank, world, meeting.address, meeting.timeout_s)
    progress.enter("fetch")


def barrier() -> None:
    """Wait for all ranks, for any time: one node may fetch for an hour, and collectives of NCCL and gloo time out after half an hour. Ray's
    barrier is public and never does; the overseer watches who keeps the others waiting."""
    import ray.train.collective

    with progress.waiting():
        ray.train.collective.barrier()


def never_started(failure: BaseException) -> bool:
    """Whether there was no room for the workers. Ray's ControllerError is public, the error inside it is not."""
    from ray.train import ControllerError
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    return isinstance(failure, ControllerError) and isinstance(failure.controller_failure, WorkerGroupStartupTimeoutError)


def start_failed(failure: BaseException | None) -> bool:
    """Whether a worker's process was lost before it had answered. Ray would try again without a limit; it waits for a public error."""
    from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError

    return isinstance(failure, WorkerGroupStartupFailedError)


class Unborn:
    """A process of a worker that has not answered yet."""

    def __init__(self, about: Any) -> None:
        self.id, self.alive = about.actor_id, about.state == about.ALIVE
        self.name = f"pid {about.pid} on {about.address.ip_address}" if about.pid else "a process that no node has started yet"

    def end(self) -> None:
        """Kill it, without a handle, which Ray's controller has."""
        import ray

        process: Any = ray._private.worker.global_worker
        process.core_worker.kill_actor(ray.ActorID(self.id), True)


def unborn() -> list[Unborn]:
    """The processes that this one makes for workers. It waits for a start of a worker group with a timeout."""
    import ray
    from ray.core.generated.gcs_pb2 import ActorTableData  # type: ignore[attr-defined]

    mine = bytes.fromhex(ray.get_runtime_context().get_worker_id())
    rows = ray._private.state.state._connect_and_get_accessor().get_actor_table(None, None)
    found = map(ActorTableData.FromString, rows)
    return [Unborn(a) for a in found if a.class_name == "RayTrainWorker" and a.owner_address.worker_id == mine and a.state != a.DEAD]
