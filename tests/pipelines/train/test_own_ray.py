"""A private Ray is its user's alone: token, folder, addresses, and what is left of it."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.train import own_ray
from simclr.errors import UserError
from tests.support.listeners import addresses
from tests.support.processes import children


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A short folder for Ray's, none of whose variables is set; no Ray of this process is under way."""
    found = tmp_path_factory.mktemp("p")
    monkeypatch.setattr(own_ray, "_own", [])
    monkeypatch.setattr(own_ray, "_RAYS_BYTES", 0)  # pytest's folders have long names
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(found))
    yield found
    own_ray.end()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_suites_ray_listens_on_the_loopback_and_its_folder_is_closed(shared_ray: None) -> None:
    """Its processes inherit a token that no list of processes shows, and no file."""
    from pipelines.train import ray_train

    assert not ray_train.connect(ray_train.Resources()) and own_ray.begun()  # it stays what it is
    (own,) = own_ray._own
    token = os.environ["RAY_AUTH_TOKEN"]
    assert mode(own.folder) == 0o700 and own.folder.stat().st_uid == os.geteuid()
    assert os.environ["RAY_AUTH_MODE"] == "token" and len(token) == 64
    processes = [pid for pid in children(os.getpid()) if str(own.folder) in _read(pid, "cmdline")]
    servers = [pid for pid in processes if _read(pid, "cmdline").split("\0")[0].endswith(("/gcs_server", "/raylet"))]
    assert len(servers) == 2 and all(f"RAY_AUTH_TOKEN={token}" in _read(pid, "environ") for pid in servers)
    processes += [child for pid in processes for child in children(pid)]
    assert not any(token in _read(pid, "cmdline") for pid in [os.getpid(), *processes])
    assert not [path for path in own.folder.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]
    found = addresses([os.getpid(), *processes])
    assert len(found) > 3 and {address for address, _ in found} <= {"127.0.0.1", "::1"}, found
    assert len(list((own.folder / "r").glob("session_latest/sockets/*"))) == 2


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:  # it has ended
        return ""


def test_each_has_a_token_and_a_folder_and_leaves_neither(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two in turn, where the user has a token for a cluster."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", "the cluster's")
    tokens = set()
    for _ in range(2):
        folder = own_ray.begin()
        assert folder.parent.parent == place and mode(folder.parent) == 0o700 and not folder.exists()
        assert os.environ["RAY_AUTH_MODE"] == "token"
        assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("lo", "=lo")  # NCCL: a name, else a prefix
        tokens.add(os.environ["RAY_AUTH_TOKEN"])
        (folder / "session/logs").mkdir(parents=True)
        own_ray.end()
        assert not list(place.iterdir())
        assert os.environ["RAY_AUTH_TOKEN"] == "the cluster's" and "RAY_AUTH_MODE" not in os.environ
        assert "GLOO_SOCKET_IFNAME" not in os.environ and "NCCL_SOCKET_IFNAME" not in os.environ
    assert len(tokens) == 2 and "the cluster's" not in tokens


_KILLED = "import os, signal; from pipelines.train import own_ray; own_ray._RAYS_BYTES = 0; print(own_ray.begin(), flush=True); "


def test_a_start_removes_what_killed_commands_left_and_nothing_else(place: Path) -> None:
    kill = [sys.executable, "-c", _KILLED + "os.kill(os.getpid(), signal.SIGKILL)"]
    wait = [sys.executable, "-c", _KILLED + "input()"]
    with subprocess.Popen(wait, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as living:
        assert living.stdin is not None and living.stdout is not None
        lives = Path(living.stdout.readline().strip()).parent
        dead = subprocess.run(kill, stdout=subprocess.PIPE, text=True)
        left = Path(dead.stdout.strip()).parent
        assert dead.returncode == -signal.SIGKILL and left.is_dir()
        (left / "r/session").mkdir(parents=True)
        theirs, link, other = (place / f"{own_ray.PREFIX}{name}" for name in ("theirs", "link", "other"))
        theirs.mkdir()
        (other / "photos").mkdir(parents=True)
        (place / "elsewhere").mkdir()
        link.symlink_to(place / "elsewhere")
        if os.geteuid() == 0:
            os.chown(theirs, 65534, 65534)
        mine = own_ray.begin().parent
        kept = {mine, lives, link, other, place / "elsewhere"} | ({theirs} if os.geteuid() == 0 else set())
        assert set(place.iterdir()) == kept
        living.stdin.close()
    assert living.returncode == 1 and not lives.exists()  # it ended by an exception, and cleaned up


def test_a_folder_that_another_start_takes_away_is_not_used(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two commands begin at once: one takes the other's new folder for a leftover, before it is locked."""
    makes, made, taken = tempfile.mkdtemp, list[Path](), list[int]()

    def meanwhile(**where: str) -> str:
        made.append(Path(makes(**where)))
        if len(made) == 1:  # it is about to be removed
            taken.append(os.open(made[0], os.O_RDONLY))
            fcntl.flock(taken[0], fcntl.LOCK_EX)
        elif len(made) == 2:  # it is gone
            made[1].rmdir()
        return str(made[-1])

    monkeypatch.setattr(tempfile, "mkdtemp", meanwhile)
    assert own_ray.begin().parent == made[2] and len(made) == 3
    assert list(place.iterdir()) == [made[2]]
    os.close(taken.pop())


@pytest.mark.parametrize(("number", "works"), [(errno.ENOLCK, True), (errno.EBADF, True), (errno.EIO, False)])
def test_only_a_disk_without_locks_is_used_without_one(place: Path, monkeypatch: pytest.MonkeyPatch, number: int, works: bool) -> None:
    def locks(lock: int, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", locks)
    if works:
        assert own_ray.begin().parent.is_dir()
        return
    with pytest.raises(UserError, match=r"cannot be made in .*Input/output error"):
        own_ray.begin()


_ENDS = """
import sys, types
from pipelines.train import own_ray
own_ray._RAYS_BYTES = 0
own_ray.begin()
ray = sys.modules["ray"] = types.ModuleType("ray")
ray.shutdown = lambda: print("its folder is there:", folder.is_dir())
folder = own_ray.begin().parent
"""


def test_rays_folder_goes_after_ray_at_the_end_of_a_process(place: Path) -> None:
    """Also from the second start on: whatever is registered later for the end runs earlier."""
    done = subprocess.run([sys.executable, "-c", _ENDS], stdout=subprocess.PIPE, text=True)
    assert done.stdout == "its folder is there: True\n" and not list(place.iterdir())


def test_an_interface_that_the_user_has_chosen_stays_and_is_said(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")
    own_ray.begin()
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("eth0", "=lo")
    (line,) = capfd.readouterr().err.splitlines()
    assert line.endswith("connections are not on the loopback alone: $GLOO_SOCKET_IFNAME is eth0; unset it, or say lo")
    own_ray.end()
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("eth0", "lo")


@pytest.mark.parametrize(("name", "works"), [("a b", True), ("a%23b;c", True), ("a#b", False), ("a?b", False)])
def test_workers_can_meet_in_the_folder_or_it_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch, name: str, works: bool) -> None:
    """Torch reads the address of the file where they meet, and takes what is behind a # or a ? for no part of the name."""
    import torch.distributed as dist

    monkeypatch.setenv("RAY_TMPDIR", str(place / name))
    if not works:
        with pytest.raises(UserError, match=r"its name has a # or a \?; set RAY_TMPDIR=/tmp"):
            own_ray.begin()
        assert not list(place.iterdir())
        return
    folder = own_ray.begin()
    folder.mkdir()
    store, _, _ = next(dist.rendezvous(f"file://{folder}/torch-1", rank=0, world_size=1))
    store.set("met", "1")
    assert [path.name for path in folder.iterdir()] == ["torch-1"]


def test_where_there_can_be_no_folder_it_says_so(place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(place / ("x" * 80)))
    with pytest.raises(UserError, match=r"bytes too long for Ray's sockets; set RAY_TMPDIR=/tmp"):
        own_ray.begin()
    assert "RAY_AUTH_TOKEN" not in os.environ and not list((place / ("x" * 80)).iterdir())
    (place / "file").touch()
    monkeypatch.setenv("RAY_TMPDIR", str(place / "file" / "in it"))
    with pytest.raises(UserError, match=r"cannot be made in .*Not a directory"):
        own_ray.begin()
    (place / "open").mkdir()
    (place / "open").chmod(0o777)
    monkeypatch.setenv("RAY_TMPDIR", str(place / "open"))
    own_ray.begin()
    assert "anybody may replace what lies in" in capfd.readouterr().err


@pytest.mark.parametrize(("before", "said"), [(0o644, True), (0o660, True), (0o600, False), (0o400, False)])
def test_the_users_own_token_is_closed_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], before: int, said: bool
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    own_ray.close_token_file()  # there is none
    token = tmp_path / ".ray/auth_token"
    token.parent.mkdir()
    token.write_text("secret")
    token.chmod(before)
    own_ray.close_token_file()
    assert mode(token) == (0o600 if said else before) and token.read_text() == "secret"
    assert (f"was open to other users of this machine (mode {before:o})" in capfd.readouterr().err) == said


def test_too_few_open_files_are_a_sentence_and_a_soft_limit_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    limits, told = [(64, 64)], list[tuple[int, int]]()
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits[0])
    monkeypatch.setattr(resource, "setrlimit", lambda which, found: told.append(found))
    with pytest.raises(UserError, match=r"64 files here \(ulimit -Hn\), Ray with 2 processes needs 264; start a shell with a higher"):
        own_ray.require_files(2)
    with pytest.raises(UserError, match=r"Ray needs 256"):
        own_ray.require_files(0)
    limits[0] = (64, 4096)
    own_ray.require_files(2)
    limits[0] = (1024, resource.RLIM_INFINITY)
    own_ray.require_files(192)
    limits[0] = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    own_ray.require_files(2)
    assert told == [(264, 4096)]


def test_without_files_no_ray_is_started(tmp_path: Path, patterns: Path) -> None:
    """As a user meets it: `ulimit -n 64`."""
    words = [sys.executable, "-m", "pipelines.cli", "pretrain", "patterns_tiny", "--data", str(patterns), "--run", str(tmp_path / "run")]
    few = subprocess.run(["sh", "-c", 'ulimit -n 64; exec "$@"', "sh", *words], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert few.returncode == 2 and few.stderr.strip().splitlines()[-1].startswith("simclr: a process may open 64 files here"), few.stderr
