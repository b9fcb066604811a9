"""Hostile files against the code that reads them. Each runs in a child, whose end, time and memory are seen from outside.

    python -m tests.attack.fuzz                      every kind, as often as SECURITY.md says
    python -m tests.attack.fuzz KIND COUNT SEED      one kind; the same seed makes the same files

A kind is a module here with `cases(seed, count)`, which makes (name, content), `place(folder, name, content)`, which puts it where a
command would find it, and `use(path)`, which does with it what commands do. A case is right if `use` returns or raises UserError, within
20 s and 2 GiB. The memory is the process' own peak during the case, with its libraries.
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
_START_S = 120.0
_ADDRESSES = 16 << 30  # of a child: a bomb is to end itself, not the machine


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a case came to."""

    name: str
    end: str
    """used, sentence (a UserError), traceback, signal or hang."""
    seconds: float
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
    while len(found) < count:
        at = len(found)
        found += _children(kind, count, seed, at)
        if len(found) == at:
            raise RuntimeError(f"the cases of {kind} cannot be made: a child ended before its first case")
    return found


def _children(kind: str, count: int, seed: int, begin: int) -> list[Outcome]:
    """The outcomes from case `begin` until the end, or until the child has died or hung."""
    command = [sys.executable, "-m", "tests.attack.fuzz", "--child", kind, str(count), str(seed), str(begin)]
    found: list[Outcome] = []
    with tempfile.TemporaryFile() as errors:
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
                    current, patience = text["name"], MOST_S + 5
                since = time.monotonic()
        if current:
            errors.seek(0)
            found.append(Outcome(current, "signal", time.monotonic() - since, 0, f"exit {child.returncode}: {errors.read()[-2000:]!r}"))
        elif child.returncode:
            errors.seek(0)
            raise RuntimeError(f"the child of {kind} ended between two cases:\n{errors.read().decode(errors='replace')[-4000:]}")
    return found


def _child(kind: str, count: int, seed: int, begin: int) -> None:
    """Run the cases from `begin` on, and print a line at the beginning and the end of each."""
    # What the code under attack prints is not ours to read.
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESSES, _ADDRESSES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from simclr.errors import UserError

    module = importlib.import_module(f"tests.attack.{kind}")
    for number, (name, content) in enumerate(module.cases(seed, count)):
        if number < begin:
            continue
        with tempfile.TemporaryDirectory(prefix="attack-") as folder:
            path = module.place(Path(folder), name, content)
            print(json.dumps({"name": name}), file=lines, flush=True)
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            began, end, text = time.monotonic(), "used", ""
            try:
                module.use(path)
            except UserError as error:
                end, text = "sentence", str(error)
            except Exception:
                end, text = "traceback", traceback.format_exc()
            seconds = time.monotonic() - began
            peak = int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) << 10
            print(json.dumps(asdict(Outcome(name, end, seconds, peak, text))), file=lines, flush=True)


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
    if sys.argv[1:2] == ["--child"]:
        _child(sys.argv[2], *map(int, sys.argv[3:]))
    else:
        sys.exit(main(sys.argv[1:]))
