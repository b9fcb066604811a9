"""How far this process has come, for whoever watches that it does not hang: a few counters, read by another thread.

The loader beats, since every loop, of training and of evaluation, gets its batches there. Nobody is watched outside of
`watched`, nor during the first steps: fetching and compiling take what they take.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Innermost functions of a thread that waits for other ranks, not for itself.
_WAITING = ("torch/distributed/", "simclr/collectives.py", "torch/autograd/graph.py")
_HOUSE = Path(__file__).parent.parent.parent
_ROOMS = ("simclr", "pipelines", "tune")
_FIRST = 3  # batches; to a GPU the second one is on its way while the first step compiles


@dataclass(slots=True)
class _Now:
    thread: int = 0
    step: int = -1
    beats: int = 0
    asleep: int = 1
    saved: int = 0


_now = _Now()


@dataclass(frozen=True, slots=True)
class Reading:
    """Where a process is."""

    watched: bool
    """Whether it should be getting on."""
    beats: int
    """Changes while it gets on."""
    step: int
    """Optimizer step, from 1 on, whose batch came last."""
    place: str
    """file:line function where it is, of ours."""
    waiting: bool
    """Whether it waits for other ranks there."""
    saved: int = 0
    """Step of the newest checkpoint that this process has written, 0 for none."""


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """In here, this thread is expected to get on."""
    _now.thread, _now.step, _now.beats, _now.asleep = threading.get_ident(), -1, 0, 0
    try:
        yield
    finally:
        _now.asleep = 1


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """In here, something takes as long as it takes: a slow disk, say, when a checkpoint is written."""
    _now.asleep += 1
    try:
        yield
    finally:
        _now.asleep -= 1
        _now.beats += 1


def beat(step: int | None = None) -> None:
    """It gets on; `step` (0-based) is the optimizer step that begins."""
    _now.beats += 1
    if step is not None:
        _now.step = step


def saved(step: int) -> None:
    """The checkpoint of `step` is safe."""
    _now.saved = step


def read() -> Reading:
    """Where this process is, asked from any thread."""
    frame = sys._current_frames().get(_now.thread)
    stack = traceback.extract_stack(frame) if frame is not None else []
    places = [(_room(Path(entry.filename)), entry) for entry in stack]
    ours = [f"{path}:{entry.lineno} {entry.name}" for path, entry in places if path is not None]
    return Reading(
        watched=not _now.asleep and _now.beats > _FIRST,
        beats=_now.beats,
        step=_now.step + 1,
        place=ours[-1] if ours else "",
        waiting=any(word in entry.filename for entry in stack[-3:] for word in _WAITING),
        saved=_now.saved,
    )


def _room(path: Path) -> Path | None:
    """`path` as seen from the house, where it is ours."""
    inside = path.relative_to(_HOUSE) if path.is_relative_to(_HOUSE) else None
    return inside if inside is not None and inside.parts[0] in _ROOMS else None
