"""A cluster as KubeRay makes one: `ray start --block` in each container, its process 1, with ports and a folder of its own here."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from tests.support.paths import ROOT

BIN = Path(sys.prefix) / "bin"
T = TypeVar("T")


def wait_for(what: str, found: Callable[[], T], process: subprocess.Popen[bytes], timeout_s: float = 180) -> T:
    """What `found()` gives, once it gives something, while `process` runs."""
    ends = time.monotonic() + timeout_s
    while not (value := found()):
        assert process.poll() is None and time.monotonic() < ends, f"{what}: not within {timeout_s:.0f} s, status {process.poll()}"
        time.sleep(0.1)
    return value


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Container:
    """A node: bash as process 1 of a process namespace of its own, which becomes `ray start --block`. Without the right to make such a
    namespace it is a process like any other."""

    def __init__(self, folder: Path, name: str, words: str, environment: dict[str, str]) -> None:
        # The form of KubeRay's BuildPod (ray-operator/controllers/ray/common/pod.go).
        command = [
            "bash",
            "-lc",
            "--",
            f"ulimit -n 4096; {BIN}/ray start --block --num-gpus=0 --min-worker-port=0 --max-worker-port=0 {words}",
        ]
        alone = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self.alone = subprocess.run([*alone, "true"], capture_output=True).returncode == 0
        self.log = folder / f"{name}.log"
        with self.log.open("w") as out:
            self.process = subprocess.Popen(
                [*(alone if self.alone else []), *command], env=environment, stdout=out, stderr=out, start_new_session=True
            )

    def first(self) -> int:
        """Pid of its process 1, in this machine's namespace."""
        if not self.alone:
            return self.process.pid
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return int(wait_for("process 1", lambda: path.read_text().split(), self.process)[0])

    def end(self) -> None:
        """SIGKILL for all of its processes."""
        for pid in [self.first(), self.process.pid] if self.process.poll() is None else []:
            os.kill(pid, signal.SIGKILL)
        self.process.wait()


class Blocked:
    """A head and one node, a core each."""

    def __init__(self, folder: Path, drain_s: str) -> None:
        """`drain_s`: the node's RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S."""
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment |= {"HOME": str(folder), "RAY_TMPDIR": str(folder), "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
        self.environment |= {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5", "PYTHONUNBUFFERED": "1"}
        self.environment |= {"RAY_memory_monitor_refresh_ms": "0"}  # where other work fills the memory, it would end workers
        port, each = free_port(), f"--num-cpus=1 --object-store-memory={80 << 20}"
        self.address = f"127.0.0.1:{port}"
        self.containers = list[Container]()
        words = f"--head --port={port} --temp-dir={folder / 'ray'} --include-dashboard=false --ray-client-server-port={free_port()}"
        self._start(folder, "head", f"{words} {each}", self.environment | {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"})
        wait_for("the head", self._answers, self.containers[0].process)
        node = self.environment | {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": drain_s}
        self._start(folder, "node", f"--address={self.address} {each}", node)
        self.state = self._state()
        wait_for("two nodes", lambda: len(self.state.node_table()) == 2, self.node.process)

    def _start(self, folder: Path, name: str, words: str, environment: dict[str, str]) -> None:
        self.containers.append(Container(folder, name, f"{words} --dashboard-agent-listen-port={free_port()}", environment))

    @property
    def node(self) -> Container:
        return self.containers[1]

    def _answers(self) -> bool:
        host, port = self.address.split(":")
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
        except OSError:
            return False
        return True

    def _state(self) -> Any:
        from ray._private.state import GlobalState
        from ray._raylet import GcsClientOptions

        state = GlobalState()
        state._initialize_global_state(
            GcsClientOptions.create(self.address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False)
        )
        return state

    def draining(self) -> dict[str, int]:
        """Node → the deadline of its drain, Unix time in ms."""
        found: dict[str, int] = self.state.get_draining_nodes()
        return found

    def close(self) -> None:
        for container in reversed(self.containers):
            container.end()
