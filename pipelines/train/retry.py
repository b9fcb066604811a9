"""Which failures of a training are tried again."""

from __future__ import annotations

from typing import Any

from pipelines.train import hang
from pipelines.train.messages import Said, Tell
from simclr import files
from simclr.data.s3.uri import Unreachable
from simclr.errors import UserError


def causes(failure: BaseException) -> list[BaseException]:
    """What the workers raised, by rank, where Ray Train gave up for that; else the failure itself."""
    errors = getattr(failure, "worker_failures", {})
    return [getattr(errors[rank], "_base_exc", errors[rank]) for rank in sorted(errors)] or [failure]


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


def failure_policy(config: Any, workers: int, tell: Tell) -> Any:
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
            if non_retryable(error):
                return FailureDecision.RAISE
            if hang.group.saved:
                hang.group.saved = self._worker_group_failures = 0
            if isinstance(error, ControllerError) and isinstance(error.controller_failure, ray.exceptions.RayError):
                # A worker was lost while its group was still meeting: to Ray a mistake of the controller's, and the end.
                self._worker_group_failures += 1
                tell(Said(f"workers failed to start: {str(error.controller_failure).strip().splitlines()[-1][:500]}"))
                again = self.failure_config.max_failures < 0 or self._worker_group_failures <= self.failure_config.max_failures
                return FailureDecision.RETRY if again else FailureDecision.RAISE
            if isinstance(error, ControllerError) and isinstance(error.controller_failure, WorkerGroupStartupTimeoutError):
                tell(Said(f"waiting for nodes: the cluster has no room for {workers} workers now (`ray status` shows why)"))
            return super().make_decision(error)

    return Policy(config)
