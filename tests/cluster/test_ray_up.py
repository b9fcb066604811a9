"""A real `ray up` of cluster/onprem.yaml: three hosts, ssh, rsync, bootstrap.sh, token, autoscaler, a job, `ray down`.

`pytest -m cluster` runs it. If the machine lacks something, the test is skipped with a sentence; with $SIMCLR_TEST_CLUSTER, as in CI,
it must run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.hosts import hosts, missing
from tests.support.paths import ROOT

BIN = Path(sys.prefix) / "bin"
pytestmark = [pytest.mark.cluster]


@pytest.fixture(scope="module", autouse=True)
def _possible() -> None:
    if sentence := missing():
        assert not os.environ.get("SIMCLR_TEST_CLUSTER"), sentence
        pytest.skip(sentence)


def filled(head: str, workers: list[str], key: Path) -> str:
    """cluster/onprem.yaml with its three marked lines filled in, as a user would."""
    lines = (ROOT / "cluster/onprem.yaml").read_text().splitlines()
    mine = {
        "head_ip:": f"  head_ip: {head}",
        "worker_ips:": f"  worker_ips: [{', '.join(workers)}]",
        "auth:": f"auth: {{ssh_user: root, ssh_private_key: {key}}}",
    }
    marked = [number for number, line in enumerate(lines) if "# EDIT" in line]
    for number in marked:
        (lines[number],) = (text for start, text in mine.items() if lines[number].strip().startswith(start))
    assert len(marked) == 3
    return "\n".join(lines) + "\n"


def environment(folder: Path) -> None:
    """This Python environment in `folder`, with bootstrap.sh's mark that it is a node's of this checkout's lock."""
    folder.mkdir()
    for path in Path(sys.prefix).iterdir():
        if path.name != "installed":
            (folder / path.name).symlink_to(path)
    made_of = ("requirements.lock", "cluster/build.lock", "pyproject.toml", "cluster/bootstrap.sh")
    lock = b"".join((ROOT / name).read_bytes() for name in made_of)
    (folder / "installed").write_text(f"{hashlib.sha256(lock).hexdigest()} {ROOT}\n")


class Laptop:
    """The user's machine: its own home with the token, `ray` on the PATH, and the seconds that each command took."""

    def __init__(self, folder: Path) -> None:
        self.home, self.took, self.began = folder / "laptop", dict[str, float](), time.monotonic()
        (self.home / ".ray").mkdir(parents=True)
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.env |= {"HOME": str(self.home), "PATH": f"{BIN}:{os.environ['PATH']}", "RAY_TMPDIR": str(self.home)}
        self.env |= {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONUNBUFFERED": "1"}
        self.token = self.run("token", "ray", "get-auth-token", "--generate").split()[-1]

    def run(self, what: str, *command: str, timeout_s: float = 300) -> str:
        """Output of a command that succeeds."""
        began = time.monotonic()
        done = subprocess.run(
            command, cwd=ROOT, env=self.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, timeout=timeout_s, start_new_session=True,
        )  # fmt: skip
        self.took[what] = time.monotonic() - began
        print(f"{self.took[what]:6.1f} s  {what}", flush=True)
        assert done.returncode == 0, f"{what}: {' '.join(command)}\n{done.stdout[-6000:]}"
        return done.stdout

    @contextlib.contextmanager
    def dashboard(self, cluster: Path) -> Iterator[str]:
        """http address on this machine of the head's dashboard, through `ray dashboard`'s ssh."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [str(BIN / "ray"), "dashboard", str(cluster), "--port", str(port), "--no-config-cache"]
        null = subprocess.DEVNULL
        tunnel = subprocess.Popen(command, cwd=ROOT, env=self.env, stdin=null, stdout=null, stderr=null, start_new_session=True)
        try:
            self.until("tunnel", lambda: _answers(port))
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(tunnel.pid, signal.SIGTERM)
            tunnel.wait()

    def until(self, what: str, holds: Callable[[], Any], timeout_s: float = 90) -> None:
        began = time.monotonic()
        while not holds():
            assert time.monotonic() - began < timeout_s, f"{what}: not after {timeout_s:.0f} s"
            time.sleep(0.5)
        self.took[what] = time.monotonic() - began
        print(f"{self.took[what]:6.1f} s  {what}", flush=True)

    def get(self, address: str, token: str | None) -> Any:
        request = urllib.request.Request(address, headers={"Authorization": f"Bearer {token}"} if token else {})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    def alive(self, address: str) -> int:
        with contextlib.suppress(OSError):
            nodes = self.get(f"{address}/nodes?view=summary", self.token)["data"]["summary"]
            return sum(node["raylet"].get("state") == "ALIVE" for node in nodes)
        return 0


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def test_from_ray_up_to_the_encoder_and_down(tmp_path: Path, patterns: Path) -> None:
    laptop = Laptop(tmp_path)
    shared = tmp_path / "shared"  # in place of NFS: every host sees it at the same path
    shutil.copytree(patterns, shared / "patterns")
    environment(shared / "environment")
    with hosts(3, tmp_path) as (machines, key):
        for host in machines:  # link to it, as cluster/README.md says
            (host.home / "simclr").mkdir()
            (host.home / "simclr/.venv").symlink_to(shared / "environment")
        head, *workers = (host.address for host in machines)
        cluster = tmp_path / "onprem.yaml"
        cluster.write_text(filled(head, workers, key))
        laptop.run("simclr cluster check", sys.executable, "-m", "pipelines.cli", "cluster", "check", str(cluster))
        laptop.run("ray up", "ray", "up", "-y", "--no-config-cache", str(cluster))
        with laptop.dashboard(cluster) as address:
            laptop.until("all nodes", lambda: laptop.alive(address) == 3)
            for wrong in (None, "0" * 64):
                with pytest.raises(urllib.error.HTTPError) as refused:
                    laptop.get(f"{address}/api/jobs/", wrong)
                assert refused.value.code in (401, 403)
            # The dashboard is bound to the head's localhost, Ray Client not at all.
            for port in (8265, 10001):
                with pytest.raises(OSError):
                    socket.create_connection((head, port), timeout=2)
            train = "simclr pretrain patterns_tiny --address auto --workers 2 --cpus-per-worker 2"  # both cores of a host: one on each
            train += " --train.batch-size 32 --train.steps 4 --train.checkpoint-every-steps 2 --train.report-every-steps 1"
            train += " --watch.every-epochs 0 --watch.bank 64 --watch.queries 32"
            command = [*train.split(), "--data", str(shared / "patterns"), "--run", str(shared / "run")]
            submit = ["ray", "job", "submit", "--address", address, "--working-dir", ".", "--"]
            log = laptop.run("job", *submit, *command)
            assert "first step" in log and "succeeded" in log
            again = laptop.run("the same command again", *submit, *command)
            assert "is complete: 4 of 4 steps; nothing to do" in again
            status = json.dumps(laptop.get(f"{address}/api/cluster_status", laptop.token))
            laptop.run("ray rsync-down", "ray", "rsync-down", str(cluster), f"{shared}/run/", f"{tmp_path}/fetched/")
        files = [path for host in machines for path in (host.folder / "ray").rglob("logs/**/*") if path.is_file()]
        logs = "".join(path.read_text(errors="replace") for path in files)
        for where, text in {"job log": log + again, "ray status": status, "Ray's logs": logs}.items():
            assert laptop.token not in text, f"the token is in {where}"
        assert laptop.token not in "".join(p.read_text(errors="replace") for p in shared.rglob("*.json*"))
        laptop.run("ray down", "ray", "down", "-y", str(cluster))
        # `ray down` ends Ray on the head. The workers' raylets notice and end by themselves, a minute later; onprem.yaml removes what
        # they leave.
        laptop.until("nothing is left on the head", lambda: not machines[0].processes("/ray/"), 20)
        laptop.until("nothing is left anywhere", lambda: not any(host.processes("/ray/") for host in machines), 120)

    rows = [json.loads(line) for line in (tmp_path / "fetched/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert (tmp_path / "fetched/encoder/encoder.safetensors").is_file()
    laptop.until("nothing is left here", lambda: not left_of(tmp_path), 30)
    print(f"{time.monotonic() - laptop.began:6.1f} s  in all")


ALONE = """
import sys, time
from pathlib import Path
from tests.support.hosts import hosts

with hosts(2, Path(sys.argv[1])) as (machines, _):
    assert all(machine.processes("sshd") for machine in machines)
    print("up", flush=True)
    {then}
"""


@pytest.mark.parametrize("then", ["time.sleep(600)", "raise RuntimeError"])
def test_hosts_leave_nothing_behind_however_their_owner_ends(then: str, tmp_path: Path) -> None:
    before = cables()
    owner = subprocess.Popen(
        [sys.executable, "-c", ALONE.format(then=then), tmp_path], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert owner.stdout is not None and owner.stdout.readline() == b"up\n"
    if "sleep" in then:
        assert cables() > before
        owner.kill()
    assert owner.wait(30) != 0
    ends = time.monotonic() + 20
    while left := [*left_of(tmp_path), *(cables() - before)]:
        assert time.monotonic() < ends, left
        time.sleep(0.2)


def cables() -> set[str]:
    return {path.name for path in Path("/sys/class/net").glob("simclr*")}


def left_of(folder: Path) -> list[str]:
    """Command lines of this machine's processes that name `folder`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # the process has ended
            found.append(path.read_bytes().replace(b"\0", b" ").decode())
    return [line for line in found if str(folder) in line]
