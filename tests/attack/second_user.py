"""The second user: takes another uid, tries what a neighbour on the machine can try, and prints what succeeded as JSON.

`python -m tests.attack.second_user UID` reads what it is told (see `victim`) from standard input. With a token there it tries that too:
a check that the attack works. It imports all that it needs before it gives up its rights.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_PATHS = ("/", "/metrics", "/api/jobs/", "/api/version", "/api/healthz")


def tokens(home: str, pids: list[int]) -> list[str]:
    """Where a token can be read: files, environments, command lines."""
    found = []
    for place in [Path(home, ".ray/auth_token"), *(Path(f"/proc/{pid}/{name}") for pid in pids for name in ("environ", "cmdline"))]:
        with contextlib.suppress(OSError):
            text = place.read_text(errors="replace")
            if place.name == "auth_token" or "AUTH_TOKEN=" in text or re.search(r"\b[0-9a-f]{64}\b", text):
                found.append(str(place))
    return found


def files(folder: str) -> list[str]:
    """What can be listed, read, connected to or deleted in the folder of the victim's sockets and logs."""
    found = []
    for place in (folder, f"{folder}/session_latest", f"{folder}/session_latest/logs", f"{folder}/session_latest/sockets"):
        with contextlib.suppress(OSError):
            found += [f"list {place}/{name}" for name in os.listdir(place)]  # noqa: PTH208
    for name in ("raylet", "plasma_store"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as to:
            to.connect(f"{folder}/session_latest/sockets/{name}")
            found.append(f"connect {name}")
        with contextlib.suppress(OSError):
            Path(f"{folder}/session_latest/sockets/{name}").rename(f"{folder}/session_latest/sockets/{name}.taken")
            found.append(f"delete {name}")
    return found


def shared_memory(pids: list[int]) -> list[str]:
    """Memory files of the victim's processes that can be opened."""
    found = []
    for place in Path("/dev/shm").iterdir():
        with contextlib.suppress(OSError):
            if any(str(place) in text for text in _maps(pids)) and place.open("rb"):
                found.append(str(place))
    return found


def _maps(pids: list[int]) -> Iterator[str]:
    for pid in pids:
        with contextlib.suppress(OSError):
            yield Path(f"/proc/{pid}/maps").read_text()


def pages(listens: list[list[Any]]) -> list[str]:
    """What answers HTTP without a token."""
    found = []
    for host, port in listens:
        for path in _PATHS:
            with contextlib.suppress(OSError, http.client.HTTPException):
                asked = http.client.HTTPConnection("127.0.0.1" if host in ("0.0.0.0", "::") else host, port, timeout=2)
                asked.request("GET", path)
                if (answer := asked.getresponse()).status == 200:
                    found.append(f"{port}{path}: {answer.read(60)!r}")
    return found


def cluster(gcs: str, token: str) -> str:
    """The number of nodes that the victim's Ray tells, and then a value written into it; "" if it refuses."""
    from ray._raylet import AuthenticationTokenLoader, Config, GcsClient

    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        os.environ.pop(name, None)
    if token:
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
    try:
        client = GcsClient(address=gcs)
        nodes = len(client.get_all_node_info(timeout=5))
        client.internal_kv_put(b"planted", b"code", True, b"fun", timeout=5)
    except Exception as error:  # its own kinds: what counts is that it refuses
        assert "ray" in type(error).__module__, error
        return ""
    return f"{nodes} nodes, written: {client.internal_kv_get(b'planted', b'fun', timeout=5)!r}"


def main(uid: int) -> None:
    import ray._raylet  # noqa: F401

    told = json.load(sys.stdin)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    done = {
        "tokens": tokens(told["home"], told["pids"]),
        "files": files(told["folder"]),
        "memory": shared_memory(told["pids"]),
        "pages": pages(told["listens"]),
        "cluster": cluster(told["gcs"], ""),
        "wrong token": cluster(told["gcs"], "0" * 64),
        "right token": cluster(told["gcs"], told["token"]) if told["token"] else "",
    }
    print(json.dumps(done))


if __name__ == "__main__":
    main(int(sys.argv[1]))
