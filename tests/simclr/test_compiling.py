"""Torch unpickles and runs what lies in its cache: it is this user's own, or that is said."""

from __future__ import annotations

import os
import stat
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipelines.runs import sync
from pipelines.train import compile_cache
from simclr.compiling import compiled, own_cache
from tests.support.small import TINY


@pytest.mark.parametrize("kind", ["new", "own", "writable", "foreign", "link"])
def test_torch_has_a_cache_of_this_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Torch's own choice is a name in /tmp that anybody can make first, with pickles and libraries in it."""
    home = tmp_path / "home/.cache/simclr/torchinductor"
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LOGNAME", "victim")
    usual = tmp_path / "torchinductor_victim"
    if kind == "link":
        (tmp_path / "theirs").mkdir()
        usual.symlink_to(tmp_path / "theirs")
    elif kind != "new":
        usual.mkdir(mode=0o700)
        usual.chmod(0o777 if kind == "writable" else 0o755)
    if kind == "foreign":
        uid = os.geteuid()
        monkeypatch.setattr("os.geteuid", lambda: uid + 1)
    for _ in range(2):  # two ranks, or a restart: one folder, or each would compile
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(usual))  # torch notes its choice there itself
        said = own_cache()
        chosen = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        if kind in ("new", "own"):
            assert chosen == usual and not said
        else:
            assert "is not this user's alone" in said and f"torch compiles into {chosen};" in said
            assert chosen == home if kind != "foreign" else chosen.parent == tmp_path and chosen != usual  # the home is foreign, too
        assert not chosen.is_symlink() and not chosen.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@pytest.mark.parametrize(("mode", "said"), [(None, False), (0o755, False), (0o1777, True), (0o770, True)])
def test_a_cache_for_torch_that_others_can_write_to_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int | None, said: bool
) -> None:
    """One that the user has named: it stays, and every rank uses it."""
    named = tmp_path / "somewhere"
    if mode is not None:
        named.mkdir()
        named.chmod(mode)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(named))
    monkeypatch.setattr(torch, "compile", lambda what: what)  # its imports take seconds
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        compiled(abs)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(named)
    expected = f"{named} is not this user's alone (owner {os.geteuid()}, mode {mode or 0:o}), and torch runs code that others put there"
    assert [str(w.message).partition(":")[0] for w in heard] == [expected] * said


@pytest.mark.parametrize(("local_rank", "told"), [("0", 1), ("1", 0)])
def test_a_worker_says_once_a_node_where_it_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local_rank: str, told: int) -> None:
    """A worker's warnings reach no terminal. Torch must not look into the other folder first."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "torchinductor_victim").symlink_to(tmp_path / "theirs")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name, value in (("HOME", str(tmp_path)), ("LOGNAME", "victim"), ("LOCAL_RANK", local_rank)):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "torchinductor_victim"))
    config, lines = replace(TINY, train=replace(TINY.train, compile=True)), list[str]()
    compile_cache.remembered(iter([1]), sync.Home(tmp_path / "run"), config, torch.device("cpu"), "", lines.append)
    assert len(lines) == told and os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / ".cache/simclr/torchinductor")
