"""Paths of the repository and of its reference numbers."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
"""Reference numbers in the repository."""
SHARED = ROOT.parent / "shared"
"""Larger reference files, beside the checkout; tests that need them are skipped without it."""
