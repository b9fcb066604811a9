"""The image: what its Dockerfile says, without Docker."""

from __future__ import annotations

import re
import shlex

from tests.support.paths import ROOT


def steps(name: str) -> list[tuple[str, str]]:
    """(instruction, its words) of a Dockerfile, in order."""
    text = re.sub(r"^#.*\n", "", (ROOT / name).read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def copied() -> list[str]:
    return [word for kind, words in steps("Dockerfile") if kind == "COPY" for word in words.split()[:-1]]


def test_what_is_copied_is_there_and_what_the_set_up_reads_is_copied() -> None:
    assert all((ROOT / path).exists() for path in copied())
    script = (ROOT / "cluster/bootstrap.sh").read_text()
    (wanted,) = re.findall(r"^wanted=\$\(cat (.+?) \|", script, re.MULTILINE)
    assert {word for word in wanted.split() if word != "$lock"} <= set(copied()) and "requirements.lock" in copied()


def test_the_context_holds_that_and_not_the_checkout() -> None:
    """The last pattern that fits a path decides."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    kept = {path for line in lines if line.startswith("!") for path in ROOT.glob(line[1:])}
    assert {ROOT / path for path in copied()} <= kept
    assert not {ROOT / ".venv", ROOT / ".git", ROOT / "docs"} & kept


def test_the_base_is_an_argument_and_the_demo_runs_as_a_user() -> None:
    found = steps("Dockerfile")
    kinds = [kind for kind, _ in found]
    assert found[:3] == [("ARG", "BASE=ubuntu:24.04"), ("FROM", "${BASE}"), ("ARG", "BASE")] and kinds.count("FROM") == 1
    assert found[-2:] == [("USER", "1000"), ("CMD", '["simclr", "demo"]')]
    assert ("ENV", "SIMCLR_BASE=${BASE}") in found
    assert not re.search(r"https?://|index-url|find-links", (ROOT / "Dockerfile").read_text())
    for kind, words in found:
        if kind == "RUN":
            shlex.split(words)
            assert "pip install" not in words  # the set-up installs by the lock
