"""A node's environment in S3: kept once and whole, fetched by others, and never what somebody else wrote there."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.test_locks import RUN, checkout, packages
from tests.support.paths import ROOT
from tests.support.s3 import Proxy

spec = importlib.util.spec_from_file_location("environment", ROOT / "cluster/environment.py")
assert spec is not None and spec.loader is not None
environment: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(environment)


def made(folder: Path, text: str = "#!/bin/sh\n") -> Path:
    """An environment with what a tar may lose: a link, a mode, an empty folder."""
    (folder / "bin").mkdir(parents=True)
    (folder / "empty").mkdir()
    (folder / "bin/simclr").write_text(text)
    (folder / "bin/simclr").chmod(0o755)
    (folder / "bin/python").symlink_to("/usr/bin/python3")
    return folder


def content(folder: Path) -> dict[str, tuple[int, str]]:
    def of(path: Path) -> str:
        return str(path.readlink()) if path.is_symlink() else "" if path.is_dir() else path.read_text()

    return {str(path.relative_to(folder)): (path.lstat().st_mode, of(path)) for path in folder.rglob("*")}


def test_what_one_node_keeps_another_fetches(s3: Proxy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    address = "s3://photos/environments-1"
    kept, fetched = made(tmp_path / "a/.venv"), tmp_path / "b/.venv"
    made(fetched, "what was here before")
    assert environment.main("fetch", address, "key", str(fetched)) == environment.NONE_YET
    assert environment.main("keep", address, "key", str(kept)) == 0
    assert environment.main("fetch", address, "key", str(fetched)) == 0
    assert content(fetched) == content(kept)
    assert [*fetched.parent.iterdir()] == [fetched] and [*kept.parent.iterdir()] == [kept]
    assert environment.main("fetch", address, "another lock", str(fetched)) == environment.NONE_YET
    assert "ready in" in capsys.readouterr().err


def test_two_that_keep_at_once_leave_one_whole_environment(s3: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both find none there, and upload; the note of the first stands."""
    address, first, second = "s3://photos/environments-2", made(tmp_path / "a/c", "first"), made(tmp_path / "b/c", "second")
    assert environment.main("keep", address, "key", str(first)) == 0
    with monkeypatch.context() as patch:
        patch.setattr(environment.Shelf, "note", lambda shelf, key: None)
        assert environment.main("keep", address, "key", str(second)) == 0
    assert environment.main("fetch", address, "key", str(tmp_path / "c")) == 0
    assert (tmp_path / "c/bin/simclr").read_text() == "first"


def test_a_damaged_archive_is_not_unpacked(s3: Proxy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    address = "s3://photos/environments-3"
    kept = made(tmp_path / "a/.venv")
    assert environment.main("keep", address, "key", str(kept)) == 0
    shelf = environment.Shelf(address)
    shelf.client.put_object(Bucket="photos", Key=shelf.note("key")["object"], Body=b"something else")
    before = content(kept)
    assert environment.main("fetch", address, "key", str(kept)) == 1
    assert content(kept) == before and [*kept.parent.iterdir()] == [kept]
    assert re.search(
        r"\.venv is not fetched from s3://photos/environments-3: .* has the hash \w{64}, expected \w{64}", capsys.readouterr().err
    )


def test_a_store_that_refuses_is_said_and_is_no_end(s3: Proxy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert environment.main("keep", "s3://nobodys/environments", "key", str(made(tmp_path / ".venv"))) == 1
    assert ".venv is not kept at s3://nobodys/environments: " in capsys.readouterr().err


def test_a_bucket_of_another_account_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request names the account whose bucket it must be; that S3 then refuses is Amazon's promise."""
    from moto import mock_aws

    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    with mock_aws():
        assert environment.Shelf("s3://photos/environments").own == {"ExpectedBucketOwner": "123456789012"}


# ── bootstrap.sh ───────────────────────────────────────────────────────────────────────────────────────────────────

PYTHON = """#!/bin/sh
if [ "$1 $2" = "-m venv" ]; then
    mkdir -p "$4/bin"
    cp "$0" "$4/bin/python"
    exit
fi
echo "$(basename "$(dirname "$(dirname "$0")")") $*" >>"$CALLS"
case "$*" in
    *"environment.py fetch"*) [ -n "$KEPT" ] || exit 3; cp -r "$KEPT" "$5" ;;
    *"pip install"*) cat "$(dirname "$(dirname "$0")")/boto3.lock" >>"$CALLS.lock" ;;
esac
"""


def node(folder: Path, *words: str, kept: Path | None = None) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """(the end of bootstrap.sh, what it asked of the environments' Python and of uv)."""
    calls = folder / "calls"
    calls.write_text("")
    (folder / "bin/python3.11").write_text(PYTHON)
    (folder / "bin/zstd").write_text("#!/bin/sh\n")
    (folder / "bin/zstd").chmod(0o755)
    env = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "HOME": str(folder), "CALLS": str(calls), "KEPT": str(kept or "")}
    done = subprocess.run(["sh", folder / "cluster/bootstrap.sh", *words], env=env, capture_output=True, text=True, timeout=60)
    return done, [line for line in calls.read_text().splitlines() if "environment.py" in line or "uv pip install" in line]


def test_a_node_fetches_and_installs_only_what_nobody_has_kept(tmp_path: Path) -> None:
    folder, address = checkout(tmp_path / "simclr"), "s3://photos/environments"
    done, calls = node(folder, "node", address)
    assert done.returncode == 0, done.stderr
    assert calls[0].startswith(f".fetch cluster/environment.py fetch {address} ")
    assert any("uv pip install" in line and f"-r {RUN}" in line for line in calls) and not (folder / ".fetch").exists()
    installed = folder / ".venv"
    # Of the whole lock it takes boto3 and what that needs, with their hashes.
    lock = (folder / "calls.lock").read_text()
    needed, found = ["boto3"], set[str]()
    while needed:
        name = needed.pop()
        found.add(name)
        needed += {re.split(r"[\s<>=!\[;(]", line)[0] for line in importlib.metadata.requires(name) or [] if "extra ==" not in line} - found
    assert {line.split("==")[0] for line in lock.splitlines() if "==" in line} == found <= packages(RUN)
    assert lock.count("--hash=sha256:") >= len(found)
    # The head keeps it, under the key that it was asked for.
    done, kept = node(folder, "keep", address)
    assert done.returncode == 0, done.stderr
    (fetch,) = (line.split() for line in calls if "environment.py fetch" in line)
    (keep,) = (line.split() for line in kept if "environment.py keep" in line)
    assert keep[-2] == fetch[-2] and re.fullmatch(r"[0-9a-f]{64}", keep[-2])
    # A second node of this path and lock takes that, and installs nothing.
    installed.rename(tmp_path / "kept")
    done, calls = node(folder, "node", address, kept=tmp_path / "kept")
    assert done.returncode == 0 and ["environment.py fetch" in line for line in calls] == [True], done.stderr
    done, calls = node(folder, "node", address)  # and a second run asks nobody
    assert done.returncode == 0 and not calls


def test_the_key_is_another_one_for_another_lock_or_path(tmp_path: Path) -> None:
    def key(folder: Path) -> str:
        (fetch,) = (line.split() for line in node(folder, "node", "s3://photos/environments")[1] if "environment.py fetch" in line)
        return fetch[-2]

    first, other = checkout(tmp_path / "a"), checkout(tmp_path / "b")
    keys = [key(first), key(other)]
    for folder in (first, other):
        (folder / ".venv/installed").unlink()
    (first / RUN).write_text((first / RUN).read_text() + "# another\n")
    assert len({*keys, key(first)}) == 3 and key(other) == keys[1]


def test_nothing_is_kept_where_nothing_is_installed(tmp_path: Path) -> None:
    done, calls = node(checkout(tmp_path / "simclr"), "keep", "s3://photos/environments")
    assert done.returncode == 1 and "there is no environment" in done.stderr and not calls
