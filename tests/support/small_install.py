"""A program: commands in a process that finds no library but those of the small install, as if pip had brought nothing else.

`python -m tests.support.small_install 'COMMAND WORD …' …` prints for each its exit code and what it printed, as lines of JSON.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import re
import shlex
import sys
import tomllib
from typing import Any

from tests.support.paths import ROOT

OURS = {"simclr", "pipelines", "tune", "tests"}


def distributions() -> set[str]:
    """The small install by pyproject.toml: its dependencies, and theirs, without any extra."""
    found: set[str] = set()
    ahead = list(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])
    while ahead:
        line = ahead.pop()
        name = re.sub(r"[-_.]+", "-", re.split(r"[\s\[(><=!~;]", line)[0]).lower()
        if name in found or "extra ==" in line:
            continue
        found.add(name)
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # of another platform
            ahead += importlib.metadata.requires(name) or []
    return found


def modules() -> set[str]:
    named = importlib.metadata.packages_distributions()
    small = distributions()
    return {module for module, whose in named.items() if {re.sub(r"[-_.]+", "-", name).lower() for name in whose} & small}


class _Small:
    """A finder that finds nothing beyond the small install."""

    def __init__(self, finder: Any, allowed: set[str]) -> None:
        self.finder, self.allowed = finder, allowed

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        top = name.partition(".")[0]
        return self.finder.find_spec(name, path, target) if top in self.allowed or top.startswith("_sysconfigdata") else None


def main() -> None:
    allowed = modules() | OURS | set(sys.stdlib_module_names)
    sys.meta_path[:] = [_Small(finder, allowed) for finder in sys.meta_path]
    from pipelines import cli

    for words in sys.argv[1:]:
        out, err, code = io.StringIO(), io.StringIO(), 0
        sys.argv = ["simclr", *shlex.split(words)]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                cli.main()
            except SystemExit as end:
                code = int(end.code or 0)
        print(json.dumps({"words": words, "code": code, "out": out.getvalue(), "err": err.getvalue()}), flush=True)


if __name__ == "__main__":
    main()
