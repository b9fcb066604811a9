"""Pictures decoded and cut ahead of the device that embeds them: in threads of this process, or in processes of their own."""

from __future__ import annotations

import contextlib
import hashlib
import math
import mmap
import os
import queue
import signal
import subprocess
import sys
import tempfile
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, Pipe
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from simclr.data.depth import Rule
from simclr.data.encode import decoded
from simclr.data.limits import ROOM, TooLarge
from simclr.data.pixels import Unreadable
from simclr.data.raster import file_bytes
from simclr.data.sources.source import Item, bundles
from simclr.errors import UserError
from simclr.views.preprocessing import Preprocessing

_AHEAD_BYTES = 256 << 20  # of encoded files in memory, and of pictures that processes have made
_BUNDLE = 4  # pictures that a process is given at a time: each message wakes a thread of this process


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture as the encoder sees it; `reason` says why there is none."""

    item: Item
    """Without its data."""
    sha256: str
    """Of the file's bytes, or of the pixels where the source gives these; "" for a file that could not be read."""
    height: int
    width: int
    """Of the whole picture."""
    x: Tensor | None
    """(3, size, size) float32, on the host."""
    reason: str = ""
    rescaled: bool = False
    """It had more than 8 bits."""
    clipped: bool = False
    """More than 1 % of its pixels lay outside the range."""


def picture(item: Item, preprocessing: Preprocessing, rule: Rule) -> Picture:
    """Read, decode, cut and normalise one picture."""
    named, digest, done = Item(item.split, item.label, item.name, b""), "", (False, False)
    try:
        if isinstance(item.data, np.ndarray):
            digest, pixels = hashlib.sha256(item.data.tobytes()).hexdigest(), np.require(item.data, requirements="W")
        else:
            data = file_bytes(item.data, rule)
            digest = hashlib.sha256(data).hexdigest()
            found = decoded(data, rule)
            pixels, done = np.require(found.pixels, requirements="W"), (found.rescaled, found.clipped)  # torch warns of a read-only array
    except Unreadable as error:
        return Picture(named, digest, 0, 0, None, str(error))
    height, width = pixels.shape[:2]
    with torch.inference_mode():
        return Picture(named, digest, height, width, preprocessing.of_picture(torch.from_numpy(pixels)), "", *done)


class Decoders(Protocol):
    """Who decodes pictures, some at a time."""

    bundle: int
    """Most pictures that are given at a time."""
    most: int
    """Bundles that are given before the first of them is taken."""

    def give(self, items: list[Item]) -> Future[list[Picture]]: ...

    def take(self, given: Future[list[Picture]]) -> None:
        """Say that its pictures have been used, or never will be."""


def ahead(items: Iterator[Item], decoders: Decoders) -> Iterator[Picture]:
    """The picture of every item, in order, decoded in advance. A picture's `x` is good until the next one is asked for."""
    waiting: deque[tuple[Future[list[Picture]], int]] = deque()
    held = 0
    try:
        for bundle in bundles(items, decoders.bundle, _AHEAD_BYTES // 8):
            size = sum(len(item.data) for item in bundle if isinstance(item.data, bytes))
            while waiting and (len(waiting) >= decoders.most or held + size > _AHEAD_BYTES):
                yield from waiting[0][0].result()
                given, freed = waiting.popleft()
                decoders.take(given)
                held -= freed
            waiting.append((decoders.give(bundle), size))
            held += size
        while waiting:
            yield from waiting[0][0].result()
            decoders.take(waiting.popleft()[0])
    finally:
        for given, _ in waiting:
            given.cancel()
            decoders.take(given)


class Threads:
    """Decodes in threads of this process. Each call into torch hands the interpreter to another thread, so that many threads do little more
    than some."""

    def __init__(self, threads: int, batch_size: int, preprocessing: Preprocessing, rule: Rule) -> None:
        self.bundle, self.most = 1, 2 * threads + batch_size
        self._how = (preprocessing, rule)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode", initializer=single)

    def give(self, items: list[Item]) -> Future[list[Picture]]:
        return self._pool.submit(lambda: [picture(item, *self._how) for item in items])

    def take(self, given: Future[list[Picture]]) -> None:
        pass


def single() -> None:
    """Let this thread compute alone: each of several threads would else have all cores for its pictures."""
    torch.get_num_threads()  # else torch's own choice comes later, and counts
    torch.set_num_threads(1)


# ── Processes ──────────────────────────────────────────────────────────────────────────────────────────────────────

_PROGRAM = "from simclr.evaluation.decoding import serve; serve({pipe}, {memory})"
_Answer = Picture | None  # without its x, which lies in the shared memory; None: too large for a process's share of the memory


class _Died(Exception):
    """A process ended; the message says how."""


class Processes:
    """Decodes in processes of their own, each with a thread here that waits for it. They live as long as this object, and end with this
    process, however it ends: they read from a pipe that it alone writes to.

    What they make lies in memory that they share with this process: not in /dev/shm, which containers make small. All of them together
    take half of `limits.ROOM`; what does not fit into a process's share is decoded here. Raises OSError where none can be started.
    """

    def __init__(self, count: int, batch_size: int, preprocessing: Preprocessing, rule: Rule) -> None:
        shape = (3, preprocessing.size_px, preprocessing.size_px)
        fit = _AHEAD_BYTES // (4 * math.prod(shape))
        self.bundle = max(1, min(_BUNDLE, fit // (2 * count)))
        self.most = max(count, min(2 * count + -(-batch_size // self.bundle), fit // self.bundle))
        self._how = (preprocessing, rule)
        places = (self.most * self.bundle, *shape)
        self._memory = _shared(4 * math.prod(places))
        self._x = _mapped(self._memory, places)
        share = ROOM.pixels // (2 * count)
        self._told = (preprocessing, rule, places, share)
        self._free = deque(range(self.most))
        self._berths: dict[Future[list[Picture]], int] = {}
        self._all: list[_Process] = []
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        self._end = weakref.finalize(self, _ended, self._all, self._memory, share * count)
        ROOM.pixels -= share * count
        try:
            for _ in range(count):
                self._start()
        except OSError:
            self._end()
            raise
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="decode", initializer=single)

    def give(self, items: list[Item]) -> Future[list[Picture]]:
        berth = self._free.popleft()
        given = self._pool.submit(self._work, berth * self.bundle, items)
        self._berths[given] = berth
        return given

    def take(self, given: Future[list[Picture]]) -> None:
        given.add_done_callback(lambda done: self._free.append(self._berths.pop(done)))  # at once, unless a process still writes

    def _start(self) -> None:
        process = _Process(self._memory, self._told)
        self._all.append(process)
        self._idle.put(process)

    def _work(self, first: int, items: Sequence[Item]) -> list[Picture]:
        """The pictures, which lie from place `first` on. Where the process dies, each is given to another one alone, so that the one at
        fault is known."""
        try:
            answers = self._asked(first, items)
        except _Died:
            answers = [self._alone(first + at, item) for at, item in enumerate(items)]
        return [self._made(first + at, *both) for at, both in enumerate(zip(items, answers, strict=True))]

    def _made(self, place: int, item: Item, answer: _Answer) -> Picture:
        if answer is None:
            return picture(item, *self._how)
        return replace(answer, x=None if answer.reason else self._x[place])

    def _alone(self, place: int, item: Item) -> _Answer:
        for _ in range(2):
            try:
                return self._asked(place, [item])[0]
            except _Died as error:
                how = str(error)
        raise UserError(
            f"each process that decoded {item.name} died ({how}): out of memory, or a picture that crashes its decoder; leave it out, or "
            "use fewer --cpus-per-worker, so that fewer pictures are in memory"
        )

    def _asked(self, first: int, items: Sequence[Item]) -> list[_Answer]:
        process = self._idle.get()
        try:
            answers, sentence, bug = process.ask(first, items)
        except (EOFError, OSError):
            self._all.remove(process)
            how = process.end()
            self._start()
            raise _Died(how) from None
        self._idle.put(process)
        if sentence:
            raise UserError(sentence)
        if bug:
            raise RuntimeError(f"in a process that decodes pictures:\n{bug}")
        return answers


class _Process:
    """A process, and this end of the pipe to it."""

    def __init__(self, memory: int, told: tuple[Any, ...]) -> None:
        self._pipe, other = Pipe()
        paths = os.pathsep.join(path for path in sys.path if path)
        environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        with other:  # a session of its own: a terminal's Ctrl-C is for this process alone
            given = {"pipe": other.fileno(), "memory": memory}
            words = [sys.executable, "-P", "-c", _PROGRAM.format(**given)]
            self.process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, env=environment, pass_fds=tuple(given.values()), start_new_session=True
            )
        self._told: tuple[Any, ...] | None = told

    def ask(self, first: int, items: Sequence[Item]) -> tuple[list[_Answer], str, str]:
        if self._told is not None:
            self._pipe.send(self._told)
            self._told = None
        self._pipe.send((first, items))
        answer: tuple[list[_Answer], str, str] = self._pipe.recv()
        return answer

    def end(self) -> str:
        """How it has ended, or that it was ended now."""
        self._pipe.close()
        try:
            code = self.process.wait(1)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _ended(processes: list[_Process], memory: int, pixels: int) -> None:
    for process in processes:
        process.process.kill()
    for process in processes:
        process.end()
    os.close(memory)
    ROOM.pixels += pixels


def _shared(size: int) -> int:
    """Descriptor of `size` bytes of memory or, where there is no such call, of a file without a name. Raises OSError where they are not
    to be had: a process that ran out of them later would die."""
    memory = -1
    if hasattr(os, "memfd_create"):
        with contextlib.suppress(OSError):  # a sandbox forbids it
            memory = os.memfd_create("simclr-pictures")
    if memory < 0:
        with tempfile.TemporaryFile() as file:
            memory = os.dup(file.fileno())
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(memory, 0, size)
        else:
            os.ftruncate(memory, size)
    except OSError:
        os.close(memory)
        raise
    return memory


def _mapped(memory: int, shape: tuple[int, ...]) -> Tensor:
    return torch.frombuffer(mmap.mmap(memory, 4 * math.prod(shape)), dtype=torch.float32).view(shape)


def serve(pipe: int, memory: int) -> None:
    """Decode what comes through the pipe until its other end is closed."""
    single()
    connection = Connection(pipe)
    with contextlib.suppress(EOFError, OSError):
        preprocessing, rule, shape, ROOM.pixels = connection.recv()
        ROOM.alone = False
        x = _mapped(memory, shape)
        while True:
            first, items = connection.recv()
            connection.send(_answered(lambda at, item: _placed(x, at, item, preprocessing, rule), first, items))


def _answered(make: Callable[[int, Item], _Answer], first: int, items: Sequence[Item]) -> tuple[list[_Answer], str, str]:
    """The answers; the sentence of a UserError; the traceback of another error."""
    try:
        return [make(first + at, item) for at, item in enumerate(items)], "", ""
    except UserError as error:
        return [], str(error), ""
    except Exception:
        return [], "", traceback.format_exc()


def _placed(x: Tensor, place: int, item: Item, preprocessing: Preprocessing, rule: Rule) -> _Answer:
    try:
        found = picture(item, preprocessing, rule)
    except TooLarge:
        return None
    if found.x is not None:
        x[place] = found.x
    return replace(found, x=None)
