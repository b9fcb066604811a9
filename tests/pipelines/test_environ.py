"""What batch systems, containers and drivers leave around a command: each test is a setting that was tried with the real commands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipelines import environ
from pipelines.evaluation import inputs
from pipelines.train import own_ray, rendezvous
from simclr.errors import UserError
from tests.support.paths import ROOT


def command(shell: str, **variables: str) -> subprocess.CompletedProcess[bytes]:
    """`shell`, where $SIMCLR is the command."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "OMP_"))}
    environment |= {"SIMCLR": f"{sys.executable} -m pipelines.cli", "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(["sh", "-c", shell], env=environment, capture_output=True, timeout=120)


@pytest.mark.parametrize("words", ["", "nonsense"])
def test_a_locale_without_unicode_prints_what_it_can(words: str) -> None:
    """It ended every command with a traceback of UnicodeEncodeError."""
    done = command(f"$SIMCLR {words}", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.returncode == 2 and b"Traceback" not in done.stdout + done.stderr, done.stderr
    assert (b"images (a folder, archive, a dataset's name) ? shards" in done.stdout.replace(b"an archive", b"archive")) == (not words)


def test_a_closed_stream_does_not_give_its_number_to_a_file(tmp_path: Path) -> None:
    """A shard was file 1 or 2 then, and what a library prints was written into it."""
    script = (
        "from pipelines import environ, terminal; import os, sys; environ.prepare()\n"
        f"file = open({str(tmp_path / 'shard')!r}, 'wb'); terminal.say('said'); terminal.show('shown'); os.write(2, b'of a library')\n"
        "assert file.fileno() > 2 and not sys.stderr.isatty() and sys.stdin.read() == '', file.fileno()\n"
    )
    assert command(f'{sys.executable} -c "$SCRIPT" <&- >&- 2>&-', SCRIPT=script).returncode == 0
    assert (tmp_path / "shard").read_bytes() == b""


@pytest.mark.parametrize(
    ("chosen", "usable", "bound", "expected", "said"),
    [
        (None, 2, 64, "2", False),  # a quota of two cores on a machine of 64, which OpenMP does not see
        (None, 64, 64, None, False),
        ("1", 64, 64, "1", False),  # many batch systems set it, and it is the user's
        ("1000", 2, 64, "2", True),
        ("64", 64, 64, "64", False),
        ("4,2", 2, 64, "4,2", False),  # OpenMP's list for nested regions
        ("", 64, 64, "", False),
    ],
)
def test_no_more_threads_than_cores(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    chosen: str | None,
    usable: int,
    bound: int,
    expected: str | None,
    said: bool,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", chosen or "")
    if chosen is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(environ, "cores", lambda: usable)
    monkeypatch.setattr(environ, "bound", lambda: bound)
    environ._limit_threads()
    assert os.environ.get("OMP_NUM_THREADS") == expected
    assert ("$OMP_NUM_THREADS is 1000, and this process may use 2 cores: it takes 2 threads" in capsys.readouterr().err) == said


@pytest.fixture
def device_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a machine's devices, with two of NVIDIA's, whose driver torch cannot use."""

    def too_old() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update your GPU driver …")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", too_old)
    monkeypatch.setattr(environ, "_DEVICES", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    return tmp_path


def test_gpus_that_an_old_driver_keeps_from_torch_are_said(
    device_files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing was said, and days on GPUs became months on the CPU."""
    told = "2 NVIDIA GPUs are in this machine and cannot be used (The NVIDIA driver on your system is too old (found version 11040).)"
    assert inputs.device_of("auto").type == "cpu"
    assert f"computing on the CPU: {told}" in capsys.readouterr().err
    with pytest.raises(UserError, match="--device cuda, but 2 NVIDIA GPUs are in this machine and cannot be used"):
        inputs.device_of("cuda")
    assert inputs.device_of("cpu").type == "cpu" and capsys.readouterr().err == ""
    for hidden in ("", "-1", "NoDevFiles"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert environ.unused_gpus() == ""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6")
    assert environ.unused_gpus().startswith(told)
    for name in ("nvidia0", "nvidia1"):  # a container without GPUs on a machine with them
        (device_files / name).unlink()
    assert environ.unused_gpus() == ""


def test_a_training_says_so_too(device_files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import ray

    from pipelines.train import ray_train

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}])
    assert ray_train.require(ray_train.Resources(), private=True) is False
    assert "training on CPUs: 2 NVIDIA GPUs are in this machine and cannot be used" in capsys.readouterr().err
    assert ray_train.require(ray_train.Resources(device="cpu"), private=True) is False and capsys.readouterr().err == ""
    with pytest.raises(UserError, match="needs as many GPUs; 2 NVIDIA GPUs are in this machine and cannot be used"):
        ray_train.require(ray_train.Resources(device="cuda"), private=True)


def test_an_address_that_was_left_in_the_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environ.without("10.0.0.1:6379") == "leave out --address"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert environ.without("10.0.0.1:6379") == "unset $RAY_ADDRESS, which names it"
    assert environ.without("auto") == "leave out --address"


def test_a_private_ray_needs_the_interface_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """gloo's own words come from a worker, after half a minute: Unable to find address for: eth77."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth77")
    with pytest.raises(UserError, match=r"\$GLOO_SOCKET_IFNAME is 'eth77', and .+ has no such interface, but lo"):
        own_ray._interfaces()
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    assert own_ray._interfaces()["GLOO_SOCKET_IFNAME"] == "lo" and "lo" in rendezvous.require_interfaces()
