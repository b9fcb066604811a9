"""torch.compile, with a cache that nobody else can write to."""

from __future__ import annotations

import contextlib
import getpass
import os
import stat
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from simclr import files

_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
_IN_HOME = Path("~/.cache/simclr/torchinductor")


def compiled(what: Callable[..., Any], **settings: Any) -> Any:
    """`torch.compile(what, **settings)`. Torch unpickles and runs what it finds in its cache: that must be this user's own."""
    if sentence := own_cache():
        warnings.warn(sentence, RuntimeWarning, stacklevel=2)
    return torch.compile(what, **settings)


def own_cache() -> str:
    """Choose the folder of torch's cache, unless the environment names another. Returns what the user has to know, or "".

    Torch's own choice is a name below /tmp that anybody can guess, and make before this user does. Where somebody has, or where others
    can write to it, this user compiles into another folder. One that the environment names stays: its user has chosen it.
    """
    usual = Path(tempfile.gettempdir()) / f"torchinductor_{_user()}"
    named = Path(os.environ.get(_VARIABLE) or usual)
    if named != usual:
        if not named.exists() or _own(named.stat()):
            return ""
        return f"{_not_own(named)}: make it yours and closed to others (chmod 700 {named}), or set ${_VARIABLE} to another"
    with contextlib.suppress(FileExistsError):
        usual.mkdir(mode=0o700)
    if _own(usual.lstat()):
        os.environ[_VARIABLE] = str(usual)
        return ""
    os.environ[_VARIABLE] = other = str(_another())
    return f"{_not_own(usual)}. So torch compiles into {other}; remove {usual}, or set ${_VARIABLE}"


def _another() -> Path:
    """A folder in this user's home, the same for all ranks and the next run; where there can be none, a new one."""
    with contextlib.suppress(OSError, RuntimeError):  # the home cannot be written to; there is none
        folder = _IN_HOME.expanduser()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _own(folder.lstat()):
            return folder
    return Path(tempfile.mkdtemp(prefix="torchinductor-"))


def _own(found: os.stat_result) -> bool:
    """Whether this is a folder that nobody else can write to."""
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & files.OTHERS_WRITE


def _not_own(folder: Path) -> str:
    found = folder.stat() if folder.exists() else folder.lstat()
    who = f"owner {found.st_uid}, mode {stat.S_IMODE(found.st_mode):o}"
    return f"{folder} is not this user's alone ({who}), and torch runs code that others put there"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # the user of a container may have no name
        return f"uid_{os.getuid()}"
