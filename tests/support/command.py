"""Commands as a user gives them."""

from __future__ import annotations

import re
from collections.abc import Callable

Run = Callable[..., tuple[int, str, str]]


def refused(result: tuple[int, str, str], *sentence: str) -> None:
    """Exit code 2 and one sentence with each part in it: ours, or one in the box that the parser of flags prints."""
    code, _, text = result
    assert code == 2 and "Traceback" not in text, text
    lines = [line for line in text.strip().splitlines() if line.startswith("simclr: ")]
    if "╭" in text:
        lines = [" ".join(line.strip("│ ") for line in text.splitlines() if line.startswith("│"))]
    assert len(lines) == 1, text
    for part in sentence:
        assert re.search(part, lines[0]), f"{part!r} is not in: {lines[0]}"
