"""What nodes and checkouts install: the locks, and what bootstrap.sh hands to uv (a stand-in that records)."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from tests.support.paths import ROOT

RUN, DEV = "requirements.lock", "requirements-dev.lock"
BESIDE = ["cluster/build.lock", "cluster/head.lock", "cluster/tpu.lock", "docs/site/docs.lock"]
TOOLS = {"moto", "mypy", "pytest", "pytest-xdist", "ruff", "uv"}


@functools.cache
def pinned(name: str) -> set[str]:
    """`package==version` and its marker, for each line of a lock."""
    lines = (ROOT / name).read_text().splitlines()
    return {re.sub(r"\[[^]]*\]", "", line.removesuffix(" \\")) for line in lines if re.match(r"[a-z0-9]", line)}


def packages(name: str) -> set[str]:
    return {line.split("==")[0] for line in pinned(name)}


@pytest.mark.parametrize("name", [RUN, DEV, *BESIDE])
def test_every_package_has_its_version_and_its_hashes_and_no_address(name: str) -> None:
    text = (ROOT / name).read_text()
    entries = re.findall(r"^[a-z0-9].*(?:\n    --hash.*)*", text, re.MULTILINE)
    assert len(entries) == len(pinned(name)) > 1
    for entry in entries:
        assert re.match(r"[a-z0-9._-]+(\[[a-z,]+\])?==\S+", entry) and "--hash=sha256:" in entry, entry
    assert "://" not in text and "--index" not in text and "--find-links" not in text


def test_nodes_get_what_runs_and_a_checkout_the_same_and_the_tools() -> None:
    assert pinned(RUN) < pinned(DEV)
    assert packages(DEV) >= TOOLS and not packages(RUN) & TOOLS
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    own = project["project"]
    wanted = [*own["dependencies"], *own["optional-dependencies"]["train"], *project["dependency-groups"]["node"]]
    assert packages(RUN) >= {re.split(r"[\[><=!]", line)[0].replace("_", "-") for line in wanted}


@pytest.mark.parametrize("name", BESIDE)
def test_what_comes_on_top_moves_no_version(name: str) -> None:
    together = {line.split(" ;")[0] for line in pinned(DEV)}
    for line in pinned(name):
        assert line.split("==")[0] not in packages(DEV) or line.split(" ;")[0] in together, line


def test_no_file_of_the_cluster_installs_a_package_whose_hash_is_not_checked() -> None:
    files = [
        path
        for path in [*(ROOT / "cluster").rglob("*"), ROOT / "Makefile"]
        if path.suffix in {".yaml", ".sh", ".md", ""} and path.is_file()
    ]
    found = [line for path in files for line in path.read_text().replace("\\\n", " ").splitlines() if re.search(r"\bpip3? install\b", line)]
    assert len(found) > 5
    for line in found:
        assert "--require-hashes" in line or re.search(r"--no-deps --no-build-isolation -e \.|`pip install --no-deps", line), line


# ── bootstrap.sh ───────────────────────────────────────────────────────────────────────────────────────────────────


def checkout(folder: Path) -> Path:
    """A checkout with an environment whose commands record what they are asked."""
    made_of = (RUN, DEV, "pyproject.toml", "cluster/bootstrap.sh", "cluster/build.lock")
    (folder / "cluster").mkdir(parents=True)
    (folder / ".venv/bin").mkdir(parents=True)
    for name in made_of:
        shutil.copy(ROOT / name, folder / name)
    (folder / "bin").mkdir()
    for name in ("python", "uv", "simclr"):
        (folder / ".venv/bin" / name).write_text(f'#!/bin/sh\necho "{name} $*" >>"{folder}/calls"\n')
    for name in ("c++", "pkg-config", "python3.11", "rsync"):  # what the script looks for is there
        (folder / "bin" / name).write_text("#!/bin/sh\n")
    for path in (*(folder / ".venv/bin").iterdir(), *(folder / "bin").iterdir()):
        path.chmod(0o755)
    return folder


def bootstrap(folder: Path, *words: str, home: Path) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    (folder / "calls").write_text("")
    env = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "HOME": str(home)}
    done = subprocess.run(["sh", folder / "cluster/bootstrap.sh", *words], env=env, capture_output=True, text=True, timeout=60)
    return done, [line for line in (folder / "calls").read_text().splitlines() if line.startswith("uv pip install")]


def test_a_node_installs_one_lock_and_a_checkout_the_other(tmp_path: Path) -> None:
    folder = checkout(tmp_path / "simclr")
    asked = {}
    for words, lock in (((), DEV), (("node",), RUN)):
        done, asked[lock] = bootstrap(folder, *words, home=tmp_path)
        assert done.returncode == 0, done.stderr
        first, second = asked[lock]
        assert first.endswith(f"-r {lock}") and "--require-hashes" in first and "--build-constraint cluster/build.lock" in first
        # What has no wheel is built, that is: runs code of its own. These three do, and nothing else.
        assert "--only-binary :all:" in first and re.findall(r"--no-binary (\S+)", first) == ["ffcv", "fastargs", "assertpy"]
        assert second.endswith("--no-deps --no-build-isolation -e .")
        again, nothing = bootstrap(folder, *words, home=tmp_path)
        assert again.returncode == 0 and nothing == []


def test_a_shared_environment_of_the_other_lock_is_not_taken_for_ones_own(tmp_path: Path) -> None:
    made = checkout(tmp_path / "made")
    assert bootstrap(made, home=tmp_path)[0].returncode == 0
    node = checkout(tmp_path / "node")
    shutil.rmtree(node / ".venv")
    (node / ".venv").symlink_to(made / ".venv")
    done, _ = bootstrap(node, "node", home=tmp_path)
    assert done.returncode == 1 and "is of another lock" in done.stderr and "bootstrap.sh node where it was made" in done.stderr
    assert bootstrap(made, "node", home=tmp_path)[0].returncode == 0
    assert bootstrap(node, "node", home=tmp_path)[0].returncode == 0
