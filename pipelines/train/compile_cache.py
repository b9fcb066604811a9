"""Compiled code of torch.compile, kept in the run directory, so that a restarted worker need not compile it again.

    compiled/DEVICE.bin     a signature, a line of JSON with the facts it fits, then the bytes of torch.compiler.save_cache_artifacts;
                            DEVICE-n.bin, where workers hold n and n + 1 images

Dynamo traces the network anew in every process. The file keeps the work of Inductor with Triton's binaries and, in a run of one worker,
of AOTAutograd: torch does not keep AOTAutograd's work if BatchNorm sums over ranks. C++ for a CPU is kept as text and compiled again,
which saves little (`python -m tests.support.compile_start`). On the machine that compiled, torch finds all of it below /tmp. This file
is for other nodes and for the time after a reboot. A run in S3 has none.

The bytes hold pickles, so anybody who can change them runs code here. A run directory may belong to somebody else, or come out of an
archive, and then its files belong to the user. So owner, mode and a signature are checked. The secret that signs lies in the home
directory of the user who starts the training, and their job brings it to the nodes.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipelines.runs.environment import version
from simclr import files
from simclr.config import Config
from simclr.errors import UserError

if TYPE_CHECKING:
    import torch

    from pipelines.runs import sync

T = TypeVar("T")
Tell = Callable[[str], None]
FOLDER = "compiled"
_KEY = Path("~/.cache/simclr/keys/compile.key")
# The fields of a config that shape the network and its inputs; tap and linear belong to fine-tuning.
_SHAPING = (
    *("encoder.", "head.", "views.size_px", "tap", "linear"),
    *("train.batch_size", "train.micro_batch", "train.precision", "train.bucket_mib", "train.linear_eval"),
)


def secret(tell: Tell) -> str:
    """The key (hex) that signs this user's compiled code, made the first time. "" if it cannot be kept; `tell` gets the reason."""
    try:
        path = _KEY.expanduser()
    except RuntimeError as error:  # there is no home directory
        tell(f"compiled code is not kept for a restart: {error}")
        return ""
    try:
        if not path.exists():
            _write_own(path, secrets.token_hex(32).encode())
        key = _read_own(path).decode(errors="replace")
        if not re.fullmatch("([0-9a-f]{2})+", key):
            raise UserError(f"{path} holds no key; remove it")
    except (OSError, UserError) as error:
        tell(f"compiled code is not kept for a restart: {error}")
        return ""
    return key


def facts(config: Config, workers: int, device: torch.device) -> dict[str, Any]:
    """The facts that the compiled code depends on: versions, kind of device, workers (a constant in it), the config's shaping fields."""
    import torch

    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {torch.backends.cpu.get_cpu_capability()}"
    found: dict[str, Any] = {"torch": torch.__version__, "triton": version("triton"), "device": chip, "workers": workers}
    return found | {name: value for name, value in config.flat().items() if name.startswith(_SHAPING)}


def remembered(reports: Iterator[T], home: sync.Home, config: Config, device: torch.device, key: str, tell: Tell) -> Iterator[T]:
    """`reports` of a training on `device`. If the config compiles, the run at `home` keeps the compiled code, signed with `key`; without
    a key, or for a run in S3, nothing is kept. Every rank must call it."""
    from simclr.collectives import every_ranks, rank, world_size
    from simclr.compiling import own_cache

    if not config.train.compile:
        return reports
    sentence = own_cache()  # ahead of torch's first look into its cache, which the loading below is
    if sentence and os.environ.get("LOCAL_RANK", "0") == "0":  # once a node
        tell(sentence)
    if home.at is not None or not key:
        return reports
    # Code names its device and is for one number of images, so there is a file for each. All ranks with them read it; the first of them
    # writes it and reports.
    images, own = config.train.batch_size, config.images_of(rank(), world_size())
    name = str(device) if images % world_size() == 0 else f"{device}-{own.stop - own.start}"
    writes = every_ranks(name).index(name) == rank()
    path = home.path / FOLDER / f"{name.replace(':', '-')}.bin"
    return kept(reports, path, facts(config, world_size(), device), key, writes, tell if writes else lambda text: None)


def kept(reports: Iterator[T], path: Path, fits: dict[str, Any], key: str, writes: bool, tell: Tell) -> Iterator[T]:
    """`reports` of a training that compiles its network for the first report. Before it, torch loads the content of `path`. After it, a
    rank with `writes` adds to `path` what it lacked.

    The file never ends the training: content that does not fit or cannot be trusted is not loaded, and `tell` gets a line.
    """
    known = _load(path, fits, key, tell)
    for report in reports:
        if writes:
            _save(path, fits, key, known, tell)
        yield report
        break
    yield from reports


def _load(path: Path, fits: dict[str, Any], key: str, tell: Tell) -> set[str]:
    """Load the content of `path` into torch; returns the names of its artifacts."""
    import torch

    try:
        content = _checked(path, fits, key)
    except FileNotFoundError:
        return set()
    except (OSError, UserError) as error:
        tell(f"the network is compiled anew: {error}")
        return set()
    try:
        info = torch.compiler.load_cache_artifacts(content)
    except Exception as error:  # an error of torch's: say so and compile anew, as without the file
        tell(f"the network is compiled anew: {error}")
        return set()
    return set() if info is None else {*info.inductor_artifacts, *info.aot_autograd_artifacts}


def _save(path: Path, fits: dict[str, Any], key: str, known: set[str], tell: Tell) -> None:
    """Write all that torch has compiled or loaded since the process began, unless all of it is `known`."""
    import torch

    made = torch.compiler.save_cache_artifacts()
    if made is None or {*made[1].inductor_artifacts, *made[1].aot_autograd_artifacts} <= known:
        return
    text = json.dumps(fits).encode() + b"\n" + made[0]
    try:
        _write_own(path, _signature(key, text) + b"\n" + text)
    except (OSError, UserError) as error:
        tell(f"compiled code is not kept for a restart: {error}")


def _checked(path: Path, fits: dict[str, Any], key: str) -> bytes:
    """Torch's bytes in `path`. Raises UserError if they are not this user's, not whole, or made under other facts."""
    signature, _, text = _read_own(path).partition(b"\n")
    if not hmac.compare_digest(signature, _signature(key, text)):
        raise UserError(f"{path} is damaged, or was not written by a job of this user")
    head, _, content = text.partition(b"\n")
    there = json.loads(head)
    for name in fits.keys() | there.keys():
        if fits.get(name) != there.get(name):
            raise UserError(f"{path} is of {name} {there.get(name)}, here it is {fits.get(name)}")
    return content


def _signature(key: str, text: bytes) -> bytes:
    return hmac.new(bytes.fromhex(key), text, hashlib.sha256).hexdigest().encode()


def _read_own(path: Path) -> bytes:
    """The content of a file that only this user can have written. Raises FileNotFoundError, and UserError if others could write it."""
    opened = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # the checks are of the very file that is read
    try:
        if not stat.S_ISREG(os.fstat(opened).st_mode):
            raise UserError(f"{path} is no file; remove it")
        _require_own(path.parent, path.parent.stat())
        _require_own(path, os.fstat(opened))
        with os.fdopen(opened, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(opened)


def _write_own(path: Path, content: bytes) -> None:
    """Write a file that others can neither read nor change. It has the old content or the new, never a part."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _require_own(path.parent, path.parent.stat())
    with files.whole(path) as scratch:
        scratch.touch(mode=0o600, exist_ok=False)
        scratch.write_bytes(content)


def _require_own(path: Path, found: os.stat_result) -> None:
    if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UserError(
            f"{path} is not this user's alone (owner {found.st_uid}, mode {stat.S_IMODE(found.st_mode):o}); expected owner "
            f"{os.geteuid()}, and that nobody else can write; remove it"
        )
