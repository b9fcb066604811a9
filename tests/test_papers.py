"""The pages: what they link to, name and tell the reader to type is there."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import yaml

from pipelines.cli import COMMANDS
from pipelines.commands import bench
from tests.support.paths import ROOT

# CHANGELOG.md is history: it may name what is gone, but not link to it.
HISTORY = ROOT / "CHANGELOG.md"
PAGES = [
    *(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "cluster").glob("*.md")),
    *(ROOT / "tests" / name / "README.md" for name in ("benchmarks", "golden")),
]
every_page = pytest.mark.parametrize("page", [*PAGES, HISTORY], ids=lambda page: str(page.relative_to(ROOT)))
every_page_of_today = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))

LINK = re.compile(r"\]\(([^)\s]+)\)")
# A path from the root of the checkout; neither /mnt/simclr/… nor ~/simclr/… nor s3://… .
PATH = re.compile(r"(?<![\w/.~$:-])(?:simclr|pipelines|tune|cluster|tests|docs|\.ci|\.github)/[\w./*-]*[\w/*]")
COMMAND = re.compile(r"(?<![\w/.-])simclr ([a-z]+)(?: ([a-z]+))?")


def code(text: str) -> Iterator[str]:
    """Fenced blocks and code spans."""
    blocks = re.findall(r"^```.*?^```", text, re.MULTILINE | re.DOTALL)
    yield from blocks
    yield from re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in slugs(there), f"{page.name} links to {target}; {there.name} has no such heading"


@every_page_of_today
def test_every_path_is_there(page: Path) -> None:
    for path in PATH.findall(page.read_text()):
        assert any(ROOT.glob(path)) if "*" in path else (ROOT / path).exists(), f"{page.name} names {path}"


@every_page_of_today
def test_every_command_is_one(page: Path) -> None:
    benches = {"all", *get_args(bench.Alone), *get_args(bench.Shards)}
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for text in code(page.read_text()):
        for name, then in COMMAND.findall(text):
            assert name in COMMANDS, f"{page.name} says `simclr {name}`"
            assert name != "bench" or not then or then in benches, f"{page.name} says `simclr bench {then}`"
        for target in re.findall(r"(?<![\w-])make ([a-z][\w-]*)", text):
            assert target in targets, f"{page.name} says `make {target}`"


def test_the_pages_have_what_is_looked_for() -> None:
    """A pattern that found nothing would let every page pass."""
    texts = [page.read_text() for page in PAGES]
    commands = {name for text in texts for part in code(text) for name, _ in COMMAND.findall(part)}
    assert len(PAGES) > 10 and sum(len(LINK.findall(text)) for text in texts) > 30 and sum(len(PATH.findall(text)) for text in texts) > 50
    assert {"prepare", "pretrain", "evaluate", "sweep", "bench"} <= commands


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_readme_leads_to_every_page() -> None:
    links = {(ROOT / target.partition("#")[0]).resolve() for target in LINK.findall((ROOT / "README.md").read_text())}
    assert set((ROOT / "docs").glob("*.md")) <= links


def test_the_rooms_are_those_of_the_tree() -> None:
    """Every folder with code has its row in ARCHITECTURE.md, and what a row names is in its folder."""
    rows = re.findall(r"^\| `([\w./]+/)` \| (.+) \|$", (ROOT / "ARCHITECTURE.md").read_text(), re.MULTILINE)
    rooms = {room.rstrip("/") for room, _ in rows}
    assert len(rows) > 20 and sum(len(re.findall(r"`(\w+\.py)`", text)) for _, text in rows) > 20
    code = {path.parent.relative_to(ROOT) for room in ("simclr", "pipelines", "tune") for path in (ROOT / room).rglob("*.py")}
    assert {str(folder) for folder in code} <= rooms
    for room, text in rows:
        assert (ROOT / room).is_dir(), room
        for name in re.findall(r"`(\w+\.py)`", text):
            assert (ROOT / room / name).is_file(), f"{room} has no {name}"


def test_the_licence_is_one_and_travels_with_the_package() -> None:
    """A node builds the package from the files that it is given: without the README it cannot, without LICENSE it has none."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert project["license"] == citation["license"] == "Apache-2.0"
    assert str(project["version"]) == str(citation["version"])
    assert project["authors"] == citation["authors"]
    named = {project["readme"], *project["license-files"]}
    assert all((ROOT / name).is_file() for name in named)
    for path in (ROOT / "cluster").glob("*.yaml"):
        mounts = yaml.safe_load(path.read_text().replace("!", "")).get("file_mounts")
        assert mounts is None or named <= set(mounts.values()), path.name
    (copied,) = re.findall(r"^COPY (requirements\.lock .*) \./$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert named <= set(copied.split())
