"""The queue by which reports come from a training's first worker to its driver."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable, Iterator
from typing import Any

Tell = Callable[[dict[str, Any]], None]
"""Sends a message to the driver."""


def make() -> Any:
    """A queue where the driver is: on another node it would be lost with that node, and the reports with it."""
    import ray
    from ray.util.queue import Queue

    return Queue(actor_options={"num_cpus": 0, "label_selector": {"ray.io/node-id": ray.get_runtime_context().get_node_id()}})


def take(inbox: Any, within_s: float) -> dict[str, Any]:
    """The next message; {} where none comes in time. Raises EOFError where the queue's process is gone."""
    with _gone():
        try:
            message: dict[str, Any] = inbox.get(timeout=within_s)
            return message
        except queue.Empty:
            return {}


@contextlib.contextmanager
def _gone() -> Iterator[None]:
    from ray.exceptions import RayActorError

    try:
        yield
    except RayActorError:
        raise EOFError("the queue's process is gone") from None
