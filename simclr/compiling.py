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

_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def compiled(what: Callable[..., Any], **settings: Any) -> Any:
    """`torch.compile(what, **settings)`. Torch unpickles and runs what it finds in its cache: that must be this user's own."""
    own_cache()
    return torch.compile(what, **settings)


def own_cache() -> None:
    """Choose the folder of torch's cache, unless the environment names another.

    Torch's own choice is a name below /tmp that anybody can guess, and make before this user does. Where somebody has, or where others
    can write to it, this process compiles into a new folder, and says so.
    """
    usual = Path(tempfile.gettempdir()) / f"torchinductor_{_user()}"
    if os.environ.get(_VARIABLE, str(usual)) != str(usual):
        return
    with contextlib.suppress(FileExistsError):
        usual.mkdir(mode=0o700)
    found = usual.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        new = tempfile.mkdtemp(prefix="torchinductor-")
        warnings.warn(
            f"{usual} is not this user's alone (owner {found.st_uid}, mode {stat.S_IMODE(found.st_mode):o}): torch would run code that "
            f"others put there. It compiles anew into {new}; remove {usual}, or set ${_VARIABLE}",
            RuntimeWarning,
            stacklevel=2,
        )
        usual = Path(new)
    os.environ[_VARIABLE] = str(usual)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # the user of a container may have no name
        return f"uid_{os.getuid()}"
