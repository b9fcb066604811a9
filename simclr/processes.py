"""Which process is which on a machine, so that a note of one says later whether it still runs."""

from __future__ import annotations

import os
from pathlib import Path

from simclr import files


def this_process() -> str:
    """What tells this process from all others: the boot of its machine, its pid namespace, its pid and when it began."""
    boot = files.read_text(Path("/proc/sys/kernel/random/boot_id"), "").strip()
    return f"{boot} {Path('/proc/self/ns/pid').readlink()} {os.getpid()} {_stat(os.getpid())[1]}"


def lives(process: str) -> bool | None:
    """Whether a process lives that runs where this one does; None if it runs elsewhere. `process` is as `this_process` has it."""
    mine, theirs = this_process().split(), process.split()
    if len(theirs) != 4 or mine[:2] != theirs[:2] or not theirs[2].isdecimal():
        return None
    state, began = _stat(int(theirs[2]))
    return state not in ("", "Z", "X") and began == theirs[3]


def _stat(pid: int) -> tuple[str, str]:
    """(state, start in ticks since the boot) of a process; empty texts if there is none."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return words[0], words[19]
