"""Ray schedules a simulated TPU slice: two hosts of four chips, which Ray itself detects from a TPU machine's variables.

Simulated: the chips (a number), and torch_tpu (tests/support/standins: a device's name, and gloo as `tpu_dist`). Real: Ray's detection
and reservation of slices, its trainer, our Resources, checks, trainer and the variables that torch_tpu needs.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.train.resources import Resources
from simclr.errors import UserError
from tests.support.paths import ROOT

RAY = Path(sys.prefix) / "bin/ray"
# The variables of Google's machines of a slice v4-16; Ray derives labels and resources from them.
SLICE = {"TPU_ACCELERATOR_TYPE": "v4-16", "TPU_TOPOLOGY": "2x2x2", "TPU_NAME": "slice-a"}
HEAD, HOSTS = "127.0.0.2", ["127.0.0.3", "127.0.0.4"]
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


@contextlib.contextmanager
def pretended_slice(folder: Path) -> Iterator[str]:
    """Address of a Ray cluster: a head without cores, and the two hosts. Its processes end with it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    base = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "TPU_", "TORCH_TPU_"))}
    base |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests/support/standins'}", "RAY_TMPDIR": str(folder), "RAY_USAGE_STATS_ENABLED": "0"}
    base |= TOKEN
    head = ["--head", f"--port={port}", f"--node-ip-address={HEAD}", "--num-cpus=0", "--include-dashboard=false"]
    head += ['--system-config={"prestart_worker_first_driver": false}']  # else it starts eight unused processes
    join = [f"--address={HEAD}:{port}", "--num-cpus=4", '--resources={"TPU": 4}']
    asked = [(head, {}), *(([*join, f"--node-ip-address={host}"], SLICE | {"TPU_WORKER_ID": str(i)}) for i, host in enumerate(HOSTS))]
    nodes: list[subprocess.Popen[bytes]] = []
    try:
        for arguments, variables in asked:
            log = folder / f"node{len(nodes)}.log"
            command = [RAY, "start", "--block", *arguments]
            with log.open("w") as out:
                nodes.append(subprocess.Popen(command, env=base | variables, stdout=out, stderr=out, cwd=folder, start_new_session=True))
            ends = time.monotonic() + 180
            while "Ray runtime started" not in log.read_text():
                assert time.monotonic() < ends and nodes[-1].poll() is None, log.read_text()
                time.sleep(0.2)
        yield f"{HEAD}:{port}"
    finally:
        for node in nodes:  # with all their children: no job is left to drain a node for
            os.killpg(node.pid, signal.SIGKILL)
            node.wait()


def left(folder: Path) -> list[str]:
    """Command lines of processes that still name `folder`; waits two seconds at most."""
    found: list[str] = []
    for _ in range(20):
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):  # the process has ended
                found += [line] if str(folder) in (line := path.read_bytes().replace(b"\0", b" ").decode()) else []
        if not found:
            break
        time.sleep(0.1)
    return found


@pytest.mark.cluster
def test_a_slice_is_reserved_whole_with_a_worker_for_each_chip(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("s")
    with pretended_slice(folder) as address:
        environment = os.environ | TOKEN | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-m", "tests.support.tpu_slice", address, folder / "results"],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400,
        )  # fmt: skip
    assert not left(folder), "processes of the pretended slice are left"
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    told = json.loads(done.stdout.splitlines()[-1])
    seen = told["seen"]
    assert [row["rank"] for row in seen] == list(range(8))
    assert {row["device"] for row in seen} == {"tpu"} and {row["backend"] for row in seen} == {"tpu_dist"}
    assert {row["sum"] for row in seen} == {36.0}  # 1 + … + 8
    # Every chip of both hosts once.
    assert sorted((row["host"], *row["chips"]) for row in seen) == [(host, str(chip)) for host in HOSTS for chip in range(4)]
    assert {(row["host"], row["TPU_WORKER_ID"], row["TPU_NAME"]) for row in seen} == {
        (host, str(index), "slice-a") for index, host in enumerate(HOSTS)
    }
    # All agree on one list, and each rank's own address is at its place.
    (addresses,) = {row["TORCH_TPU_SLICEBUILDER_ADDRESSES"] for row in seen}
    assert addresses.split(",") == [f"{row['host']}:{8070 + int(row['LOCAL_RANK'])}" for row in seen]
    assert len(set(addresses.split(","))) == 8
    assert {row["TORCH_TPU_TOPOLOGY"] for row in seen} == {"2,2,2"} and len({row["TORCH_TPU_XPROF_SESSION_ID"] for row in seen}) == 1
    assert "no whole slice of TPU-V4 with topology 2x2x4 (16 chips); it has slice-a: v4-16, 2 hosts, 8 chips" in told["refused"]


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"workers": 8}, "--device tpu wants --topology"),
        ({"workers": 2, "topology": "2x2x2", "accelerator_type": "TPU-V4"}, "a slice of 2x2x2 has 8 chips; .* use --workers 8"),
        ({"workers": 16, "topology": "4x4", "accelerator_type": "v5e"}, r"expected one of .*TPU-V5LITEPOD \(v5e\)"),
        ({"workers": 16, "topology": "16", "accelerator_type": "TPU-V6E"}, "--topology is '16'"),
    ],
)
def test_a_slice_that_is_none_is_refused(asked: dict[str, int | str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Resources(device="tpu", **asked)  # type: ignore[arg-type]


def test_a_slice_is_asked_for_with_its_device() -> None:
    with pytest.raises(UserError, match="say --device tpu"):
        Resources(topology="4x4", accelerator_type="TPU-V6E", workers=16)
