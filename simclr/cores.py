"""How many CPU cores this process may use: a batch system, `taskset` or a container may leave it a few of the machine's."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path


def cores(root: Path = Path("/")) -> int:
    """Cores that this process may use: as many as it may run on, and no more than the quota of their time that its cgroup has, rounded
    up; at least 1. `root` is where /proc and the folders of the cgroups lie.
    """
    return max(1, min([bound(), *map(math.ceil, _quotas(root))]))


def bound() -> int:
    """Cores that this process may run on (its affinity), whatever the quota of their time: as many as OpenMP and numba see."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else of_machine()


def of_machine() -> int:
    """All cores of the machine, whoever may use them."""
    return os.cpu_count() or 1


def _quotas(root: Path) -> Iterator[float]:
    """Cores' worth of time that each of this process's cgroups, and each group around it, may take; nothing where there is no limit."""
    for folder, top, version in _groups(root):
        for group in (folder, *folder.parents):
            if not group.is_relative_to(top):
                break
            if version == 2:
                quota, _, period = _text(group / "cpu.max").partition(" ")
            else:
                quota, period = _text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us")
            if quota.isdigit() and period.isdigit() and int(period):  # else it is "max" or -1, or this group has no such file
                yield int(quota) / int(period)


def _groups(root: Path) -> Iterator[tuple[Path, Path, int]]:
    """(folder of this process's cgroup, folder where its hierarchy is mounted, version) of each hierarchy that may limit CPU time."""
    own: dict[int, str] = {}
    for line in _text(root / "proc/self/cgroup").splitlines():  # number:controllers:path; version 2 names no controllers
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        own |= {2: path} if not controllers else {1: path} if "cpu" in controllers.split(",") else {}
    for line in _text(root / "proc/self/mountinfo").splitlines():
        mount, _, kind = line.partition(" - ")
        fields, (form, _, options) = mount.split(" "), [*kind.split(" ", 2), "", ""][:3]
        version = 2 if form == "cgroup2" else 1 if form == "cgroup" and "cpu" in options.split(",") else 0
        if version not in own or len(fields) < 5:
            continue
        # A container may see its own group as the root of what is mounted, while its path is told as the machine has it.
        inside = own[version].removeprefix(fields[3].rstrip("/")) if (own[version] + "/").startswith(fields[3].rstrip("/") + "/") else ""
        top = root / re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), fields[4]).lstrip("/")
        yield top / inside.strip("/"), top, version


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
