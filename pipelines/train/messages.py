"""What goes between the processes of a training: the task that its workers get, and the messages that come back to its driver.

Ray pickles both, and the queue's own process reads them too: this module imports nothing that takes time.
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simclr.config import Config


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What every worker of a training is told."""

    stage: str
    """Which command it serves: pretrain, finetune or distill."""
    config: Config
    data: str
    """Directory of shards, or s3://bucket/prefix, of which each node has a copy."""
    run: str
    """Run directory, or s3://bucket/prefix, of which each node has a copy."""
    created: float = 0.0
    """When the run began, Unix time: an address in S3 may be used again by another run."""
    given: dict[str, Any] = field(default_factory=dict)
    """Fields of the loop's `Start`, by name: ids, the only training images; labelled, those whose labels a distillation sees."""
    compile_key: str = ""
    """Signs compiled code (see `compile_cache`)."""
    trial: str = ""
    """Name of the sweep's trial that this is; every message has it."""
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
    """Ranks and hosts that keep the others waiting, for people."""
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
    """Seconds between two, where the config states no steps."""
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
    """Nothing comes any more: Ray Train has returned."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialBeganAgain:
    """A trial failed, and begins again on another seed."""

    trial: str
    reason: str
    bug: str = ""
    """The traceback, where it is one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialFailed:
    trial: str
    reason: str
    bug: str = ""
    """The traceback, where it is one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialOver:
    """Nothing comes of this trial any more."""

    trial: str
    status: str
    """As MLflow has it: FINISHED or FAILED."""


OfTrial = Reported | Saved | Said | TrialBeganAgain | TrialFailed | TrialOver
"""What a sweep's inbox has."""
Message = OfTrial | WorkerFailed | TrainingOver
Tell = Callable[[Message], object]
"""Sends a message to the driver."""


def make() -> Any:
    """A queue where the driver is: on another node it would be lost with that node, and the reports with it."""
    import ray
    from ray.util.queue import Queue

    return Queue(actor_options={"num_cpus": 0, "label_selector": {"ray.io/node-id": ray.get_runtime_context().get_node_id()}})


def take(inbox: Any, within_s: float) -> Any:
    """The next message; None where none comes in time. Raises EOFError where the queue's process is gone."""
    with _gone():
        try:
            return inbox.get(timeout=within_s)
        except queue.Empty:
            return None


@contextlib.contextmanager
def _gone() -> Iterator[None]:
    from ray.exceptions import RayActorError

    try:
        yield
    except RayActorError:
        raise EOFError("the queue's process is gone") from None
