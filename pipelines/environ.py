"""What a batch system, a container or an old driver leaves around a command, put right or said before work begins.

Each line here is for a setting that was tried; docs/environment.md has the table. Nothing is said where nothing is wrong.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path

from pipelines.terminal import say
from simclr.cores import bound, cores

_THREADS = "OMP_NUM_THREADS"
_HIDING = ("", "-1", "NoDevFiles")  # values of CUDA_VISIBLE_DEVICES that hide every GPU; the last is SLURM's
_DEVICES = Path("/dev")


def prepare() -> None:
    """Call it before torch, numba or Ray is imported."""
    _open_streams()
    _spell()
    _limit_threads()


def _open_streams() -> None:
    """A closed standard stream (`>&-`, some daemons) becomes /dev/null. Else the next file that is opened, as a shard, gets its number, and
    what a library prints is written into it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest number that is free
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def _spell() -> None:
    """A locale without Unicode prints ? for a letter that it lacks; it ended commands."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower().replace("-", "") != "utf8":
            with contextlib.suppress(io.UnsupportedOperation):
                stream.reconfigure(errors="replace")


def _limit_threads() -> None:
    """No more threads of torch, OpenMP and BLAS than cores. They know an affinity, and no quota of a cgroup."""
    chosen, usable = os.environ.get(_THREADS, "").strip(), cores()
    if not chosen and usable < bound():
        os.environ[_THREADS] = str(usable)
    elif chosen.isdigit() and int(chosen) > usable:
        say(f"${_THREADS} is {chosen}, and this process may use {usable} cores: it takes {usable} threads")
        os.environ[_THREADS] = str(usable)


def without(address: str) -> str:
    """How to do without the Ray cluster at `address`: a batch system or an old shell may have left it in the environment."""
    return "unset $RAY_ADDRESS, which names it" if os.environ.get("RAY_ADDRESS") == address else "leave out --address"


def unused_gpus() -> str:
    """What to say where nothing can use the NVIDIA GPUs that this machine shows to this process, and nobody has hidden them; else "".
    Call it where no GPU was found."""
    shown = [path for path in _DEVICES.glob("nvidia*") if path.name.removeprefix("nvidia").isdigit()]
    if not shown or os.environ.get("CUDA_VISIBLE_DEVICES", "all") in _HIDING:
        return ""
    import torch

    try:
        torch.cuda.init()
        why = "Ray does not see them"
    except (RuntimeError, AssertionError) as error:  # an old driver, one that was updated while it was loaded, a torch without CUDA
        why = str(error).strip().splitlines()[0][:200]
    return f"{len(shown)} NVIDIA GPUs are in this machine and cannot be used ({why}); `nvidia-smi` may say more"
