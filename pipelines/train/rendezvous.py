"""How workers on several nodes reach one another: the interface of torch's gloo, and the addresses under which Ray knows the nodes.

gloo listens where this host's own name leads. Debian's installer lets that name lead to 127.0.1.1, where no other host finds it: then gloo
is told the interface of the address that Ray has of this node. NCCL chooses an interface by itself.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from typing import Any

from simclr.errors import UserError

_GLOO, _NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"


def choose_interface(address: str) -> None:
    """Let torch's processes on this node meet at the node's `address` where its own name leads to the loopback alone. A choice of the
    user's stays. Raises UserError if that names no interface of this host."""
    there = require_interfaces()
    if os.environ.get(_GLOO) or _is_loopback(address) or not all(map(_is_loopback, _own_addresses()[:1])):
        return
    if mine := [name for name, addresses in there.items() if address in addresses]:
        os.environ[_GLOO] = mine[0]


def require_interfaces() -> dict[str, set[str]]:
    """Interface → addresses of this host. Raises UserError if the environment names one that is not among them."""
    import psutil  # type: ignore[import-untyped]

    there = {name: {found.address.partition("%")[0] for found in each} for name, each in psutil.net_if_addrs().items()}
    for variable in (_GLOO, _NCCL):
        _require_interface(variable, list(there))
    return there


def require_reachable(nodes: list[dict[str, Any]]) -> None:
    """Raise UserError if one of several hosts is in the cluster (`ray.nodes()`) under an address that leads each host to itself."""
    alive = [node for node in nodes if node["Alive"]]
    if len({node["NodeManagerHostname"] for node in alive}) < 2:
        return
    for node in alive:
        if _is_loopback(node["NodeManagerAddress"]):
            raise UserError(
                f"{node['NodeManagerHostname']} is in the Ray cluster as {node['NodeManagerAddress']}, where no other host reaches it: its "
                "name leads there in its /etc/hosts; start Ray on it again with --node-ip-address and its own address, or mend that file"
            )


def _require_interface(variable: str, there: list[str]) -> None:
    """NCCL takes prefixes with commas between them, = before whole names, ^ before those that it shall not use; gloo takes names."""
    chosen = os.environ.get(variable, "")
    if not chosen or chosen.startswith("^"):
        return
    exact = variable == _GLOO or chosen.startswith("=")
    wanted = [name.partition(":")[0] for name in chosen.removeprefix("=").split(",") if name]
    lacking = [name for name in wanted if not any(name == found or (not exact and found.startswith(name)) for found in there)]
    if lacking and (variable == _GLOO or len(lacking) == len(wanted)):  # gloo wants each, NCCL one
        raise UserError(f"${variable} is {chosen!r}, and {socket.gethostname()} has no such interface, but {', '.join(there)}; correct it")


def _own_addresses() -> list[str]:
    """Where this host's name leads, in the order in which gloo tries it."""
    try:
        return [str(found[4][0]) for found in socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)]
    except OSError:  # nowhere: gloo then takes the loopback
        return []


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False
