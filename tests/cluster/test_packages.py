"""How bootstrap.sh installs system packages: the real apt-get, on folders of its own, whose locks another process holds; and gcsfuse."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

HOLDER = """
import fcntl, sys
held = open(sys.argv[1], "w")
fcntl.lockf(held, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""
# Where apt's locks lie below its folder.
LOCKS = ("dpkg/lock-frontend", "lists/lock", "cache/archives/lock")


def world(folder: Path) -> dict[str, str]:
    """The environment of an apt-get that has its own folders, one repository with one package, and downloads it only."""
    for name in ("dpkg", "lists/partial", "cache/archives/partial", "etc", "packages", "bin"):
        (folder / name).mkdir(parents=True)
    (folder / "dpkg/status").touch()
    deb = folder / "packages/absent_1_all.deb"
    deb.write_bytes(b"not looked into")
    digest = hashlib.sha256(deb.read_bytes()).hexdigest()
    (folder / "packages/Packages").write_text(
        "Package: absent\nVersion: 1\nArchitecture: all\nMaintainer: Nobody <nobody@example.org>\nDescription: no package\n"
        f"Filename: ./absent_1_all.deb\nSize: {deb.stat().st_size}\nSHA256: {digest}\n"
    )
    (folder / "etc/sources.list").write_text(f"deb [trusted=yes] copy:{folder}/packages ./\n")
    settings = {
        "Dir::State": folder, "Dir::State::lists": folder / "lists", "Dir::State::status": folder / "dpkg/status",
        "Dir::Cache": folder / "cache", "Dir::Etc::sourcelist": folder / "etc/sources.list", "Dir::Etc::sourceparts": folder / "etc/none",
        "APT::Get::Download-Only": "true", "APT::Sandbox::User": "",
    }  # fmt: skip
    (folder / "apt.conf").write_text("".join(f'{name} "{value}";\n' for name, value in settings.items()))
    # These folders are this user's, so there is no sudo; and it asks again at once.
    for name, text in {"id": "echo 0", "sleep": "exec /bin/sleep 0.1"}.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / "bin" / name).chmod(0o755)
    return os.environ | {"APT_CONFIG": str(folder / "apt.conf"), "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}


def install(environment: dict[str, str]) -> subprocess.Popen[str]:
    command = ["sh", str(ROOT / "cluster/bootstrap.sh"), "packages", "absent"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="needs apt-get")
def test_a_lock_of_apts_is_waited_for_and_said(tmp_path: Path) -> None:
    """All three locks that a fresh machine's own updates hold, in the order in which the script meets them."""
    environment = world(tmp_path)
    holders = {}
    for name in LOCKS:
        holders[name] = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / name], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert holders[name].stdout.readline() == b"held\n"  # type: ignore[union-attr]
    installing, said = install(environment), list[str]()
    assert installing.stdout is not None
    try:
        for line in installing.stdout:
            said.append(line)
            waits = f"waiting for another program that installs packages, 15 minutes at most: {tmp_path}/"
            for name in [name for name in holders if f"{waits}{name}. It is held by process {holders[name].pid}" in line]:
                holders.pop(name).communicate()
        assert installing.wait(60) == 0, said
    finally:
        installing.kill()
        for holder in holders.values():
            holder.kill()
    assert not holders and len([line for line in said if "waiting" in line]) == len(LOCKS), said
    assert (tmp_path / "cache/archives/absent_1_all.deb").exists()


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="needs apt-get")
def test_what_is_no_lock_ends_at_once(tmp_path: Path) -> None:
    environment = world(tmp_path)
    (tmp_path / "packages/absent_1_all.deb").unlink()
    output = install(environment).communicate(timeout=60)[0]
    assert "apt could not install them" in output and "absent_1_all.deb" in output and "waiting" not in output
