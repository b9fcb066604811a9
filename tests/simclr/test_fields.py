"""Values that stand in a file which a person may have edited."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from simclr import fields, files
from simclr.errors import UserError


@dataclass(frozen=True)
class Cup:
    name: str
    litres: float
    sides: tuple[int, ...] = ()
    marks: dict[str, float] | None = None


@pytest.mark.parametrize(
    ("value", "hint", "whether"),
    [
        (3, float, True),
        (3.0, int, False),
        (True, int, False),
        (float("nan"), float, False),
        (float("-inf"), float, False),
        pytest.param(10**400, float, False, id="huge"),
        (10**12, float, True),
        ([1, 2], tuple[int, ...], True),
        ([1, "2"], tuple[int, ...], False),
        ([1.0, 2.0], tuple[float, float, float], False),
        ({"a": 1}, dict[str, float], True),
        ({"a": "1"}, dict[str, float], False),
        ([{"a": 1}], list[dict[str, Any]], True),
        ("b", Literal["a", "b"], True),
        (None, int | None, True),
    ],
)
def test_what_fits_a_type(value: Any, hint: Any, whether: bool) -> None:
    assert fields.fits(value, hint) is whether


@pytest.mark.parametrize(
    ("stated", "sentence"),
    [
        ({"litres": 1}, "cup.json is damaged: it has no 'name'; buy another"),
        ({"name": "c", "litres": "much"}, "cup.json is damaged: litres is 'much', expected float; buy another"),
        ({"name": "c", "litres": 1, "lid": 1}, "cup.json has an unknown field 'lid'; buy another"),
    ],
)
def test_what_is_wrong_is_one_sentence(stated: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as refused:
        fields.build(Cup, stated, "cup.json", "buy another")
    assert str(refused.value) == sentence


def test_lists_become_tuples_and_what_is_given_need_not_be_stated() -> None:
    made = fields.build(Cup, {"litres": 1, "sides": [1, 2], "marks": {"a": 1}}, "cup.json", "buy another", name="c")
    assert made == Cup("c", 1, (1, 2), {"a": 1})


@pytest.mark.parametrize(
    ("content", "what"),
    [(b'{"a":', "no JSON"), (b"\xff\xfe", "byte 0 is no UTF-8"), (b"[1]", "no JSON object"), (b"[" * 99_999, "no JSON")],
)
def test_a_file_that_is_no_json_is_one_sentence(tmp_path: Path, content: bytes, what: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"a.json is damaged: .*{what}.*; write it again"):
        files.read_json(path, "write it again")
