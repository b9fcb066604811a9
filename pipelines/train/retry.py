"""Decides which failures of a training are retried."""

from __future__ import annotations

import contextlib
import traceback
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipelines.train import hang, memory, ray_private, ray_start
from pipelines.train.messages import Said, Tell
from simclr import files, sense
from simclr.data.manifest import read_manifest, require_sizes
from simclr.data.s3.uri import Corrupt, Refetched, Unreachable, address, copy_of
from simclr.errors import UserError

if TYPE_CHECKING:
    from simclr.config import Config


_KERNEL_S = 10.0  # for the answers of lost workers' machines
_TOO_OFTEN = (
    "workers failed more often in a row than --max-failures allows, the last time so: {last}; "
    "run the same command again, to go on from the last checkpoint"
)


def causes(failure: BaseException) -> list[BaseException]:
    """The workers' errors, by rank, if these made Ray Train give up; else the failure itself."""
    errors = getattr(failure, "worker_failures", {})
    return [ray_private.inner(errors[rank]) for rank in sorted(errors)] or [failure]


def non_retryable(failure: BaseException, less_memory: str = "") -> str:
    """The sentence of a worker's failure that no retry would mend (a diverging loss, a damaged shard, a full disk, too little memory on
    the device, where `less_memory` is the advice), or ""."""
    started = getattr(failure, "controller_failure", None)  # of a worker ahead of its training, as Ray wraps it
    if isinstance(started, UserError) and not isinstance(started, Unreachable):
        return str(getattr(started, "cause", started))
    for error in causes(failure) if hasattr(failure, "worker_failures") else []:
        if type(error).__name__ == "OutOfMemoryError" and type(error).__module__.startswith("torch"):
            first = str(error).splitlines()[0][:200]
            return f"a worker's device is out of memory ({first}); {less_memory or 'use more workers, or a smaller batch in a new run'}"
        if isinstance(error, UserError) and not isinstance(error, Unreachable):
            return str(error)
        if sentence := files.trouble(error):
            return sentence
    return ""


def less_memory(stage: str, config: Config, workers: int) -> str:
    """Advice for a training of `stage` (its command) that does not fit the memory of its devices: flags that the next command accepts.

    With more workers the run goes on, by the same numbers unless BatchNorm normalises over some workers' images. Pieces of a batch change
    BatchNorm's statistics, and a smaller batch all numbers, so they belong to a new run."""
    train, go_on = config.train, ""
    most = config.images_per_rank(workers)
    more = next((w for w in range(workers + 1, train.batch_size + 1) if config.images_per_rank(w) < most and _learns(config, w)), None)
    if more and train.micro_batch is None:
        some = sense.statistics_over(config, more) < more
        other = f", with other numbers: BatchNorm then normalises over {sense.normalised_over(config, [more])} images" if some else ""
        go_on = f"the same command with --workers {more} goes on with this run{other}; "
    piece = min(train.micro_batch or most, most)
    pieces = (m for m in range(piece - 1, 1, -1) if stage == "pretrain" and _trains(config, workers, "micro_batch", m))
    batches = (n for n in range(train.batch_size // 2, 1, -1) if _trains(config, workers, "batch_size", n))
    if found := next(pieces, None):
        other = f"--train.micro-batch {found}"
    elif found := next(batches, None):
        other = f"{'--train.batch-size' if stage == 'pretrain' else '--batch-size'} {found}"
    else:
        other = "a smaller network"
    return f"{go_on}{other} is for a new run: add another --run, or leave --run out"


def shares(config: Config, workers: int) -> bool:
    """Whether so many workers can share the batch and the groups of shards and of statistics that `config` asks for."""
    try:
        sense.statistics_over(config, workers)
        config.images_per_rank(workers)
        config.groups_of(0, workers)
    except UserError:
        return False
    return True


def _learns(config: Config, workers: int) -> bool:
    """Whether so many workers can share the work, and BatchNorm has more than an image of each."""
    return shares(config, workers) and not sense.single_image(config, [workers])


def _trains(config: Config, workers: int, name: Literal["micro_batch", "batch_size"], value: int) -> bool:
    """Whether `workers` can train by `config` with another value of this field of its `train`."""
    change: dict[str, Any] = {name: value}
    try:
        return _learns(replace(config, train=replace(config.train, **change)), workers)
    except UserError:
        return False


def given_up(failure: BaseException, data: str = "") -> str:
    """The sentence of a failure that came too often but is no bug: S3 unreachable, a process lost or hung, and why, if a shard of `data`
    has shrunk. "" for others: their traceback says more."""
    import ray

    if sentence := next(filter(None, map(memory.used_up, causes(failure))), ""):
        return f"{sentence}; then run the same command again, to go on from the last checkpoint"
    at_start = getattr(failure, "controller_failure", None)
    if (failed := _failed_start(failure)) and not isinstance(at_start, ray.exceptions.RayTaskError):  # that one has a traceback
        return _TOO_OFTEN.format(last=failed.splitlines()[-1][:500])
    for error in causes(failure) if hasattr(failure, "worker_failures") else []:
        if isinstance(error, Unreachable):
            return str(error)
        if isinstance(error, hang.Hung | ray.exceptions.RayActorError):
            if shrunk := resized(data):
                return shrunk
            return _TOO_OFTEN.format(last=str(error).strip().splitlines()[0])
    return ""


def resized(data: str) -> str:
    """The sentence of a shard of `data` here that has another size than it had, "" if there is none. A worker that reads behind the end of
    a shard is killed by its kernel, and cannot say so."""
    if not data:
        return ""
    at = address(data)
    directory = Path(data) if at is None else copy_of(at, "shards")
    try:
        shards = read_manifest(directory, look=False).shards
        require_sizes(directory, [shard for shard in shards if (directory / shard.name).is_file()])
    except Corrupt as error:
        return f"workers died as {error}"
    except UserError:  # no shards on this machine
        pass
    return ""


def bug(failure: BaseException) -> str:
    """The traceback of a failure that is a bug. "" for a failure that the user can mend, and for a process that was lost, hung or out of
    memory, be it of another worker: without it the others fail in ways that look like bugs."""
    import ray

    error = causes(failure)[0]
    lost = isinstance(error, ray.exceptions.RayError | hang.Hung | hang.Leave | Refetched) or hasattr(failure, "controller_failure")
    if lost or isinstance(error, UserError | OSError) or type(error).__name__ == "OutOfMemoryError" or given_up(failure):
        return ""
    errors = getattr(failure, "worker_failures", {})
    # A worker's exception comes without its traceback, but Ray Train's wrapper prints it.
    return str(errors[min(errors)]) if errors else "".join(traceback.format_exception(failure))


def _failed_start(failure: BaseException) -> str:
    """Ray's words for a worker that was lost while its group was starting, or ""."""
    import ray
    from ray.train import ControllerError

    why = failure.controller_failure if isinstance(failure, ControllerError) else None
    return str(why).strip() if isinstance(why, ray.exceptions.RayError) or ray_start.start_failed(why) else ""


def _ask_kernels(failure: Any, tell: Tell) -> None:
    """Put a `memory.EndedByKernel` in the place of a lost worker's error, if its machine's kernel has killed a process for lack of memory
    since the worker answered. Ray only says that a worker died."""
    import ray

    errors: dict[int, Exception] = getattr(failure, "worker_failures", {})
    gone = {rank for rank, error in errors.items() if isinstance(ray_private.inner(error), ray.exceptions.RayActorError)}
    known = {rank: hang.group.kills[rank] for rank in sorted(gone & hang.group.kills.keys())}
    nodes = {worker.node: worker for worker, _ in known.values()}
    asked = {node: worker.beside(memory.kernel_kills) for node, worker in nodes.items()}
    answered = ray.wait([*asked.values()], num_returns=len(asked), timeout=_KERNEL_S)[0] if asked else []
    for rank, (worker, before) in known.items():
        with contextlib.suppress(ray.exceptions.RayError):  # the node is gone, too
            if (answer := asked[worker.node]) in answered and (kills := ray.get(answer) - before) > 0:
                errors[rank] = memory.ended_by_kernel(str(worker), kills)
                tell(Said(str(errors[rank])))


def failure_policy(config: Any, workers: int, tell: Tell) -> Any:
    """Decides on a retry. It gives up on non-retryable failures, does not count workers that left on request, and counts failures in a
    row: over weeks every node fails once, so only failures without a new checkpoint between them count. Ray's own policy does not
    count preempted nodes."""

    hang.group.short = 0

    def again(error: Any, counter: Any) -> bool | None:
        if any(isinstance(cause, hang.Leave) for cause in causes(error)):
            return True
        if non_retryable(error):
            return False
        if hang.group.saved:
            hang.group.saved = hang.group.short = counter.failures = 0
        _ask_kernels(error, tell)
        sentence = next(filter(None, map(memory.used_up, causes(error))), "")
        if sentence:  # it may have been another job's, once; a second time at the same place is none
            hang.group.short += 1
            if hang.group.short > 1:
                return False
        if failed := _failed_start(error):
            # A worker was lost while its group was starting. Ray takes that for an error of the controller, and would end the job, or try
            # again for ever.
            counter.failures += 1
            tell(Said(f"workers failed to start: {sentence or hang.group.stuck or failed.splitlines()[-1][:500]}"))
            return bool(config.max_failures < 0 or counter.failures <= config.max_failures)
        if ray_start.never_started(error):
            tell(Said(f"waiting for nodes: the cluster has no room for {workers} workers now (`ray status` shows why)"))
        return None

    return ray_private.failure_policy(config, again)
