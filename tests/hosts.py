"""Hosts for a cluster on this machine: each a network namespace with its own address, processes, home and sshd.

Needs root, sshd, and leave to make namespaces; `missing()` says what is not there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Names come from a file: a name server that cannot be reached from there holds up every connection for seconds.
# In the host's own mount and pid namespace: root's home and Ray's folder are its own, the rest of the disk is shared.
# The shell stays as process 1, since somebody has to reap what daemons leave; when it is killed, all of the host is.
_BOOT = """
mount --bind {folder}/passwd /etc/passwd && mount --bind {folder}/ray /tmp/ray && hostname {name} &&
mount --bind {folder}/../names /etc/hosts && mount --bind {folder}/../resolv.conf /etc/resolv.conf &&
mkdir -p /run/sshd && {{ /usr/sbin/sshd -D -e -f {folder}/sshd_config 2>{folder}/sshd.log & wait; }}
"""
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
"""


def missing() -> str:
    """What keeps this machine from having such hosts, as a sentence; "" where nothing does."""
    if os.getuid() != 0:
        return "hosts in network namespaces need root"
    for program in ("/usr/sbin/sshd", "ssh", "rsync", "ip", "unshare", "ssh-keygen"):
        if shutil.which(program) is None:
            return f"{program} is missing: apt-get install openssh-server rsync iproute2"
    if subprocess.run(["unshare", "--net", "--pid", "--mount", "--uts", "--fork", "true"], capture_output=True).returncode:
        return "this machine allows no network namespaces"
    return ""


@dataclass(frozen=True)
class Host:
    """One of them."""

    address: str
    folder: Path
    pid: int
    """Of its process 1, as this machine sees it."""

    @property
    def home(self) -> Path:
        return self.folder / "home"

    def processes(self, words: str) -> list[str]:
        """Command lines, with `words` in them, of what runs in it."""
        space = Path(f"/proc/{self.pid}/ns/pid").readlink()
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if entry.name.isdigit() and int(entry.name) != self.pid and (entry / "ns/pid").readlink() == space:
                    found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip())
        return [line for line in found if words in line]


@contextlib.contextmanager
def hosts(count: int, folder: Path) -> Iterator[tuple[list[Host], Path]]:
    """(`count` hosts on a bridge of their own, the private key that opens them). All of it is gone afterwards."""
    number = os.getpid() % 200 + 20  # another run of the tests on this machine has another network
    bridge, network = f"simclr{number}", f"10.199.{number}"
    key = folder / "key"
    _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
    Path("/tmp/ray").mkdir(exist_ok=True)
    named = [f"{network}.{index + 10} {bridge}-{index}\n" for index in range(count)]
    (folder / "names").write_text("".join(["127.0.0.1 localhost\n", *named]))
    (folder / "resolv.conf").write_text("nameserver 127.0.0.1\n")
    running: list[subprocess.Popen[bytes]] = []
    spaces: list[str] = []
    _run("ip", "link", "add", bridge, "type", "bridge")
    try:
        _run("ip", "address", "add", f"{network}.1/24", "dev", bridge)
        _run("ip", "link", "set", bridge, "up")
        made = []
        for index in range(count):
            name, address = f"{bridge}-{index}", f"{network}.{index + 10}"
            _run("ip", "netns", "add", name)
            spaces.append(name)
            _run("ip", "link", "add", f"{bridge}o{index}", "type", "veth", "peer", "name", "eth0", "netns", name)
            _run("ip", "link", "set", f"{bridge}o{index}", "master", bridge, "up")
            inside = ("ip", "-n", name)
            _run(*inside, "address", "add", f"{address}/24", "dev", "eth0")
            _run(*inside, "link", "set", "eth0", "up")
            _run(*inside, "link", "set", "lo", "up")
            _run(*inside, "route", "add", "default", "via", f"{network}.1")
            own = folder / name
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
            shell = ["sh", "-c", _BOOT.format(folder=own, name=name)]
            enter = ["ip", "netns", "exec", name, "unshare", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "--uts"]
            running.append(subprocess.Popen([*enter, *shell], start_new_session=True))
            made.append((address, own, running[-1].pid))
        yield [Host(address, own, _first(pid, address)) for address, own, pid in made], key
    finally:
        for process in running:  # unshare; its child, the host's process 1, dies with it, and with that all others
            process.send_signal(signal.SIGKILL)
            process.wait()
        for index, name in enumerate(spaces):
            # The kernel keeps a namespace until its last TCP connection has timed out; its cable need not wait for that.
            subprocess.run(["ip", "link", "delete", f"{bridge}o{index}"], check=False)
            _run("ip", "netns", "delete", name)
        _run("ip", "link", "delete", bridge)


def _first(unshare: int, address: str) -> int:
    """Wait until its sshd answers, then the pid of the host's process 1."""
    ends = time.monotonic() + 20
    while time.monotonic() < ends:
        with contextlib.suppress(OSError), socket.create_connection((address, 22), timeout=1):
            return int(Path(f"/proc/{unshare}/task/{unshare}/children").read_text().split()[0])
        time.sleep(0.1)
    raise AssertionError(f"no sshd answers at {address}:22")


def _run(*command: str) -> None:
    subprocess.run(command, check=True)
