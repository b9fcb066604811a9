"""The machine and the versions that a run began on, for people."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

from simclr.cores import cores, of_machine

_GIT_S = 5.0


def environment() -> dict[str, str]:
    """This machine and the versions that matter, for people. A missing package is listed as absent: it must not end a measurement of
    hours."""
    models = [line.split(":")[1].strip() for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")]
    cpu = models[0] if models else platform.processor()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = [f"{name} {version(name) or 'absent'}" for name in ("torch", "ray", "mlflow", "ffcv")]
    versions += [f"{name} {found}" for name in ("torchvision", "triton") if (found := version(name))]
    return {
        "machine": f"{_cores()}, {cpu or platform.machine()}, {memory:.0f} GiB",
        "versions": ", ".join([f"Python {platform.python_version()}", *versions, *_gpu_versions()]),
    }


def place() -> dict[str, str]:
    """This host, and the commit of the code if that is a checkout, with -dirty where files of it were changed."""
    root = Path(__file__).resolve().parents[2]
    found = {"host": platform.node()}
    # Of this very folder: a package that was installed may lie in somebody's repository, whose commits say nothing of it.
    if (root / ".git").exists() and (git := shutil.which("git")):
        asked = [git, "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):  # no repository of this user's, or one on a slow disk
            found["commit"] = subprocess.run(asked, capture_output=True, text=True, timeout=_GIT_S, check=True).stdout.strip()
    return found


def _cores() -> str:
    """The machine's, and how many of them this process may use where that is fewer."""
    usable, all_ = cores(), of_machine()
    return f"{all_} cores" if usable >= all_ else f"{usable} of {all_} cores"


def version(package: str) -> str:
    """The installed version of `package`, without its build; "" where it is not installed."""
    try:
        return importlib.metadata.version(package).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return ""


def _gpu_versions() -> list[str]:
    """CUDA's and the driver's, if NVIDIA's driver is loaded."""
    driver = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", "\n".join(_lines(Path("/proc/driver/nvidia/version"))))
    if driver is None:
        return []
    import torch  # takes seconds, so only on a machine with a GPU

    return [f"CUDA {torch.version.cuda or 'absent'}", f"driver {driver[1]}"]


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


def installed() -> str:
    """What is installed, in one line: this package, the commit of a checkout, and the libraries that decide what a run computes. It imports
    none of them."""
    import simclr

    found = [f"simclr {simclr.__version__}{_commit(Path(simclr.__file__).parents[1])}"]
    found += [f"{name} {version(name) or 'absent'}" for name in ("torch", "ray")]
    return ", ".join([*found, f"Python {platform.python_version()}"])


def _commit(folder: Path) -> str:
    """ " (commit 1a2b3c4d, changed)" for a git checkout in `folder`; "" where it is none."""
    if not (folder / ".git").exists() or not (git := shutil.which("git")):
        return ""
    words = [git, "-C", str(folder), "describe", "--always", "--abbrev=8", "--exclude=*", "--dirty=, changed"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return f" (commit {done.stdout.strip()})" if done.returncode == 0 else ""
