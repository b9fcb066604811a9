"""Progress and heartbeat of this process, for the detection of hangs: a few counters that another thread reads.

The loader calls `beat`, since every loop of training and evaluation gets its batches there. No heartbeat is expected outside of
`watched`, nor during the first steps: fetching and compiling may take long.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Files of the innermost functions of a thread that waits for other ranks.
_WAITING = ("torch/distributed/", "simclr/collectives.py", "torch/autograd/graph.py")
_ROOT = Path(__file__).parent.parent.parent
_ROOMS = ("simclr", "pipelines", "tune")
_FIRST = 3  # batches without a check; the second is copied to a GPU while the first step compiles


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
    """The progress of a process."""

    watched: bool
    """Whether heartbeats are expected."""
    beats: int
    """Number of heartbeats so far."""
    step: int
    """Optimizer step (1-based) of the newest batch."""
    place: str
    """Innermost file:line and function of our code."""
    waiting: bool
    """Whether it waits for other ranks there."""
    saved: int = 0
    """Step of the newest checkpoint that this process has written, 0 for none."""


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Inside, heartbeats are expected of this thread."""
    _now.thread, _now.step, _now.beats, _now.asleep = threading.get_ident(), -1, 0, 0
    try:
        yield
    finally:
        _now.asleep = 1


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Inside, no heartbeat is expected, as when a checkpoint is written to a slow disk."""
    _now.asleep += 1
    try:
        yield
    finally:
        _now.asleep -= 1
        _now.beats += 1


def beat(step: int | None = None) -> None:
    """Count a heartbeat; `step` (0-based) is the optimizer step that begins."""
    _now.beats += 1
    if step is not None:
        _now.step = step


def saved(step: int) -> None:
    """Record that the checkpoint of `step` is written."""
    _now.saved = step


def read() -> Reading:
    """The progress of this process, for any thread to read."""
    frame = sys._current_frames().get(_now.thread)
    stack = traceback.extract_stack(frame) if frame is not None else []
    places = [(_relative(Path(entry.filename)), entry) for entry in stack]
    ours = [f"{path}:{entry.lineno} {entry.name}" for path, entry in places if path is not None]
    return Reading(
        watched=not _now.asleep and _now.beats > _FIRST,
        beats=_now.beats,
        step=_now.step + 1,
        place=ours[-1] if ours else "",
        waiting=any(word in entry.filename for entry in stack[-3:] for word in _WAITING),
        saved=_now.saved,
    )


def _relative(path: Path) -> Path | None:
    """`path` relative to the repository; None if it is not our code."""
    inside = path.relative_to(_ROOT) if path.is_relative_to(_ROOT) else None
    return inside if inside is not None and inside.parts[0] in _ROOMS else None
