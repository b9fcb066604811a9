"""What ranks tell each other beside tensors: JSON, which runs nothing where it is read."""

from __future__ import annotations

import math
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from simclr import collectives
from simclr.collectives import every_ranks, from_rank_zero, rank
from tests.support.paths import ROOT
from tests.support.ranks import Ranks

_MINE = ["step-00012", {"host": "gpu-7", "ü": [1.5, None, True]}, ""]


def told(values: list[Any]) -> tuple[list[Any], Any]:
    return every_ranks(values[rank()]), from_rank_zero(values[0] if rank() == 0 else object())


@pytest.mark.parametrize("world", [1, 3])
def test_every_rank_gets_what_each_has_said(ranks: Ranks, world: int) -> None:
    """Values of other lengths on each rank. Rank 0 alone needs one for `from_rank_zero`."""
    assert ranks(world, told, _MINE) == [(_MINE[:world], _MINE[0])] * world


class Planted:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.write_text, (self.path, "it ran")


def attacked(path: str, payload: str, liar: int) -> list[str]:
    """The errors of this rank when the rank `liar` sends something else than JSON."""
    sent = {"pickle": pickle.dumps(Planted(Path(path))), "nothing": b"", "much": b"1" * (collectives._MOST_BYTES + 1)}[payload]
    written = collectives._written
    errors = []
    try:
        if rank() == liar:
            collectives._written = lambda value: torch.frombuffer(bytearray(sent), dtype=torch.uint8) if sent else torch.zeros(0).byte()
        for exchange in (every_ranks, from_rank_zero):
            try:
                exchange("step-00012")
            except RuntimeError as error:
                errors.append(str(error))
    finally:
        collectives._written = written
    return errors


@pytest.mark.parametrize(
    ("payload", "sentence"), [("pickle", "bytes that are no JSON"), ("much", "1,048,577 bytes"), ("nothing", " 0 bytes")]
)
def test_what_is_no_json_is_an_error_on_every_rank_and_never_runs(ranks: Ranks, tmp_path: Path, payload: str, sentence: str) -> None:
    for errors in ranks(2, attacked, str(tmp_path / "planted"), payload, 0):
        assert len(errors) == 2 and all(error.startswith("rank 0 sen") and sentence in error for error in errors), errors
    assert not (tmp_path / "planted").exists()


_ITSELF: list[Any] = []
_ITSELF.append(_ITSELF)
_NO_JSON = [("a", "tuple"), {1: "a number as key"}, Path("run"), b"bytes", math.nan, [math.nan], _ITSELF]


@pytest.mark.parametrize("value", _NO_JSON, ids=lambda value: str(value)[:12])
def test_what_json_does_not_give_back_is_refused_where_it_is_sent(value: Any) -> None:
    with pytest.raises(TypeError, match="JSON"):
        every_ranks(value)


def refused(values: list[Any], liar: int) -> list[str]:
    """The errors of this rank where only the rank `liar` has a value that is no JSON; then what a later exchange gives."""
    errors = []
    for value in values:
        for exchange in (every_ranks, from_rank_zero):
            try:
                exchange(value if rank() == liar else "step-00012")
            except (TypeError, RuntimeError) as error:
                errors.append(f"{type(error).__name__}: {error}")
    return [*errors, *every_ranks(str(rank()))]


@pytest.mark.parametrize("liar", [0, 1])
def test_one_ranks_value_that_is_no_json_is_an_error_on_every_rank(ranks: Ranks, liar: int) -> None:
    """The others would wait half an hour in the collective. Rank 0 alone has a value for `from_rank_zero`."""
    values = [*_NO_JSON[:2], _NO_JSON[4]]
    for me, told in enumerate(ranks(2, refused, values, liar)):
        *errors, zero, one = told
        assert (zero, one) == ("0", "1") and len(errors) == len(values) * (2 if liar == 0 else 1)
        for error in errors:
            assert error.startswith("TypeError: ") and "JSON" in error if me == liar else f"rank {liar} sends 0 bytes" in error, error


def test_no_code_unpickles_what_others_sent() -> None:
    """Torch's collectives of objects, and its loader without `weights_only`. Ray's own messages are behind its token."""
    loads = re.compile(r"_object_list\(|_object\(|pickle\.loads?\(|torch\.load\((?!.*weights_only=True)")
    paths = sorted(p for room in ("simclr", "pipelines", "tune") for p in (ROOT / room).rglob("*.py"))
    found = {line.strip() for path in paths for line in path.read_text().splitlines() if loads.search(line)}
    assert not {line for line in found if not re.search(r"\bclient\.\w+_object\(", line)}, found  # S3 has objects, too
