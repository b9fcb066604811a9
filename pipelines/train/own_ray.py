"""What keeps a private Ray to its user, on a machine that others share: a token, a folder, the loopback; and enough open files.

The token is random, and lies in the environment of this process, which Ray's processes inherit: no file has it, no list of processes
shows it. The folder has Ray's sockets and logs. It goes with the command; a killed command's is removed by the next start. Here is no
import of Ray, which reads the variables when it is imported.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import os
import resource
import secrets
import shutil
import socket
import stat
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

from pipelines.terminal import say
from pipelines.train import rendezvous
from simclr.errors import UserError

PREFIX = ".simclr-ray-"
_INNER = "r"  # Ray opens its own folder to everybody (mode 777), so it gets one inside of ours
# A unix socket's path has at most 107 bytes, and Ray adds /session_2026-11-26_21-05-57_123456_1234567/sockets/plasma_store to its folder.
_SOCKET_BYTES, _RAYS_BYTES = 107, 64
# Measured with two workers on two cores: 67 in Ray's scheduler, 66 in a worker; 3 more in the scheduler with each process. So with room.
_FILES, _FILES_PER_PROCESS = 256, 4
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF)  # of a disk, or a network's, without locks
_GONE_S = 1.0  # to remove the folder, while processes that end still write into it


@dataclass(frozen=True)
class _Own:
    pid: int
    """Of the process that made it: a forked child must leave it alone."""
    folder: Path
    lock: int
    """File descriptor of the folder, locked as long as this process lives."""
    before: dict[str, str | None]
    """Environment variables as they were."""


_own: list[_Own] = []


def begun() -> bool:
    """Whether the Ray of this process is private: `begin` was called, and `end` was not."""
    return bool(_own) and _own[0].pid == os.getpid()


def folder() -> Path:
    """The folder of this process's private Ray, which has begun."""
    return _own[0].folder / _INNER


def begin() -> Path:
    """Set the variables of a private Ray, before Ray is imported, and return the folder for it. `end` undoes both.

    Raises UserError where there can be no such folder.
    """
    end()
    place = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()).absolute()
    if urlparse(f"file://{place}").path != str(place):  # so torch reads the address of the file where workers meet
        raise UserError(f"Ray's folder for sockets and logs cannot lie in {place}: its name has a # or a ?; set RAY_TMPDIR=/tmp")
    try:
        place.mkdir(parents=True, exist_ok=True)
        found = place.stat()
        _remove_leftovers(place)
        made, lock = _locked(place)
    except OSError as error:
        raise UserError(
            f"Ray's folder for sockets and logs cannot be made in {place} ({error.strerror}); set RAY_TMPDIR=/dev/shm"
        ) from None
    if found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
        say(f"anybody may replace what lies in {place}: chmod +t {place}, or set RAY_TMPDIR to a folder of your own")
    new = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    if "lo" in (name for _, name in socket.if_nameindex()):  # all workers are on this machine
        new |= _interfaces()
    _own.append(_Own(os.getpid(), made, lock, {name: os.environ.get(name) for name in new}))
    os.environ.update(new)
    atexit.unregister(_at_exit)
    atexit.register(_at_exit)
    if (size := len(os.fsencode(folder())) + _RAYS_BYTES) > _SOCKET_BYTES:
        end()
        raise UserError(f"{place} is {size - _SOCKET_BYTES} bytes too long for Ray's sockets; set RAY_TMPDIR=/tmp, or another short path")
    return folder()


def _interfaces() -> dict[str, str]:
    """Variables that keep the workers' connections on the loopback. An interface that the user has chosen stays, and is said."""
    rendezvous.require_interfaces()
    new = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo"}  # NCCL takes a name without = as a prefix
    for name, loopback in new.items():
        if (chosen := os.environ.get(name, "")) not in ("", "lo", "=lo"):
            new[name] = chosen
            say(f"the workers' connections are not on the loopback alone: ${name} is {chosen}; unset it, or say {loopback}")
    return new


def _at_exit() -> None:
    """Ray's own shutdown at the end of the process comes before this or after it: that depends on who was imported first. The folder must
    go last."""
    if begun():
        if "ray" in sys.modules:
            sys.modules["ray"].shutdown()
        end()


def end() -> None:
    """Remove the private Ray's folder and its variables, if there are any. Its processes must have ended, or be about to."""
    if not begun():
        return
    own = _own.pop()
    for name, value in own.before.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    until = time.monotonic() + _GONE_S
    while own.folder.exists():
        shutil.rmtree(own.folder, ignore_errors=True)
        if time.monotonic() > until:
            break
        time.sleep(0.02)
    os.close(own.lock)


def _locked(place: Path) -> tuple[Path, int]:
    """A new folder (mode 700) in `place`, and its locked descriptor."""
    while True:
        made = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
        with contextlib.suppress(FileNotFoundError):  # another start was faster, and took it for a leftover
            lock = os.open(made, os.O_RDONLY | os.O_DIRECTORY)
            if _locks(lock) and made.exists():
                return made, lock
            os.close(lock)
        with contextlib.suppress(OSError):
            made.rmdir()


def _locks(opened: int) -> bool:
    """Lock this folder. False if another start has it, which is about to remove it."""
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True  # also on a disk without locks: nobody takes it for a leftover there


def _remove_leftovers(place: Path) -> None:
    """Remove this user's folders whose process is gone. A lock tells it, also of a process in another container."""
    for folder in place.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # it is locked, or went meanwhile
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(lock).st_uid == os.geteuid() and not {path.name for path in folder.iterdir()} - {_INNER}:
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def close_token_file() -> None:
    """Put the user's own token for clusters, which Ray writes for all to read, to mode 600."""
    try:
        path = Path("~/.ray/auth_token").expanduser()
        opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except (OSError, RuntimeError):  # there is none; there is no home
        return
    try:
        found = os.fstat(opened)
        mode = stat.S_IMODE(found.st_mode)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or not mode & 0o077:
            return
        os.fchmod(opened, 0o600)
        say(f"{path}, your token for Ray clusters, was open to other users of this machine (mode {mode:o}); it is closed now (600)")
    except OSError as error:
        say(f"{path}, your token for Ray clusters, is open to other users of this machine, and cannot be closed ({error.strerror})")
    finally:
        os.close(opened)


def require_files(processes: int) -> None:
    """Raise the limit of open files for a Ray with as many workers and controllers on this machine at a time (0 = a cluster's). Raises
    UserError if it cannot be enough."""
    needed = _FILES + _FILES_PER_PROCESS * processes
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(
            f"a process may open {hard:,} files here (ulimit -Hn), Ray{f' with {processes:,} processes' if processes else ''} needs "
            f"{needed:,}; start a shell with a higher limit, let the administrator raise it (nofile in /etc/security/limits.conf)"
            f"{', or train with fewer workers at a time' if processes else ''}"
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
