"""A Ray cluster of several nodes on this machine: each a raylet of its own that may be killed, be given notice, or have another clock."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import ray._private.parameter
import ray._private.utils

from tests.support.processes import children

_SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
static long ahead(void) { const char *s = getenv("CLOCK_AHEAD_S"); return s ? atol(s) : 0; }
int clock_gettime(clockid_t id, struct timespec *at) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(id, at);
    if (!failed && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) at->tv_sec += ahead();
    return failed;
}
int gettimeofday(struct timeval *restrict at, void *restrict zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    at->tv_sec = now.tv_sec; at->tv_usec = now.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}
"""


def clock(folder: Path, ahead_s: int) -> dict[str, str] | None:
    """The environment of processes whose clock is `ahead_s` fast; None without a C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    (folder / "clock.c").write_text(_SHIM)
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", folder / "clock.so", folder / "clock.c", "-ldl"], check=True)
    return {"LD_PRELOAD": str(folder / "clock.so"), "CLOCK_AHEAD_S": str(ahead_s)}


class Nodes:
    """A head without cores, and nodes that are added and lost. (`ray.cluster_utils.Cluster` registers itself, and every other Ray of this
    machine's user would join it.)"""

    def __init__(self, folder: Path, **tuned: Any) -> None:
        from ray._private.node import Node

        self.folder = folder
        parameters = self._parameters(0, _system_config=tuned or None, include_dashboard=False, gcs_server_port=0)
        self.head = Node(parameters, head=True, shutdown_at_exit=True, spawn_reaper=True)
        self.address: str = self.head.gcs_address
        self.others: list[Any] = []

    def _parameters(self, cores: int, **more: Any) -> Any:
        found = ray._private.parameter.RayParams(num_cpus=cores, num_gpus=0, object_store_memory=80 << 20, **more)
        found.update_if_absent(min_worker_port=0, max_worker_port=0, temp_dir=str(self.folder), include_log_monitor=False)
        return found

    def add(self, cores: int = 1, environment: dict[str, str] | None = None) -> Any:
        """One more node, seen by all when this returns."""
        from ray._private.node import Node

        before = {name: os.environ.get(name) for name in environment or {}}
        os.environ.update(environment or {})
        try:
            more = {"redis_address": None, "gcs_address": self.address, "node_manager_port": 0}
            parameters = self._parameters(cores, **more)
            parameters.dashboard_agent_listen_port = None
            node = Node(parameters, head=False, shutdown_at_exit=True, spawn_reaper=True)
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        self.others.append(node)
        return node

    def kill(self, node: Any) -> None:
        """Lose the node at once: SIGKILL for its raylet and all its processes."""
        own = [info.process.pid for infos in node.all_processes.values() for info in infos]
        for pid in [*own, *(child for parent in own for child in children(parent))]:
            _signal(pid, signal.SIGKILL)
        self.others.remove(node)
        node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)

    def notice(self, node: Any, seconds: float) -> None:
        """Give the notice that a cloud gives before it takes a machine back."""
        from ray._raylet import GcsClient
        from ray.core.generated.autoscaler_pb2 import DrainNodeReason

        deadline = int((time.time() + seconds) * 1000)
        accepted, why = GcsClient(address=self.address).drain_node(
            node.node_id, DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"), "spot", deadline
        )
        assert accepted, why

    def close(self) -> None:
        for node in [*self.others, self.head]:
            node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
