"""The code, broken in listed ways, one at a time, and the tests that must notice.

    python -m tests.support.mutations [NAME …]

It works on a temporary copy of the checkout, never on the checkout itself. Ahead of the first mutation the named tests must pass as the
code is. Then each mutation is applied, its tests run, and a line says `killed` and by which test, or `survived`. The exit code is 1 where
one survived. `tests/test_mutations.py` holds the table to the code as that changes.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.support.mutation import Mutation
from tests.support.mutation_table import MUTATIONS
from tests.support.paths import ROOT

_PATIENCE_S = 900


def copied(target: Path) -> None:
    """Copy what git tracks or would, as it lies in the checkout, to `target`."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():  # not one that was deleted and is tracked still
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def tested(copy: Path, *arguments: str) -> tuple[int, str]:
    """Exit code of pytest in the copy, and what it printed. One that runs for too long has failed."""
    # Without bytecode: a mutation of the same length in the same second would not be noticed.
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-rf", "--durations=1", "-p", "no:cacheprovider", *arguments]
    try:
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=_PATIENCE_S)
    except subprocess.TimeoutExpired:
        return 1, f"FAILED after {_PATIENCE_S} s"
    return done.returncode, done.stdout + done.stderr


def outcome(copy: Path, mutation: Mutation) -> tuple[str, str]:
    """("killed", by which test), ("survived", "") or ("broken", why): then the tests did not run. The copy is as before."""
    path = copy / mutation.file
    whole = path.read_text()
    path.write_text(mutation.applied(whole))
    try:
        code, said = tested(copy, "-x", *mutation.tests.split())
    finally:
        path.write_text(whole)
    if code == 0:
        return "survived", ""
    killer = re.search(r"^FAILED (.+?)(?: - .*)?$", said, re.MULTILINE)
    return ("killed", killer[1]) if code == 1 and killer else ("broken", said[-2000:])


def main(names: list[str]) -> int:
    known = {mutation.name: mutation for mutation in MUTATIONS}
    if unknown := [name for name in names if name not in known]:
        print(f"no mutation {', '.join(unknown)}; there are {', '.join(known)}")
        return 2
    chosen = [known[name] for name in names] or list(MUTATIONS)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        copied(copy)
        code, said = tested(copy, *sorted({test for mutation in chosen for test in mutation.tests.split()}))
        if code:
            print("\n".join(["these fail without any mutation:", *re.findall(r"^FAILED .+$", said, re.MULTILINE)]) + said[-500:])
            return 2
        alive = 0
        for mutation in chosen:
            began = time.monotonic()
            what, by = outcome(copy, mutation)
            alive += what != "killed"
            print(f"{what:8s} {time.monotonic() - began:5.0f} s  {mutation.name}  {by}", flush=True)
    print(f"{len(chosen) - alive} of {len(chosen)} killed")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
