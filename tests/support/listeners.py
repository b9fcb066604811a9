"""Addresses on which processes listen, as the kernel lists them."""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import Iterable
from pathlib import Path

_LISTENS = "0A"


def addresses(pids: Iterable[int]) -> set[tuple[str, int]]:
    """(address, port) of every TCP socket that one of these processes listens on."""
    sockets = {link for pid in pids for link in _links(pid)}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, _, inode = line.split()[:10]
            if state == _LISTENS and f"socket:[{inode}]" in sockets:
                host, _, port = local.partition(":")
                found.add((_address(host), int(port, 16)))
    return found


def _links(pid: int) -> list[str]:
    links = []
    with contextlib.suppress(OSError):  # it has ended
        for path in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                links.append(str(path.readlink()))
    return links


def _address(host: str) -> str:
    """The kernel's words are of 32 bits, each in the machine's own order of bytes."""
    raw = b"".join(bytes.fromhex(host[at : at + 8])[::-1] for at in range(0, len(host), 8))
    found = ipaddress.ip_address(raw)
    return str(getattr(found, "ipv4_mapped", None) or found)
