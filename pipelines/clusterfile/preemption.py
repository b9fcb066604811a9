"""Hands a cloud's preemption notice to Ray, so that a training leaves this machine with a checkpoint.

A cloud gives the notice only to the machine itself, by its metadata service, two minutes (EC2) or 30 s (Google Cloud) ahead. Ray 2.60
does not ask there, and sees a node that dies. So this asks every two seconds, and on a notice drains its own node.

    python -m pipelines.clusterfile.preemption aws            or gcp; beside a worker's raylet, as the same user

It belongs to one raylet, and ends with it or when Ray has accepted the drain; a new raylet needs a new one. The raylet's command line
has the head's address and the node's id. It finds the token like any Ray process: RAY_AUTH_MODE=token and ~/.ray/auth_token. It prints
a line for a log when something changes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import ray  # noqa: F401  now: a notice leaves no time for it

from pipelines.train import ray_private
from simclr.text import printable

ASK_EVERY_S = 2.0
_ANSWER_WITHIN_S, _DRAIN_WITHIN_S, _RAYLET_WITHIN_S = 2.0, 5.0, 60
# No proxy stands between a machine and its metadata service; the environment's proxies are for other addresses.
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Notice:
    """A notice that the cloud takes this machine back."""

    why: str
    deadline_s: float
    """Unix time at which the machine goes."""


class Service(Protocol):
    """A cloud's metadata service."""

    def ask(self, now_s: float) -> Notice | None:
        """The notice, if there is one. Raises some error if the service is silent or its answer is odd."""


class Aws:
    """EC2's, version 2: each request carries a token of the service, which expires."""

    # A rebalance recommendation (/events/recommendations/rebalance) is no notice: most machines that get one stay.
    _NOTICE, _TOKEN, _AHEAD_S = "/latest/meta-data/spot/instance-action", "/latest/api/token", 120.0

    def __init__(self, base: str = "http://169.254.169.254") -> None:
        self.base, self.token = base, ""

    def ask(self, now_s: float) -> Notice | None:
        kept, self.token = self.token, ""  # stored again once the service has accepted it
        token = kept or _fetch("PUT", self.base + self._TOKEN, {"X-aws-ec2-metadata-token-ttl-seconds": "21600"})
        try:
            answer = _fetch("GET", self.base + self._NOTICE, {"X-aws-ec2-metadata-token": token})
        except urllib.error.HTTPError as error:
            if error.code == 401 and kept:  # the token has expired
                return self.ask(now_s)
            raise
        self.token = token
        if not answer:
            return None
        said = json.loads(answer)
        if said["action"] not in ("terminate", "stop", "hibernate"):
            raise ValueError(f"expected an action, got {answer[:200]!r}")
        try:
            told_s = datetime.fromisoformat(said["time"]).replace(tzinfo=UTC).timestamp()
        except (KeyError, TypeError, ValueError):
            told_s = now_s + self._AHEAD_S
        # Bounded by EC2's two minutes: this machine's clock may differ from EC2's.
        deadline_s = min(max(told_s, now_s), now_s + self._AHEAD_S)
        return Notice(f"EC2 says {said['action']}", deadline_s)


class Gcp:
    """Google Cloud's, for VMs with GPUs and with TPUs. Its notices have no time, so the least that Google promises is assumed."""

    _NOTICES = (
        ("preempted", "TRUE", "Google Cloud preempts this machine", 30.0),
        # For machines that cannot move to another host: machines with GPUs get it an hour ahead, others a minute.
        ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE", "Google Cloud stops this machine for maintenance", 60.0),
    )

    def __init__(self, base: str = "http://metadata.google.internal") -> None:
        self.base = base

    def ask(self, now_s: float) -> Notice | None:
        for name, notice, why, ahead_s in self._NOTICES:
            if _fetch("GET", f"{self.base}/computeMetadata/v1/instance/{name}", {"Metadata-Flavor": "Google"}) == notice:
                return Notice(why, now_s + ahead_s)
        return None


def _fetch(method: str, url: str, headers: dict[str, str]) -> str:
    """The page at `url`, "" if there is none (404); another status raises HTTPError."""
    try:
        with _direct.open(urllib.request.Request(url, method=method, headers=headers), timeout=_ANSWER_WITHIN_S) as answer:
            found: bytes = answer.read(4096)
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return ""
        raise
    return found.decode().strip()


# ── The node ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Raylet:
    """The process that makes a machine a node."""

    pid: int
    node_id: str
    """Hexadecimal, as Ray prints it."""
    gcs: str
    """host:port of the head."""


def raylet(pid: int, proc: Path = Path("/proc")) -> Raylet | None:
    """The raylet with this process id; None if there is none, or it has ended."""
    try:
        if (proc / str(pid) / "comm").read_text().strip() != "raylet":
            return None
        words = (proc / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    flags = dict(word.split("=", 1) for word in words if word.startswith(("--node_id=", "--gcs-address=")))
    return Raylet(pid, flags["--node_id"], flags["--gcs-address"]) if len(flags) == 2 else None


def find_raylet(proc: Path = Path("/proc")) -> Raylet | None:
    """The newest raylet of this user. Another user's raylet could send the token to their own head."""
    own = [int(entry.name) for entry in proc.iterdir() if entry.name.isdigit() and _owner(entry) == os.getuid()]
    return max(filter(None, (raylet(pid, proc) for pid in own)), key=lambda found: found.pid, default=None)


def _owner(entry: Path) -> int:
    try:
        return entry.stat().st_uid
    except OSError:  # the process has ended
        return -1


def drain(node: Raylet, notice: Notice) -> tuple[bool, str]:
    """(whether Ray has accepted it, else why not). Telling Ray twice does no harm."""
    return ray_private.drain(node.gcs, node.node_id, notice.why, int(notice.deadline_s * 1000), _DRAIN_WITHIN_S)


def watch(service: Service, node: Raylet, *, alive: Callable[[], bool], sleep: Callable[[float], None] = time.sleep) -> bool:
    """Ask until there is a notice, then tell Ray until it accepts: True. False if the raylet ends before."""
    notice, said = None, ""
    while alive():
        trouble = ""
        try:  # no error may end this process: nothing starts it again
            notice = notice or service.ask(time.time())
        except Exception as error:
            trouble = f"the metadata service gives no answer: {error!r}"
        if notice is not None:
            try:
                accepted, why = drain(node, notice)
            except Exception as error:
                accepted, why = False, repr(error)
            if accepted:
                _say(f"{notice.why} in {notice.deadline_s - time.time():.0f} s: Ray drains node {node.node_id}")
                return True
            trouble = f"{notice.why}, and Ray does not drain node {node.node_id} yet: {why}"
        if trouble != said:
            said = trouble
            _say(trouble or "the metadata service answers again")
        sleep(ASK_EVERY_S)
    _say("the raylet has ended")
    return False


def _say(sentence: str) -> None:
    with contextlib.suppress(OSError):  # a full disk must not stop the drain
        print(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} notice: {printable(sentence)}", flush=True)


def main(words: list[str] | None = None) -> int:
    """Exit status: 0, also when Ray has ended; 1 if no raylet was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("cloud", choices=("aws", "gcp"))
    parser.add_argument("--metadata", metavar="URL", help="address of the metadata service; default: the cloud's")
    parser.add_argument("--raylet", type=int, metavar="PID", help="the raylet's process id; default: the newest raylet")
    asked = parser.parse_args(words)
    kind = Aws if asked.cloud == "aws" else Gcp
    service = kind(asked.metadata) if asked.metadata else kind()
    node = None
    for _ in range(_RAYLET_WITHIN_S):
        node = raylet(asked.raylet) if asked.raylet else find_raylet()
        if node is not None:
            break
        time.sleep(1.0)
    if node is None:
        _say(f"no raylet of this user within {_RAYLET_WITHIN_S} s; start this after Ray")
        return 1
    _say(f"asking {service.base} for node {node.node_id} of {node.gcs}, raylet {node.pid}")
    watch(service, node, alive=lambda: raylet(node.pid) == node)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
