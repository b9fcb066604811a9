"""Hostile files against the code that reads them. Each runs in a child, whose end, time and memory are seen from outside.

    python -m tests.attack.fuzz                      every kind, as often as SECURITY.md says
    python -m tests.attack.fuzz KIND COUNT SEED      one kind; the same seed makes the same files

A kind is a module here with `cases(seed, count)`, which makes (name, content), `place(folder, name, content)`, which puts it where a
command would find it (else it is a file of that name), and `use(path)`, which does with it what commands do. A case is right if `use`
returns or raises UserError, within 20 s of all cores together and 2 GiB. The memory is the peak of the process, with its libraries.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import resource
import selectors
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

COUNTS = {
    "shards": 400,
    "manifests": 200,
    "checkpoints": 200,
    "encoders": 200,
    "runs": 200,
    "weights": 200,
    "images": 1500,
    "archives": 100,
}
MOST_S, MOST_BYTES = 20.0, 2 << 30
_PATIENCE = 4.0  # times MOST_S by the clock: other processes may have the cores
_START_S = 120.0
_COMMAND = (sys.executable, "-m", "tests.attack.fuzz")
_ADDRESSES = 16 << 30  # of a child: a bomb is to end itself, not the machine


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a case came to."""

    name: str
    end: str
    """used, sentence (a UserError), traceback, signal or hang."""
    seconds: float
    """Of all cores; of the clock for a signal and a hang."""
    peak: int
    """Bytes."""
    text: str
    """The sentence, or the traceback."""

    @property
    def right(self) -> bool:
        return self.end in ("used", "sentence") and self.seconds <= MOST_S and self.peak <= MOST_BYTES


def attack(kind: str, count: int, seed: int) -> list[Outcome]:
    """The outcomes of `count` cases of `kind`. A child that dies or hangs is replaced, and the next case is tried."""
    found: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="attack-") as folder:
        # In a process of its own: a bomb may need more memory to be made than to be refused.
        subprocess.run([*_COMMAND, "--make", kind, str(count), str(seed), folder], check=True)
        while len(found) < count:
            at = len(found)
            found += _outcomes(kind, Path(folder), at)
            if len(found) == at:
                raise RuntimeError(f"a child of {kind} ended before its first case")
    return found


def _make(kind: str, count: int, seed: int, folder: Path) -> None:
    """Write the cases into `folder`: a file each, and their names."""
    names = []
    for number, (name, content) in enumerate(importlib.import_module(f"tests.attack.{kind}").cases(seed, count)):
        (folder / str(number)).write_bytes(content)
        names.append(name)
    assert len(names) == count, f"{kind} makes {len(names)} cases of {count}"
    (folder / "names.json").write_text(json.dumps(names))


def _outcomes(kind: str, folder: Path, begin: int) -> list[Outcome]:
    """The outcomes from case `begin` until the end, or until the child has died or hung."""
    found: list[Outcome] = []
    with tempfile.TemporaryFile() as errors:
        command = [*_COMMAND, "--child", kind, str(folder), str(begin)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert child.stdout is not None
        current, since, patience = "", time.monotonic(), _START_S
        with child, selectors.DefaultSelector() as selector:
            selector.register(child.stdout, selectors.EVENT_READ)
            while True:
                left = patience - (time.monotonic() - since)
                if left <= 0 or not selector.select(left):
                    child.kill()
                    if current:
                        found.append(Outcome(current, "hang", time.monotonic() - since, 0, ""))
                    return found
                line = child.stdout.readline()
                if not line:
                    break
                text = json.loads(line)
                if "end" in text:
                    found.append(Outcome(**text))
                    current, patience = "", _START_S
                else:
                    current, patience = text["name"], _PATIENCE * MOST_S
                since = time.monotonic()
        errors.seek(0)
        said = errors.read().decode(errors="replace")[-3000:]
        if current:
            found.append(Outcome(current, "signal", time.monotonic() - since, 0, f"exit {child.returncode}: {said}"))
        elif child.returncode:
            raise RuntimeError(f"a child of {kind} ended between two cases:\n{said}")
    return found


def _child(kind: str, folder: Path, begin: int) -> None:
    """Run the cases from `begin` on, and print a line at the beginning and the end of each."""
    # What the code under attack prints is not ours to read.
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESSES, _ADDRESSES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from simclr.errors import UserError

    module = importlib.import_module(f"tests.attack.{kind}")
    place = getattr(module, "place", _as_a_file)
    names = json.loads((folder / "names.json").read_text())
    for number in range(begin, len(names)):
        with tempfile.TemporaryDirectory(prefix="attack-") as scratch:
            path = place(Path(scratch), names[number], (folder / str(number)).read_bytes())
            print(json.dumps({"name": names[number]}), file=lines, flush=True)
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            began, end, text = time.process_time(), "used", ""
            try:
                module.use(path)
            except UserError as error:
                end, text = "sentence", str(error)
            except Exception:
                end, text = "traceback", traceback.format_exc()
            seconds = time.process_time() - began
            peak = int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) << 10
            print(json.dumps(asdict(Outcome(names[number], end, seconds, peak, text))), file=lines, flush=True)


def _as_a_file(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def row(kind: str, found: list[Outcome]) -> str:
    """A line of the table in SECURITY.md."""
    ends = Counter(outcome.end for outcome in found)
    slowest, largest = max(outcome.seconds for outcome in found), max(outcome.peak for outcome in found) / 2**30
    shown = [str(ends[end]) for end in ("used", "sentence", "traceback", "signal", "hang")]
    return f"| {kind} | {len(found)} | {' | '.join(shown)} | {slowest:.1f} s | {largest:.2f} GiB |"


HEAD = "| files | cases | used | a sentence | tracebacks | signals | hangs | slowest | most memory |\n|---|---|---|---|---|---|---|---|---|"


def main(words: list[str]) -> int:
    """Print the table, and each case that is not right with its traceback."""
    chosen = {words[0]: int(words[1]) if len(words) > 1 else COUNTS[words[0]]} if words else COUNTS
    wrong: list[Outcome] = []
    print(HEAD)
    for kind, count in chosen.items():
        found = attack(kind, count, int(words[2]) if len(words) > 2 else 0)
        wrong += [outcome for outcome in found if not outcome.right]
        print(row(kind, found), flush=True)
    for outcome in wrong:
        print(f"\n{outcome.name}: {outcome.end}, {outcome.seconds:.1f} s, {outcome.peak / 2**30:.2f} GiB\n{outcome.text}")
    return bool(wrong)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--make", kind, count, seed, folder]:
            _make(kind, int(count), int(seed), Path(folder))
        case ["--child", kind, folder, begin]:
            _child(kind, Path(folder), int(begin))
        case words:
            sys.exit(main(words))
