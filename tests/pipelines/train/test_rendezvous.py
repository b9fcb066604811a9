"""How workers of several hosts meet where a host's own name leads to the host itself, as Debian's installer writes it."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from pipelines.train import ray_start, rendezvous, retry
from simclr.data.s3.uri import Unreachable
from simclr.errors import UserError
from tests.support.hosts import missing
from tests.support.paths import ROOT

VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
Host = Callable[..., None]


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    """host(addresses where its name leads): it has lo, eth0 with 10.0.0.5, and ib0."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that it is undone after the test
        monkeypatch.delenv(name)
    cards = {"lo": ["127.0.0.1", "::1"], "eth0": ["10.0.0.5", "fe80::1%eth0"], "ib0": ["10.1.0.5"]}
    there = {name: [SimpleNamespace(address=address) for address in each] for name, each in cards.items()}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: there)

    def leads(*addresses: str) -> None:
        def look_up(name: str, *_: Any, **__: Any) -> list[Any]:
            if not addresses:
                raise socket.gaierror(-2, "Name or service not known")
            return [(0, 0, 0, "", (address, 0)) for address in addresses]

        monkeypatch.setattr(socket, "getaddrinfo", look_up)

    return leads


@pytest.mark.parametrize(
    ("leads", "address", "expected"),
    [
        (["127.0.1.1"], "10.0.0.5", "eth0"),
        (["127.0.1.1"], "10.1.0.5", "ib0"),  # the network that Ray was told
        (["127.0.1.1", "10.0.0.5"], "10.0.0.5", "eth0"),
        (["::1"], "10.0.0.5", "eth0"),
        ([], "10.0.0.5", "eth0"),  # a name that leads nowhere: gloo would take the loopback
        (["10.0.0.5"], "10.0.0.5", None),  # as it should be
        (["127.0.1.1"], "127.0.0.1", None),  # a cluster of one host
        (["127.0.1.1"], "10.7.7.7", None),
    ],
)
def test_gloo_gets_the_interface_of_the_node(host: Host, leads: list[str], address: str, expected: str | None) -> None:
    host(*leads)
    rendezvous.choose_interface(address)
    assert os.environ.get("GLOO_SOCKET_IFNAME") == expected and "NCCL_SOCKET_IFNAME" not in os.environ


@pytest.mark.parametrize(
    ("variable", "chosen", "fits"),
    [
        ("GLOO_SOCKET_IFNAME", "ib0", True),
        ("GLOO_SOCKET_IFNAME", "ib0,eth0", True),
        ("GLOO_SOCKET_IFNAME", "eth7", False),
        ("GLOO_SOCKET_IFNAME", "eth", False),
        ("NCCL_SOCKET_IFNAME", "eth", True),
        ("NCCL_SOCKET_IFNAME", "=eth", False),
        ("NCCL_SOCKET_IFNAME", "^docker", True),
        ("NCCL_SOCKET_IFNAME", "bond,ib", True),
        ("NCCL_SOCKET_IFNAME", "bond,enp", False),
    ],
)
def test_a_choice_stays_and_one_of_nothing_is_refused(
    host: Host, monkeypatch: pytest.MonkeyPatch, variable: str, chosen: str, fits: bool
) -> None:
    host("127.0.1.1")
    monkeypatch.setenv(variable, chosen)
    if not fits:
        with pytest.raises(UserError, match=rf"\${variable} is '{chosen}', and .+ has no such interface, but lo, eth0, ib0; correct it"):
            rendezvous.choose_interface("10.0.0.5")
        return
    rendezvous.choose_interface("10.0.0.5")
    assert os.environ[variable] == chosen


def test_a_node_that_others_cannot_reach_is_named() -> None:
    def nodes(*of: tuple[str, str]) -> list[dict[str, Any]]:
        return [{"Alive": True, "NodeManagerHostname": name, "NodeManagerAddress": address} for name, address in of]

    rendezvous.require_reachable(nodes(("box1", "127.0.1.1")))
    rendezvous.require_reachable(nodes(("box1", "127.0.0.1"), ("box1", "127.0.0.1")))  # several of one host
    rendezvous.require_reachable(nodes(("box1", "10.0.0.5"), ("box2", "10.0.0.6")))
    rendezvous.require_reachable([*nodes(("box1", "10.0.0.5")), {**nodes(("box2", "127.0.1.1"))[0], "Alive": False}])
    with pytest.raises(UserError, match=r"box2 is in the Ray cluster as 127\.0\.1\.1, where no other host reaches it"):
        rendezvous.require_reachable(nodes(("box1", "10.0.0.5"), ("box2", "127.0.1.1")))


def test_each_worker_of_a_cluster_chooses_before_they_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where they meet in a file: then all are on one machine."""
    import ray
    import ray.train.torch.config as ray_config

    order: list[str] = []
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.5")
    monkeypatch.setattr(ray.train, "get_context", lambda: SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1))
    monkeypatch.setattr(ray_config, "_set_torch_distributed_env_vars", lambda: None)
    monkeypatch.setattr(ray_config, "_setup_torch_process_group", lambda *told: order.append(f"meets at {told[3]}"))
    monkeypatch.setattr(rendezvous, "choose_interface", order.append)
    for address in ("tcp://10.0.0.5:1", "file:///store"):
        monkeypatch.setattr(ray_start, "_meetings", [ray_start._Meeting("gloo", address, 7)])
        ray_start.meet()
    assert order == ["10.0.0.5", "meets at tcp://10.0.0.5:1", "meets at file:///store"]


def test_a_sentence_of_a_worker_that_has_not_begun_ends_the_job() -> None:
    """Ray wraps it twice; it was taken for a lost worker, and tried again."""
    from ray.exceptions import RayTaskError
    from ray.train import ControllerError

    for error, sentence in ((UserError("no such interface"), "no such interface"), (Unreachable("S3 is away"), ""), (KeyError("x"), "")):
        wrapped = RayTaskError("execute", "Traceback …", error).as_instanceof_cause()
        assert retry.non_retryable(ControllerError(wrapped)) == sentence


_MEET = """
import datetime, os, sys, torch, torch.distributed as dist
rank, choose = int(sys.argv[1]), sys.argv[2] == "True"
if choose:
    from pipelines.train.rendezvous import choose_interface
    choose_interface(f"10.9.0.{rank + 1}")
dist.init_process_group("gloo", init_method="tcp://10.9.0.1:29511", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=45))
summed = torch.ones(1)
dist.all_reduce(summed)
os.write(1, f"sum {summed.item()} {os.environ.get('GLOO_SOCKET_IFNAME')}\\n".encode())  # in one piece: two hosts write to one pipe
os._exit(0)
"""
# Each host is a network namespace behind a bridge, with a name that its /etc/hosts leads to 127.0.1.1, and waits for its cable.
_HOSTS = """
ip link set lo up; ip link add br0 type bridge; ip link set br0 up
host() {
    unshare --net --mount --uts --kill-child --fork sh -c "
        until ip link show eth0 2>/dev/null | grep -q eth0; do sleep 0.05; done
        ip link set lo up; ip address add 10.9.0.$1/24 dev eth0; ip link set eth0 up; hostname box$1
        printf '127.0.0.1 localhost\\n127.0.1.1 box$1\\n' > $DIR/hosts$1; mount --bind $DIR/hosts$1 /etc/hosts
        timeout 60 $PYTHON $DIR/meet.py $(($1 - 1)) $CHOOSE" &
    until child=$(cat /proc/$!/task/*/children | tr -d ' ') && [ -n "$child" ]; do sleep 0.05; done
    sleep 0.2
    ip link add c$1 type veth peer name eth0 netns $child
    ip link set c$1 master br0; ip link set c$1 up
}
host 1; host 2; wait
"""


@pytest.mark.cluster
@pytest.mark.parametrize("choose", [True, False])
def test_two_hosts_whose_names_lead_to_127_0_1_1(tmp_path: Path, choose: bool) -> None:
    """What choosing is for: torch's gloo between two hosts, and without it the same two, which do not meet."""
    if why := missing():
        pytest.skip(why)
    (tmp_path / "meet.py").write_text(_MEET)
    environment = os.environ | {"DIR": str(tmp_path), "PYTHON": sys.executable, "CHOOSE": str(choose), "PYTHONPATH": str(ROOT)}
    for name in VARIABLES:
        environment.pop(name, None)
    done = subprocess.run(
        ["unshare", "--net", "--kill-child", "--fork", "bash", "-c", _HOSTS], env=environment, capture_output=True, text=True, timeout=240
    )
    if choose:
        assert done.stdout.split() == ["sum", "2.0", "eth0"] * 2, done.stdout + done.stderr
    else:
        assert "sum" not in done.stdout and re.search(r"remote=\[127\.0\.1\.1\]", done.stderr), done.stdout + done.stderr
