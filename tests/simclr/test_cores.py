"""The cores that a process may use: its affinity, and the quotas of its cgroups in trees as kernels and containers show them."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.runs import environment
from simclr import cores as counted
from simclr.cores import cores
from tests.support.paths import ROOT

V2 = "35 30 0:31 {root} /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "42 32 0:36 {root} /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:15 - cgroup cgroup rw,cpu,cpuacct"
MEMORY = "43 32 0:37 / /sys/fs/cgroup/memory rw,nosuid shared:16 - cgroup cgroup rw,memory"


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 128 cores, all of which this process may use."""
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(128)))


def tree(root: Path, own: str, mounts: list[str], files: dict[str, str]) -> Path:
    for name, text in {"proc/self/cgroup": own, "proc/self/mountinfo": "\n".join(mounts), **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def two(group: str, text: str) -> dict[str, str]:
    """What version 2 says of a group."""
    return {f"sys/fs/cgroup/{group}/cpu.max": text}


def one(group: str, quota: int, period: int) -> dict[str, str]:
    """What version 1 says of a group."""
    return {f"sys/fs/cgroup/cpu,cpuacct/{group}/cpu.cfs_{name}_us": str(value) for name, value in (("quota", quota), ("period", period))}


@pytest.mark.parametrize(
    ("own", "mounts", "files", "expected"),
    [
        ("0::/", [V2.format(root="/")], two("", "400000 100000"), 4),  # a container
        ("0::/", [V2.format(root="/")], two("", "max 100000"), 128),
        ("0::/", [V2.format(root="/")], two("", "150000 100000"), 2),  # rounded up
        ("0::/", [V2.format(root="/")], two("", "1000 100000"), 1),
        ("0::/", [V2.format(root="/")], two("", "4 0"), 128),
        ("0::/", [V2.format(root="/")], {}, 128),  # the root of all has no such file
        # A job of a batch system: the limit is that of a group around it, or its own, whichever is less.
        ("0::/slurm/job/step", [V2.format(root="/")], two("slurm/job", "800000 100000") | two("slurm/job/step", "max 100000"), 8),
        ("0::/a/b", [V2.format(root="/")], two("a", "300000 100000") | two("a/b", "900000 100000"), 3),
        ("0::/a/b", [V2.format(root="/")], two("a", "900000 100000") | two("a/b", "300000 100000"), 3),
        ("4:memory:/m\n2:cpu,cpuacct:/a/b", [V1.format(root="/"), MEMORY], one("a/b", -1, 100000), 128),
        ("2:cpu,cpuacct:/a/b", [V1.format(root="/")], one("a", 50000, 10000) | one("a/b", -1, 10000), 5),
        # Docker with version 1: the path is the machine's, the folder is the container's own.
        ("2:cpu,cpuacct:/docker/abc", [V1.format(root="/docker/abc")], one("", 200000, 100000), 2),
        ("2:cpu,cpuacct:/docker/abc/x", [V1.format(root="/docker/abc")], one("x", 70000, 10000), 7),
        ("0::/../other", [V2.format(root="/")], two("", "600000 100000"), 6),  # a process that was moved out of what it sees
        # Both versions at once, with the controller in the old one.
        (
            "2:cpu,cpuacct:/j\n0::/j",
            [V1.format(root="/"), V2.format(root="/").replace("cgroup rw", "cgroup/unified rw")],
            one("j", 4, 1),
            4,
        ),
        ("nonsense", ["nonsense", "1 2 3 - cgroup2"], {}, 128),
        ("0::/my job", [V2.format(root="/").replace("fs/cgroup", r"fs/my\040own")], {"sys/fs/my own/my job/cpu.max": "5 1"}, 5),
    ],
)
def test_a_quota_counts(many: None, tmp_path: Path, own: str, mounts: list[str], files: dict[str, str], expected: int) -> None:
    assert cores(tree(tmp_path, own, mounts, files)) == expected


def test_affinity_counts_and_the_less_of_both(many: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 64})
    place = tree(tmp_path, "0::/", [V2.format(root="/")], two("", "400000 100000"))
    assert cores(place) == 3 and cores(tmp_path / "nothing") == 3
    tree(place, "0::/", [V2.format(root="/")], two("", "200000 100000"))
    assert cores(place) == 2
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS has none
    assert cores(tmp_path / "nothing") == 128


def test_a_process_on_one_core_starts_the_work_of_one() -> None:
    """What `taskset -c 0` leaves: commands' threads, trials at a time, cores of a private Ray. On a machine of 128 they were 128."""
    script = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); os.cpu_count = lambda: 128\n"
        "from simclr.cores import cores\nfrom pipelines.commands import verify\nfrom pipelines.parts import run\n"
        "from pipelines.train import ray_train\nfrom pipelines.runs.environment import environment\n"
        "ray_train._init = lambda address, cores, imports: (print('ray', cores), exit())\n"
        "list(run.run(lambda settings: print('parts', settings['threads']) or (lambda part: {}), {}, [{}], run.Where()))\n"
        "print('cores', cores(), verify.Args.threads, environment()['machine'].split(',')[0])\n"
        "ray_train.connect(ray_train.Resources(workers=1))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.split("\n")[:3] == ["parts 1", "cores 1 1 1 of 128 cores", "ray 1"], done.stdout + done.stderr


def test_the_machine_is_told_with_what_may_be_used_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for usable, told in ((128, "128 cores"), (4, "4 of 128 cores"), (200, "128 cores")):
        monkeypatch.setattr(environment, "cores", lambda usable=usable: usable)
        monkeypatch.setattr(environment, "of_machine", lambda: 128)
        assert environment.environment()["machine"].startswith(f"{told}, ")


def test_nothing_else_counts_cores() -> None:
    """Neither the library's numbers of all cores nor a second count of those that may be used."""
    names = {"cpu_count", "process_cpu_count", "sched_getaffinity", "get_num_cpus"}
    for path in (path for room in ("simclr", "pipelines", "tune") for path in (ROOT / room).rglob("*.py")):
        if not any(name in (text := path.read_text()) for name in names):
            continue
        tree = ast.parse(text)
        used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)} | {
            alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
        }
        assert not used & names or path == Path(counted.__file__), path
