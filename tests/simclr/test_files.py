"""A disk's error is one sentence, and a file under its own name is whole."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from simclr import files
from simclr.errors import UserError


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (errno.ENOSPC, "no space left on the disk that holds runs/x; free some"),
        (errno.EDQUOT, "the disk quota is used up where runs/x lies"),
        (errno.EROFS, "runs/x lies on a disk that is read-only"),
        (errno.EACCES, "no permission for runs/x"),
        (errno.EIO, ""),
    ],
)
def test_a_disk_error_is_one_sentence(code: int, sentence: str) -> None:
    found = files.trouble(OSError(code, "…", "runs/x"))
    assert found.startswith(sentence) and bool(found) == bool(sentence)
    assert files.trouble(ValueError("x")) == ""


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    files.write_text(tmp_path / "a", "old")
    with pytest.raises(OSError, match="full"), files.whole(tmp_path / "a") as scratch:
        scratch.write_text("ne")
        raise OSError("full")
    assert (tmp_path / "a").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a"]
    files.write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new"


def test_a_path_that_cannot_be_made_is_refused_beforehand(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    files.require_writable(tmp_path / "new" / "deep")
    files.require_writable(tmp_path / "file")
    with pytest.raises(UserError, match="is a file; give another path"):
        files.require_writable(tmp_path / "file" / "x")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    with pytest.raises(UserError, match=r"no permission|read-only"):
        files.require_writable(Path("/proc/1/nothing"))
