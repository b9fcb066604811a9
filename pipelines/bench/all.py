"""`simclr bench all`: every bench that says something about this machine, most valuable first, within a budget of minutes.

A machine may disappear at any time, and a bench may hang or crash. So each phase is a process, which is ended at its limit with all
that it started. Its result is appended at once, and the same command again runs the missing phases.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Literal
from xml.etree import ElementTree

from pipelines.bench.held import end_with_parent
from pipelines.bench.plan import Phase, Size, plan
from pipelines.bench.result import Row, machine
from pipelines.terminal import say
from simclr import files
from simclr.cores import cores
from simclr.errors import UserError

ROOT = Path(__file__).parent.parent.parent
SCHEMA = 1
_ARCHIVES = {"small": "cifar10*.tar*", "photographs": "*photo*.tar*"}  # shards → their source file in --data
_PROGRAMS = {"simclr": ("-m", "pipelines.cli"), "pytest": ("-m", "pytest"), "python": ()}
_PEERS = ("ray", "mlflow", "kornia", "lightly")  # without one of these, a bench leaves out the comparison, or is left out itself
_WORTH = 0.8  # times its expected seconds: with less time left, a phase is not begun
_LEAVE_S = 5.0  # between asking a phase to end and ending it
_MOST_THREADS = 16


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of a phase."""

    phase: str
    code: int | Literal["timeout", "skipped"]
    seconds: float
    figure: str
    """The result in a line, or why it was skipped."""
    command: str
    n: int = 0
    """Trials of each side."""
    complete: bool = False
    rows: tuple[Row, ...] = ()
    """The bench's rows; of an incomplete bench the rows so far."""


def bench_all(budget_min: float, out: Path | None, device: str, dry: bool, data: Path | None) -> list[str]:
    """Run the plan of this machine, print the table, and leave in `out`: results.jsonl, a line as soon as a phase is over; bench.log, all
    output; DATE-DEVICE.json, the whole result, as in tests/benchmarks/results/; profiles. Returns the names of the phases that failed
    or were ended; of a dry run also of those for which no time was left.

    Raises UserError, before anything is measured, if the device is absent, if `data` is no folder, or if `out` has results of another
    machine, version or plan.
    """
    if not budget_min > 0:
        raise UserError(f"--budget-min is {budget_min}; expected minutes, more than 0")
    size = _size(device, dry)
    archives = _archives(data)
    out = out or Path("runs") / f"bench-{datetime.now(UTC):%Y-%m-%d}"
    files.require_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    usable = cores()
    # As many threads as cores would leave no core for other processes, and a CPU's threads wait for one another.
    threads = 1 if dry else min(usable if size == "gpu" else max(usable - 1, 1), _MOST_THREADS)
    given = {shards: archive and Path(archive.name) for shards, archive in archives.items()}
    phases = plan(size, threads, given, _gpu_tests(), ray=importlib.util.find_spec("ray") is not None)
    day = _day(size, archives)
    with tempfile.TemporaryDirectory(prefix="simclr-bench-") as folder:
        for archive in archives.values():
            if archive is not None:
                (Path(folder) / archive.name).symlink_to(archive.absolute())
        outcomes, whole = run(phases, out, Path(folder), 60 * budget_min, day)
    print(table(outcomes))
    print(f"\n{day['gpus'] if 'gpus' in day else day['machine']}; {day['versions']}")
    if day["absent"]:
        print(f"not installed here: {', '.join(day['absent'])}")
    print(f"data: {' and '.join(day['data'].values())}; load average before: {day['load_average']}")
    print(f"{whole}; log and profiles beside it")
    lacking = {phase.name for phase in phases if phase.lacks}
    return [o.phase for o in outcomes if o.code != 0 and (o.code != "skipped" or (dry and o.phase not in lacking))]


def run(phases: tuple[Phase, ...], out: Path, work: Path, budget_s: float, day: dict[str, Any]) -> tuple[list[Outcome], Path]:
    """Run the `phases` without a result in `out`, in folder `work`, until `budget_s` is spent: one after the other, except for the phases
    that run `beside` others. Returns all outcomes, and the file with the whole result."""
    began, day, done = time.monotonic(), _same_day(out, day), _done(out, phases)
    wanted = {p.needs for p in phases if p.name not in done and not p.lacks}  # shards, which went with the work folder of an earlier call
    open_ = [p for p in phases if p.name not in done or (p.makes and p.makes in wanted)]
    device = "dry" if day["size"] == "dry" else re.sub(r"\W+", "-", str(day.get("gpus", "cpu")).rpartition("× ")[2].lower()).strip("-")
    whole = out / f"{day['date'][:16].replace(':', '')}-{device}.json"
    outcomes = dict(done)
    beside: dict[str, tuple[Phase, _Running]] = {}

    def over(outcome: Outcome) -> None:
        outcomes[outcome.phase] = outcome
        for profile in work.glob("*.txt"):
            shutil.move(profile, out / profile.name)
        _append(out / "results.jsonl", asdict(outcome))
        in_order = [outcomes[p.name] for p in phases if p.name in outcomes]
        files.write_text(whole, json.dumps(day | {"phases": [asdict(o) for o in in_order]}, indent=1, ensure_ascii=False) + "\n")
        said = f"{outcome.phase}: {outcome.code}, {outcome.seconds:.0f} s, {outcome.figure}"
        say(f"{time.monotonic() - began:5.0f} s  {said}")
        print(f"===== {said}", file=log, flush=True)

    with open(out / "bench.log", "a", encoding="utf-8", opener=files.plain) as log, contextlib.ExitStack() as stack:
        for phase in open_:
            for shards in [s for s, (_, r) in beside.items() if s == phase.needs or r.process.poll() is not None]:
                maker, running = beside.pop(shards)
                over(_outcome(maker, running, out))
            left_s = budget_s - (time.monotonic() - began)
            if why := _why_not(phase, left_s, work):
                over(Outcome(phase.name, "skipped", 0.0, why, shlex.join(phase.command)))
                continue
            print(f"\n===== {phase.name} at {time.monotonic() - began:.0f} s: {shlex.join(phase.command)}", file=log, flush=True)
            started = _started(phase, out, work, log, min(phase.limit_s, left_s), day["size"])
            if phase.beside:
                beside[phase.makes] = phase, stack.enter_context(started)
                continue
            with started as running:
                over(_outcome(phase, running, out))
        for maker, running in beside.values():
            over(_outcome(maker, running, out))
    return [outcomes[p.name] for p in phases], whole


def table(outcomes: list[Outcome]) -> str:
    """Phase, code, seconds, main figure: a line each."""
    width = max(len(o.phase) for o in outcomes)
    lines = [f"{'phase':<{width}}  {'code':>7}  {'seconds':>7}  figure"]
    lines += [f"{o.phase:<{width}}  {o.code:>7}  {o.seconds:>7.1f}  {o.figure}".rstrip() for o in outcomes]
    return "\n".join(lines)


# ── The machine ────────────────────────────────────────────────────────────────────────────────────────────────────


def _size(device: str, dry: bool) -> Size:
    import torch

    if dry:
        return "dry"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, and torch sees no GPU here; leave it out")
    return "cpu" if device == "cpu" or not torch.cuda.is_available() else "gpu"


def _archives(data: Path | None) -> dict[str, Path | None]:
    if data is None:
        return dict.fromkeys(_ARCHIVES)
    if not data.is_dir():
        raise UserError(f"--data {data} is no folder; expected one with {' and '.join(_ARCHIVES.values())}, or leave it out")
    return {shards: next(iter(sorted(data.glob(pattern))), None) for shards, pattern in _ARCHIVES.items()}


def _gpu_tests() -> tuple[str, ...]:
    """Test files of the checkout for a GPU; () without a checkout or pytest. Other tests need packages that a GPU host may lack."""
    if importlib.util.find_spec("pytest") is None:
        return ()
    tests = sorted((ROOT / "tests").rglob("test_*.py"))
    return tuple(str(p.relative_to(ROOT)) for p in tests if "@pytest.mark.gpu" in p.read_text(encoding="utf-8"))


def _day(size: Size, archives: dict[str, Path | None]) -> dict[str, Any]:
    """The facts that all results share."""
    rendered = {"small": "rendered patterns", "photographs": "rendered photographs"}
    given = {shards: rendered[shards] if archive is None else archive.name for shards, archive in archives.items()}
    absent = [name for name in _PEERS if importlib.util.find_spec(name) is None]
    date = datetime.now(UTC).isoformat(timespec="seconds")
    day = {"schema": SCHEMA, "what": "all", "size": size, **machine(), "absent": absent, "data": given, "date": date}
    return day | {"load_average": round(os.getloadavg()[0], 1)}  # of the last minute: the other work of the machine


# ── Earlier results ────────────────────────────────────────────────────────────────────────────────────────────────


def _append(path: Path, line: dict[str, Any]) -> None:
    """Append one line, which is on the disk when this returns: the next phase may crash the machine."""
    with open(path, "a", encoding="utf-8", opener=files.plain) as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _lines(path: Path) -> list[dict[str, Any]]:
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        with contextlib.suppress(json.JSONDecodeError):  # half a line of a machine that crashed
            found.append(json.loads(line))
    return found


def _same_day(out: Path, day: dict[str, Any]) -> dict[str, Any]:
    """The day of the results in `out`, written there if it has none. Raises UserError if it is of another machine or plan."""
    path = out / "results.jsonl"
    if path.is_file() and not path.read_text(encoding="utf-8").endswith("\n"):
        with open(path, "a", encoding="utf-8", opener=files.plain) as file:
            file.write("\n")
    before = [line["day"] for line in _lines(path) if "day" in line]
    if not before:
        _append(path, {"day": day})
        return day
    for key in ("size", "machine", "gpus", "versions", "absent", "data"):
        if before[0].get(key) != day.get(key):
            raise UserError(f"{out} holds results of {key} {before[0].get(key)}, this is {day.get(key)}; use another --out")
    found: dict[str, Any] = before[0]
    return found


def _done(out: Path, phases: tuple[Phase, ...]) -> dict[str, Outcome]:
    """The outcomes that need no second run: successful ones of the same command."""
    commands = {p.name: shlex.join(p.command) for p in phases}
    lines = [line for line in _lines(out / "results.jsonl") if "phase" in line]
    return {line["phase"]: Outcome(**line) for line in lines if line["code"] == 0 and commands.get(line["phase"]) == line["command"]}


def _why_not(phase: Phase, left_s: float, work: Path) -> str:
    """Why a phase is not begun, or ""."""
    if phase.lacks:
        return phase.lacks
    if phase.needs and not (work / phase.needs / "manifest.json").is_file():
        return f"there are no shards {phase.needs}"
    if left_s < _WORTH * phase.expected_s:
        return f"takes about {phase.expected_s:.0f} s, {max(left_s, 0):.0f} s of the budget are left"
    return ""


# ── A phase's process ──────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class _Running:
    process: subprocess.Popen[bytes]
    began: float
    """On the monotonic clock."""
    at: float
    """Unix time."""
    limit_s: float
    ask: signal.Signals = signal.SIGTERM
    """What asks it to end. SIGTERM: Ray's processes are in other groups, and end with the process that started them."""

    def ended(self) -> tuple[int | Literal["timeout"], float]:
        """(code, seconds) once it is over; at its limit it is ended, with all its children."""
        code: int | Literal["timeout"] = "timeout"
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self.process.wait(max(self.limit_s - (time.monotonic() - self.began), 0.0))
        seconds = time.monotonic() - self.began
        self.end()
        return code, seconds

    def end(self) -> None:
        """End its whole process group, so that no child of a crashed phase holds the GPU of the next."""
        if self.process.poll() is None:
            self._signal(self.ask)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_LEAVE_S)
        left = self._signal(signal.SIGKILL)
        self.process.wait()
        until = time.monotonic() + _LEAVE_S
        while left and time.monotonic() < until:  # a killed process holds its GPU until the kernel has removed it
            left = self._signal(0)
            time.sleep(0.05)

    def _signal(self, number: int) -> bool:
        """Whether the group still had a process."""
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            return False
        return True


@contextlib.contextmanager
def _started(phase: Phase, out: Path, work: Path, log: IO[str], limit_s: float, size: Size) -> Iterator[_Running]:
    program, *words = phase.command
    to = ["--junitxml" if program == "pytest" else "--json", str(_result_file(out, phase).absolute())]
    _result_file(out, phase).parent.mkdir(exist_ok=True)
    _result_file(out, phase).unlink(missing_ok=True)
    inherited = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH", "")])])
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"), "TRITON_CACHE_DIR": str(work / "triton")}  # empty: compiling counts
    hidden = {} if size == "gpu" else {"CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [sys.executable, *_PROGRAMS[program], *words, *to],
        cwd=ROOT if phase.in_checkout else work,
        env={**inherited, **caches, **hidden, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=end_with_parent,
    )
    running = _Running(process, time.monotonic(), time.time(), limit_s, signal.SIGINT if program == "pytest" else signal.SIGTERM)
    try:
        yield running
    finally:
        running.end()


def _result_file(out: Path, phase: Phase) -> Path:
    ending = "xml" if phase.command[0] == "pytest" else "json"
    return out / "phases" / f"{re.sub(r'[^a-z0-9]+', '-', phase.name.lower())}.{ending}"


def _outcome(phase: Phase, running: _Running, out: Path) -> Outcome:
    code, seconds = running.ended()
    if phase.beside and (written := _result_file(out, phase)).is_file():  # it ran beside others, so the time of its end is unknown
        seconds = min(seconds, written.stat().st_mtime - running.at)
    n, complete, rows = _result(_result_file(out, phase))
    figure = phase.figure(rows) if complete else f"{len(rows)} rows before it ended" if rows else "nothing; see the log"
    return Outcome(phase.name, code, round(seconds, 1), figure, shlex.join(phase.command), n, complete, tuple(rows))


def _result(path: Path) -> tuple[int, bool, list[Row]]:
    """The phase's file: n, whether it is complete, rows."""
    if not path.is_file():
        return 0, False, []
    if path.suffix == ".xml":
        suite = next(ElementTree.parse(path).iter("testsuite"))
        count = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
        failed = count["failures"] + count["errors"]
        row = {"name": "tests", "passed": count["tests"] - failed - count["skipped"], "failed": failed, "skipped": count["skipped"]}
        return 1, True, [row]
    text: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return text["n"], text["complete"], text["rows"]
