"""TPUs under Ray Train: whole slices, one worker for each chip, and the variables that torch_tpu needs before a process group starts.

Nothing of this has run on a TPU; cluster/README.md says how far it was tried without one.
"""

from __future__ import annotations

import math
import os
import re
import time
from typing import Any

from simclr.errors import UserError

# Ray's names → the ones people use.
KINDS = {"TPU-V4": "v4", "TPU-V5P": "v5p", "TPU-V5LITEPOD": "v5e", "TPU-V6E": "v6e"}
_FIRST_PORT = 8070  # torch_tpu's own default (TORCH_TPU_BASE_PORT); one port for each worker of a host


def chips(topology: str) -> int:
    """Chips of a slice: 8 of 2x2x2."""
    return math.prod(int(side) for side in topology.split("x"))


def check(workers: int, topology: str | None, kind: str | None) -> None:
    """Raises UserError if `workers` is not the number of chips of one slice. torch_tpu binds a process to one chip."""
    if not topology or not kind:
        raise UserError("--device tpu wants --topology (as 4x4) and --accelerator-type (as TPU-V5LITEPOD) of the slice")
    if kind not in KINDS:
        known = ", ".join(f"{name} ({people})" for name, people in KINDS.items())
        raise UserError(f"--accelerator-type is {kind!r}; expected one of {known}")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", topology):
        raise UserError(f"--topology is {topology!r}; expected a slice's chips in each direction, as 4x4 or 2x2x2")
    if workers != chips(topology):
        raise UserError(
            f"--workers is {workers}, and a slice of {topology} has {chips(topology)} chips; "
            f"a worker drives one chip and a slice is used whole: use --workers {chips(topology)}"
        )


def require_equal(images: int, workers: int) -> None:
    """Raises UserError if the workers would not hold as many of a batch's `images` each. On GPUs and CPUs they need not."""
    if images % workers:
        low = images // workers * workers
        raise UserError(
            f"batch_size {images} does not divide over the {workers} chips of a TPU slice, whose workers run one program, compiled for one "
            f"number of images; use {f'{low} or ' if low else ''}{low + workers}"
        )


def require(topology: str, kind: str) -> None:
    """Raises UserError if the cluster has no such slice with all of its hosts."""
    import ray
    from ray.util.tpu import get_num_tpu_slices

    if get_num_tpu_slices(topology, kind):
        return
    hosts = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("TPU")]
    slices: dict[str, list[dict[str, Any]]] = {}
    for host in hosts:
        slices.setdefault(host["Labels"].get("ray.io/tpu-slice-name", host["NodeID"]), []).append(host)
    has = "; ".join(
        f"{name}: {of[0]['Labels'].get('ray.io/tpu-pod-type', 'of unknown type')}, {len(of)} hosts, "
        f"{sum(host['Resources']['TPU'] for host in of):.0f} chips"
        for name, of in sorted(slices.items())
    )
    raise UserError(
        f"the cluster has no whole slice of {kind} with topology {topology} ({chips(topology)} chips); "
        f"it has {has or 'no TPU'}: name the topology that it has, or wait until all hosts of the slice have joined"
    )


def scaling(topology: str, kind: str) -> dict[str, Any]:
    """Arguments of `ray.train.ScalingConfig` besides the number of workers and their CPUs."""
    return {"use_tpu": True, "topology": topology, "accelerator_type": kind}


def torch_config(topology: str, timeout_s: int) -> Any:
    """Ray's TorchConfig for the process group `tpu_dist`. It sets the variables that torch_tpu 0.2 needs and Ray 2.60 does not set.

    torch_tpu's own launcher sets three variables before it starts processes, and torch_tpu stops without them: the address of each
    worker's runtime, in order of rank; the slice's topology; a name for the profiler's session. Here Ray starts the processes. On
    Kubernetes Google's webhook sets the variables of a pod, so existing values stay.
    """
    from ray.train.torch import TorchConfig

    class Backend(TorchConfig(backend="tpu_dist").backend_cls):  # type: ignore[misc]
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            sides = [*topology.split("x"), "1", "1"][:3]
            told = {
                "TORCH_TPU_SLICEBUILDER_ADDRESSES": ",".join(worker_group.execute(_address)),
                "TORCH_TPU_TOPOLOGY": ",".join(sides),
                "TORCH_TPU_XPROF_SESSION_ID": str(time.time_ns()),
            }
            worker_group.execute(_set_variables, told)
            super().on_start(worker_group, backend_config)

    class Config(TorchConfig):
        @property
        def backend_cls(self) -> Any:
            return Backend

    return Config(backend="tpu_dist", timeout_s=timeout_s)


def _address() -> str:
    """The address of this worker's runtime."""
    import ray
    import ray.train

    return f"{ray.util.get_node_ip_address()}:{_FIRST_PORT + ray.train.get_context().get_local_rank()}"


def _set_variables(variables: dict[str, str]) -> None:
    for name, value in variables.items():
        os.environ.setdefault(name, value)
