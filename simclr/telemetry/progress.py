"""Phase, progress and heartbeat of this process, for the detection of hangs: a few counters that another thread reads.

From the begin of its work to the end a process is in one of the phases below. In the loop the loader calls `beat`, since every loop of
training and evaluation gets its batches there; while files travel, whoever moves bytes calls `moved`. So a long transfer is no silence.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PHASES = ("start", "import", "rendezvous", "fetch", "lock", "first batch", "training", "evaluation", "saving", "upload")
"""In their order: Ray starts the process; it imports; the ranks meet; shards and checkpoint come from S3; another process of this machine
works on them meanwhile; the first batches, with compiling; the loop; an evaluation within it; the wait until the checkpoint before this
one is on the disk, and copying this one; the last checkpoint goes to S3."""
_BY_BYTES = ("fetch", "saving", "upload")  # where what other threads move is progress
# Files of the innermost functions of a thread that waits for other ranks.
_WAITING = ("torch/distributed/", "simclr/collectives.py", "torch/autograd/graph.py")
_STOPPED = ("bdb.py", "pdb.py")  # a breakpoint: somebody looks at this process
_ROOT = Path(__file__).parent.parent.parent
_ROOMS = ("simclr", "pipelines", "tune")
_FIRST = 3  # batches; the second is copied to a GPU while the first step compiles


@dataclass(slots=True)
class _Now:
    thread: int = 0
    phase: str = ""
    step: int = -1
    beats: int = 0
    moved: int = 0
    batches: int = 0
    waits: bool = False
    saved: int = 0
    grows: Path | None = None


_now = _Now()


@dataclass(frozen=True, slots=True)
class Reading:
    """The progress of a process."""

    phase: str
    """One of `PHASES`; "" = it has not begun or has ended, and no heartbeat is expected."""
    beats: int
    """A number that changes with every heartbeat."""
    step: int
    """Optimizer step (1-based) of the newest batch; 0 before the first."""
    place: str
    """Innermost file:line and function of our code."""
    waiting: bool
    """Whether it waits for other ranks there."""
    saved: int = 0
    """Step of the newest checkpoint that this process has written, 0 for none."""
    stopped: bool = False
    """Whether it stands at a breakpoint."""


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Inside, heartbeats are expected of this thread. It begins in the phase "import"."""
    _now.thread, _now.phase, _now.step, _now.beats, _now.batches, _now.waits = threading.get_ident(), "import", -1, 0, 0, False
    try:
        yield
    finally:
        _now.phase = ""


def enter(phase: str) -> None:
    """From now on this thread is in `phase`. Other threads than the watched one change nothing."""
    if threading.get_ident() == _now.thread and _now.phase:
        _now.phase = phase
        _now.beats += 1


@contextlib.contextmanager
def within(phase: str) -> Iterator[None]:
    """Inside, this thread is in `phase`; then in the one before."""
    before = _now.phase
    enter(phase)
    try:
        yield
    finally:
        enter(before)


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """Inside, this thread waits for other ranks."""
    _now.waits = True
    try:
        yield
    finally:
        _now.waits = False


def beat(step: int | None = None) -> None:
    """Count a heartbeat; `step` (0-based) is the optimizer step that begins."""
    _now.beats += 1
    if step is None:
        return
    _now.step = step
    _now.batches += 1
    if _now.phase == "first batch" and _now.batches > _FIRST:
        _now.phase = "training"


def moved() -> None:
    """Count a piece of a file that was read, sent, fetched or written, by any thread."""
    _now.moved += 1


@contextlib.contextmanager
def grows(path: Path) -> Iterator[None]:
    """Inside, the bytes of the file `path`, which a library writes in one call, are progress."""
    _now.grows = path
    try:
        yield
    finally:
        _now.grows = None


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
        phase=_now.phase,
        beats=_now.beats + (_moved() if _now.phase in _BY_BYTES else 0),
        step=_now.step + 1,
        place=ours[-1] if ours else "",
        waiting=_now.waits or any(word in entry.filename for entry in stack[-3:] for word in _WAITING),
        saved=_now.saved,
        stopped=any(Path(entry.filename).name in _STOPPED for entry in stack),
    )


def _moved() -> int:
    growing, size = _now.grows, 0
    if growing is not None:
        with contextlib.suppress(OSError):  # it has its last name now
            size = growing.stat().st_size
    return _now.moved + size


def _relative(path: Path) -> Path | None:
    """`path` relative to the repository; None if it is not our code."""
    inside = path.relative_to(_ROOT) if path.is_relative_to(_ROOT) else None
    return inside if inside is not None and inside.parts[0] in _ROOMS else None
