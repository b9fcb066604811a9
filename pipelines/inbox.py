"""The queue by which reports come from a training's first worker to its driver."""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Iterator
from typing import Any


def make() -> Any:
    """A queue where the driver is: on another node it would be lost with that node, and the reports with it."""
    import ray
    from ray.util.queue import Queue

    return Queue(actor_options={"num_cpus": 0, "label_selector": {"ray.io/node-id": ray.get_runtime_context().get_node_id()}})


def taken(inbox: Any) -> None:
    """Return when the driver has taken every message that this process has put there: of a driver that is dead, never. (The
    queue's process outlives it for seconds, in which workers would go on and write checkpoints that no report leads to.)"""
    import ray

    while not ray.get(inbox.actor.empty.remote()):
        time.sleep(0.005)


def take(inbox: Any, within_s: float) -> dict[str, Any]:
    """The next message; {} where none comes in time. Raises EOFError where the queue's process is gone."""
    with _gone():
        try:
            message: dict[str, Any] = inbox.get(timeout=within_s)
            return message
        except queue.Empty:
            return {}


def ask(inbox: Any, within_s: float) -> Any:
    """A handle to the next message: whoever is interrupted while waiting for its `answer` can ask for that again."""
    return inbox.actor.get.remote(within_s)


def answer(asked: Any) -> dict[str, Any]:
    """As `take`, of what was asked for."""
    import ray

    with _gone():
        try:
            message: dict[str, Any] = ray.get(asked)
            return message
        except queue.Empty:  # Ray's is one of these
            return {}


@contextlib.contextmanager
def _gone() -> Iterator[None]:
    from ray.exceptions import RayActorError

    try:
        yield
    except RayActorError:
        raise EOFError("the queue's process is gone") from None
