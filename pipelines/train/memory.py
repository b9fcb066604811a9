"""Workers that were ended because a node's memory is used up, and the sentence for it. Ray says who and how much in many lines, of which
its errors show the last: a link to its documentation."""

from __future__ import annotations

import re
from pathlib import Path

_NODE = re.compile(r"Memory on the node \(IP: ([^,)]+).*?\) was ([\d.]+)\s*GB used / ([\d.]+)\s*GB limit")
_LIMIT = re.compile(r"exceeded threshold of \d+B \(([\d.]+)% of")
_ENDED = re.compile(r"(\d+) worker\(s\) were killed")
_USER = re.compile(r"^(\d+)\t([\d.]+)\t(\S+)", re.MULTILINE)
_LARGEST = 3
_MEND = (
    "fewer --cpus-per-worker (each is a thread that loads images), fewer --workers on a node or a smaller batch take less, ending what "
    "else runs there gives more"
)
_MOVE = "RAY_memory_usage_threshold, set where Ray is started, moves the limit"


class EndedByKernel(Exception):
    """A worker that the kernel of its machine has killed for lack of memory."""


def kernel_kills() -> int:
    """How many processes the kernel of this machine has killed for lack of memory since it runs, its containers' included; 0 where it does
    not count them."""
    try:
        text = Path("/proc/vmstat").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith("oom_kill ")), 0)


def ended_by_kernel(name: str, kills: int) -> EndedByKernel:
    """The error of the worker of this `name`, whose machine's kernel has killed so many processes since the worker's last answer."""
    return EndedByKernel(
        f"the memory of the node, or of the container, of {name} is used up: the worker is gone, and since it last answered the kernel "
        f"there has ended {kills} process{'es' * (kills > 1)} for lack of memory. Here {_MEND}"
    )


def used_up(error: BaseException) -> str:
    """The sentence for workers that Ray's memory monitor or a kernel has ended: node, memory, largest processes. "" for other errors.

    Ray gives its OutOfMemoryError alone, or as a cause in the errors of a poll and of a start, which have its text.
    """
    text = str(error)
    if isinstance(error, EndedByKernel):
        return text
    node = _NODE.search(text)
    if node is None:
        return ""
    host, used, of = node.groups()
    limit, ended = _LIMIT.search(text), _ENDED.search(text)
    over = f", more than {limit[1]} %" if limit else ""
    who = f"{ended[1]} processes" if ended and ended[1] != "1" else "a process"
    # Of a command only the program: its words may hold what is secret.
    largest = [f"pid {pid} ({command.rpartition('/')[2]}) {gb} GB" for pid, gb, command in _USER.findall(text)[:_LARGEST]]
    seen = f" The largest: {', '.join(largest)}." if largest else ""
    return (
        f"the memory of the node {host} is used up: {used} of {of} GB{over}, so Ray has ended {who} there.{seen} Here {_MEND}, and {_MOVE}"
    )
