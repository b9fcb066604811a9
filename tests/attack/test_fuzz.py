"""Hostile files end in a sentence: no signal, no hang, no traceback, no gigabytes. `make test-attack` runs this in minutes."""

from __future__ import annotations

import pytest

from tests.attack import fuzz

pytestmark = pytest.mark.attack


def test_the_driver_sees_every_bad_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "_PATIENCE", 0.5)
    found = fuzz.attack("doomed", 7, 0)
    assert [outcome.end for outcome in found] == ["used", "sentence", "traceback", "signal", "hang", "used", "used"]
    assert [outcome.right for outcome in found] == [True, True, False, False, False, False, True]  # the last but one took 2.5 GiB
    assert found[5].peak > 5 << 29 and found[6].peak < fuzz.MOST_BYTES and "KeyError" in found[2].text


@pytest.mark.parametrize("kind", fuzz.COUNTS)
def test_hostile_files_end_in_a_sentence(kind: str) -> None:
    found = fuzz.attack(kind, fuzz.COUNTS[kind], seed=0)
    print(f"\n{fuzz.row(kind, found)}")
    assert len(found) == fuzz.COUNTS[kind] and "used" in {outcome.end for outcome in found}
    wrong = [outcome for outcome in found if not outcome.right]
    assert not wrong, f"{len(wrong)} of {len(found)}, the first: {wrong[0].name}, {wrong[0].seconds:.1f} s, {wrong[0].peak >> 20} MiB"
