"""Where the house and its reference numbers are."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
"""Reference numbers that are kept here."""
SHARED = ROOT.parent / "shared"
"""Larger reference files, beside the checkout; tests that want them are skipped without it."""
