"""A job by parts: each part is read, computed and written by whoever takes it. The door to Ray Data.

The caller keeps the parts that have no output yet, so the same command goes on after any death. Without an address and a number of
workers the parts are done here, one after the other, by the very function that a cluster's processes run.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines import terminal
from simclr.cores import cores
from simclr.errors import UserError

Plain = dict[str, Any]
"""Values that JSON can hold."""
Work = Callable[[Plain], Plain]
"""A part → what the driver is told of it, once its output is written."""
CARRIED, THREADS = "carried", "threads"
"""Names in a process's settings: the folder of the carried files, and the CPU cores that it has."""
_TRIES = 4
_LOG_LEVEL = "RAY_BACKEND_LOG_LEVEL"


@dataclass(frozen=True, kw_only=True, slots=True)
class Where:
    """Where the parts are done."""

    address: str | None = None
    """Ray cluster to use: 'auto' on a cluster's node; nothing = this machine."""
    workers: int | None = None
    """Processes that do parts, in the cluster or on this machine. Nothing: with --address one for each GPU or, without GPUs, for each
    CPU; else this process alone."""
    cpus_per_worker: int | None = None
    """CPU cores of each worker, for its threads. Nothing: 1, beside a GPU an equal share of its node's, and all for this process."""

    def __post_init__(self) -> None:
        for name, value in (("workers", self.workers), ("cpus-per-worker", self.cpus_per_worker)):
            if value is not None and value < 1:
                raise UserError(f"--{name} is {value}; expected at least 1")

    @property
    def here(self) -> bool:
        """Whether this process does the parts itself."""
        return self.address is None and self.workers is None


def run(
    make: Callable[[Plain], Work],
    settings: Plain,
    parts: Sequence[Plain],
    where: Where,
    device: str = "cpu",
    carry: Path | None = None,
) -> Iterator[tuple[Plain, Plain]]:
    """(part, result) of each of `parts`, in the order in which they are done.

    `make(settings)` is called once in each process; it must be a function of a module. What it returns does a part. `settings` and parts
    are plain values. The files of the folder `carry` are brought to every process, where settings["carried"] names their folder;
    settings["threads"] is the number of its cores. device cpu, cuda, or auto: a worker gets a GPU where the cluster has one. Raises
    UserError where a part's function does.
    """
    if not parts:
        return
    if where.here:
        settings = {THREADS: where.cpus_per_worker or cores(), **settings}
        work = make(settings | ({CARRIED: str(carry)} if carry else {}))
        for part in parts:
            yield part, work(part)
        return
    with _connected(where):
        yield from _spread(make, settings, parts, where, device, carry)


@contextlib.contextmanager
def _connected(where: Where) -> Iterator[None]:
    from pipelines.train import ray_train
    from pipelines.train.resources import Resources

    # Ray Data gives its actors their arguments in the object store, and Ray complains of this on standard error at each start.
    level = os.environ.get(_LOG_LEVEL)
    os.environ.setdefault(_LOG_LEVEL, "fatal")
    try:
        ours = ray_train.connect(
            Resources(workers=where.workers or 1, cpus_per_worker=where.cpus_per_worker or 1, address=where.address),
            imports="ray.data",
        )
    finally:
        if level is None:
            os.environ.pop(_LOG_LEVEL, None)
    try:
        yield
    finally:
        if ours:
            ray_train.disconnect()


def _spread(
    make: Callable[[Plain], Work], settings: Plain, parts: Sequence[Plain], where: Where, device: str, carry: Path | None
) -> Iterator[tuple[Plain, Plain]]:
    import ray
    from ray.util.annotations import RayDeprecationWarning

    from pipelines.train import own_ray

    workers, cpus, gpus = _sizes(where, device, len(parts))
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    carried: list[Any] = []
    if carry is not None and own_ray.begun():  # its processes see this machine's disk
        settings = settings | {CARRIED: str(carry)}
    elif carry is not None:  # in a list, so that Ray hands the reference on and each actor fetches what it stands for
        carried = [ray.put({path.name: path.read_bytes() for path in sorted(carry.iterdir()) if path.is_file()})]
    rows = ray.data.from_items(
        [{"index": index, "part": json.dumps(part)} for index, part in enumerate(parts)], override_num_blocks=len(parts)
    )
    with warnings.catch_warnings():
        # Ray is to have a name of its own for `max_task_retries`, and says so at each call.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        done = rows.map_batches(
            _Actor,
            fn_constructor_args=(make, json.dumps(settings | {THREADS: cpus}), carried),
            batch_size=1,
            num_cpus=cpus,
            num_gpus=gpus,
            max_task_retries=_TRIES - 1,  # Ray Data would try a part that kills its process for ever
            # One part at a time: what an actor has been given waits for it while others are idle.
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers, initial_size=workers, max_tasks_in_flight_per_actor=1),
        )
    results = iter(done.iter_rows())
    while True:
        try:
            row = next(results, None)
        except ray.exceptions.RayError as error:
            raise UserError(
                f"processes that did one part died {_TRIES} times ({type(error).__name__}): out of memory, or a picture that crashes its "
                "decoder; the same command goes on with the parts that are left, with fewer --workers each has more memory"
            ) from None
        if row is None:
            return
        if row["error"]:
            raise UserError(row["error"])
        if row["bug"]:
            terminal.bug(row["bug"])
            raise RuntimeError("a worker failed; its traceback is above")
        yield parts[row["index"]], json.loads(row["result"])


def _sizes(where: Where, device: str, parts: int) -> tuple[int, int, int]:
    """Number of workers, and the cores and GPUs of each. Raises UserError if the cluster cannot give them."""
    from pipelines.train import capacity, own_ray

    joined = not own_ray.begun()
    has = capacity.reachable(joined)
    gpus = 1 if device != "cpu" and has.get("GPU", 0) >= 1 else 0
    if device == "cuda" and not gpus:
        raise UserError("--device cuda, but the cluster has no GPU; leave it out to use CPUs")
    cpus = where.cpus_per_worker or (_beside_a_gpu() if gpus else 1)
    room = capacity.slots(joined, cpus, bool(gpus))
    if room < 1:
        raise UserError(f"a worker with {cpus} CPUs{' and a GPU' if gpus else ''} fits on no node; use fewer --cpus-per-worker")
    if where.workers is None and math.isinf(room):
        raise UserError("how many workers? this cluster grows without a limit that is known here; give --workers")
    if where.workers and where.workers > room:
        raise UserError(
            f"{where.workers} workers with {cpus} CPUs{' and a GPU' if gpus else ''} each do not fit, there is room for {room:.0f}; "
            "use fewer --workers or --cpus-per-worker"
        )
    workers = where.workers or int(room)
    capacity.announce({"CPU": workers * cpus, "GPU": workers * gpus})
    return max(min(workers, parts), 1), cpus, gpus


def _beside_a_gpu() -> int:
    """Cores for each GPU of the node that has the fewest; 1 where the nodes are still to start."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU", 0) >= 1]
    return max(min((int(node.get("CPU", 1) // node["GPU"]) for node in nodes), default=1), 1)


class _Actor:
    """Does parts in a process of Ray's. An error goes back as a row: Ray would print it, and try again."""

    def __init__(self, make: Callable[[Plain], Work], settings: str, carried: list[Any]) -> None:
        given = json.loads(settings)
        if carried:
            import ray

            self.folder = tempfile.TemporaryDirectory(prefix="simclr-carried-")
            for name, data in ray.get(carried[0]).items():
                (Path(self.folder.name) / name).write_bytes(data)
            given[CARRIED] = self.folder.name
        self.work: Work | None
        self.work, self.failed = _caught(lambda: make(given))

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        work, (error, bug), result = self.work, self.failed, None
        if work is not None:
            result, (error, bug) = _caught(lambda: work(json.loads(str(rows["part"][0]))))
        return {"index": rows["index"], "result": [json.dumps(result)], "error": [error], "bug": [bug]}


def _caught(what: Callable[[], Any]) -> tuple[Any, tuple[str, str]]:
    """The result, or None; the sentence of a UserError; the traceback of another error."""
    from simclr import files

    try:
        return what(), ("", "")
    except UserError as error:
        return None, (str(error), "")
    except OSError as error:
        sentence = files.trouble(error)
        return None, (sentence, "" if sentence else traceback.format_exc())
    except Exception:
        return None, ("", traceback.format_exc())
