"""Files that are whole under their own name, and a sentence for each error of a disk."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from simclr.errors import UserError

_REASONS = {
    errno.ENOSPC: "no space left on the disk that holds {name}; free some and run the same command again",
    errno.EDQUOT: "the disk quota is used up where {name} lies; free some and run the same command again",
    errno.EROFS: "{name} lies on a disk that is read-only; write somewhere else",
    errno.EACCES: "no permission for {name}; change its permissions, or give another path",
    errno.EPERM: "{name} may not be changed (operation not permitted); give another path",
    errno.ENOTDIR: "a folder in the path {name} is a file; give another path",
    errno.EISDIR: "{name} is a folder where a file is wanted; give another path",
    errno.ENAMETOOLONG: "the name {name} is too long for this disk; give another path",
}
FULL = (errno.ENOSPC, errno.EDQUOT)


def trouble(error: BaseException) -> str:
    """The sentence for an OSError that a user can mend and a retry cannot, or ""."""
    known = isinstance(error, OSError) and error.errno in _REASONS
    # Of a renaming the second name is the one that was asked for.
    return _REASONS[error.errno].format(name=error.filename2 or error.filename or "the output") if known else ""  # type: ignore[attr-defined]


def user_path(text: str) -> Path:
    """The path that a user wrote, with ~ as a home folder. Raises UserError where there can be none of that name."""
    path = Path(text)
    try:
        path = path.expanduser()
        path.exists()
    except RuntimeError:
        raise UserError(f"{text}: there is no such user here; write the path in full") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{text[:60]}{'…' * (len(text) > 60)} is no path ({getattr(error, 'strerror', None) or error})") from None
    return path


def require_writable(path: Path) -> None:
    """Raise UserError if `path` cannot be created. Call it before hours of work, not after; it writes nothing."""
    if path.parts[:1] == ("s3:",):
        raise UserError(f"s3://{'/'.join(path.parts[1:])} is no place on a disk; give a local path here")
    there = next(p for p in [path.absolute(), *path.absolute().parents] if p.exists())
    if there.is_file() and there != path.absolute():
        raise UserError(_REASONS[errno.ENOTDIR].format(name=path))
    if not os.access(there, os.W_OK | (os.X_OK if there.is_dir() else 0)):
        read_only = os.statvfs(there).f_flag & os.ST_RDONLY
        raise UserError(_REASONS[errno.EROFS if read_only else errno.EACCES].format(name=path))


def require_space(path: Path, needed: int, what: str, instead: str) -> None:
    """Raise UserError if the disk that holds, or will hold, `path` has fewer than `needed` bytes free. In the message `what` follows the
    number (for two checkpoints), and `instead` is the alternative to freeing some (use another --out)."""
    there = next(p for p in [path.absolute(), *path.absolute().parents] if p.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise UserError(
            f"no space left on the disk of {path}: {free / 2**20:,.0f} MiB free, {needed / 2**20:,.0f} MiB needed {what}; "
            f"free some, or {instead}"
        )


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`. It becomes `path` at the end, or is removed if the writing failed."""
    scratch = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        yield scratch
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`: the old content or the new, never a part."""
    with whole(path) as scratch:
        scratch.write_text(text, encoding="utf-8", errors="replace")


def read_text(path: Path, instead: str) -> str:
    """The text in `path`. Raises UserError if it is no UTF-8; `instead` tells the user what to do."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: byte {error.start:,} is no UTF-8 text; {instead}") from None


def read_json(path: Path, instead: str) -> dict[str, Any]:
    """The JSON object in `path`. Raises UserError if there is none; `instead` tells the user what to do."""
    return json_in(read_text(path, instead), path, instead)


def json_in(text: str | bytes, where: object, instead: str) -> dict[str, Any]:
    """The JSON object in `text`, which comes from `where`. Raises UserError as `read_json` does."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:  # of bytes also UnicodeDecodeError
        raise UserError(f"{where} is damaged: it is no JSON ({error}); {instead}") from None
    if not isinstance(found, dict):
        raise UserError(f"{where} is damaged: it holds no JSON object; {instead}")
    return found
