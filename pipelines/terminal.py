"""What a command prints, and its progress: on a terminal a bar with ETA and rate, elsewhere a plain line now and then.

Everything that reaches a terminal or a log passes here, and through the filter in `simclr.text`: names of files may hold what a terminal
obeys.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
import time
import traceback
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from simclr.text import cut, paragraph, printable, printable_lines, redacted

_PLAIN_EVERY_S = 10.0
_COLOUR = re.compile(r"\x1b\[[\d;]*m")
_QUIET = False


def set_quiet(quiet: bool) -> None:
    """`--quiet`: errors and results only."""
    global _QUIET
    _QUIET = quiet


def say(text: str) -> None:
    """One line of progress, on standard error, so that results on standard output can be piped."""
    if not _QUIET:
        complain(text)


def complain(text: str) -> None:
    """A message that --quiet does not silence: an error, or the traceback of a bug."""
    print(paragraph(text), file=sys.stderr, flush=True)


def bug(error: BaseException | str) -> None:
    """The traceback of a bug, or its text as another process sent it, without credentials."""
    text = error if isinstance(error, str) else "".join(traceback.format_exception(error))
    complain(_COLOUR.sub("", cut(redacted(text.rstrip()))))  # Ray colours what it sends


def show(text: str) -> None:
    """A result, on standard output. The text's line breaks stay, so the names in a table must be `printable` themselves."""
    print(printable_lines(text))


class _Held(io.StringIO):
    encoding = ""  # the parser draws its boxes by it


@contextlib.contextmanager
def filtered() -> Iterator[None]:
    """What a library prints meanwhile comes out at the end, through the filter. It goes without colours: a word of others may have some."""
    out, err = _Held(), _Held()
    out.encoding, err.encoding = sys.stdout.encoding, sys.stderr.encoding
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            yield
    finally:
        for held, stream in ((out, sys.stdout), (err, sys.stderr)):
            print(printable_lines(_COLOUR.sub("", held.getvalue())), end="", file=stream, flush=True)


def process_age_s() -> float:
    """Seconds since this process began, its imports included."""
    import psutil  # type: ignore[import-untyped]

    return time.time() - float(psutil.Process().create_time())


def pace(rate: float, unit: str) -> str:
    """A `rate` per second in the largest unit of time that leaves no 0 before its point: 64 images/s, 2.5 trials/min, 40 trials/h; "" of
    none, since nothing is done yet. `unit` ends with /s."""
    if rate <= 0:
        return ""
    for seconds, name in ((1, "s"), (60, "min"), (3600, "h")):
        if (found := rate * seconds) >= 1 or name == "h":
            break
    return f"{found:,.0f} {unit[:-1]}{name}" if found >= 10 else f"{found:.2g} {unit[:-1]}{name}"


class Bar:
    """Progress of one step of work.

    with Bar("embed", total=60_000, unit="images") as bar:
        bar.advance(256)

    `rate_unit` is the unit of the speed, if it is not images/s. `note` is free text at the end (loss, kNN). Without a
    terminal it prints a line every ten seconds and one at the end, so that a log of a long run stays readable. A step that
    ends within two seconds prints nothing there.
    """

    def __init__(self, name: str, total: int | None, unit: str = "images", rate_unit: str = "images/s") -> None:
        self.name, self.total, self.unit, self.rate_unit = printable(name), total, unit, rate_unit
        self.done, self.note, self.rate = 0, "", 0.0
        self.began = self.printed = time.monotonic()
        self.started_at = 0
        self.first: tuple[float, int] | None = None  # (time, number) of the first units that were done; the time before is set-up
        self.last = -1  # the count in the last plain line
        self.progress: Progress | None = None

    def __enter__(self) -> Self:
        if not _QUIET and sys.stderr.isatty():
            self.progress = Progress(
                TextColumn("{task.description:<10}", markup=False),
                BarColumn(bar_width=28),
                TextColumn("{task.fields[counts]}", markup=False),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                console=Console(stderr=True),
                refresh_per_second=4,
            )
            self.progress.start()
            self.task = self.progress.add_task(self.name, total=self.total, counts="", note="")
        return self

    def resume_at(self, done: int) -> None:
        """Start counting at `done` units, which an earlier process did. They count as progress, not as speed."""
        self.done = self.started_at = done

    def resize(self, total: int) -> None:
        """Set the total, once it is known."""
        self.total = total or None
        if self.progress is not None:
            self.progress.update(self.task, total=self.total)

    def advance(self, amount: int = 1) -> None:
        self.update(self.done + amount)

    def update(self, done: int, note: str | None = None, rate: float | None = None) -> None:
        """`done` units so far; `rate` in images/s, if the caller measures it better than this clock."""
        self.done = done
        self.note = self.note if note is None else printable(note)
        self.first = self.first or (time.monotonic(), done)
        elapsed = time.monotonic() - self.began
        self.rate = rate if rate is not None else (done - self.started_at) / max(elapsed, 1e-9)
        if self.progress is not None:
            self.progress.update(self.task, completed=done, counts=self._counts(), note=self.note)
        elif time.monotonic() - self.printed >= _PLAIN_EVERY_S:
            self.printed, self.last = time.monotonic(), done
            say(self._line(elapsed))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.progress is not None:
            self.progress.stop()
        elif kind is None and time.monotonic() - self.began > 2 and self.last != self.done:
            say(self._line(time.monotonic() - self.began))

    def _counts(self) -> str:
        of = f"/{self.total:,}" if self.total else ""
        return f"{self.done:,}{of} {self.unit}  {pace(self.rate, self.rate_unit)}".rstrip()

    def _line(self, elapsed: float) -> str:
        left = ""
        if self.total and self.first and self.first[1] < self.done < self.total:
            pace = (time.monotonic() - self.first[0]) / (self.done - self.first[1])
            left = f"  ETA {(self.total - self.done) * pace:,.0f} s"
        return f"{self.name}: {self._counts()}  {elapsed:,.0f} s{left}  {self.note}".rstrip()
