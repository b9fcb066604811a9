"""A way to break the code."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mutation:
    """One way to break the code: `old`, which stands in `file` exactly once, becomes `new`."""

    name: str
    file: str
    old: str
    new: str
    tests: str
    """What must notice, as pytest takes it: files or tests, with spaces between them."""

    def applied(self, text: str) -> str:
        """The broken text of the file. Raises AssertionError where `old` does not stand there once."""
        assert text.count(self.old) == 1, f"{self.name}: {self.file} has {self.old!r} {text.count(self.old)} times, expected once"
        return text.replace(self.old, self.new)
