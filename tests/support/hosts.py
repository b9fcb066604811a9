"""Hosts for a cluster on this machine: each a network namespace with its own address, processes, home and sshd.

Needs root, sshd, and permission to make namespaces; `missing()` names what this machine lacks. An sshd on 127.0.0.1 alone would not do:
the cluster files begin with `ray stop`, which ends every Ray process that it sees, also those of other tests and of the developer, and
`ray up` writes into the home of its login.

No namespace has a name: each lives as long as its processes, and these end with the process that started them, in any case (setpriv
--pdeathsig, unshare --kill-child). The bridge is in a namespace of its own and ends in the same way, with its cables.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Names come from a file: a name server that cannot be reached from there holds up every connection for seconds.
# In the host's own mount and pid namespace: root's home and Ray's folder are its own, the rest of the disk is shared.
# The shell stays as process 1 to reap the children of daemons; when it is killed, the whole host is.
_BOOT = """
until ip -o address show dev eth0 2>/dev/null | grep -q {address}; do sleep 0.05; done
mount --bind {folder}/passwd /etc/passwd && mount --bind {folder}/ray /tmp/ray && hostname {name} &&
mount --bind {folder}/../names /etc/hosts && mount --bind {folder}/../resolv.conf /etc/resolv.conf &&
mkdir -p /run/sshd && {{ /usr/sbin/sshd -D -e -f {folder}/sshd_config 2>{folder}/sshd.log & wait; }}
"""
# How long a raylet waits for a lost head. With Ray's own minute, half of a test of `ray down` would be waiting.
_SSHD = """
ListenAddress {address}
HostKey {folder}/host_key
PidFile none
AuthorizedKeysFile {folder}/authorized_keys
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
PermitRootLogin prohibit-password
Subsystem sftp internal-sftp
SetEnv RAY_gcs_rpc_server_reconnect_timeout_s=30
"""


def missing() -> str:
    """Why this machine cannot have such hosts, as a sentence; "" if it can."""
    if os.getuid() != 0:
        return "hosts in network namespaces need root"
    for program in ("/usr/sbin/sshd", "ssh", "rsync", "ip", "unshare", "nsenter", "setpriv", "ssh-keygen"):
        if shutil.which(program) is None:
            return f"{program} is missing: apt-get install openssh-server rsync iproute2"
    if subprocess.run(["unshare", "--net", "--pid", "--mount", "--uts", "--fork", "true"], capture_output=True).returncode:
        return "this machine allows no network namespaces"
    return ""


@dataclass(frozen=True)
class Host:
    """One host."""

    address: str
    folder: Path
    pid: int
    """Pid of its process 1 in this machine's namespace."""

    @property
    def home(self) -> Path:
        return self.folder / "home"

    def processes(self, words: str) -> list[str]:
        """Command lines with `words` of the processes in it."""
        space = Path(f"/proc/{self.pid}/ns/pid").readlink()
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if entry.name.isdigit() and int(entry.name) != self.pid and (entry / "ns/pid").readlink() == space:
                    found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip())
        return [line for line in found if words in line]


@contextlib.contextmanager
def hosts(count: int, folder: Path) -> Iterator[tuple[list[Host], Path]]:
    """(`count` hosts on a network of their own, the private key for their sshd). All are removed afterwards."""
    number = os.getpid() % 200 + 20  # another run of the tests on this machine has another network
    cable, network = f"simclr{number}", f"10.199.{number}"
    key = folder / "key"
    _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
    named = [f"{network}.{index + 10} {cable}-{index}\n" for index in range(count)]
    (folder / "names").write_text("".join(["127.0.0.1 localhost\n", *named]))
    (folder / "resolv.conf").write_text("nameserver 127.0.0.1\n")
    with contextlib.ExitStack() as ends:
        if not Path("/tmp/ray").exists():
            Path("/tmp/ray").mkdir()
            ends.callback(Path("/tmp/ray").rmdir)
        switch = _space(ends, "sleep", "infinity")
        inside = ("nsenter", "--net", "--target", str(switch), "ip")
        _run(*inside, "link", "add", "bridge", "type", "bridge")
        _run(*inside, "link", "set", "bridge", "up")
        _run("ip", "link", "add", cable, "type", "veth", "peer", "name", "out", "netns", str(switch))
        # The kernel keeps a namespace until its last TCP connection has timed out; its cable need not wait for that.
        ends.callback(subprocess.run, ["ip", "link", "delete", cable], check=False, capture_output=True)
        _run(*inside, "link", "set", "out", "master", "bridge", "up")
        _run("ip", "address", "add", f"{network}.1/24", "dev", cable)
        _run("ip", "link", "set", cable, "up")
        made = []
        for index in range(count):
            own, address = folder / f"{cable}-{index}", f"{network}.{index + 10}"
            _furnish(own, address, key)
            shell = _BOOT.format(folder=own, name=own.name, address=address)
            space = _space(ends, "sh", "-c", shell, unshare=("--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "--uts"))
            _run(*inside, "link", "add", f"host{index}", "type", "veth", "peer", "name", "eth0", "netns", str(space))
            _run(*inside, "link", "set", f"host{index}", "master", "bridge", "up")
            within = ("nsenter", "--net", "--target", str(space), "ip")
            _run(*within, "link", "set", "lo", "up")
            _run(*within, "link", "set", "eth0", "up")
            _run(*within, "address", "add", f"{address}/24", "dev", "eth0")
            _run(*within, "route", "add", "default", "via", f"{network}.1")
            made.append((address, own, space))
        yield [Host(address, own, _first(space, address)) for address, own, space in made], key


def _space(ends: contextlib.ExitStack, *command: str, unshare: tuple[str, ...] = ()) -> int:
    """Pid of a process that runs `command` in a network of its own, until `ends` or the end of this thread."""
    prefix = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", *unshare]
    process = subprocess.Popen([*prefix, *command], start_new_session=True)
    ends.callback(process.wait)
    ends.callback(process.kill)
    here, patience = Path("/proc/self/ns/net").readlink(), time.monotonic() + 20
    while Path(f"/proc/{process.pid}/ns/net").readlink() == here:
        assert time.monotonic() < patience and process.poll() is None, f"no namespace for {command}"
        time.sleep(0.01)
    return process.pid


def _furnish(own: Path, address: str, key: Path) -> None:
    """A host's own files: home, Ray's folder, the entry of root, and sshd's files."""
    (own / "home").mkdir(parents=True)
    (own / "ray").mkdir()
    (own / "home/.bashrc").touch()
    (own / "passwd").write_text(
        "".join(
            f"root:x:0:0:root:{own}/home:/bin/bash\n" if line.startswith("root:") else line
            for line in Path("/etc/passwd").read_text().splitlines(keepends=True)
        )
    )
    (own / "sshd_config").write_text(_SSHD.format(address=address, folder=own))
    (own / "authorized_keys").write_text(key.with_suffix(".pub").read_text())
    _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(own / "host_key"))


def _first(unshare: int, address: str) -> int:
    """Wait until its sshd answers, then the pid of the host's process 1."""
    ends = time.monotonic() + 300
    while time.monotonic() < ends:
        with contextlib.suppress(OSError), socket.create_connection((address, 22), timeout=1):
            return int(Path(f"/proc/{unshare}/task/{unshare}/children").read_text().split()[0])
        time.sleep(0.1)
    raise AssertionError(f"no sshd answers at {address}:22")


def _run(*command: str) -> None:
    subprocess.run(command, check=True)
