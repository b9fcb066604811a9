"""Which failures of a training are tried again."""

from __future__ import annotations

import traceback
from typing import Any

from pipelines.train import hang, ray_private
from pipelines.train.messages import Said, Tell
from simclr import files
from simclr.data.s3.uri import Refetched, Unreachable
from simclr.errors import UserError


def causes(failure: BaseException) -> list[BaseException]:
    """What the workers raised, by rank, where Ray Train gave up for that; else the failure itself."""
    errors = getattr(failure, "worker_failures", {})
    return [errors[rank] for rank in sorted(errors)] or [failure]


def non_retryable(failure: BaseException) -> str:
    """The sentence of a worker's failure that would come again in every new try (a diverging loss, a damaged shard, a full
    disk, too little memory on the device), or ""."""
    for error in causes(failure) if hasattr(failure, "worker_failures") else []:
        if type(error).__name__ == "OutOfMemoryError" and type(error).__module__.startswith("torch"):
            first = str(error).splitlines()[0][:200]
            return f"a worker's device is out of memory ({first}); use --train.micro-batch, a smaller batch or more workers"
        if isinstance(error, UserError) and not isinstance(error, Unreachable):
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


def bug(failure: BaseException) -> str:
    """The traceback of a failure that is a bug; "" of one that a user can mend, and of a process that was lost, hung, or had too little
    memory."""
    import ray

    error = causes(failure)[0]
    lost = isinstance(error, ray.exceptions.RayError | hang.Hung | hang.Leave | Refetched) or hasattr(failure, "controller_failure")
    if lost or isinstance(error, UserError | OSError) or type(error).__name__ == "OutOfMemoryError":
        return ""
    errors = getattr(failure, "worker_failures", {})
    # A worker's exception comes without its traceback; what Ray Train wraps it in prints as that.
    return str(errors[min(errors)]) if errors else "".join(traceback.format_exception(failure))


def failure_policy(config: Any, workers: int, tell: Tell) -> Any:
    """Gives up on mistakes, does not count who left when asked to, and counts failures in a row: over weeks every node fails once,
    and only a training that gets no further is worth no other try. Nodes that give notice do not count either: that is Ray's own."""
    import ray
    from ray.train import ControllerError

    def again(error: Any, counter: Any) -> bool | None:
        if any(isinstance(cause, hang.Leave) for cause in causes(error)):
            return True
        if non_retryable(error):
            return False
        if hang.group.saved:
            hang.group.saved = counter.failures = 0
        if isinstance(error, ControllerError) and isinstance(error.controller_failure, ray.exceptions.RayError):
            # A worker was lost while its group was still meeting: to Ray a mistake of the controller's, and the end.
            counter.failures += 1
            tell(Said(f"workers failed to start: {str(error.controller_failure).strip().splitlines()[-1][:500]}"))
            return bool(config.max_failures < 0 or counter.failures <= config.max_failures)
        if ray_private.never_started(error):
            tell(Said(f"waiting for nodes: the cluster has no room for {workers} workers now (`ray status` shows why)"))
        return None

    return ray_private.failure_policy(config, again)
