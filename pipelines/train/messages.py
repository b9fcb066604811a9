"""The types that pass between the processes of a training: the task for its workers, and the messages to its driver.

Ray pickles both, and the queue's own process reads them too, so this module has no slow imports.
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.runs.home import Ticket
    from simclr.config import Config


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """The task of every worker of a training."""

    stage: str
    """Which command it serves: pretrain, finetune or distill."""
    config: Config
    data: str
    """Directory of shards, or s3://bucket/prefix, of which each node has a copy."""
    run: str
    """Run directory, or s3://bucket/prefix, of which each node has a copy."""
    created: float = 0.0
    """Unix time at which the run began. It tells apart two runs that use the same address in S3 one after the other."""
    lease: Ticket | None = None
    """Of the driver, for a run in S3 that has a lease; trials of a sweep have none."""
    begun: bool = False
    """Whether the run began with given weights, as its first checkpoint: then no worker begins without one."""
    given: dict[str, Any] = field(default_factory=dict)
    """Fields of the loop's `Start`, by name: ids, the training images to use; labelled, the images whose labels a distillation sees."""
    compile_key: str = ""
    """Signs compiled code (see `compile_cache`)."""
    trial: str = ""
    """Name of the sweep's trial, if it is one; every message has it."""
    inbox: Any = None
    """The queue for messages, see `make`."""
    cpus_per_worker: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Reported:
    """A report of rank 0: a line of metrics.jsonl."""

    step: int
    total_steps: int
    metrics: dict[str, float]
    stragglers: str = ""
    """Ranks and hosts of stragglers, for people."""
    trial: str = ""

    def line(self) -> dict[str, Any]:
        """The report as metrics.jsonl and checkpoints have it."""
        slow = {"stragglers": self.stragglers} if self.stragglers else {}
        return {**self.metrics, **slow, "step": self.step, "total_steps": self.total_steps}


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """A checkpoint is on the disk."""

    step: int
    held_s: float
    """How long training stood still for it."""
    written_s: float
    every_s: float
    """Seconds between two checkpoints, if the config states no steps."""
    trial: str = ""


@dataclass(frozen=True, slots=True)
class Said:
    """A sentence for people."""

    text: str
    trial: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerFailed:
    rank: int
    error: str


@dataclass(frozen=True, slots=True)
class TrainingOver:
    """Ray Train has returned; no message follows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialBeganAgain:
    """A trial failed, and starts again with another seed."""

    trial: str
    reason: str
    bug: str = ""
    """The traceback, if the failure is a bug."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialFailed:
    trial: str
    reason: str
    bug: str = ""
    """The traceback, if the failure is a bug."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialOver:
    """The trial is over; no message of it follows."""

    trial: str
    status: str
    """MLflow's: FINISHED or FAILED."""


OfTrial = Reported | Saved | Said | TrialBeganAgain | TrialFailed | TrialOver
"""The messages of a sweep's trials."""
Message = OfTrial | WorkerFailed | TrainingOver
Tell = Callable[[Message], object]
"""Sends a message to the driver."""


def make() -> Any:
    """A queue on the driver's node: on another one, a lost node would take the reports with it."""
    import ray
    from ray.util.queue import Queue

    return Queue(actor_options={"num_cpus": 0, "label_selector": {"ray.io/node-id": ray.get_runtime_context().get_node_id()}})


def take(inbox: Any, within_s: float) -> Any:
    """The next message; None if none comes in time. Raises EOFError if the queue's process is gone."""
    with _gone():
        try:
            return inbox.get(timeout=within_s)
        except queue.Empty:
            return None


@contextlib.contextmanager
def _gone() -> Iterator[None]:
    from ray.exceptions import OutOfMemoryError, RayActorError

    try:
        yield
    except (RayActorError, OutOfMemoryError):  # its own, or Ray's memory monitor has ended it
        raise EOFError("the queue's process is gone") from None
